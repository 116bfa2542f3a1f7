"""Splits as clip_benchmark wants them, read back by clip_benchmark itself."""

import os
import shutil
import subprocess
from contextlib import suppress

import numpy as np
import pytest
from conftest import ROOT, times, tree

from tic_clip import TicError
from tic_clip.data import clip_benchmark
from tic_clip.data.clip_benchmark import convert, imagenet_texts
from tic_clip.data.reshard import reshard
from tic_clip.data.split import list_shards, split_sizes
from tic_clip.data.uids import CLASS_ROW, parse_uids, save_uids
from tic_clip.storage import read_json, write_json, write_text

TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt")


@pytest.fixture
def make_split(make_pool, tmp_path):
    """Reshard a pool of shards of ``counts`` samples; its sample i has the image i and, for classes, the class i + 5.

    ``name`` is the split's, in eval/ where others are.
    """

    def call(name="2014", counts=(3, 2), kind="classification", **options):
        inputs = tmp_path / "inputs" / name
        shutil.rmtree(inputs, ignore_errors=True)
        pool = make_pool(counts, inputs / "pool")
        uids = parse_uids(pool.uids)
        save_uids(inputs / "uids.npy", uids)
        if kind == "classification":
            classes = [(*uid, i + 5) for i, uid in enumerate(uids.tolist())]
            save_uids(inputs / "classes.npy", np.array(classes, CLASS_ROW))
            options["classes"] = str(inputs / "classes.npy")
        split = tmp_path / "eval" / name
        reshard(pool.path, str(split), str(inputs / "uids.npy"), **options)
        return split

    return call


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
@pytest.mark.parametrize(
    ("counts", "options", "shards"),
    [
        ((3, 2), {"shard_size": 3}, ["00000000", "00000001"]),
        ((0, 2, 0, 3), {"shard_size": 2, "parts": 4}, ["00001/00000000", "00003/00000000", "00003/00000001"]),
        ((11, 1), {"shard_size": 1, "parts": 2}, [*(f"00000/{i:08d}" for i in range(11)), "00001/00000000"]),
    ],
)
def test_clip_benchmark_reads_every_sample_once(make_split, counts, options, shards, kind):
    """A flat split, which has an entry for a shard without samples, and splits in parts."""
    split, total = make_split(counts=counts, kind=kind, **options), sum(counts)
    if "parts" not in options:
        write_json(split / "sizes.json", read_json(split / "sizes.json") | {"00000002.tar": 0})
    before = list_shards(split), split_sizes(split)
    for path in (split, split.parent):
        assert list(convert(str(path), kind)) == [(split, len(shards))]
    dataset = load(split, kind)
    labels = [[f"picture {i} of {split.parents[1]}/inputs/2014/pool"] for i in range(total)]
    assert list(dataset) == list(enumerate(labels if kind == "retrieval" else range(5, total + 5)))
    names, templates = imagenet_texts().values()
    texts = ([name.strip() for name in names], templates) if kind == "classification" else (None, None)
    assert (dataset.classes, dataset.templates) == texts
    assert (list_shards(split), split_sizes(split)) == before  # our own readers do not count the links
    assert [os.readlink(split / f"test/{i}.tar") for i in range(len(shards))] == [f"../{name}.tar" for name in shards]


def test_a_folder_of_splits_and_one_without_a_sample(make_split, tmp_path):
    splits = [make_split(f"201{i}", (i,)) for i in (1, 2)]
    empty = [make_split("2013", (0,)), make_split("2014", (0, 0), parts=2)]
    before = [tree(split) for split in empty]
    for _ in range(2):
        found = list(convert(str(tmp_path / "eval"), "classification"))
        assert found == [*((split, 1) for split in splits), *((split, 0) for split in empty)]
    assert [len(list(load(split))) for split in splits] == [1, 2]
    assert [tree(split) for split in empty] == before
    assert run(empty[0], "classification").stdout == f"{empty[0]}: no sample, so no test/\n"


def test_texts_of_the_user_and_of_the_folder_above_count(make_split):
    """TiC-Emoji has its class names and templates once for all periods."""
    split = make_split()
    (split / TEXTS[0]).write_text("cat\ndog\n")
    (split.parent / TEXTS[0]).write_text("bird\n")
    (split.parent / TEXTS[1]).write_text("a {c}.\n")
    list(convert(str(split), "classification"))
    assert (load(split).classes, load(split).templates) == (["cat", "dog"], ["a {c}."])
    assert os.readlink(split / TEXTS[1]) == f"../{TEXTS[1]}"


def test_killed_anywhere_the_second_run_completes(make_split, tmp_path, monkeypatch):
    """Each step in turn is the one that it does not come to; a run after that changes nothing."""
    source, expected = make_split(shard_size=3), tmp_path / "expected"
    shutil.copytree(source, expected)
    list(convert(str(expected), "classification"))
    for stop in range(9):
        split, steps = shutil.copytree(source, tmp_path / f"{stop}"), iter(range(stop))
        with monkeypatch.context() as patch:
            for name in ("write_text", "_symlink"):
                real = getattr(clip_benchmark, name)
                patch.setattr(clip_benchmark, name, lambda *args, real=real, steps=steps: (next(steps), real(*args)))
            with suppress(StopIteration, RuntimeError):
                list(convert(str(split), "classification"))
        assert (split / "test/nshards.txt").exists() == (stop >= 6)
        list(convert(str(split), "classification"))
        before = times(split)
        assert tree(split) == tree(expected)
        list(convert(str(split), "classification"))
        assert times(split) == before


def test_a_split_that_was_made_again(make_split):
    """Links beyond its last shard go, one to another shard is put right."""
    for size, expected in ((2, ["0.tar", "1.tar", "2.tar"]), (5, ["0.tar"])):
        split = make_split(kind="retrieval", shard_size=size, overwrite=True)
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
        ("captions", "00000000.tar is not for classification: its first sample has no cls"),
        ("converted", "dataset_type.txt says it is not for classification; delete it"),
        ("parts/00001", "00001 is a part of a split; give the folder that holds all parts"),
        ("parts", "parts has 1 of 2 parts: finish reshard first"),
        ("mine", "File exists: .*mine/test/0.tar"),
        ("html", "00000000.tar"),
        ("missing", "holds no .tar file"),
        ("file", "holds no .tar file"),
    ],
)
def test_what_cannot_be_converted(make_split, tmp_path, path, message):
    make_split("captions", kind="retrieval")
    list(convert(str(make_split("converted")), "retrieval"))
    (make_split("parts", parts=2) / "00001/sizes.json").unlink()
    (make_split("mine") / "test").mkdir()
    for name in ("mine/test/0.tar", "html/00000000.tar", "file"):
        write_text(tmp_path / "eval" / name, "<html>" * 200)
    before = tree(tmp_path)
    with pytest.raises((TicError, FileExistsError), match=message):
        list(convert(str(tmp_path / "eval" / path), "classification"))
    assert before.items() <= tree(tmp_path).items()


def test_the_script(make_split):
    split = make_split("a folder")
    done = run(split, "classification")
    assert (done.returncode, done.stdout) == (0, f"{split}: 1 shards for clip_benchmark in test/\n"), done.stderr
    for wrong in ((split, "captions"), ("s3://bucket/x", "retrieval")):
        done = run(*wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
