"""Lists and images to shards: read back with Python's own tarfile, in every layout, with every fault."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_tars, times, tree
from miniature import make_image

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.data import images as image_files
from tic_clip.data.lists import file_digest, list_names
from tic_clip.data.pack import PackOptions, create_tars
from tic_clip.data.split import read_meta, read_sizes, split_sizes
from tic_clip.data.uids import make_uid
from tic_clip.data.verify import verify
from tic_clip.evaluation.data import read_set
from tic_clip.storage import lock_folder, write_json

SCRIPT = ROOT / "dataset_creation/create_tars.py"
GIF = b"GIF89a" + bytes(20)
CAPTION = '"quoted", with a comma, 🐈‍⬛ and ümläut ' + "x" * 140_000  # more than csv reads by default


def write_lists(folder, lists):
    """Write lists, {name: keys}, and their manifest, as create_splits.py does; the other lists are empty."""
    folder.mkdir()
    for name in list_names(get_benchmark("redcaps")):
        keys = sorted(lists.get(name, ()), key=lambda key: make_uid(f"redcaps/{key}"))
        rows = [[key, f"birds/{key}.jpg", CAPTION, "2018-06-01T12:00:00Z"] for key in keys]
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([["key", "image", "caption", "date"], *rows])
    files = {path.name: file_digest(str(path)) for path in folder.iterdir()}
    write_json(folder / "manifest.json", {"benchmark": "redcaps", "dataset": "redcaps", "files": files})


def save(folder, key, data=None, name=None):
    path = folder / (name or f"birds/{key}.jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_image(key) if data is None else data)


@pytest.fixture
def lists(tmp_path):
    """Twenty keys to train on in 2018, three held out, and no images."""
    keys, held = [f"key{i}" for i in range(20)], [f"held{i}" for i in range(3)]
    write_lists(tmp_path / "lists", {"train_batch_2018.csv": keys, "test_batch_2018.csv": held})
    return keys + held


@pytest.fixture
def images(tmp_path, lists):
    """The images of all of them, in folders."""
    for key in lists:
        save(tmp_path / "images", key)
    return tmp_path / "images"


@pytest.fixture
def make(tmp_path):
    def call(out="data", **settings):
        folders = (str(tmp_path / name) for name in ("lists", "images", out))
        return create_tars(*folders, PackOptions(**settings))

    return call


def split(tmp_path, out="data", folder="train/2018"):
    return tmp_path / out / "tic/redcaps/yearly" / folder


def members(folder):
    return dict(read_tars(folder))


def test_a_split_by_hand(tmp_path, images, make):
    before = tree(images)
    splits, _ = make(shard_size=8)
    assert tree(images) == before
    assert sum(one.num_samples for one in splits) == 23
    uid = {hashlib.sha256(f"redcaps/key{i}".encode()).hexdigest()[:32]: f"key{i}" for i in range(20)}
    found = members(split(tmp_path))
    assert list(found) == [f"{one}-0" for one in sorted(uid)]
    for one, key in uid.items():
        assert found[f"{one}-0"]["jpg"] == make_image(key)
        assert found[f"{one}-0"]["txt"] == CAPTION.encode()
        record = {"uid": one, "caption": CAPTION, "key": key, "date": "2018-06-01T12:00:00Z", "dataset": "redcaps"}
        record |= {"sha256": hashlib.sha256(make_image(key)).hexdigest()}
        assert json.loads(found[f"{one}-0"]["json"]) == record
    assert read_sizes(str(split(tmp_path))) == {"00000000.tar": 8, "00000001.tar": 8, "00000002.tar": 4}
    assert read_meta(str(split(tmp_path)))["output_count"] == 20
    for folder in ("train/2018", "eval/retrieval/2018"):
        assert list(verify(str(split(tmp_path, folder=folder)))) == []
    assert len(read_set(str(split(tmp_path, folder="eval/retrieval/2018")), {"retrieval"}).samples) == 3
    assert (split(tmp_path, folder="eval/retrieval/2018") / "test/0.tar").is_symlink()


def test_the_bytes_do_not_depend_on_the_processes_or_the_layout(tmp_path, images, make, lists):
    make(shard_size=8)
    make("again", shard_size=8, num_workers=2)
    assert tree(tmp_path / "again") == tree(tmp_path / "data")
    shutil.rmtree(images)
    for key in lists[:6]:
        save(images, key, name=f"{key}.jpg")  # flat
    for key, suffix in zip(lists[6:9], ("JPEG", "Jpg", "jfif"), strict=True):
        save(images, key, name=f"birds/{key}.{suffix}")
    for key in lists[9:12]:
        save(images, key, name=f"{key}.png")  # by its bytes a JPEG
    (tmp_path / "elsewhere").mkdir()
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    archives = (("all.zip", 0, "jpg"), ("birds/piped.zip", 8, "JFIF"), ("linked/more.ZIP", 8, "jPg"))
    for number, (name, method, suffix) in enumerate(archives):
        with open(images / name, "wb") as file:
            pipe = SimpleNamespace(write=file.write, flush=file.flush)  # the sizes stand behind the data
            with zipfile.ZipFile(pipe if "piped" in name else file, "w", method) as archive:
                for key in lists[12 + number :: 3]:
                    archive.writestr(f"deep/er/{key}.{suffix}", make_image(key))
    make("layouts", shard_size=8)
    assert tree(tmp_path / "layouts") == tree(tmp_path / "data")


def test_a_file_goes_before_a_zip_and_a_zip_before_the_next(tmp_path, images, make):
    make()
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(images / name, "w") as archive:
            for key in ("key1", "key2", "gone"):
                archive.writestr(f"{key}.jpg", make_image(f"another {key}" if name == "b.zip" else key))
    (images / "birds/key2.jpg").unlink()
    save(images, "key1", make_image("of the file"))
    make("zipped")
    found = {json.loads(one["json"])["key"]: one["jpg"] for one in members(split(tmp_path, "zipped")).values()}
    assert (found["key1"], found["key2"], len(found)) == (make_image("of the file"), make_image("key2"), 20)


def test_what_can_not_be_used_is_counted(tmp_path, images, make, monkeypatch):
    removed = b"\x89PNG\r\n\x1a\n removed"
    monkeypatch.setattr(image_files, "PLACEHOLDERS", {hashlib.md5(removed).hexdigest()})
    bad = {
        "key0": (None, "no image file"),
        "key1": (b"", "empty file"),
        "key2": (GIF, "not an image but a GIF"),
        "key3": (b"\n<!doctype html>", "not an image but a web page"),
        "key4": (b"nothing of the kind", "not an image"),
        "key5": (removed, "placeholder of a removed image"),
        "key6": (None, "zip member that can't be read"),
    }
    with zipfile.ZipFile(images / "all.zip", "w") as archive:
        archive.writestr("key6.jpg", b"\xff\xd8\xff of the zip")
    (images / "all.zip").write_bytes((images / "all.zip").read_bytes().replace(b"of the zip", b"of the zap"))
    for key, (data, _) in bad.items():
        (images / f"birds/{key}.jpg").unlink() if data is None else save(images, key, data)
    _, dropped = make()
    found = read_meta(str(split(tmp_path)))
    assert found["dropped"] == dict(dropped) == {reason: 1 for _, reason in bad.values()}
    assert (found["processed_count"], found["kept_count"], len(members(split(tmp_path)))) == (20, 13, 13)


def test_shards_of_which_nothing_can_be_used(tmp_path, images, make):
    make(shard_size=8)
    order = [json.loads(sample["json"])["key"] for sample in members(split(tmp_path)).values()]
    for key in order[16:]:
        save(images, key, GIF)
    make("last", shard_size=8)
    assert list(split_sizes(split(tmp_path, "last")).values()) == [8, 8]
    assert len(list(split(tmp_path, "last").glob("*_stats.json"))) == 2
    assert list(verify(str(split(tmp_path, "last")))) == []
    for key in order[8:16]:
        save(images, key, GIF)
    for key in order[16:]:
        save(images, key)
    with pytest.raises(TicError, match=r"2018: none of the images of shard 1 can be used; .*larger --shard-size"):
        make("middle", shard_size=8)


def test_again_nothing_is_done_and_overwrite_makes_all_again(tmp_path, images, make):
    with lock_folder(split(tmp_path)), pytest.raises(TicError, match=r"another process is writing .*/train/2018; "):
        make(shard_size=8)
    make(shard_size=8)
    before = times(tmp_path / "data")
    with lock_folder(split(tmp_path)):  # what is finished is read by any number
        assert all(one.reused for one in make(shard_size=8)[0])
    assert times(tmp_path / "data") == before
    for size, message in ((0, "must be at least 1, not 0"), (7, "arguments: shard size 8, now 7; give --overwrite")):
        with pytest.raises(TicError, match=message):
            make(shard_size=size)
    whole = tree(tmp_path / "data")
    (images / "birds/key7.jpg").rename(tmp_path / "key7.jpg")
    splits, dropped = make(shard_size=8, overwrite=True)
    assert (sum(one.num_samples for one in splits), dict(dropped)) == (22, {"no image file": 1})
    (tmp_path / "key7.jpg").rename(images / "birds/key7.jpg")
    make(shard_size=8, overwrite=True)
    assert tree(tmp_path / "data") == whole


def test_shards_with_damaged_stats_or_of_another_list_are_made_again(tmp_path, images, make):
    make(shard_size=2)
    whole, folder = tree(tmp_path / "data"), split(tmp_path)
    arguments = json.loads((folder / "meta.json").read_text())["arguments"]
    (folder / ".pack.json").write_text(json.dumps(arguments))
    (folder / "meta.json").unlink()
    (folder / "00000001_stats.json").write_text('{"dropped": {}}')
    (folder / "00000003_stats.json").write_text("")
    (folder / "00000002.tar").write_bytes(b"cut off")
    other = (folder / "00000004_stats.json").read_text().replace(arguments["list"], "another list's digest")
    (folder / "00000004_stats.json").write_text(other)
    (folder / "00000004.tar").write_bytes(bytes((folder / "00000004.tar").stat().st_size))
    make(shard_size=2)
    assert tree(tmp_path / "data") == whole


def test_it_goes_on_after_kill_9(tmp_path, lists, make):
    for key in lists:
        save(tmp_path / "images", key, make_image(key) + bytes(300_000))
    make("whole", shard_size=1)
    folders = ["--csv-path", "lists", "--image-path", "images", "--output-path", "data"]
    arguments = [*folders, "--shard-size", "1", "-j", "2"]
    killed = subprocess.Popen([sys.executable, SCRIPT, *arguments], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not list(split(tmp_path).glob("*_stats.json")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    made = {path: path.stat().st_mtime_ns for path in split(tmp_path).glob("*_stats.json")}
    make(shard_size=1)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    whole, data = tree(tmp_path / "whole"), tree(tmp_path / "data")
    assert {name for name in whole if data[name] != whole[name]} <= {name for name in whole if "meta" in name}


NO_LISTS = "lists has no manifest.json of lists: run create_splits.py first"
BAD = {
    "no manifest": (lambda at: (at / "lists/manifest.json").unlink(), NO_LISTS),
    "another manifest": (lambda at: (at / "lists/manifest.json").write_text("{}"), NO_LISTS),
    "no images": (lambda at: shutil.rmtree(at / "images"), "images is not a folder of images"),
    "a list cut": (
        lambda at: os.truncate(at / "lists/train_batch_2018.csv", 300),
        "lists/train_batch_2018.csv is not as create_splits.py made it",
    ),
    "the wrong images": (
        lambda at: (shutil.rmtree(at / "images"), save(at / "images", "other")),
        "images has none of the images of the lists, such as birds/key19.jpg, as a file or in a zip",
    ),
    "a damaged zip": (lambda at: save(at / "images", "", b"PK", "all.zip"), "all.zip is not a zip archive that can be"),
    "a damaged tar": (lambda at: save(at / "images", "", b"x" * 600, "x.tar"), "x.tar: damaged header at byte 0"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, images, make, spoil, message):
    spoil(tmp_path)
    with pytest.raises((TicError, OSError)) as error:
        make()
    assert message in str(error.value)
    assert not list((tmp_path / "data").rglob("*.tar"))


def test_a_zip_that_was_cut_off_is_one_line(tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key1.jpg", b"1" * 100)
        archive.writestr("key2.jpg", b"2" * 100)
    data = path.read_bytes()
    assert len(data) > 400
    for size in range(0, 400, 7):
        for cut in (data[:size], data[-size:], data[:50] + data[50 + size :]):
            path.write_bytes(cut)
            with suppress(TicError, image_files.UnusableImage):  # any other error would be a traceback
                for member in image_files.index_archive("redcaps", [str(path)], False, 0):
                    assert image_files.read_member(str(path), member) in (b"1" * 100, b"2" * 100)
