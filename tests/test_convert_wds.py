"""Splits as clip_benchmark wants them, read back by clip_benchmark itself."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import picture, write_tar

from tic_clip import TicError, evalsets
from tic_clip.evalsets import convert, imagenet_texts
from tic_clip.shards import list_tars, split_sizes

ROOT = Path(__file__).parent.parent
TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt")


def make_split(folder, counts=(3, 2), kind="classification"):
    """A split as the resharder writes it; sample i has the picture i, the caption "picture i" and the class i + 5."""
    folder.mkdir(parents=True)
    number, sizes = 0, {}
    for shard, count in enumerate(counts):
        members = []
        for i in range(number, number + count):
            members += [(f"{i:032x}-0.png", picture(i)), (f"{i:032x}-0.txt", f"picture {i}".encode())]
            members += [(f"{i:032x}-0.json", b"{}")]
            members += [(f"{i:032x}-0.cls", str(i + 5).encode())] if kind == "classification" else []
        write_tar(folder / f"{shard:08d}.tar", members)
        sizes[f"{shard:08d}.tar"] = count
        number += count
    (folder / "sizes.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """clip_benchmark leaves webdataset's shuffling unsaid."""


def load(split, task="zeroshot_classification"):
    """clip_benchmark's own dataset of a split, as DataComp's evaluate.py builds it."""
    from clip_benchmark.datasets.builder import build_dataset

    red = {"transform": lambda image: image.getpixel((0, 0))[0]}
    return build_dataset("wds/tic", root=str(split), split="test", download=False, task=task, **red)


def tree(folder):
    """Every file and link with what it holds and when that was written."""
    return {
        str(path.relative_to(folder)): (os.readlink(path) if path.is_symlink() else path.read_bytes(), path.lstat()[8])
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def run(*arguments):
    script = ROOT / "dataset_creation/tic-datacomp/convert_wds.sh"
    return subprocess.run(["bash", str(script), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("counts", [(1,), (3, 2), (1,) * 12])
def test_classification(tmp_path, counts):
    split = make_split(tmp_path / "2014", counts)
    assert list(convert(str(split), "classification")) == [(split, len(counts))]
    dataset = load(split)
    assert list(dataset) == [(i, i + 5) for i in range(sum(counts))]
    assert dataset.classes == [name.strip() for name in imagenet_texts()[TEXTS[0]]]
    assert dataset.templates == imagenet_texts()[TEXTS[1]]


def test_retrieval(tmp_path):
    split = make_split(tmp_path / "2014", kind="retrieval")
    assert list(convert(str(split), "retrieval")) == [(split, 2)]
    dataset = load(split, "zeroshot_retrieval")
    assert list(dataset) == [(i, [f"picture {i}"]) for i in range(5)]
    assert dataset.classes is None
    assert not any((split / name).exists() for name in TEXTS)


def test_a_split_without_a_table_of_sizes(tmp_path):
    split = make_split(tmp_path / "2014")
    (split / "sizes.json").unlink()
    list(convert(str(split), "classification"))
    assert len(list(load(split))) == 5


def test_a_shard_without_a_sample_is_left_out(tmp_path):
    split = make_split(tmp_path / "2014", (2, 0, 1))
    assert list(convert(str(split), "classification")) == [(split, 2)]
    assert [image for image, _ in load(split)] == [0, 1, 2]


def test_our_own_readers_see_each_shard_once(tmp_path):
    split = make_split(tmp_path / "2014")
    before = list_tars(split), list(split_sizes(split))
    list(convert(str(split), "classification"))
    assert (list_tars(split), list(split_sizes(split))) == before
    (split / "sizes.json").unlink()
    assert list_tars(split) == before[0]


def test_a_folder_of_splits(tmp_path):
    splits = [make_split(tmp_path / "eval" / name, (int(name[-1]),)) for name in ("2014", "2015")]
    for _ in range(2):
        assert list(convert(str(tmp_path / "eval"), "classification")) == [(split, 1) for split in splits]
    assert [len(list(load(split))) for split in splits] == [4, 5]
    assert not (tmp_path / "eval/test").exists()


def test_a_split_in_parts_stays_as_it_is(tmp_path):
    """The layout of reshard.py's --parts, whose readers would count the links as well."""
    for part in ("00000", "00001"):
        make_split(tmp_path / "2014" / part)
    before = tree(tmp_path)
    for path in (tmp_path, tmp_path / "2014", tmp_path / "2014/00001"):
        with pytest.raises(TicError, match="is a part of a split; cut evaluation splits without --parts"):
            list(convert(str(path), "classification"))
    assert tree(tmp_path) == before


def test_a_split_that_was_moved_still_loads(tmp_path):
    split = make_split(tmp_path / "a/2014")
    list(convert(str(split), "classification"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(list(load(tmp_path / "b/2014"))) == 5


def test_the_users_own_texts_stay(tmp_path):
    split = make_split(tmp_path / "2014")
    (split / TEXTS[0]).write_text("cat\ndog\n")
    list(convert(str(split), "classification"))
    assert load(split).classes == ["cat", "dog"]
    assert len(load(split).templates) == 80


def test_texts_of_the_folder_above_count(tmp_path):
    """TiC-Emoji has its class names and templates once for all periods."""
    split = make_split(tmp_path / "emojinet/2014")
    for name, text in zip(TEXTS, ("cat\ndog\n", "a {c}.\n"), strict=True):
        (split.parent / name).write_text(text)
    list(convert(str(split), "classification"))
    assert (load(split).classes, load(split).templates) == (["cat", "dog"], ["a {c}."])
    assert os.readlink(split / TEXTS[0]) == f"../{TEXTS[0]}"


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_twice_changes_nothing(tmp_path, kind):
    split = make_split(tmp_path / "2014")
    list(convert(str(split), kind))
    before = tree(split)
    inodes = {path: path.lstat().st_ino for path in (split / "test").glob("*.tar")}
    list(convert(str(split), kind))
    assert tree(split) == before
    assert {path: path.lstat().st_ino for path in (split / "test").glob("*.tar")} == inodes


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_killed_anywhere_the_second_run_completes(tmp_path, monkeypatch, kind):
    """Each step in turn is the one that it does not come to."""
    whole = make_split(tmp_path / "whole/2014")
    list(convert(str(whole), kind))
    for stop in range(9):
        split, steps = make_split(tmp_path / f"{stop}/2014"), iter(range(stop))
        with monkeypatch.context() as patch:
            for name in ("write_text", "_symlink"):
                real = getattr(evalsets, name)
                patch.setattr(evalsets, name, lambda *args, real=real, steps=steps: (next(steps), real(*args)))
            killed = False
            try:
                list(convert(str(split), kind))
            except (StopIteration, RuntimeError):
                killed = True
        assert killed == (stop < (6 if kind == "classification" else 4))
        assert (split / "test/nshards.txt").exists() != killed
        list(convert(str(split), kind))
        assert {name: data for name, (data, _) in tree(split).items()} == {
            name: data for name, (data, _) in tree(whole).items()
        }


def test_a_split_that_was_made_again(tmp_path):
    """Fewer shards than before: what is left of the old links is beyond nshards.txt."""
    split = make_split(tmp_path / "2014", (1, 1, 1))
    list(convert(str(split), "classification"))
    (split / "00000002.tar").unlink()
    (split / "sizes.json").unlink()
    list(convert(str(split), "classification"))
    assert len(list(load(split))) == 2


def test_a_link_that_leads_elsewhere_is_put_right(tmp_path):
    split = make_split(tmp_path / "2014")
    (split / "test").mkdir()
    (split / "test/0.tar").symlink_to("../00000001.tar")
    list(convert(str(split), "classification"))
    assert [image for image, _ in load(split)] == [0, 1, 2, 3, 4]


def test_a_file_of_the_users_is_not_replaced(tmp_path):
    split = make_split(tmp_path / "2014")
    (split / "test").mkdir()
    (split / "test/1.tar").write_bytes(b"mine")
    with pytest.raises(TicError, match=r"1.tar is there and no link to ../00000001.tar"):
        list(convert(str(split), "classification"))
    assert (split / "test/1.tar").read_bytes() == b"mine"


def test_the_wrong_kind(tmp_path):
    split = make_split(tmp_path / "2014", kind="retrieval")
    with pytest.raises(TicError, match=r"00000000.tar is not for classification: its first sample has no cls"):
        list(convert(str(split), "classification"))
    list(convert(str(split), "retrieval"))


def test_a_class_in_the_second_sample_only(tmp_path):
    split = tmp_path / "2014"
    split.mkdir()
    write_tar(split / "00000000.tar", [("a.png", b"1"), ("a.txt", b"1"), ("b.cls", b"1")])
    with pytest.raises(TicError, match="its first sample has no cls"):
        list(convert(str(split), "classification"))


def test_another_kind_than_before(tmp_path):
    split = make_split(tmp_path / "2014")
    list(convert(str(split), "retrieval"))
    with pytest.raises(TicError, match=r"dataset_type.txt says it is not for classification; delete it"):
        list(convert(str(split), "classification"))


@pytest.mark.parametrize("path", ["", "missing", "file"])
def test_no_split(tmp_path, path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TicError, match=r"holds no .tar file"):
        list(convert(str(tmp_path / path), "retrieval"))


def test_a_folder_that_clip_benchmark_reads_already(tmp_path):
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test/0.tar", [("a.png", b"1"), ("a.txt", b"1")])
    with pytest.raises(TicError, match=r"holds no .tar file"):
        list(convert(str(tmp_path), "retrieval"))


def test_what_is_no_tar(tmp_path):
    (tmp_path / "00000000.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(TicError, match=r"00000000.tar is no tar: "):
        list(convert(str(tmp_path), "retrieval"))


def test_the_script(tmp_path):
    split = make_split(tmp_path / "a folder" / "2014")
    line = f"{split}: 2 shards for clip_benchmark in test/\n"
    for _ in range(2):
        done = run(split, "classification")
        assert (done.returncode, done.stdout) == (0, line), done.stderr
    assert len(list(load(split))) == 5
    for wrong in ((split, "captions"), (split,), (tmp_path / "missing", "retrieval")):
        done = run(*wrong)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_datacomps_loader_batches_it(tmp_path):
    """As ``eval_utils/wds_eval.py`` does: no length, batches of the dataset, a loader of those."""
    import torch

    split = make_split(tmp_path / "2014")
    list(convert(str(split), "classification"))
    loader = torch.utils.data.DataLoader(load(split).batched(2), batch_size=None, shuffle=False, num_workers=0)
    assert [target.tolist() for _, target in loader] == [[5, 6], [7, 8], [9]]
