"""A user's own table and its images to shards: paths, zips, tars, images in Parquet, labels, equal images."""

import json
import re
import zipfile
from collections import defaultdict

import numpy as np
import pytest
from conftest import call_script, forget, read_tars, tree, write_tar
from miniature import held_out, make_image
from test_own import write_table

from tic_clip.data.lists import OwnOptions
from tic_clip.data.pack import PackOptions, create_tars
from tic_clip.data.pairs import create_own_splits
from tic_clip.data.tables import Columns
from tic_clip.data.uids import make_uid
from tic_clip.data.verify import verify
from tic_clip.evaluation.data import read_images, read_set
from tic_clip.evaluation.tasks import find_tasks
from tic_clip.storage import read_json

SCRIPTS = "dataset_creation"
COLUMNS = {"image": "file", "caption": "text", "date": "taken"}
ROWS = [
    {"file": f"{('cats', 'dogs', 'owls')[i % 3]}/{i // 3}.jpg", "text": f"text {i}", "taken": f"{2014 + i % 2}"}
    for i in range(60)
]
for row in ROWS:
    row["kind"] = row["file"].split("/")[0]


def key_of(row):
    return row["file"].removesuffix(".jpg")


@pytest.fixture
def pack(tmp_path):
    """Make the lists of rows and pack them; returns {folder below DATA/tic/mine/yearly: {key: members}}."""

    def call(rows=ROWS, out="data", label="", images="images", **settings):
        forget()
        table = write_table(tmp_path / "t.csv", rows)
        options = {"output_path": str(tmp_path / "lists"), "name": "mine", "every": "year", "test_share": 0.5}
        columns, options = Columns(**COLUMNS, label=label), OwnOptions(**options, overwrite=True)
        create_own_splits([str(table)], columns, options)
        folders = (str(tmp_path / name) for name in ("lists", images, out))
        call.splits, call.dropped = create_tars(*folders, PackOptions(**settings))
        return packed(tmp_path / out)

    return call


def packed(data):
    """{folder: {key: members}} of the splits of a benchmark."""
    root, found = data / "tic/mine/yearly", {}
    for folder in sorted({path.parent for path in root.rglob("00*.tar")}):
        found[str(folder.relative_to(root))] = {json.loads(one["json"])["key"]: one for _, one in read_tars(folder)}
    return found


def save(folder, rows=ROWS):
    for row in rows:
        path = folder / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(row["file"]))


def test_files_zips_and_tars(tmp_path, pack):
    """A path in an archive may begin with folders that the table does not name; dogs/7.jpg is not owls/7.jpg."""
    rows = [row for row in ROWS if row["file"] not in ("owls/7.jpg", "cats/3.jpg")]
    save(tmp_path / "images", rows)
    found = pack(rows)
    folders = {f"{kind}/{year}" for kind in ("train", "eval/retrieval") for year in (2014, 2015)}
    assert set(found) == folders
    for row in rows:
        folder = f"{'eval/retrieval' if held_out('mine', key_of(row), 0.5) else 'train'}/{row['taken']}"
        assert found[folder][key_of(row)]["jpg"] == make_image(row["file"])
    for folder in folders:
        assert list(verify(str(tmp_path / "data/tic/mine/yearly" / folder))) == []
    (tmp_path / "archives").mkdir()
    save(tmp_path / "archives", rows[:10])
    with zipfile.ZipFile(tmp_path / "archives/z.zip", "w") as archive:
        for row in rows[10:30]:
            archive.writestr(f"all/of/{row['file']}", make_image(row["file"]))
    members = {f"./pool/{row['file']}": make_image(row["file"]) for row in rows[30:]}
    write_tar(tmp_path / "archives/t.tar", [*members.items(), ("./notes.txt", b"of no interest")])
    assert pack(ROWS, "again", images="archives", num_workers=2) == found
    assert dict(pack.dropped) == {"no image file": 2}
    paths = (tmp_path / "again/tic/mine/yearly/benchmark.yaml", tmp_path / "lists/benchmark.yaml")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(find_tasks("tic/mine/retrieval/yearly", str(tmp_path / "again"))) == 2


def test_shards_in_the_folder_of_the_images_are_not_images(tmp_path, pack):
    save(tmp_path)
    found = pack(out=".", images=".")
    assert pack(out=".", images=".", overwrite=True) == found


def cut_and_pack(folder, table, rows, images="IMAGES"):
    """Cut a Parquet table and run the command that is printed then; {key: image} of all splits, and what it prints."""
    (folder / "in").mkdir(exist_ok=True)
    write_table(folder / "in" / table, rows)
    columns = [part for name, column in COLUMNS.items() for part in (f"--{name}", column)]
    flags = ("--name", "mine", "--every", "year", "--output-path", "lists", "--test-share", "0.5")
    *_, command = call_script(f"{SCRIPTS}/create_splits.py", "in", *columns, *flags, cwd=folder).stdout.splitlines()
    assert command.startswith(f"next: python {SCRIPTS}/create_tars.py --csv-path lists --image-path {images} ")
    done = call_script(*command.replace("IMAGES", "in").split()[2:], cwd=folder)
    splits = packed(folder / "data").values()
    return {key: members["jpg"] for split in splits for key, members in split.items()}, done.stdout


def test_the_tars_of_img2dataset(tmp_path):
    keys, status = [f"{i:09d}" for i in range(9)], ["failed_to_download"] + ["success"] * 8
    (tmp_path / "in").mkdir()
    members = [(f"{key}.{end}", make_image(key)) for key in keys[1:] for end in ("jpg", "txt")]
    write_tar(tmp_path / "in/00000.tar", members)
    (tmp_path / "in/00000_stats.json").touch()
    rows = [{"file": key, "text": key, "status": of, "taken": 2014} for key, of in zip(keys, status, strict=True)]
    found, _ = cut_and_pack(tmp_path, "00000.parquet", rows)
    assert found == {key: make_image(key) for key in keys[1:]}
    assert read_json(tmp_path / "lists/manifest.json")["dropped"] == {"not downloaded": 1}


def test_images_in_parquet(tmp_path):
    images = [*(make_image(f"{i}") for i in range(9)), b"no"]
    rows = [{"file": {"bytes": data, "path": None}, "text": "t", "taken": 2014} for data in images]
    found, printed = cut_and_pack(tmp_path, "t.parquet", rows, "lists/images")
    assert found == {f"t.parquet/{i + 1}": data for i, data in enumerate(images[:9])}
    assert printed.endswith("dropped: 1 not an image\n")


def test_a_test_image_that_is_in_a_training_set_is_left_out(tmp_path, pack):
    """Whatever its step; also where the training sets are there already. What is in two test sets stays in both."""
    trained = [row for row in ROWS if not held_out("mine", key_of(row), 0.5)]
    tested = [row for row in ROWS if held_out("mine", key_of(row), 0.5)]
    first, second = (next(row for row in tested if row["taken"] == year) for year in ("2014", "2015"))
    tested = [first, second, *(row for row in tested if row not in (first, second))]
    save(tmp_path / "images")
    for row, other in ((tested[0], trained[0]), (tested[1], trained[0]), (tested[2], tested[3])):
        (tmp_path / "images" / row["file"]).write_bytes(make_image(other["file"]))
    found = pack()
    left = {key for folder, samples in found.items() if "eval" in folder for key in samples}
    assert left == {key_of(row) for row in tested[2:]}
    assert dict(pack.dropped) == {"test image that is also in train": 2}
    meta = json.loads((tmp_path / "data/tic/mine/yearly/eval/retrieval/2014/meta.json").read_text())
    assert meta["dropped"] == {"test image that is also in train": 1}
    for year in ("2014", "2015"):
        (tmp_path / f"data/tic/mine/yearly/eval/retrieval/{year}/meta.json").unlink()
        (tmp_path / f"data/tic/mine/yearly/eval/retrieval/{year}/00000000.tar").unlink()
    before = tree(tmp_path / "data/tic/mine/yearly/train")
    assert pack() == found
    assert tree(tmp_path / "data/tic/mine/yearly/train") == before


def test_labels_become_classification(tmp_path, pack):
    """Class ids are those of the sorted names; of each class the first images by UID; what is missing is said."""
    rows = [{**row, "kind": "" if row["file"] == "cats/0.jpg" else row["kind"]} for row in ROWS]
    rows = [row for row in rows if row["kind"] != "owls" or row["taken"] == "2015"]
    save(tmp_path / "images")
    pack(rows, label="kind", max_per_class=3, templates=("a drawing of {c}.",))
    root = tmp_path / "data/tic/mine/yearly"
    notes = {split.path.removeprefix(f"{root}/"): split.note for split in pack.splits if split.note}
    assert notes == {"eval/labels/2014": "2 of 3 classes", "eval/labels/2015": "3 of 3 classes"}
    for year in ("2014", "2015"):
        found = read_set(str(root / "eval/labels" / year), {"classification"})
        assert found.classes == (("cats", "dogs", "owls"), ("a drawing of {c}.",))
        expected = defaultdict(list)
        for row in sorted(rows, key=lambda row: make_uid(f"mine/{key_of(row)}")):
            if held_out("mine", key_of(row), 0.5) and row["taken"] == year and row["kind"]:
                expected[("cats", "dogs", "owls").index(row["kind"])].append(make_image(row["file"]))
        assert max(map(len, expected.values())) > 3
        images = defaultdict(list)
        for sample, data in zip(found.samples, read_images(found.samples), strict=True):
            images[sample.label].append(data)
        assert images == {label: data[:3] for label, data in expected.items()}
        assert (root / f"eval/labels/{year}/dataset_type.txt").read_text() == "classification\n"
        assert list(verify(str(root / f"eval/labels/{year}"))) == []
    assert len(np.load(root / "classes.npy")) == sum(
        len(np.load(root / f"uids/eval/labels/{y}.npy")) for y in (2014, 2015)
    )
    assert len(find_tasks("tic/mine/labels/yearly", str(tmp_path / "data"))) == 2
    before = tree(root)
    pack(rows, label="kind", max_per_class=3, templates=("a drawing of {c}.",), num_workers=2)
    assert all(split.reused for split in pack.splits)
    assert tree(root) == before
    later = [{**row, "file": f"{i}.jpg", "taken": "2016", "kind": "apes"} for i, row in enumerate(rows[:20])]
    save(tmp_path / "images", later)
    pack([*rows, *later], label="kind", max_per_class=3, templates=("a drawing of {c}.",))
    reused = {split.path.removeprefix(f"{root}/") for split in pack.splits if split.reused}
    assert reused == {f"{kind}/{year}" for kind in ("train", "eval/retrieval") for year in ("2014", "2015")}
    found = read_set(str(root / "eval/labels/2015"), {"classification"})
    assert (found.classes[0], {sample.label for sample in found.samples}) == (
        ("apes", "cats", "dogs", "owls"),
        {1, 2, 3},
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"templates": ["a photo"]}, "--template 'a photo' must have {c} once"),
        ({"templates": ["a {c} of {d}"]}, "--template 'a {c} of {d}' must have {c} once"),
        ({"max_per_class": 0}, "--max-per-class must be at least 1, not 0"),
    ],
)
def test_bad_flags(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackOptions(**setting)


def test_names_with_dots_in_a_tar_links_in_circles_and_names_too_long_for_a_file(tmp_path, pack):
    rows = [{**ROWS[0], "file": f"x/{i}.40.jpg", "text": f"{i}", "taken": str(2014 + i % 2)} for i in range(20)]
    (tmp_path / "images").mkdir()
    write_tar(tmp_path / "images/t.tar", [(f"a.b/{row['file']}", make_image(row["file"])) for row in rows])
    for name in ("me", "me2"):
        (tmp_path / "images" / name).symlink_to(".")
    found = pack([*rows, {**rows[0], "file": f"{'y' * 300}.jpg"}])
    assert {key for members in found.values() for key in members} == {f"x/{i}.40" for i in range(20)}
    assert dict(pack.dropped) == {"no image file": 1}
