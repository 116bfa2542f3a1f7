"""TiC-Emoji, built twice and read back with Python's own tarfile and with PIL."""

import hashlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import call_script, read_tars, times, tree
from PIL import Image

from tic_clip.data.uids import CLASS_ROW, UID, format_uids

SCRIPT = Path(__file__).parents[2] / "dataset_creation/tic-emoji/create_pool.py"
STEPS = {"2014": 858, "2015": 776, "2016": 755, "2017-2018": 400, "2019": 398, "2020": 334, "2021-2025": 432}


def load_script():
    spec = importlib.util.spec_from_file_location("emoji_create_pool", SCRIPT)
    module = sys.modules["emoji_create_pool"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


create_pool = load_script()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "data/emoji"
    create_pool.create_pool(folder)
    return folder


@pytest.fixture(scope="module")
def samples(built):
    """UID to (caption, record, PNG) as tarfile reads them; members of a sample follow each other."""
    found = {}
    for key, members in read_tars(built / "pool"):
        record = json.loads(members["json"])
        assert (record["key"], list(members)) == (key, ["png", "json", "txt"])
        found[record["uid"]] = (members["txt"].decode(), record, members["png"])
    return found


def read_uids(path):
    rows = np.load(path)
    assert rows.dtype == UID
    return format_uids(rows)


def test_pool_counts(built, samples):
    sizes = json.loads((built / "pool/sizes.json").read_text())
    assert list(sizes.values()) == [500] * 7 + [453]
    assert sum(STEPS.values()) == len(samples) == 3953
    stats = [json.loads(path.read_text())["successes"] for path in sorted((built / "pool").glob("*_stats.json"))]
    assert stats == list(sizes.values())
    assert list(samples) == sorted(samples)
    assert [record["key"] for _, record, _ in samples.values()] == [f"{i:08d}" for i in range(3953)]
    done = json.loads((built / "pool/done.json").read_text())
    assert (done["pictures"], done["left_out_without_name"]) == (3953, 542)


def test_pictures_and_records(samples):
    for caption, record, png in samples.values():
        assert record["caption"] == caption
        assert record["sha256"] == hashlib.sha256(png).hexdigest()
    for _, _, png in list(samples.values())[::40]:
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert image.convert("RGBA").getpixel((0, 0))[3] == 255
        assert len(image.convert("RGB").getcolors(64 * 64)) > 1
    assert len({caption for caption, _, _ in samples.values()}) == 3953


def test_known_samples(samples):
    for codepoints, caption, year in (("1F3F4-200D-2620-FE0F", "pirate flag", 2018), ("1FACD", "orca", 2025)):
        uid = hashlib.sha256(f"openmoji-17.0.0/{codepoints}".encode()).hexdigest()[:32]
        found, record, _ = samples[uid]
        assert (found, record["codepoints"], record["year"]) == (caption, codepoints, year)


@pytest.mark.parametrize("step", STEPS)
def test_split_of_step(built, samples, step):
    splits = ("train", "eval/retrieval", "eval/emojinet")
    train, held_out, emojinet = (read_uids(built / f"uids/{split}/{step}.npy") for split in splits)
    first, last = int(step[:4]), int(step[-4:])
    of_step = [uid for uid, (_, record, _) in samples.items() if first <= record["year"] <= last]
    assert len(of_step) == STEPS[step]
    assert sorted(train + held_out) == of_step
    assert emojinet == sorted(set(emojinet) & set(held_out))
    assert 0.15 < len(held_out) / STEPS[step] < 0.25
    counts = json.loads((built / "pool/done.json").read_text())["counts"][step]
    assert counts == {"train": len(train), "retrieval": len(held_out), "emojinet": len(emojinet)}


def test_classes(built):
    rows = np.load(built / "classes.npy")
    assert rows.dtype == CLASS_ROW
    class_of = dict(zip(format_uids(rows), rows["class_id"], strict=True))
    names = (built / "eval_files/emojinet/classnames.txt").read_text().splitlines()
    assert "CC BY-SA 4.0" in (built / "LICENSE.txt").read_text()
    templates = (built / "eval_files/emojinet/zeroshot_classification_templates.txt").read_text().splitlines()
    assert all("{c}" in template for template in templates)
    assert len(names) == len(set(names)) == 24
    assert min(np.bincount(rows["class_id"], minlength=len(names))) >= 8
    by_step = [read_uids(built / f"uids/eval/emojinet/{step}.npy") for step in STEPS]
    assert sorted(class_of) == sorted(uid for uids in by_step for uid in uids)
    assert all(len({class_of[uid] for uid in uids}) >= 5 for uids in by_step)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("open mailbox with raised flag", None),
        ("cat face", "animal"),
        ("kiss man man", "couple with a heart"),
        ("hand with fingers splayed", "hand"),
        ("face with open eyes and hand over mouth", "face"),
    ],
)
def test_class_of_caption(caption, name):
    (found,) = create_pool.find_classes([create_pool.Image("", "", caption, 1, b"")]).values() or (None,)
    names = [re.sub(" such as .*", "", entry["name"]) for entry in create_pool.EMOJINET["classes"]]
    assert (None if found is None else names[found]) == name


def test_what_is_drawn_alike_for_two_classes_has_none():
    captions = {"a": ("cook", b"1"), "b": ("man cook", b"1"), "c": ("man bowing", b"2")}
    images = [create_pool.Image(uid, "", caption, 1, png) for uid, (caption, png) in captions.items()]
    names = [entry["name"] for entry in create_pool.EMOJINET["classes"]]
    assert create_pool.find_classes(images) == {"c": names.index("man")}


def test_two_builds_are_the_same_bytes_and_a_third_run_does_nothing(built, tmp_path):
    folder = tmp_path / "again"
    leftover = tmp_path / ".again.building/pool/00000099.tar"
    leftover.parent.mkdir(parents=True)
    leftover.write_text("half")
    result = call_script(SCRIPT, "--output_dir", folder)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == len(STEPS)
    assert tree(folder) == tree(built)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    before = times(folder)
    result = call_script(SCRIPT, "--output_dir", folder)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{folder}: already there\n", "")
    assert times(folder) == before


def test_killed_build_leaves_nothing_under_the_final_name(monkeypatch, tmp_path):
    monkeypatch.setattr(create_pool, "draw_images", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        create_pool.create_pool(tmp_path / "emoji")
    assert [path.name for path in tmp_path.iterdir()] == [".emoji.building"]


def test_bad_output(tmp_path):
    (tmp_path / "other/pool").mkdir(parents=True)
    (tmp_path / "other/pool/done.json").write_text('{"versions": {"emoji": "1.0.0"}}')
    message = "holds something else, or TiC-Emoji of other versions; delete it to build it again"
    result = call_script(SCRIPT, "--output_dir", tmp_path / "other")
    assert (result.returncode, result.stderr) == (1, f"error: {tmp_path}/other {message}\n")
