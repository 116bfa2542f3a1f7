"""Splits as clip_benchmark wants them, read back by clip_benchmark itself."""

import json
import os
import subprocess
from contextlib import suppress

import pytest
from conftest import ROOT, make_png, times, tree, write_tar

from tic_clip import TicError
from tic_clip.data import clip_benchmark
from tic_clip.data.clip_benchmark import convert, imagenet_texts
from tic_clip.data.reshard import reshard
from tic_clip.data.split import list_shards, split_sizes
from tic_clip.data.uids import parse_uids, save_uids

TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt")


def make_split(folder, counts=(3, 2), kind="classification", number=0):
    """A split as reshard writes it; sample i has the image i, the caption "picture i" and the class i + 5."""
    folder.mkdir(parents=True)
    sizes = {}
    for shard, count in enumerate(counts):
        members = []
        for i in range(number, number + count):
            members += [(f"{i:032x}-0.png", make_png(i)), (f"{i:032x}-0.txt", f"picture {i}".encode())]
            members += [(f"{i:032x}-0.cls", str(i + 5).encode())] if kind == "classification" else []
        write_tar(folder / f"{shard:08d}.tar", members)
        sizes[f"{shard:08d}.tar"] = count
        number += count
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


def make_parts(folder, parts, kind="classification"):
    """A split in parts of such counts, numbered through."""
    for part, counts in enumerate(parts):
        make_split(folder / f"{part:05d}", counts, kind, sum(map(sum, parts[:part])))
        meta = {"arguments": {"part": part, "parts": len(parts)}}
        meta |= {"output_shard_count": len(counts), "output_count": sum(counts)}
        (folder / f"{part:05d}/meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """clip_benchmark leaves webdataset's shuffling unsaid."""


def load(split, kind="classification"):
    """clip_benchmark's own dataset of a split, as DataComp's evaluate.py builds it."""
    from clip_benchmark.datasets.builder import build_dataset

    red = {"transform": lambda image: image.getpixel((0, 0))[0]}
    return build_dataset("wds/tic", root=str(split), split="test", download=False, task=f"zeroshot_{kind}", **red)


def run(*arguments):
    script = ROOT / "dataset_creation/tic-datacomp/convert_wds.sh"
    return subprocess.run(["bash", str(script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
@pytest.mark.parametrize("parts", [None, ((), (2,), (), (1, 2)), ((1,) * 11, (1,))])
def test_clip_benchmark_reads_every_sample_once(tmp_path, parts, kind):
    """A flat split, whose second shard is empty, and splits in parts; by themselves and in a folder of splits."""
    folder = tmp_path / "eval/2014"
    split = make_parts(folder, parts, kind) if parts else make_split(folder, (3, 0, 2), kind)
    before = list_shards(split), split_sizes(split)
    shards, total = len(before[1]), sum(before[1].values())
    for path in (split, split.parent):
        assert list(convert(str(path), kind)) == [(split, shards)]
    dataset = load(split, kind)
    labels = [[f"picture {i}"] for i in range(total)] if kind == "retrieval" else range(5, total + 5)
    assert list(dataset) == list(enumerate(labels))
    if kind == "classification":
        names, templates = imagenet_texts().values()
        assert (dataset.classes, dataset.templates) == ([name.strip() for name in names], templates)
    else:
        assert dataset.classes is None
    assert (list_shards(split), split_sizes(split)) == before  # our own readers do not count the links
    if parts:
        links = [f"../{part:05d}/{n:08d}.tar" for part, counts in enumerate(parts) for n in range(len(counts))]
        assert [os.readlink(split / f"test/{i}.tar") for i in range(shards)] == links


def test_a_folder_of_splits_and_one_without_a_sample(tmp_path):
    splits = [make_split(tmp_path / f"eval/201{i}", (i,)) for i in (1, 2)]
    empty = [make_split(tmp_path / "eval/2013", ()), make_parts(tmp_path / "eval/2014", ((), ()))]
    before = [tree(split) for split in empty]
    for _ in range(2):
        found = list(convert(str(tmp_path / "eval"), "classification"))
        assert found == [*((split, 1) for split in splits), *((split, 0) for split in empty)]
    assert [len(list(load(split))) for split in splits] == [1, 2]
    assert [tree(split) for split in empty] == before
    assert run(empty[0], "classification").stdout == f"{empty[0]}: no sample, so no test/\n"


def test_texts_of_the_user_and_of_the_folder_above_count(tmp_path):
    """TiC-Emoji has its class names and templates once for all periods."""
    split = make_split(tmp_path / "emojinet/2014")
    (split / TEXTS[0]).write_text("cat\ndog\n")
    (split.parent / TEXTS[0]).write_text("bird\n")
    (split.parent / TEXTS[1]).write_text("a {c}.\n")
    list(convert(str(split), "classification"))
    assert (load(split).classes, load(split).templates) == (["cat", "dog"], ["a {c}."])
    assert os.readlink(split / TEXTS[1]) == f"../{TEXTS[1]}"


def test_killed_anywhere_the_second_run_completes(tmp_path, monkeypatch):
    """Each step in turn is the one that it does not come to; a run after that changes nothing."""
    kind = "classification"
    expected = make_split(tmp_path / "expected/2014")
    list(convert(str(expected), kind))
    for stop in range(9):
        split, steps = make_split(tmp_path / f"{stop}/2014"), iter(range(stop))
        with monkeypatch.context() as patch:
            for name in ("write_text", "_symlink"):
                real = getattr(clip_benchmark, name)
                patch.setattr(clip_benchmark, name, lambda *args, real=real, steps=steps: (next(steps), real(*args)))
            with suppress(StopIteration, RuntimeError):
                list(convert(str(split), kind))
        assert (split / "test/nshards.txt").exists() == (stop >= 6)
        list(convert(str(split), kind))
        before = times(split)
        assert tree(split) == tree(expected)
        list(convert(str(split), kind))
        assert times(split) == before


def test_a_split_that_was_made_again(make_pool, tmp_path):
    """Links beyond its last shard go, one to another shard is put right."""
    pool, split = make_pool((3, 2)), tmp_path / "eval/retrieval/2014"
    save_uids(tmp_path / "2014.npy", parse_uids(pool.uids))
    for size, expected in ((2, ["0.tar", "1.tar", "2.tar"]), (5, ["0.tar"])):
        reshard(pool.path, str(split), str(tmp_path / "2014.npy"), shard_size=size, overwrite=True)
        (split / "test").mkdir(exist_ok=True)
        (split / "test/0.tar").unlink(missing_ok=True)
        (split / "test/0.tar").symlink_to("../00000007.tar")
        list(convert(str(split), "retrieval"))
        assert sorted(path.name for path in split.glob("test/*.tar")) == expected
        assert os.readlink(split / "test/0.tar") == "../00000000.tar"
        assert (split / "test/nshards.txt").read_text() == f"{len(expected)}\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("captions/2014", "00000000.tar is not for classification: its first sample has no cls"),
        ("converted/2014", "dataset_type.txt says it is not for classification; delete it"),
        ("parts/2014/00001", "00001 is a part of a split; give the folder that holds all parts"),
        ("parts/2014", "2014 has 1 of 2 parts: finish reshard first"),
        ("mine", "File exists: .*mine/test/1.tar"),
        ("html", "00000000.tar"),
        ("missing", "holds no .tar file"),
        ("file", "holds no .tar file"),
    ],
)
def test_what_cannot_be_converted(tmp_path, path, message):
    make_split(tmp_path / "captions/2014", kind="retrieval")
    list(convert(str(make_split(tmp_path / "converted/2014")), "retrieval"))
    (make_parts(tmp_path / "parts/2014", ((3, 2), (1,))) / "00001/sizes.json").unlink()
    (make_split(tmp_path / "mine") / "test").mkdir()
    for name in ("mine/test/1.tar", "html/00000000.tar", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"<html>" * 200)
    before = tree(tmp_path)
    with pytest.raises((TicError, FileExistsError), match=message):
        list(convert(str(tmp_path / path), "classification"))
    assert before.items() <= tree(tmp_path).items()


def test_the_script(tmp_path):
    split = make_split(tmp_path / "a folder" / "2014")
    done = run(split, "classification")
    assert (done.returncode, done.stdout) == (0, f"{split}: 2 shards for clip_benchmark in test/\n"), done.stderr
    for wrong in ((split, "captions"), (split,), ("s3://bucket/x", "retrieval")):
        done = run(*wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
