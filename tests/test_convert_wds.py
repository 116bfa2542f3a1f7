"""Splits as clip_benchmark wants them, read back by clip_benchmark itself."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import picture, write_tar

from tic_clip import TicError
from tic_clip.data import clip_benchmark
from tic_clip.data.clip_benchmark import convert, imagenet_texts
from tic_clip.data.reshard import reshard
from tic_clip.data.split import list_tars, sizes_if_known, split_sizes
from tic_clip.data.uids import parse_uids, save_uids
from tic_clip.data.verify import VerifyReport, verify

ROOT = Path(__file__).parent.parent
TEXTS = ("classnames.txt", "zeroshot_classification_templates.txt")


def make_split(folder, counts=(3, 2), kind="classification", number=0):
    """A split as the resharder writes it; sample i has the picture i, the caption "picture i" and the class i + 5."""
    folder.mkdir(parents=True)
    sizes = {}
    for shard, count in enumerate(counts):
        members = []
        for i in range(number, number + count):
            members += [(f"{i:032x}-0.png", picture(i)), (f"{i:032x}-0.txt", f"picture {i}".encode())]
            members += [(f"{i:032x}-0.json", f'{{"uid": "{i:032x}"}}'.encode())]
            members += [(f"{i:032x}-0.cls", str(i + 5).encode())] if kind == "classification" else []
        write_tar(folder / f"{shard:08d}.tar", members)
        (folder / f"{shard:08d}_stats.json").write_text(f'{{"successes": {count}}}')
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


@pytest.fixture(params=["flat", "parts"])
def make(request):
    """A split of two shards, of three and two samples, in either layout."""
    if request.param == "flat":
        return make_split
    return lambda folder, counts=(3, 2), kind="classification": make_parts(folder, [(n,) for n in counts] + [()], kind)


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
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.read_bytes(),
            path.lstat().st_mtime_ns,
        )
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


def test_a_part_alone_is_no_split(tmp_path):
    make_parts(tmp_path / "2014", ((3, 2), (1,)))
    before = tree(tmp_path)
    with pytest.raises(TicError, match="00001 is a part of a split; give the folder that all parts lie in"):
        list(convert(str(tmp_path / "2014/00001"), "classification"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("parts", [((3, 2), (1, 1)), ((), (2,), (), (1, 2)), ((1,) * 11, (1,))])
@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_a_split_in_parts(tmp_path, parts, kind):
    split = make_parts(tmp_path / "eval/2014", parts, kind)
    shards, total = sum(map(len, parts)), sum(map(sum, parts))
    before = list_tars(split), split_sizes(split)
    assert len(before[0]) == shards
    for path in (split, split.parent):
        assert list(convert(str(path), kind)) == [(split, shards)]
    dataset = load(split, f"zeroshot_{kind}")
    assert [image for image, _ in dataset] == list(range(total))
    assert [label for _, label in dataset] == (
        [[f"picture {i}"] for i in range(total)] if kind == "retrieval" else list(range(5, total + 5))
    )
    assert [os.readlink(split / f"test/{i}.tar") for i in range(shards)] == [
        f"../{part:05d}/{shard:08d}.tar" for part, counts in enumerate(parts) for shard in range(len(counts))
    ]
    assert (list_tars(split), split_sizes(split)) == before
    assert sum(sizes_if_known(split).values()) == total


def test_verify_sees_no_fault_in_a_split_in_parts(tmp_path):
    split = make_parts(tmp_path / "2014", ((3, 2), (), (1,)))
    for _ in range(2):
        seen = VerifyReport()
        assert list(verify(str(split), seen=seen)) == []
        assert (seen.shards, seen.samples) == (3, 6)
        list(convert(str(split), "classification"))


def test_parts_without_tables_of_sizes(tmp_path):
    split = make_parts(tmp_path / "2014", ((3, 2), (1,)))
    for table in split.glob("*/sizes.json"):
        table.unlink()
    for _ in range(2):
        assert list(convert(str(split), "classification")) == [(split, 3)]
        assert len(list_tars(split)) == 3
        assert sizes_if_known(split) == dict.fromkeys(list_tars(split))
    assert len(list(load(split))) == 6


def test_parts_that_are_not_all_there(tmp_path):
    split = make_parts(tmp_path / "2014", ((3, 2), (1,)))
    (split / "00001/sizes.json").unlink()
    with pytest.raises(TicError, match="2014 has 1 of 2 parts: finish reshard first"):
        list(convert(str(split), "classification"))
    assert not (split / "test").exists()


@pytest.mark.parametrize("make", [lambda folder: make_split(folder, ()), lambda folder: make_parts(folder, ((), ()))])
def test_a_split_without_a_sample_stays_as_it_is(tmp_path, make):
    empty, split = make(tmp_path / "eval/2014"), make_split(tmp_path / "eval/2015", (2,))
    before = tree(empty)
    assert list(convert(str(tmp_path / "eval"), "classification")) == [(empty, 0), (split, 1)]
    done = run(empty, "classification")
    assert (done.returncode, done.stdout) == (0, f"{empty}: no sample, so no test/\n")
    assert tree(empty) == before


def test_a_split_that_was_moved_still_loads(tmp_path, make):
    split = make(tmp_path / "a/2014")
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
def test_twice_changes_nothing(tmp_path, kind, make):
    split = make(tmp_path / "2014", kind=kind)
    list(convert(str(split), kind))
    before = tree(split)
    inodes = {path: path.lstat().st_ino for path in (split / "test").glob("*.tar")}
    list(convert(str(split), kind))
    assert tree(split) == before
    assert {path: path.lstat().st_ino for path in (split / "test").glob("*.tar")} == inodes


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_killed_anywhere_the_second_run_completes(tmp_path, monkeypatch, kind, make):
    """Each step in turn is the one that it does not come to."""
    whole = make(tmp_path / "whole/2014", kind=kind)
    list(convert(str(whole), kind))
    for stop in range(9):
        split, steps = make(tmp_path / f"{stop}/2014", kind=kind), iter(range(stop))
        with monkeypatch.context() as patch:
            for name in ("write_text", "_symlink"):
                real = getattr(clip_benchmark, name)
                patch.setattr(clip_benchmark, name, lambda *args, real=real, steps=steps: (next(steps), real(*args)))
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


def test_a_link_that_leads_elsewhere_is_put_right(tmp_path, make):
    split = make(tmp_path / "2014")
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


def test_links_of_a_split_that_had_more_shards_go(make_pool, tmp_path):
    pool, split = make_pool((3, 2)), tmp_path / "eval/retrieval/2014"
    save_uids(tmp_path / "2014.npy", parse_uids(pool.uids))
    for size, expected in ((2, ["0.tar", "1.tar", "2.tar"]), (5, ["0.tar"])):
        reshard(pool.path, str(split), str(tmp_path / "2014.npy"), shard_size=size, overwrite=True)
        list(convert(str(split), "retrieval"))
        assert sorted(path.name for path in split.glob("test/*.tar")) == expected
        assert (split / "test/nshards.txt").read_text() == f"{len(expected)}\n"
