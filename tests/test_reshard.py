"""Resharding against slow versions that hold everything in dicts, and by hand: plan, index, whole, faults, script."""

import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from conftest import write_tar

from tic_clip import TicError
from tic_clip.data.reshard import find_subsets, index, part, plan, reshard, table
from tic_clip.data.split import HOW_TO_MAKE, split_sizes
from tic_clip.data.tar import END, headers, write_shard
from tic_clip.data.uids import CLASS_ROW, is_uid, parse_uids, save_uids
from tic_clip.parallel import make_pool

SCRIPT = Path(__file__).parents[1] / "dataset_creation/reshard.py"
ABSENT = ["0" * 32, "f" * 32]
UID = "0123456789abcdef0123456789abcdef"


def read_tars(folder):
    """[(key, {suffix: data})] of the tars below a folder, in order; members of a key that follow each other."""
    found = []
    for path in sorted(Path(folder).rglob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.split(".", 1)
                if not found or found[-1][0] != key or suffix in found[-1][1]:
                    found.append((key, {}))
                found[-1][1][suffix] = tar.extractfile(info).read()
    return found


def slow_reshard(pool, uids, classes=None):
    """What a split should hold, as DataComp's resharder has it: [(key, {suffix: data})] in the pool's order.

    A sample of the pool comes as often as its UID is in the sorted subset, under the keys {uid}-0, {uid}-1, …
    """
    wanted, found = sorted(uids), []
    for _, members in read_tars(pool):
        if not {"json", "txt", "png"} <= set(members):
            continue
        uid = json.loads(members["json"])["uid"].lower()
        for number in range(bisect_right(wanted, uid) - bisect_left(wanted, uid)):
            label = {"cls": str(classes[uid]).encode()} if classes and uid in classes else {}
            found.append((f"{uid}-{number}", members | label))
    return found


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def read_meta(split):
    return json.loads(Path(split, "meta.json").read_text())


def write_classes(path, classes):
    """Write a file of class ids from {uid: class id}."""
    rows = np.zeros(len(classes), dtype=CLASS_ROW)
    for name in ("f0", "f1"):
        rows[name] = parse_uids(classes)[name]
    rows["class_id"] = list(classes.values())
    save_uids(path, rows)
    return str(path)


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


@pytest.fixture
def indexed(monkeypatch):
    """The names of the pool shards that are read in this process, in order."""
    names = []
    real = part.index_shard
    monkeypatch.setattr(part, "index_shard", lambda job: names.append(Path(job.path).name) or real(job))
    return names


# The plan.


def pieces(found):
    return [(piece.number, piece.first, piece.last, piece.offset) for piece in found]


@pytest.mark.parametrize(
    ("start", "count", "size", "expected"),
    [
        (0, 0, 3, []),
        (5, 0, 3, []),
        (0, 3, 3, [(0, 0, 3, 0)]),
        (0, 4, 3, [(0, 0, 3, 0), (1, 3, 4, 0)]),
        (2, 5, 3, [(0, 0, 1, 0), (1, 1, 4, 0), (2, 4, 5, 0)]),
        (3, 2, 1, [(3, 0, 1, 0), (4, 1, 2, 0)]),
        (7, 2, 100, [(0, 0, 2, 0)]),
    ],
)
def test_cut_by_hand(start, count, size, expected):
    assert pieces(plan.cut(start, count, size)) == expected


def test_cutter_by_hand():
    cutter = plan.Cutter(4)
    assert pieces(cutter.place(np.array([10, 20, 30]))) == [(0, 0, 3, 0)]
    assert (cutter.rows, cutter.num_full) == (3, 0)
    assert pieces(cutter.place(np.array([1, 2, 3]))) == [(0, 0, 1, 60), (1, 1, 3, 0)]
    assert pieces(cutter.place(np.array([], np.int64))) == []
    assert pieces(cutter.place(np.array([5, 6, 7, 8, 9, 9, 9]))) == [(1, 0, 2, 5), (2, 2, 6, 0), (3, 6, 7, 0)]
    assert (cutter.rows, cutter.num_full) == (13, 3)
    cutter.skip(3)  # to the end of shard 3
    assert pieces(cutter.place(np.array([1]))) == [(4, 0, 1, 0)]


def test_cutter_against_a_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(100):
        size, cutter = int(rng.integers(1, 6)), plan.Cutter(4)
        cutter.shard_size = size
        shards = [rng.integers(1, 99, rng.integers(0, 9)) for _ in range(5)]
        found, offset, row = [], 0, 0
        for sizes in shards:
            for i, length in enumerate(sizes.tolist()):
                offset = 0 if row % size == 0 else offset
                found.append((row // size, i, offset))
                offset, row = offset + length, row + 1
        placed = [
            (piece.number, i, piece.offset + int(sizes[piece.first : i].sum()))
            for sizes in shards
            for piece in cutter.place(sizes)
            for i in range(piece.first, piece.last)
        ]
        assert placed == found


def slow_to_read(counts, known, finished, size):
    read = [not all(known[: i + 1]) for i in range(len(known))]
    for split, done in enumerate(finished):
        row = 0
        for shard, count in enumerate(counts):
            outputs = {(row + i) // size for i in range(count[split])}
            read[shard] |= not outputs <= done
            row += count[split]
    return read


def test_to_read_against_a_slow_version():
    rng = random.Random(0)
    seen = Counter()
    for _ in range(500):
        num_shards, num_splits, size = rng.randint(1, 8), rng.randint(1, 3), rng.randint(1, 5)
        counts = [[rng.choice((0, 0, 1, 2, 3, 9)) for _ in range(num_splits)] for _ in range(num_shards)]
        known = [rng.random() < 0.9 for _ in range(num_shards)]
        finished = [{i for i in range(30) if rng.random() < 0.8} for _ in range(num_splits)]
        read = plan.to_read(np.array(counts), np.array(known), finished, size)
        assert read.tolist() == slow_to_read(counts, known, finished, size)
        seen.update(read.tolist())
    assert min(seen[True], seen[False]) > 500


def test_to_read_by_hand():
    counts, known = np.array([[2], [0], [3], [1], [4]]), np.ones(5, bool)  # rows 0 1 | | 2 3 4 | 5 | 6 7 8 9
    for finished, expected in (({0, 1, 2, 3}, []), ({0, 1, 3}, [4]), ({0, 2, 3}, [2, 3]), ({1, 2}, [0, 2, 4])):
        assert np.flatnonzero(plan.to_read(counts, known, [finished], 3)).tolist() == expected
    known[1] = False
    assert np.flatnonzero(plan.to_read(counts, known, [{0, 1, 2, 3}], 3)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [1]), (5, [5]), (6, [5, 1]), (10, [5, 5]), (12, [5, 5, 2])]
)
def test_shard_counts(count, expected):
    assert plan.shard_counts(count, 5) == expected


def test_blocks():
    assert [plan.block(7, 3, i) for i in range(3)] == [range(0, 2), range(2, 4), range(4, 7)]
    for num_shards, parts in ((1, 1), (5, 5), (100, 7)):
        blocks = [plan.block(num_shards, parts, i) for i in range(parts)]
        assert list(itertools.chain(*blocks)) == list(range(num_shards))
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
    for parts, number, message in (
        (8, 0, "8 parts of 7 pool shards: give from 1 to 7 parts"),
        (0, 0, "0 parts of 7"),
        (3, 3, "there is no part 3: the parts are 0 to 2"),
        (3, -1, "there is no part -1"),
    ):
        with pytest.raises(TicError, match=message):
            plan.block(7, parts, number)


# The index.


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (f'{{"uid": "{UID}"}}', UID),
        (f'{{"a":1,"uid"\n:\t"{UID}"}}', UID),
        (f'{{"uid": "{UID.upper()}"}}', UID.upper()),
        (f'{{"exif": {{"uid": "x"}}, "uid": "{UID}", "a": [{{"uid": 3}}]}}', UID),
        (json.dumps({"caption": 'he said "uid": "x"', "uid": UID}), UID),
        (f'{{"\\u0075id": "\\u0030{UID[1:]}"}}', UID),
        (f'{{"uid": "x", "uid": "{UID}"}}', UID),
        (f'{{"similarity": NaN, "uid": "{UID}", "a": [-Infinity]}}', UID),
        (f'{{"caption": "\\ud83d", "uid": "{UID}"}}', UID),
        (f'{{"similarity": NaN, "caption": "\\ud83d", "uid": "{UID}"}}', UID),
        (f'{{"n": {"1" * 5000}, "uid": "{UID}"}}', UID),
        ('{"uid": ""}', ""),
        ('{"uid": 7}', None),
        ('{"uid": null}', None),
        ('{"UID": "a"}', None),
        ("{}", None),
        (f'["uid", "{UID}"]', None),
        ("NaN", None),
        ('"uid"', None),
    ],
)
def test_uid_of_a_record(record, expected):
    assert index.read_uid(record.encode()) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"uid": "a"',
        b'{"uid": "a"} x',
        b"{'uid': 'a'}",
        b'{"uid": "a",}',
        b"\xff{",
        b'{"uid": "\xff"}',
        b'{"uid": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"uid": "a", "y": NaN, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_no_json(data):
    with pytest.raises(ValueError):
        index.read_uid(data)


def good(key, **changes):
    """The members of a sample; a change is other data, or None to leave the member out."""
    uid = sha256(key.encode()).hexdigest()[:32]
    members = {"png": b"p" * 600, "json": json.dumps({"uid": uid}).encode(), "txt": b"t"} | changes
    return [(f"{key}.{suffix}", data) for suffix, data in members.items() if data is not None]


def special(name, kind, data=b"", **options):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, options.get("to", ""), len(data)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def members_of(entries):
    """The bytes of a tar without its end: (name, data) pairs are files, bytes go in as they are."""
    return b"".join(entry if isinstance(entry, bytes) else special(entry[0], b"0", entry[1]) for entry in entries)


def index_of(tmp_path, data, uids=()):
    """The index of a shard with these bytes, for one subset of all that is good in it."""
    (tmp_path / "0.tar").write_bytes(data)
    save_uids(tmp_path / "all.npy", parse_uids(uids))
    job = index.Job(path=str(tmp_path / "0.tar"), subsets=(str(tmp_path / "all.npy"),), classes=(None,))
    return index.index_shard(job)


def uid_of(key):
    return sha256(key.encode()).hexdigest()[:32]


NO_UIDS = (b'{"uid": "0123"}', b'{"uid": "' + b"g" * 32 + b'"}', b'{"uid": 7}', b"{}", b"[]", b'{"uid": "\\ud83d"}')


@pytest.mark.parametrize(
    ("entries", "dropped"),
    [
        (good("a"), {"duplicate key": 1}),
        ([*good("b"), *good("b"), *good("b")], {"duplicate key": 2}),
        ([*good("b"), *good("c"), *good("b"), *good("c")], {"duplicate key": 2}),
        ([*good("b")[:1], *good("c"), *good("b")[1:]], {"no json": 1, "duplicate key": 1}),
        ([*good("b"), ("b.png", b"2")], {"duplicate key": 1}),
        (good("b", json=None), {"no json": 1}),
        (good("b", json=None, png=None), {"no json": 1}),
        (good("b", png=None, gif=b"g"), {"no image": 1}),
        (good("b", txt=None), {"no text": 1}),
        (good("b", txt=b""), {"empty member": 1}),
        (good("b", png=b""), {"empty member": 1}),
        (good("b", png=b"p", jpg=b""), {"empty member": 1}),
        (good("b", json=b""), {"empty member": 1}),
        (good("b", json=b"{"), {"invalid json": 1}),
        (good("b", json=b"[" * 100_000), {"invalid json": 1}),
        ([entry for i, data in enumerate(NO_UIDS) for entry in good(f"b{i}", json=data)], {"no valid uid": 6}),
        (good("b", **{"s" * 57: b"x"}), {"name too long": 1}),
        ([*good("b", **{"s" * 57: b"x", "t" * 99: b"x"}), *good("c", **{"ß" * 29: b"x"})], {"name too long": 2}),
        ([*good("b", json=None), *good("c", txt=None), *good("d", json=None)], {"no json": 2, "no text": 1}),
    ],
)
def test_each_reason_is_counted(tmp_path, entries, dropped):
    wanted = [uid_of(key) for key in "az"]
    found = index_of(tmp_path, members_of([*good("a"), *entries, *good("z")]) + END, wanted)
    assert (found.fault, dict(found.dropped)) == (None, dropped)
    assert found.read == found.usable + sum(dropped.values())
    assert found.table.keys == ["a", "z"]
    assert found.uids.tolist() == parse_uids(wanted).tolist()


def test_what_is_no_fault(tmp_path):
    """Other members than the four, other kinds of images, unusual but readable JSON."""
    entries = [
        *good("a", **{"seg.npy": b"", "exif": b""}),
        *good("b", png=None, webp=b"w"),
        *good("c", png=None, JPEG=b"w"),
        *good("d", json=f'{{"uid": "{uid_of("d")}", "score": NaN, "caption": "\\ud83d"}}'.encode()),
    ]
    found = index_of(tmp_path, members_of(entries) + END, map(uid_of, "abcd"))
    assert (found.table.keys, found.read, dict(found.dropped), dict(found.noted)) == (list("abcd"), 4, {}, {})


def test_what_is_noted(tmp_path):
    upper = json.dumps({"uid": uid_of("b").upper()}).encode()
    entries = [
        *good("a"),
        *(special("a.jpg", kind, to="a.png") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
        special("folder/", tarfile.DIRTYPE),
        special("pipe.png", tarfile.FIFOTYPE),
        special("label", b"V"),
        special("sparse.png", tarfile.GNUTYPE_SPARSE, b"data"),
        *((name, b"x") for name in ("README", ".png", "folder/.DS_Store", "folder/x")),
        *good("b", json=upper),
    ]
    found = index_of(tmp_path, members_of(entries) + END, [uid_of("a"), uid_of("b")])
    assert (found.read, found.usable, dict(found.dropped)) == (2, 2, {})
    assert dict(found.noted) == {
        "link": 2,
        "directory": 1,
        "device": 1,
        "other entry": 2,
        "file without a key or a suffix": 4,
        "upper-case uid": 1,
    }
    assert found.table.keys == ["a", "b"]


def test_upper_case_uid_becomes_a_lower_case_key(tmp_path, write_uids, out):
    uid = uid_of("a")
    write_tar_of(tmp_path, good("a", json=json.dumps({"uid": uid.upper()}).encode()))
    reshard(str(tmp_path / "pool"), out, write_uids([uid]))
    assert [key for key, _ in read_tars(out)] == [f"{uid}-0"]
    assert read_meta(out)["noted"] == {"upper-case uid": 1}


def write_tar_of(tmp_path, *shards):
    (tmp_path / "pool").mkdir()
    for number, members in enumerate(shards):
        write_tar(tmp_path / "pool" / f"{number:08d}.tar", members)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_the_pool(tmp_path, write_uids, out, form):
    keys = ["k" * 120, "folder/" * 30 + "größe", "a"]
    (tmp_path / "pool").mkdir()
    with tarfile.open(tmp_path / "pool/0.tar", "w", format=form) as tar:
        for name, data in [member for key in keys for member in good(key)]:
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", name)
    reshard(str(tmp_path / "pool"), out, write_uids(map(uid_of, keys)))
    assert [key for key, _ in read_tars(out)] == [f"{uid_of(key)}-0" for key in keys]
    assert read_meta(out)["noted"] == {}


DAMAGES = [
    (lambda data: b"", "empty file"),
    (lambda data: data[:700], "truncated"),
    (lambda data: data[: -(-len(data.rstrip(b"\0")) // 512) * 512], "truncated: no end of the tar"),
    (lambda data: data.replace(b".json\0", b".jsom\0", 1), "wrong header checksum at byte "),
    (lambda data: b"<html>404</html>" * 100, "damaged header at byte 0"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_fault_of_a_shard(tmp_path, damage, message):
    whole = members_of([*good("a"), *good("b")]) + END
    assert index_of(tmp_path, whole, [uid_of("a")]).fault is None
    found = index_of(tmp_path, damage(whole), [uid_of("a")])
    assert found.fault.startswith(message)
    assert (found.read, found.rows, found.dropped) == (0, [], Counter())


def test_shard_without_a_sample(tmp_path):
    found = index_of(tmp_path, END, [uid_of("a")])
    assert (found.fault, found.read, len(found.rows[0].sample)) == (None, 0, 0)


def test_rows_by_hand(tmp_path):
    """A sample twice in one subset and once in another, with a class that it had and one that it had not."""
    entries = [*good("a", cls=b"7"), *good("b"), *good("c"), *good("d")]
    (tmp_path / "0.tar").write_bytes(members_of(entries) + END)
    a, b, c, d = map(uid_of, "abcd")
    for name, chosen in (("x", [a, a, c]), ("y", [c, b])):
        save_uids(tmp_path / name, parse_uids(chosen))
    classes = write_classes(tmp_path / "classes", {a: 3, c: 12, d: 5})
    subsets = (str(tmp_path / "x"), str(tmp_path / "y"))
    found = index.index_shard(index.Job(path=str(tmp_path / "0.tar"), subsets=subsets, classes=(classes, None)))
    assert found.table.keys == ["a", "b", "c"]
    x, y = found.rows
    whole = 512 * (1 + 2 + 1 + 1 + 1 + 1)  # png with its two blocks, json, txt
    assert (x.sample.tolist(), x.copy.tolist(), x.label.tolist()) == ([0, 0, 2], [0, 1, 0], [3, 3, 12])
    assert x.size.tolist() == [whole + 1024] * 3
    assert (y.sample.tolist(), y.copy.tolist(), y.label.tolist()) == ([1, 2], [0, 0], [-1, -1])
    assert y.size.tolist() == [whole] * 2
    assert (x.num_samples, y.num_samples) == (2, 2)


# The whole.


def test_many_subsets_in_one_pass(make_pool, write_uids, out, indexed):
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
    splits = reshard(pool.path, out, str(Path(out).parent / "uids"), shard_size=4)
    assert indexed == [f"{i:08d}.tar" for i in range(4)]
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
        assert split.num_bytes == sum(path.stat().st_size for path in Path(split.path).glob("*.tar"))
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
    assert read_meta(out) == {
        "output_shard_count": len(expected),
        "output_count": 6,
        "output_bytes": sum(read[f"{name}.tar"].stat().st_size for name in names),
        "output_shard_format": "{:08d}.tar",
        "subset_count": 6,
        "processed_count": 6,
        "kept_count": 6,
        "dropped": {},
        "noted": {},
        "bad_shards": {},
        "arguments": {
            "input_dir": pool.path,
            "cls_file": None,
            "shard_size": size,
            "parts": 1,
            "part": 0,
            "pool": sha256("".join(f"{t.name} {t.stat().st_size}\n" for t in tars_of(pool)).encode()).hexdigest(),
            "classes": None,
            "subset_file": subset,
            "subset": sha256(Path(subset).read_bytes()[128:]).hexdigest(),
        },
    }


def tars_of(pool):
    return sorted(Path(pool.path).glob("*.tar"))


def test_random_pools_against_the_slow_version(tmp_path):
    """Any samples per shard, members, repeats, shard sizes and classes; the headers are those of ``headers``."""
    rng = random.Random(1)
    for case in range(25):
        folder, number, uids = tmp_path / str(case), 0, []
        (folder / "pool").mkdir(parents=True)
        for shard in range(rng.randint(1, 5)):
            written = []
            for _ in range(rng.randint(0, 6)):
                number += 1
                changes = {
                    "png": bytes(rng.choices(range(256), k=rng.choice((1, 511, 512, 513, 5000)))),
                    "cls": rng.choice((None, b"1", b"x" * 700)),
                    "txt": rng.choice((b"t", b"t", b"t", None)),
                    "npy": rng.choice((None, b"", b"n" * 512)),
                }
                written += rng.sample(sample := good(str(number), **changes), len(sample))
                uids.append(uid_of(str(number)))
            write_tar(folder / "pool" / f"{shard}.tar", written)
        subsets = {name: rng.choices([*uids, *ABSENT], k=rng.randint(0, 2 * len(uids))) for name in "abc"}
        for name, chosen in subsets.items():
            save_uids(folder / "uids" / f"{name}.npy", parse_uids(chosen))
        classes = {uid: rng.choice((0, 7, 2**31 - 1)) for uid in uids if rng.random() < 0.5}
        table = write_classes(folder / "classes.npy", classes) if case % 2 and classes else None
        size = rng.choice((1, 2, 3, 100))
        reshard(f"{folder}/pool", f"{folder}/out", f"{folder}/uids", shard_size=size, classes=table)
        for name, chosen in subsets.items():
            split = f"{folder}/out/{name}"
            assert read_tars(split) == slow_reshard(f"{folder}/pool", chosen, classes if table else None)
            assert all(count == size for count in list(split_counts(split))[:-1])
            for path in Path(split).glob("*.tar"):
                assert path.read_bytes() == written_by_hand(path)


def split_counts(split):
    return json.loads(Path(split, "sizes.json").read_text()).values()


def written_by_hand(path):
    """A tar with the same members, put together from headers, data and padding, one by one."""
    with tarfile.open(path) as tar:
        found = [(info.name, tar.extractfile(info).read()) for info in tar]
    blocks = [
        headers([name.encode()], np.array([len(data)])).tobytes() + data + bytes(-len(data) % 512)
        for name, data in found
    ]
    return b"".join(blocks) + END


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


def test_same_samples_whatever_the_shard_size(make_pool, write_uids, tmp_path):
    pool = make_pool((4, 5, 3))
    subset = write_uids(pool.uids + pool.uids[3:6])
    contents = []
    for size in (1, 2, 5, 1000):
        reshard(pool.path, f"{tmp_path}/{size}", subset, shard_size=size)
        contents.append(b"".join(path.read_bytes()[:-1024] for path in sorted(Path(tmp_path, str(size)).glob("*.tar"))))
    assert read_tars(tmp_path / "2") == slow_reshard(pool.path, pool.uids + pool.uids[3:6])
    assert len(set(contents)) == 1


def test_uids_that_share_half_their_bits_are_told_apart(make_pool, write_uids, out):
    words = ["0" * 16, "0" * 15 + "1", "8" + "0" * 15, "f" * 16]
    uids = [high + low for high in words for low in words]

    def set_uid(number, members):
        members["json"] = json.dumps({"uid": uids[number]}).encode()

    pool = make_pool((7, 9), edit=set_uid)
    rng = random.Random(2)
    for case in range(20):
        chosen = rng.choices(uids, k=rng.randint(1, 20))
        subset = write_uids(chosen, str(case))
        reshard(pool.path, f"{out}/{case}", subset)
        keys = Counter(key.split("-")[0] for key, _ in read_tars(f"{out}/{case}"))
        assert keys == Counter(chosen)
        assert read_tars(f"{out}/{case}") == slow_reshard(pool.path, chosen)


def test_classes_go_to_listed_samples_only(make_pool, write_uids, tmp_path, out):
    def add_class(number, members):
        if number < 2:
            members["cls"] = b"999"

    pool = make_pool((3, 3), edit=add_class)
    uids = pool.uids
    classes = {uids[0]: 0, uids[2]: 17, uids[5]: 3}
    chosen = [*uids[:5], uids[2]]
    reshard(pool.path, out, write_uids(chosen), classes=write_classes(tmp_path / "classes.npy", classes))
    read = read_tars(out)
    assert read == slow_reshard(pool.path, chosen, classes)
    assert [members.get("cls") for _, members in read] == [b"0", b"999", b"17", b"17", None, None]
    with tarfile.open(f"{out}/00000000.tar") as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 6 * 3 + 4


def test_folder_of_classes(make_pool, write_uids, tmp_path, out):
    """Each subset has the class file of its own name; one that has none gets no classes."""
    pool = make_pool((3, 2))
    for name in ("2014", "2015", "months/01"):
        write_uids(pool.uids, name)
    tables = {"2014": {pool.uids[0]: 1, pool.uids[4]: 2}, "months/01": {pool.uids[0]: 30}}
    for name, classes in tables.items():
        write_classes(tmp_path / "classes" / f"{name}.npy", classes)
    reshard(pool.path, out, str(tmp_path / "uids"), classes=str(tmp_path / "classes"))
    for name in ("2014", "2015", "months/01"):
        assert read_tars(f"{out}/{name}") == slow_reshard(pool.path, pool.uids, tables.get(name))
    assert read_meta(f"{out}/2015")["arguments"]["cls_file"] is None
    with pytest.raises(TicError, match=r"classes has a \{name\}\.npy for none of the subsets"):
        reshard(pool.path, f"{out}2", write_uids(pool.uids, "other"), classes=str(tmp_path / "classes"))


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
    chosen = [pool.uids[i] for i in (0, 1, 2, 3, 5, 6, 6)]
    reshard(pool.path, out, write_uids(chosen))
    keys = [f"{pool.uids[1]}-0", f"{pool.uids[6]}-0", f"{pool.uids[6]}-1"]
    assert [key for key, _ in read_tars(out)] == keys
    meta = read_meta(out)
    assert meta["dropped"] == {"no image": 3, "no json": 2, "no text": 1, "no valid uid": 1, "not in the subset": 2}
    assert (meta["processed_count"], meta["kept_count"], meta["output_count"]) == (11, 2, 3)
    assert meta["noted"] == {"upper-case uid": 1}


def test_counts_that_do_not_add_up_are_an_error(make_pool, write_uids, out, monkeypatch):
    real = part.index_shard

    def miscounting(job):
        found = real(job)
        found.read += 1
        return found

    monkeypatch.setattr(part, "index_shard", miscounting)
    pool = make_pool((2, 1))
    with pytest.raises(TicError, match=f"{out}: 5 samples read, but 3 kept and 0 dropped"):
        reshard(pool.path, out, write_uids(pool.uids))
    assert not Path(out, "meta.json").exists()


def test_pool_with_nothing_that_can_be_used(make_pool, write_uids, out):
    pool = make_pool((2, 1), edit=lambda number, members: members.pop("json"))
    (split,) = reshard(pool.path, out, write_uids(pool.uids))
    assert (split.wanted, split.num_samples) == (3, 0)
    assert read_meta(out)["dropped"] == {"no json": 3}


@pytest.mark.parametrize("uids", [[], ABSENT])
def test_subset_without_a_sample(make_pool, write_uids, out, uids):
    pool, subset = make_pool(), write_uids(uids)
    (split,) = reshard(pool.path, out, subset)
    assert (split.wanted, split.num_samples, split.num_shards) == (len(uids), 0, 0)
    assert set(tree(out)) == {"meta.json", "sizes.json", "sample_ids.npy"}
    assert json.loads(Path(out, "sizes.json").read_text()) == {}
    assert reshard(pool.path, out, subset)[0].reused


def test_resharding_a_split_again(make_pool, write_uids, tmp_path):
    """A split is a pool itself, with the same UIDs."""
    pool = make_pool()
    reshard(pool.path, str(tmp_path / "a"), write_uids(pool.uids))
    reshard(str(tmp_path / "a"), str(tmp_path / "b"), write_uids(pool.uids[:2], "b"))
    assert read_tars(tmp_path / "b") == slow_reshard(pool.path, pool.uids[:2])
    assert all(is_uid(key.removesuffix("-0")) for key, _ in read_tars(tmp_path / "b"))


def test_members_of_any_kind_are_carried_along(tmp_path, write_uids, out):
    members = {"jpg": b"\xff\xd8", "json": f'{{"uid": "{UID}"}}'.encode(), "txt": b" ", "seg.npy": b"", "s" * 56: b"1"}
    write_shard(tmp_path / "pool/0.tar", [("a/b/0", members), ("c/1", {"webp": b""})])
    reshard(str(tmp_path / "pool"), out, write_uids([UID]))
    assert read_tars(out) == [(f"{UID}-0", members)]


# Pool shards that can't be read.


def spoil_shard(pool, damage, number=1):
    """Damage a shard of a pool; returns its path, and how to repair it."""
    path = tars_of(pool)[number]
    data = path.read_bytes()
    path.write_bytes(damage(data))
    return path, lambda: path.write_bytes(data)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_bad_shard_then_left_out(make_pool, write_uids, out, indexed, damage, message):
    pool = make_pool((2, 2, 3, 2))
    subset = write_uids(pool.uids)
    bad, _ = spoil_shard(pool, damage)
    with pytest.raises(TicError) as error:
        reshard(pool.path, out, subset, shard_size=2)
    assert str(error.value).startswith(f"pool shards that can't be read: 1 ({bad}: {message}")
    assert str(error.value).endswith("; --skip-bad-shards leaves them out")
    assert len(indexed) == 4
    rest = [uid for i, uid in enumerate(pool.uids) if i not in (2, 3)]
    assert [key for key, _ in read_tars(out)] == [f"{uid}-0" for uid in rest]
    assert not Path(out, "meta.json").exists()
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(out).glob("*.tar")}
    indexed.clear()
    (split,) = reshard(pool.path, out, subset, shard_size=2, skip_bad_shards=True)
    assert indexed == [bad.name]  # whether it has been repaired
    assert split.num_samples == 7
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in Path(out).glob("*.tar")} == before
    meta = read_meta(out)
    assert list(meta["bad_shards"]) == [str(bad)]
    assert meta["bad_shards"][str(bad)].startswith(message)
    assert meta["processed_count"] == meta["kept_count"] == 7
    assert not Path(out, ".reshard").exists()


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_bad_shard_then_repaired(make_pool, write_uids, tmp_path, out, damage, message):
    pool = make_pool((2, 2, 3, 2))
    subset = write_uids(pool.uids)
    reshard(pool.path, str(tmp_path / "undisturbed"), subset, shard_size=2)
    _, repair = spoil_shard(pool, damage)
    with pytest.raises(TicError, match="can't be read"):
        reshard(pool.path, out, subset, shard_size=2)
    repair()
    reshard(pool.path, out, subset, shard_size=2)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_bad_shard_left_out_at_once(make_pool, write_uids, tmp_path, num_workers):
    pool = make_pool((2, 2, 3, 2))
    write_uids(pool.uids[:5] + pool.uids[:1], "a")
    write_uids(pool.uids[3:], "b")
    bad, _ = spoil_shard(pool, DAMAGES[1][0])
    splits = reshard(
        pool.path, str(tmp_path / "out"), str(tmp_path / "uids"), num_workers=num_workers, skip_bad_shards=True
    )
    assert [(split.name, split.num_samples, split.wanted) for split in splits] == [("a", 4, 6), ("b", 5, 6)]
    for split in splits:
        meta = read_meta(split.path)
        assert list(meta["bad_shards"]) == [str(bad)]
        assert meta["processed_count"] == 7 == meta["kept_count"] + sum(meta["dropped"].values())


def test_many_bad_shards_are_one_line(make_pool, write_uids, out):
    pool = make_pool((1, 1, 1, 1, 1))
    for path in tars_of(pool):
        path.write_bytes(b"")
    shown = "; ".join(f"{path}: empty file" for path in tars_of(pool)[:3])
    with pytest.raises(TicError) as error:
        reshard(pool.path, out, write_uids(pool.uids))
    assert str(error.value) == (
        f"pool shards that can't be read: 5 ({shown}; and 2 more); --skip-bad-shards leaves them out"
    )


def test_bad_shard_in_a_dry_run(make_pool, write_uids, out):
    pool = make_pool((2, 2))
    bad, _ = spoil_shard(pool, DAMAGES[0][0])
    with pytest.raises(TicError, match=f"{bad}: empty file"):
        reshard(pool.path, out, write_uids(pool.uids), dry_run=True)
    (split,) = reshard(pool.path, out, write_uids(pool.uids), dry_run=True, skip_bad_shards=True)
    assert (split.num_samples, Path(out).exists()) == (2, False)


# Again, over, and what is refused.


def test_again_does_nothing(make_pool, write_uids, tmp_path, out, indexed):
    pool = make_pool()
    write_uids(pool.uids, "2014")
    first = reshard(pool.path, out, str(tmp_path / "uids"))
    before = times(out)
    indexed.clear()
    (split,) = reshard(pool.path, out, str(tmp_path / "uids"))
    assert split.reused
    assert (split.wanted, split.num_samples, split.num_shards) == (5, 5, 1)
    assert not first[0].reused
    assert (times(out), indexed) == (before, [])


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


def test_other_arguments_are_refused_and_overwrite_replaces(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    subset, other = write_uids(pool.uids), write_uids(pool.uids[:1], "other")
    classes = write_classes(tmp_path / "classes.npy", {pool.uids[0]: 3})
    reshard(pool.path, out, subset, shard_size=2)
    Path(out, "notes.txt").write_text("mine")
    before = tree(out)
    for arguments, message in (
        ((pool.path, out, other, None, 2), f"{out} was made with another UID file; give --overwrite"),
        ((pool.path, out, subset, None, 3), f"{out} was made with another shard size; give --overwrite"),
        ((pool.path, out, subset, classes, 2), f"{out} was made with another class file; give --overwrite"),
        ((pool.path, out, other, classes, 3), "with another UID file and class file and shard size; "),
        ((make_pool((4, 2), name="b").path, out, subset, None, 2), f"{out} was made with another pool; "),
    ):
        pool_path, output, subset_file, class_file, size = arguments
        with pytest.raises(TicError, match=message):
            reshard(pool_path, output, subset_file, classes=class_file, shard_size=size)
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
    with pytest.raises(TicError, match=f"{out} has shards of something else"):
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
        with pytest.raises(TicError, match="holds shards of the pool; give another output folder"):
            reshard(pool.path, output, subsets, overwrite=overwrite)
    assert tree(pool.path) == before


def test_dry_run_writes_nothing(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    write_uids(pool.uids[1:], "2014")
    write_uids(ABSENT, "2015")
    before = times(tmp_path)
    splits = reshard(pool.path, out, str(tmp_path / "uids"), shard_size=3, dry_run=True)
    assert [(s.name, s.wanted, s.num_samples, s.num_shards) for s in splits] == [("2014", 4, 4, 2), ("2015", 2, 0, 0)]
    assert times(tmp_path) == before


def test_no_pool_and_no_subsets(make_pool, write_uids, tmp_path, out):
    pool, subset = make_pool(), write_uids([])
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "wrong.npy", np.zeros(3, np.int64))
    empty, missing, wrong = (str(tmp_path / name) for name in ("empty", "missing", "wrong.npy"))
    for arguments, options, message in (
        ((missing, out, subset), {}, f"{missing} is missing or not a folder"),
        ((empty, out, subset), {}, f"{empty} holds no .tar file"),
        ((pool.path, out, empty), {}, f"{empty} holds no .npy file of UIDs"),
        ((pool.path, out, missing), {}, f"{missing} is missing"),
        ((pool.path, out, wrong), {}, f"{wrong} has dtype int64"),
        ((pool.path, out, str(tmp_path)), {}, f"{wrong} has dtype int64"),
        ((pool.path, out, subset), {"classes": subset}, f"{subset} has dtype"),
        ((pool.path, out, subset), {"classes": missing}, f"{missing} is missing"),
        ((pool.path, out, subset), {"shard_size": 0}, "must be at least 1"),
        ((pool.path, out, subset), {"num_workers": 0}, "must be at least 1"),
        ((pool.path, out, subset), {"engine": "slurm"}, "unknown engine 'slurm'; the engines are local, ray"),
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


# Processes.


def square(number):
    return number * number


def fail(number):
    raise TicError(f"job {number}")


@pytest.mark.parametrize(("count", "fork"), [(1, False), (2, False), (2, True)])
def test_workers(count, fork):
    with make_pool(count, fork=fork) as executor:
        assert [executor.submit(square, i).result() for i in range(5)] == [0, 1, 4, 9, 16]
        with pytest.raises(TicError, match="job 3"):
            executor.submit(fail, 3).result()


def test_worker_that_dies(make_pool, write_uids, out, monkeypatch):
    """Both processes of a run die at the third pool shard; the message names what they were at."""
    real = part.index_shard
    monkeypatch.setattr(part, "index_shard", lambda job: os._exit(1) if "00000002" in job.path else real(job))
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # so that processes are copies of this one
    pool = make_pool((1, 1, 1, 1))
    with pytest.raises(TicError, match=r"a worker process died .*00000002\.tar.*; try fewer workers"):
        reshard(pool.path, out, write_uids(pool.uids), num_workers=2)
    monkeypatch.undo()
    reshard(pool.path, out, write_uids(pool.uids))
    assert read_tars(out) == slow_reshard(pool.path, pool.uids)


# The script.


def script(*arguments, **options):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, **options)


def test_script(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    write_uids(pool.uids[1:], "2014")
    write_uids([*pool.uids[:1], *ABSENT], "2015")
    arguments = ["-i", pool.path, "-o", "out", "-s", "uids", "--shard-size", "3"]
    for flags in (["--dry-run"], ["-j", "2"], []):
        done = script(*arguments, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        title, first, second, *last = done.stdout.splitlines()
        assert title.split() == ["split", "samples", "shards", "size", "coverage"]
        assert (first.split()[:3], second.split()[:3]) == (["out/2014", "4", "2"], ["out/2015", "1", "1"])
        assert ("100.0 % of 4" in first, "33.3 % of 3" in second) == (True, True)
        assert ("already there" in first, "already there" in second) == (not flags, not flags)
        assert last == (["dry run: nothing was written"] if flags == ["--dry-run"] else [])
        assert Path(out).exists() == (flags != ["--dry-run"])
    assert read_tars(f"{out}/2014") == slow_reshard(pool.path, pool.uids[1:])
    done = script(*arguments, "--shard-size", "9", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: out/2014 was made with another shard size; give --overwrite to replace it\n"
    assert script(*arguments, "--shard-size", "9", "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads(Path(out, "2014/sizes.json").read_text()) == {"00000000.tar": 4}


def test_script_with_a_bad_shard(make_pool, write_uids, tmp_path):
    pool = make_pool((2, 2, 1))
    write_uids(pool.uids)
    bad, _ = spoil_shard(pool, DAMAGES[1][0])
    done = script("-i", "pool", "-o", "out", "-s", "uids/2014.npy", "-j", "2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: pool shards that can't be read: 1 (pool/{bad.name}: ")
    assert "Traceback" not in done.stderr
    done = script("-i", "pool", "-o", "out", "-s", "uids/2014.npy", "--skip-bad-shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_script_without_a_pool(tmp_path):
    done = script("-i", "nothing", "-o", "out", "-s", "uids", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"error: nothing is missing or not a folder: {HOW_TO_MAKE}\n",
    )


def test_an_output_never_touches_the_pool(make_pool, write_uids, tmp_path):
    """A pool may be folders of tars: none of them is an output, and none of the outputs is a part of the next pool."""
    pool = make_pool((2, 2), name="pool/2014")
    root, subset = f"{tmp_path}/pool", write_uids(pool.uids, "2014")
    folder, before = str(Path(subset).parent), tree(root)
    (tmp_path / "link").symlink_to(root)
    for output, subsets, message in (
        (root, folder, "pool/2014 holds shards of the pool"),
        (f"{tmp_path}/link", folder, "pool/2014 holds shards of the pool"),
        (f"{root}/2014", subset, "pool/2014 holds shards of the pool"),
        (f"{root}/other", subset, "pool/other lies among the folders of the pool"),
    ):
        for options in ({}, {"overwrite": True}, {"dry_run": True}, {"parts": 2, "overwrite": True}):
            with pytest.raises(TicError, match=message):
                reshard(root, output, subsets, **options)
    assert tree(root) == before


@pytest.mark.parametrize("empty", range(3))
def test_empty_paths_are_not_this_folder(make_pool, write_uids, out, empty):
    pool = make_pool()
    paths = [pool.path, out, write_uids(pool.uids)]
    paths[empty] = ""
    with pytest.raises(TicError, match="is empty"):
        reshard(*paths)


def test_a_split_without_bad_shards_is_kept_only_on_demand(make_pool, write_uids, out):
    pool = make_pool((2, 2))
    subset = write_uids(pool.uids)
    Path(pool.path, "00000002.tar").symlink_to("nowhere")
    (split,) = reshard(pool.path, out, subset, skip_bad_shards=True)
    assert (split.num_samples, split.num_bad) == (4, 1)
    assert "without 1 bad pool shards" in table([split])
    assert reshard(pool.path, out, subset, skip_bad_shards=True)[0].reused
    with pytest.raises(TicError, match="was made without 1 pool shards that could not be read; --skip-bad-shards"):
        reshard(pool.path, out, subset)
    with pytest.raises(TicError, match=r"can't be read: 1 .*00000002\.tar: .* is missing"):
        reshard(pool.path, out, subset, overwrite=True)


@pytest.mark.parametrize("lost", ["00000000_stats.json", "sample_ids.npy"])
def test_a_lost_table_is_made_again(make_pool, write_uids, out, lost):
    pool = make_pool()
    reshard(pool.path, out, write_uids(pool.uids))
    before = tree(out)
    Path(out, lost).unlink()
    reshard(pool.path, out, write_uids(pool.uids))
    assert tree(out) == before


def test_a_broken_table_is_replaced_on_demand(make_pool, write_uids, out):
    pool = make_pool()
    subset = write_uids(pool.uids)
    reshard(pool.path, out, subset)
    before = tree(out)
    Path(out, "meta.json").write_text("{")
    with pytest.raises(TicError, match="not valid JSON"):
        reshard(pool.path, out, subset)
    reshard(pool.path, out, subset, overwrite=True)
    assert tree(out) == before
    Path(out, "sizes.json").write_text("{")
    reshard(pool.path, out, subset)
    assert tree(out) == before
