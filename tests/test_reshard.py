"""Resharding against a slow version that holds everything in dicts, and by hand."""

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from cloudpathlib import S3Client

from tic_clip import TicError
from tic_clip.reshard import copy, engine, find_subsets, index, plan, reshard
from tic_clip.shards import split_sizes
from tic_clip.storage import to_path
from tic_clip.tarshard import Sample, write_shard
from tic_clip.uids import CLASSES, is_uid, parse_uids, save_uids

SCRIPT = Path(__file__).parents[1] / "dataset_creation/reshard.py"
ABSENT = ["0" * 32, "f" * 32]


def read_tars(folder):
    """[(key, {suffix: data})] of the tars in a folder, in order; members of a key that follow each other."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.split(".", 1)
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                found[-1][1][suffix] = tar.extractfile(info).read()
    return found


def slow_reshard(pool, uids, classes=None):
    """What a split should hold: [(key, {suffix: data})]."""
    wanted, found = Counter(uids), []
    for _, members in read_tars(pool):
        if not {"json", "txt", "png"} <= set(members):
            continue
        uid = json.loads(members["json"])["uid"].lower()
        for number in range(wanted[uid]):
            label = {"cls": str(classes[uid]).encode()} if classes and uid in classes else {}
            found.append((f"{uid}-{number}", members | label))
    return found


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.fixture
def write_uids(tmp_path):
    """Write ``uids/{name}.npy`` of hex UIDs and return its path."""

    def write(uids, name="2014"):
        path = tmp_path / "uids" / f"{name}.npy"
        save_uids(path, parse_uids(uids))
        return str(path)

    return write


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


# The parts.


def matches(*rows):
    """Matches of (position, UID's low word, copies)."""
    positions, low, copies = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return plan.Matches(samples=positions, uids=parse_uids(f"{i:032x}" for i in low), copies=copies)


def as_lists(shards):
    return [
        (
            shard.number,
            [(p.source, p.samples.tolist(), p.uids["f1"].tolist(), p.copies.tolist()) for p in shard.pieces],
        )
        for shard in shards
    ]


def test_repeat():
    rows, copies = plan.repeat(matches((5, 50, 2), (6, 60, 1), (9, 90, 3)))
    assert rows.tolist() == [0, 0, 1, 2, 2, 2]
    assert copies.tolist() == [0, 1, 0, 0, 1, 2]


def test_cut_by_hand():
    found = [matches((5, 50, 2), (6, 60, 1)), matches(), matches((0, 10, 2)), matches((7, 70, 1))]
    assert as_lists(plan.cut("abcd", found, 2)) == [
        (0, [("a", [5, 5], [50, 50], [0, 1])]),
        (1, [("a", [6], [60], [0]), ("c", [0], [10], [0])]),
        (2, [("c", [0], [10], [1]), ("d", [7], [70], [0])]),
    ]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, [1] * 6), (2, [2] * 3), (4, [4, 2]), (5, [5, 1]), (6, [6]), (7, [6])]
)
def test_only_the_last_shard_is_short(size, expected):
    found = [matches((0, 1, 3)), matches((0, 2, 1), (1, 3, 2))]
    shards = list(plan.cut("ab", found, size))
    assert [shard.num_samples for shard in shards] == expected
    assert [shard.number for shard in shards] == list(range(len(expected)))


def test_nothing_is_cut_into_no_shard():
    assert list(plan.cut("ab", [matches(), matches()], 3)) == []


UID = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (f'{{"uid": "{UID}"}}', UID),
        (f'{{"a":1,"uid"\n:\t"{UID}"}}', UID),
        (f'{{"uid": "{UID.upper()}"}}', UID.upper()),
        (f'{{"exif": {{"uid": "{OTHER}"}}, "uid": "{UID}"}}', UID),
        (json.dumps({"caption": f'he said "uid": "{OTHER}"', "uid": UID}), UID),
        (f'{{"\\u0075id": "{UID}"}}', UID),
        (f'{{"uid": "\\u0030{UID[1:]}"}}', UID),
        (f'{{"uid": "{UID[1:]}"}}', None),
        (f'{{"uid": "{UID[1:]}g"}}', None),
        ('{"uid": 7}', None),
        ('{"uid": null}', None),
        ("{}", None),
        (f'["uid", "{UID}"]', None),
        ("", None),
        ("{", None),
        ("ÿ{", None),
    ],
)
def test_uid_of_a_record(record, expected):
    data = record.encode("latin-1")
    assert index.read_uid(data, Sample("0", {"json": (0, len(data))})) == expected


def square(number):
    return number * number


def die(number):
    os._exit(1)


def fail(number):
    raise TicError(f"job {number}")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_engine(num_workers):
    taken = []
    jobs = (taken.append(i) or i for i in range(50))
    results = engine.run(square, jobs, num_workers)
    assert next(results) == 0
    assert len(taken) <= 4 * num_workers  # the rest is made when it is needed
    assert list(results) == [i * i for i in range(1, 50)]
    assert list(engine.run(square, [], num_workers)) == []
    with pytest.raises(TicError, match="job 0"):
        list(engine.run(fail, range(9), num_workers))


def has_a_client(_):
    return S3Client._default_client is not None


def test_workers_share_no_connection(s3):
    assert to_path(s3).exists()
    assert list(engine.run(has_a_client, [0], 1)) == [True]
    assert list(engine.run(has_a_client, range(4), 2)) == [False] * 4


def test_engine_whose_worker_dies():
    with pytest.raises(TicError, match="a worker process died"):
        list(engine.run(die, range(9), 2))


# The whole.


def test_many_subsets_in_one_pass(make_pool, write_uids, out, monkeypatch):
    pool = make_pool((4, 0, 5, 3))
    uids = pool.uids
    subsets = {
        "2014": uids[1::2],
        "2015": uids[::-1],
        "months/201403": [uids[0], *[uids[5]] * 3, uids[11], uids[11], *ABSENT],
        "months/deep/201404": [uids[4]],
    }
    for name, chosen in subsets.items():
        write_uids(chosen, name)
    opened = []
    monkeypatch.setattr(index, "open_shard", lambda path, real=index.open_shard: opened.append(path) or real(path))
    splits = reshard(pool.path, out, str(Path(out).parent / "uids"), shard_size=4)
    assert len(opened) == 4
    assert {split.name: (split.num_samples, split.wanted) for split in splits} == {
        "2014": (6, 6),
        "2015": (12, 12),
        "months/201403": (6, 8),
        "months/deep/201404": (1, 1),
    }
    for split in splits:
        expected = slow_reshard(pool.path, subsets[split.name])
        assert split.path == f"{out}/{split.name}"
        assert read_tars(split.path) == expected
        assert len(expected) == split.num_samples == sum(split_sizes(split.path).values())
    assert [key for key, _ in read_tars(f"{out}/months/201403")] == [
        f"{uid}-{copy}" for uid, copy in ((uids[0], 0), *((uids[5], i) for i in range(3)), (uids[11], 0), (uids[11], 1))
    ]


def test_one_subset_is_the_split_itself(make_pool, write_uids, out):
    pool = make_pool((3, 2))
    path = write_uids([pool.uids[4], pool.uids[0], *ABSENT])
    (split,) = reshard(pool.path, out, path, shard_size=2)
    assert (split.name, split.path, split.wanted, split.num_samples, split.num_shards) == ("", out, 4, 2, 1)
    assert read_tars(out) == [(f"{uid}-0", pool.samples[uid]) for uid in (pool.uids[0], pool.uids[4])]


@pytest.mark.parametrize(("size", "expected"), [(1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (7, [6])])
def test_tables_of_a_split(make_pool, write_uids, out, size, expected):
    pool = make_pool((3, 3))
    subset = write_uids(pool.uids)
    reshard(pool.path, out, subset, shard_size=size)
    names = [f"{i:08d}" for i in range(len(expected))]
    read = {path.name: path for path in Path(out).iterdir()}
    assert set(read) == {
        *(f"{name}.tar" for name in names),
        *(f"{name}_stats.json" for name in names),
        *("sizes.json", "meta.json", "sample_ids.npy"),
    }
    for name, count in zip(names, expected, strict=True):
        with tarfile.open(read[f"{name}.tar"]) as tar:
            assert len(tar.getnames()) == 3 * count
        assert json.loads(read[f"{name}_stats.json"].read_text()) == {"successes": count}
    assert list(split_sizes(out).items()) == [(f"{out}/{i:08d}.tar", count) for i, count in enumerate(expected)]
    assert read["sample_ids.npy"].read_bytes() == Path(subset).read_bytes()
    assert json.loads(read["meta.json"].read_text()) == {
        "output_shard_count": len(expected),
        "output_count": 6,
        "output_shard_format": "{:08d}.tar",
        "subset_count": 6,
        "processed_count": 6,
        "dropped": {},
        "arguments": {
            "input_dir": pool.path,
            "cls_file": None,
            "shard_size": size,
            "pool": sha256("".join(f"{t.name} {t.stat().st_size}\n" for t in tars_of(pool)).encode()).hexdigest(),
            "classes": None,
            "subset_file": subset,
            "subset": sha256(Path(subset).read_bytes()[128:]).hexdigest(),
        },
    }


def tars_of(pool):
    return sorted(Path(pool.path).glob("*.tar"))


def test_same_bytes_whatever_the_number_of_workers(make_pool, write_uids, tmp_path):
    pool = make_pool((4, 5, 3))
    write_uids(pool.uids + pool.uids[3:6], "2014")
    write_uids(pool.uids[:7], "2015")
    trees = []
    for num_workers in (1, 2, 3):
        reshard(pool.path, str(tmp_path / "out"), str(tmp_path / "uids"), num_workers=num_workers, shard_size=4)
        trees.append(tree(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / f"out{num_workers}")
    assert len(trees[0]) == 4 + 2 + 4 + 2 + 3 * 2
    assert trees[0] == trees[1] == trees[2]


def test_classes_go_to_listed_samples_only(make_pool, write_uids, tmp_path, out):
    def add_class(number, members):
        if number < 2:
            members["cls"] = b"999"

    pool = make_pool((3, 3), edit=add_class)
    uids = pool.uids
    classes = {uids[0]: 0, uids[2]: 17, uids[5]: 3}
    rows = np.zeros(3, dtype=CLASSES)
    for name in ("f0", "f1"):
        rows[name] = parse_uids(classes)[name]
    rows["class_id"] = list(classes.values())
    save_uids(tmp_path / "classes.npy", rows)
    chosen = [*uids[:5], uids[2]]
    reshard(pool.path, out, write_uids(chosen), classes=str(tmp_path / "classes.npy"))
    read = read_tars(out)
    assert read == slow_reshard(pool.path, chosen, classes)
    assert [members.get("cls") for _, members in read] == [b"0", b"999", b"17", b"17", None, None]
    with tarfile.open(f"{out}/00000000.tar") as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 6 * 3 + 4


def test_dropped_samples_are_counted_by_reason(make_pool, write_uids, out):
    def spoil(number, members):
        if number in (0, 8):
            del members["json"]
        elif number == 2:
            del members["txt"]
        elif number in (3, 4, 9):
            members["gif"] = members.pop("png")
        elif number == 5:
            members["json"] = b'{"uid": "no uid"}'
        elif number == 6:
            members["json"] = members["json"].upper().replace(b'"UID"', b'"uid"')

    pool = make_pool((6, 5), edit=spoil)
    chosen = [pool.uids[i] for i in (0, 1, 2, 3, 5, 6)]
    reshard(pool.path, out, write_uids(chosen))
    assert read_tars(out) == [(f"{pool.uids[i]}-0", pool.samples[pool.uids[i]]) for i in (1, 6)]
    meta = json.loads(Path(out, "meta.json").read_text())
    assert meta["dropped"] == {"no image": 3, "no json": 2, "no text": 1, "no valid uid": 1}
    unused = [pool.uids[i] for i in (7, 10)]
    assert meta["processed_count"] == 11 == meta["output_count"] + len(unused) + sum(meta["dropped"].values())


def test_pool_with_nothing_that_can_be_used(make_pool, write_uids, out):
    pool = make_pool((2, 1), edit=lambda number, members: members.pop("json"))
    (split,) = reshard(pool.path, out, write_uids(pool.uids))
    assert (split.wanted, split.num_samples) == (3, 0)
    assert json.loads(Path(out, "meta.json").read_text())["dropped"] == {"no json": 3}


@pytest.mark.parametrize("uids", [[], ABSENT])
def test_subset_without_a_sample(make_pool, write_uids, out, uids):
    pool, subset = make_pool(), write_uids(uids)
    (split,) = reshard(pool.path, out, subset)
    assert (split.wanted, split.num_samples, split.num_shards) == (len(uids), 0, 0)
    assert set(tree(out)) == {"meta.json", "sizes.json", "sample_ids.npy"}
    assert json.loads(Path(out, "sizes.json").read_text()) == {}
    assert reshard(pool.path, out, subset)[0].reused


# Again, over, and what is refused.


def test_again_does_nothing(make_pool, write_uids, tmp_path, out):
    pool = make_pool()
    write_uids(pool.uids, "2014")
    first = reshard(pool.path, out, str(tmp_path / "uids"))
    before = times(out)
    (split,) = reshard(pool.path, out, str(tmp_path / "uids"), num_workers=2)
    assert split.reused
    assert (split.wanted, split.num_samples, split.num_shards) == (5, 5, 1)
    assert not first[0].reused
    assert times(out) == before


def test_a_subset_more_makes_only_its_split(make_pool, write_uids, tmp_path, out):
    pool = make_pool()
    write_uids(pool.uids[:2], "2014")
    reshard(pool.path, out, str(tmp_path / "uids"))
    before = times(f"{out}/2014")
    write_uids(pool.uids[2:], "2013")
    assert [(split.name, split.reused) for split in reshard(pool.path, out, str(tmp_path / "uids"))] == [
        ("2013", False),
        ("2014", True),
    ]
    assert times(f"{out}/2014") == before
    assert read_tars(f"{out}/2013") == slow_reshard(pool.path, pool.uids[2:])


def test_other_arguments_are_refused_and_overwrite_replaces(make_pool, write_uids, out):
    pool = make_pool((3, 2))
    subset, other = write_uids(pool.uids), write_uids(pool.uids[:1], "other")
    reshard(pool.path, out, subset, shard_size=2)
    Path(out, "notes.txt").write_text("mine")
    before = tree(out)
    for arguments, message in (
        ((pool.path, out, other, None, 2), f"{out} was made with another UID file; give --overwrite"),
        ((pool.path, out, subset, None, 3), f"{out} was made with another shard size; give --overwrite"),
        ((make_pool((4, 2), name="b").path, out, subset, None, 2), f"{out} was made with another pool; "),
    ):
        pool_path, output, subset_file, classes, size = arguments
        with pytest.raises(TicError, match=message):
            reshard(pool_path, output, subset_file, classes=classes, shard_size=size)
    assert tree(out) == before
    reshard(pool.path, out, other, shard_size=2, overwrite=True)
    assert read_tars(out) == slow_reshard(pool.path, pool.uids[:1])
    assert set(tree(out)) == {
        *("00000000.tar", "00000000_stats.json", "sizes.json", "meta.json", "sample_ids.npy", "notes.txt")
    }


@pytest.mark.parametrize("change", [lambda uids: uids[:3], lambda uids: [*uids[:4], ABSENT[0]]])
def test_other_uids_under_the_same_name_are_refused(make_pool, write_uids, out, change):
    pool = make_pool()
    reshard(pool.path, out, write_uids(pool.uids))
    subset = write_uids(change(pool.uids))
    with pytest.raises(TicError, match=f"{out} was made with another UID file; give --overwrite"):
        reshard(pool.path, out, subset)
    reshard(pool.path, out, subset, overwrite=True)
    assert read_tars(out) == slow_reshard(pool.path, change(pool.uids))


def test_the_pool_may_be_moved_and_spelt_another_way(make_pool, write_uids, out, tmp_path):
    pool = make_pool()
    subset = write_uids(pool.uids)
    reshard(pool.path, out, subset)
    Path(pool.path).rename(tmp_path / "moved")
    assert [split.reused for split in reshard(f"{tmp_path}//moved/", out, subset)] == [True]


@pytest.mark.parametrize("lost", ["00000001.tar", "sizes.json"])
def test_a_split_that_lost_a_file_is_made_again(make_pool, write_uids, out, lost):
    pool = make_pool()
    reshard(pool.path, out, write_uids(pool.uids), shard_size=2)
    before = tree(out)
    Path(out, lost).unlink()
    assert [split.reused for split in reshard(pool.path, out, write_uids(pool.uids), shard_size=2)] == [False]
    assert tree(out) == before


def test_an_output_that_is_a_file_is_refused(make_pool, write_uids, tmp_path):
    (tmp_path / "file").touch()
    pool = make_pool()
    with pytest.raises(TicError, match="file is no folder"):
        reshard(pool.path, str(tmp_path / "file"), write_uids(pool.uids))


def test_shards_of_others_are_left_alone(make_pool, write_uids, out):
    pool, other = make_pool(), make_pool(name="out")
    before = tree(out)
    with pytest.raises(TicError, match=f"{out} has shards that reshard did not write"):
        reshard(pool.path, out, write_uids(pool.uids))
    assert tree(out) == before
    assert other.path == out
    reshard(pool.path, out, write_uids(pool.uids), overwrite=True)
    assert read_tars(out) == slow_reshard(pool.path, pool.uids)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_pool_is_never_written_into(make_pool, write_uids, tmp_path, overwrite):
    pool = make_pool()
    subset = write_uids(pool.uids, "pool")
    before = tree(pool.path)
    for output, subsets in ((f"{pool.path}/../pool", subset), (str(tmp_path), str(Path(subset).parent))):
        with pytest.raises(TicError, match="is the pool; give another output folder"):
            reshard(pool.path, output, subsets, overwrite=overwrite)
    assert tree(pool.path) == before


class Killed(BaseException):
    """Ends the program at once."""


def kill_at(monkeypatch, number):
    """Die at the ``number``-th renaming or deleting of a file from now on; returns the list of those done."""
    done = []

    def dying(real):
        def call(*args, **kwargs):
            if len(done) >= number:
                raise Killed
            done.append(args)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    return done


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_it_is_finished_later(make_pool, write_uids, tmp_path, monkeypatch, overwrite):
    """With ``overwrite``, a split made with another shard size is being replaced when the program dies."""
    pool = make_pool((2, 1))
    subset, out = write_uids(pool.uids), tmp_path / "out"
    reshard(pool.path, str(out), subset, shard_size=2)
    expected, samples = tree(out), read_tars(out)
    for number in range(200):
        out = tmp_path / f"out{number}"
        if overwrite:
            reshard(pool.path, str(out), subset, shard_size=1)
        with monkeypatch.context() as patch:
            done = kill_at(patch, number)
            with suppress(Killed):
                reshard(pool.path, str(out), subset, shard_size=2, overwrite=overwrite)
        if (out / "meta.json").exists():  # the old split or the new one, but whole
            assert read_tars(out) == samples
        replace = overwrite and (out / "meta.json").exists()  # an unfinished split needs no --overwrite
        reshard(pool.path, str(out), subset, shard_size=2, overwrite=replace)
        assert tree(out) | {"started.json": b""} == expected | {"started.json": b""}  # it may stay, and harms nobody
        if len(done) < number:
            break
    assert 15 < number < 199


def test_what_a_killed_process_left_is_removed(make_pool, write_uids, out):
    pool = make_pool()
    for name in ("started.json", "00000000.tar", "00000007.tar", ".00000001.tar.123.tmp", "notes.txt"):
        Path(out).mkdir(exist_ok=True)
        Path(out, name).write_text("{}")
    reshard(pool.path, out, write_uids(pool.uids))
    assert set(tree(out)) == {
        *("00000000.tar", "00000000_stats.json", "sizes.json", "meta.json", "sample_ids.npy", "notes.txt")
    }


def test_dry_run_writes_nothing(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    write_uids(pool.uids[1:], "2014")
    write_uids(ABSENT, "2015")
    before = times(tmp_path)
    splits = reshard(pool.path, out, str(tmp_path / "uids"), shard_size=3, dry_run=True)
    assert [(s.name, s.wanted, s.num_samples, s.num_shards) for s in splits] == [("2014", 4, 4, 2), ("2015", 2, 0, 0)]
    assert times(tmp_path) == before


@pytest.mark.parametrize("damage", [lambda shard: shard[:700], lambda shard: b"", lambda shard: b"x" * 5000])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_damaged_pool_shard_is_named(make_pool, write_uids, out, damage, num_workers):
    pool = make_pool((2, 2))
    shard = Path(pool.path, "00000001.tar")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(TicError, match=f"^{shard}: "):
        reshard(pool.path, out, write_uids(pool.uids), num_workers=num_workers)
    assert not Path(out).exists()


def test_no_pool_and_no_subsets(make_pool, write_uids, tmp_path, out):
    pool, subset = make_pool(), write_uids([])
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wrong.npy", np.zeros(3, np.int64))
    empty, missing, wrong = (str(tmp_path / name) for name in ("empty", "missing", "wrong.npy"))
    for arguments, options, message in (
        ((missing, out, subset), {}, f"{missing} is missing or no folder"),
        ((empty, out, subset), {}, f"{empty} holds no .tar file"),
        ((pool.path, out, empty), {}, f"{empty} holds no .npy file of UIDs"),
        ((pool.path, out, missing), {}, f"{missing} is missing"),
        ((pool.path, out, wrong), {}, f"{wrong} has dtype int64"),
        ((pool.path, out, str(tmp_path)), {}, f"{wrong} has dtype int64"),
        ((pool.path, out, subset), {"classes": subset}, f"{subset} has dtype"),
        ((pool.path, out, subset), {"classes": missing}, f"{missing} is missing"),
        ((pool.path, out, subset), {"shard_size": 0}, "must be at least 1"),
        ((pool.path, out, subset), {"num_workers": 0}, "must be at least 1"),
    ):
        with pytest.raises(TicError, match=message):
            reshard(*arguments, **options)
    assert not Path(out).exists()


def test_unsorted_subset_is_refused(make_pool, tmp_path, out):
    pool = make_pool()
    rows = parse_uids(sorted(pool.uids))
    np.save(tmp_path / "x.npy", rows[[0, 1, 3, 2, 4]])
    with pytest.raises(TicError, match=r"x\.npy is not sorted"):
        reshard(pool.path, out, str(tmp_path / "x.npy"))


def test_subsets_by_name(write_uids, tmp_path):
    paths = {name: write_uids([], name) for name in ("b", "a", "c/2014.5", "c/d/e")}
    (tmp_path / "uids" / "notes.txt").touch()
    assert find_subsets(str(tmp_path / "uids")) == paths
    assert find_subsets(paths["a"]) == {"": paths["a"]}


# The script, and the cloud.


def script(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, **options)


def test_script(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    write_uids(pool.uids[1:], "2014")
    write_uids([*pool.uids[:1], *ABSENT], "2015")
    arguments = ["-i", pool.path, "-o", "out", "-s", "uids", "--shard-size", "3"]
    lines = "out/2014: {0}4 of 4 UIDs in 2 shards\nout/2015: {0}1 of 3 UIDs in 1 shards\n"
    for flags, state in ((["--dry-run"], "would write "), (["-j", "2"], ""), ([], "already there: ")):
        done = script(*arguments, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == lines.format(state)
        assert Path(out).exists() == (flags != ["--dry-run"])
    assert read_tars(f"{out}/2014") == slow_reshard(pool.path, pool.uids[1:])
    done = script(*arguments, "--shard-size", "9", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: out/2014 was made with another shard size; give --overwrite to replace it\n"
    assert script(*arguments, "--shard-size", "9", "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads(Path(out, "2014/sizes.json").read_text()) == {"00000000.tar": 4}


def test_script_without_a_pool(tmp_path):
    done = script("-i", "nothing", "-o", "out", "-s", "uids", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: nothing is missing or no folder\n")


def test_from_cloud_to_cloud(make_pool, write_uids, tmp_path, s3):
    pool = make_pool((3, 4, 2))
    subset = write_uids(pool.uids[1:] + pool.uids[:3])
    reshard(pool.path, str(tmp_path / "out"), subset, shard_size=4)
    to_path(f"{s3}/pool").upload_from(pool.path)
    (split,) = reshard(f"{s3}/pool", f"{s3}/out", subset, shard_size=4, num_workers=2)
    assert (split.path, split.num_samples, split.num_shards) == (f"{s3}/out", 11, 3)
    to_path(f"{s3}/out").download_to(tmp_path / "down")
    down, local = tree(tmp_path / "down"), tree(tmp_path / "out")
    assert json.loads(down.pop("meta.json"))["arguments"]["input_dir"] == f"{s3}/pool"
    local.pop("meta.json")
    assert down == local
    assert reshard(f"{s3}/pool", f"{s3}/out", subset, shard_size=4)[0].reused
    with pytest.raises(TicError, match="was made with another shard size"):
        reshard(f"{s3}/pool", f"{s3}/out", subset, shard_size=3)
    reshard(f"{s3}/pool", f"{s3}/out", subset, shard_size=12, overwrite=True)
    assert split_sizes(f"{s3}/out") == {f"{s3}/out/00000000.tar": 11}
    assert {path.name for path in to_path(f"{s3}/out").iterdir()} == {
        *("00000000.tar", "00000000_stats.json", "sizes.json", "meta.json", "sample_ids.npy")
    }


def test_resharding_a_split_again(make_pool, write_uids, tmp_path):
    """A split is a pool itself, with the same UIDs."""
    pool = make_pool()
    reshard(pool.path, str(tmp_path / "a"), write_uids(pool.uids))
    reshard(str(tmp_path / "a"), str(tmp_path / "b"), write_uids(pool.uids[:2], "b"))
    assert read_tars(tmp_path / "b") == slow_reshard(pool.path, pool.uids[:2])
    assert all(is_uid(key.removesuffix("-0")) for key, _ in read_tars(tmp_path / "b"))


def test_members_of_any_kind_are_carried_along(tmp_path, write_uids, out):
    members = {"jpg": b"\xff\xd8", "json": f'{{"uid": "{UID}"}}'.encode(), "txt": b"", "seg.npy": b"123"}
    write_shard(tmp_path / "pool/0.tar", [("a/b/0", members), ("c/1", {"webp": b""})])
    reshard(str(tmp_path / "pool"), out, write_uids([UID]))
    assert read_tars(out) == [(f"{UID}-0", members)]


def test_copy_needs_no_classes():
    assert copy.class_ids(None, parse_uids([UID, OTHER])) == [None, None]
