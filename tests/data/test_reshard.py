"""Resharding through its function and its command, against a slow version that holds everything in memory."""

import errno
import io
import json
import os
import shutil
import tarfile
from bisect import bisect_left, bisect_right
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, read_tars, times, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tar import raw

from tic_clip import TicError
from tic_clip.data.folder import table
from tic_clip.data.reshard import find_subsets, index, part, reshard
from tic_clip.data.split import read_meta, split_sizes
from tic_clip.data.tar import END
from tic_clip.data.uids import CLASS_ROW, parse_uids, save_uids

SCRIPT = ROOT / "dataset_creation/reshard.py"
ABSENT = ["0" * 32, "f" * 32]


def slow_reshard(pool, uids, classes=None):
    """What a split should hold: [(key, {suffix: data})] in the pool's order.

    A sample comes as often as its UID is in the list, under the keys {uid}-0, {uid}-1, …; a UID that the pool has twice
    counts once.
    """
    wanted, found, seen = sorted(uids), [], set()
    for _, members in read_tars(pool):
        if not {"json", "txt", "png"} <= set(members):
            continue
        uid = json.loads(members["json"])["uid"].lower()
        copies = 0 if uid in seen else bisect_right(wanted, uid) - bisect_left(wanted, uid)
        seen.add(uid)
        for number in range(copies):
            cls = {"cls": str(classes[uid]).encode()} if classes and uid in classes else {}
            found.append((f"{uid}-{number}", members | cls))
    return found


def write_classes(path, classes):
    """Write a file of class ids from {uid: class id}."""
    rows = np.zeros(len(classes), dtype=CLASS_ROW)
    rows[["f0", "f1"]] = parse_uids(classes)
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
    names, real = [], part.index_shard
    monkeypatch.setattr(part, "index_shard", lambda *args: names.append(Path(args[-1]).name) or real(*args))
    return names


def good(key, **changes):
    """The members of a sample; a change is other data, or None to leave the member out."""
    members = {"png": b"p" * 600, "json": json.dumps({"uid": uid_of(key)}).encode(), "txt": b"t"} | changes
    return [(f"{key}.{suffix}", data) for suffix, data in members.items() if data is not None]


def write_pool(folder, entries):
    """Write a pool of one shard and return its path: (name, data) pairs are files, bytes go in as they are."""
    folder.mkdir()
    members = [entry if isinstance(entry, bytes) else raw(*entry) for entry in entries]
    (folder / "00000000.tar").write_bytes(b"".join(members) + END)
    return str(folder)


def uid_of(key):
    return sha256(key.encode()).hexdigest()[:32]


NO_UIDS = [b'{"uid": %s}' % uid for uid in (b'"%031d"' % 0, b'"%033d"' % 0, b'"%s"' % (b"g" * 32), b"7", b'"\\ud83d"')]
NO_UIDS += [b"{}", b"[]"]
DIGITS = b'{"uid": "%s", "n": %s}'


@pytest.mark.parametrize(
    ("entries", "dropped"),
    [
        ([*good("b"), *good("b"), *good("b")], {"duplicate key": 2, "not in the subset": 1}),
        ([*good("b")[:1], *good("c"), *good("b")[1:]], {"no json": 1, "duplicate key": 1, "not in the subset": 1}),
        (good("b", json=None, png=None), {"no json": 1}),
        (good("b", png=None, gif=b"g"), {"no image": 1}),
        (good("b", txt=None), {"no text": 1}),
        *((good("b", **{"png": b"p", suffix: b""}), {"empty member": 1}) for suffix in ("txt", "png", "jpg", "json")),
        *((good("b", json=data), {"invalid json": 1}) for data in (b"{", b"[" * 100_000)),
        (good("b", json=b'{"uid": "%s", "caption": "\xff"}' % uid_of("b").encode()), {"invalid json": 1}),
        (good("b", json=DIGITS % (uid_of("b").encode(), b"1" * 4301)), {"invalid json": 1}),
        ([entry for i, data in enumerate(NO_UIDS) for entry in good(f"b{i}", json=data)], {"no valid uid": 7}),
        ([*good("b", **{"s" * 57: b"x", "t" * 98: b"x"}), *good("c", **{"ß" * 29: b"x"})], {"name too long": 2}),
        ([raw("b.png", b"data", tarfile.GNUTYPE_SPARSE), *good("b", png=None)], {"sparse member": 1}),
        (good("b", json=json.dumps({"uid": uid_of("a")}).encode()), {"duplicate uid in the pool": 1}),
    ],
)
def test_each_reason_is_counted(tmp_path, write_uids, out, entries, dropped):
    pool = write_pool(tmp_path / "pool", [*good("a"), *entries, *good("z")])
    reshard(pool, out, write_uids(map(uid_of, "az")))
    assert [key for key, _ in read_tars(out)] == [f"{uid_of(key)}-0" for key in "az"]
    meta = read_meta(out)
    assert meta["dropped"] == dropped
    assert (meta["processed_count"], meta["kept_count"]) == (2 + sum(dropped.values()), 2)


def test_what_is_no_fault(tmp_path, write_uids, out):
    """Other members and kinds of images, odd but readable JSON, long names, entries that are not files."""
    entries = [
        *good("a", **{"seg.npy": b"", "exif": b"", "s" * 56: b"1"}),
        *good("b", png=None, webp=b"w"),
        *good("c", png=None, JPEG=b"w"),
        *(raw("c.jpg", b"", kind) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)),
        *((name, b"x") for name in ("README", ".png", "folder/.DS_Store", "folder/x")),
        *good("d", json=b'{"uid": "%s", "score": NaN, "caption": "\\ud83d"}' % uid_of("d").upper().encode()),
        *good("e", json=DIGITS % (uid_of("e").encode(), b"1" * 4300)),
    ]
    reshard(write_pool(tmp_path / "pool", entries), out, write_uids(map(uid_of, "abcde")))
    assert [key for key, _ in read_tars(out)] == [f"{uid_of(key)}-0" for key in "abcde"]
    assert read_meta(out)["dropped"] == {}
    suffixes = [set(members) - {"json", "txt"} for _, members in read_tars(out)]
    assert suffixes[:3] == [{"png", "seg.npy", "exif", "s" * 56}, {"webp"}, {"jpeg"}]


def test_many_subsets_in_one_pass_and_new_ones_later(make_pool, write_uids, tmp_path, out, indexed):
    pool = make_pool((4, 0, 5, 3))
    uids, folder = pool.uids, str(tmp_path / "uids")
    subsets = {"2014": uids[1::2], "months/201403": [uids[0], *[uids[5]] * 3, *ABSENT], "months/deep/201404": uids[:1]}
    for name, chosen in subsets.items():
        write_uids(chosen, name)
    planned = reshard(pool.path, out, folder, shard_size=4, dry_run=True)
    assert not Path(out).exists()
    indexed.clear()
    splits = reshard(pool.path, out, folder, shard_size=4)
    assert indexed == [f"{i:08d}.tar" for i in range(4)]
    assert [split.num_samples for split in planned] == [split.num_samples for split in splits]
    assert table(splits).splitlines()[2].endswith("66.7 % of 6")
    assert [(split.name, split.num_samples, split.wanted) for split in splits] == [
        *(("2014", 6, 6), ("months/201403", 4, 6), ("months/deep/201404", 1, 1)),
    ]
    for split in splits:
        assert read_tars(split.path) == slow_reshard(pool.path, subsets[split.name])
        assert split.num_bytes == sum(path.stat().st_size for path in Path(out, split.name).glob("*.tar"))
    before = times(f"{out}/2014")
    write_uids(uids[2:], "2013")
    for reused in (False, True):
        assert [split.reused for split in reshard(pool.path, out, folder, shard_size=4)] == [reused, True, True, True]
    assert (len(indexed), times(f"{out}/2014")) == (8, before)
    assert read_tars(f"{out}/2013") == slow_reshard(pool.path, uids[2:])


def test_tables_of_a_split(make_pool, write_uids, out, tmp_path):
    """The list is a link, as in a hub's cache: the split must not hold a link that points to nothing."""
    pool = make_pool((3, 3))
    subset = write_uids(pool.uids)
    Path(subset).rename(tmp_path / "blob")
    Path(subset).symlink_to("../blob")
    reshard(pool.path, out, subset, shard_size=4)
    for lost in ("00000001.tar", "00000000_stats.json", "sizes.json", "sample_ids.npy"):  # is made again
        whole = tree(out)
        Path(out, lost).unlink()
        assert [split.reused for split in reshard(pool.path, out, subset, shard_size=4)] == [False]
        assert tree(out) == whole
    files = tree(out)
    assert split_sizes(out) == {f"{out}/00000000.tar": 4, f"{out}/00000001.tar": 2}
    stats = {number: json.loads(files.pop(f"0000000{number}_stats.json")) for number in (0, 1)}
    assert stats == {0: {"successes": 4}, 1: {"successes": 2}}
    assert set(files) == {"00000000.tar", "00000001.tar", "sizes.json", "meta.json", "sample_ids.npy"}
    assert files["sample_ids.npy"] == Path(subset).read_bytes()
    tars = "".join(f"{tar.name} {tar.stat().st_size}\n" for tar in sorted(Path(pool.path).glob("*.tar")))
    arguments = {"input_dir": pool.path, "subset_file": subset, "cls_file": None, "classes": None, "shard_size": 4}
    digests = {"pool": sha256(tars.encode()).hexdigest(), "subset": sha256(files["sample_ids.npy"][128:]).hexdigest()}
    assert read_meta(out) == {
        **{"output_shard_count": 2, "output_bytes": sum(len(files[f"0000000{i}.tar"]) for i in (0, 1))},
        **{"output_count": 6, "subset_count": 6, "processed_count": 6, "kept_count": 6},
        **{"dropped": {}, "bad_shards": {}, "wrong_stats": {}},
        "arguments": {**arguments, **digests, "parts": 1, "part": 0},
        "output_shard_format": "{:08d}.tar",
    }


SIZES = st.sampled_from([1, 511, 512, 513, 5000])
SAMPLES = st.fixed_dictionaries(
    {
        "uid": st.integers(0, 9),
        "png": SIZES.map(os.urandom),
        "cls": st.sampled_from([None, b"1", b"x" * 700]),
        "txt": st.sampled_from([b"t", b"t", b"t", None]),
        "npy": st.sampled_from([None, b"", b"n" * 512]),
        "order": st.randoms(use_true_random=False),
        "name": st.sampled_from(["", "folder/", "k" * 120]),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    shards=st.lists(st.lists(SAMPLES, max_size=6), min_size=1, max_size=4),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    lists=st.lists(st.lists(st.integers(0, 12), max_size=20), min_size=1, max_size=3),
    classes=st.dictionaries(st.integers(0, 12), st.sampled_from([0, 7, 2**31 - 1])),
    size=st.sampled_from([1, 2, 3, 100]),
    parts=st.integers(1, 2),
)
def test_random_pools_against_the_slow_version(tmp_path_factory, shards, form, lists, classes, size, parts):
    """Any samples, members, formats, repeats, parts, sizes and classes."""
    folder, uids = tmp_path_factory.mktemp("case"), [uid_of(str(number)) for number in range(13)]
    (folder / "pool").mkdir()
    for number, samples in enumerate(shards):
        with tarfile.open(folder / f"pool/{number}.tar", "w", format=form) as tar:
            for i, sample in enumerate(samples):
                record = json.dumps({"uid": uids[sample["uid"]]}).encode()
                members = {suffix: sample[suffix] for suffix in ("png", "cls", "txt", "npy")} | {"json": record}
                key = f"{sample['name'] if form != tarfile.USTAR_FORMAT else ''}{number}{i}"
                entries = good(key, **members)
                for name, data in sample["order"].sample(entries, len(entries)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for name, chosen in zip("abc", lists, strict=False):
        save_uids(folder / f"uids/{name}.npy", parse_uids(uids[i] for i in chosen))
    chosen_classes = {uids[i]: class_id for i, class_id in classes.items()}
    file = write_classes(folder / "classes.npy", chosen_classes) if classes else None
    parts = min(parts, len(shards))
    reshard(f"{folder}/pool", f"{folder}/out", f"{folder}/uids", shard_size=size, classes=file, parts=parts)
    for name, chosen in zip("abc", lists, strict=False):
        for number in range(parts):
            block = folder / "block"
            shutil.rmtree(block, ignore_errors=True)
            block.mkdir()
            for shard in range(len(shards) * number // parts, len(shards) * (number + 1) // parts):
                os.link(folder / f"pool/{shard}.tar", block / f"{shard}.tar")
            split = folder / f"out/{name}/{number:05d}" if parts > 1 else folder / f"out/{name}"
            assert read_tars(split) == slow_reshard(block, [uids[i] for i in chosen], chosen_classes)
            assert all(count == size for count in list(json.loads((split / "sizes.json").read_text()).values())[:-1])


def test_bad_shard_then_left_out(make_pool, write_uids, out, indexed):
    pool = make_pool((2, 2, 3, 2))
    subset, bad = write_uids(pool.uids), Path(pool.path, "00000001.tar")
    bad.write_bytes(bad.read_bytes()[:700])
    Path(pool.path, "00000002_stats.json").write_text('{"successes": 5}')
    Path(pool.path, "00000003_stats.json").unlink()
    for _ in range(2):
        with pytest.raises(TicError, match=rf"can't be read: 1 \({bad}: truncated.*; repair them and give --overwrite"):
            reshard(pool.path, out, subset, shard_size=2)
    assert indexed == [f"{i:08d}.tar" for i in (0, 1, 2, 3, 1)]  # again: whether it has been repaired
    assert [key for key, _ in read_tars(out)] == [f"{uid}-0" for uid in pool.uids[:2] + pool.uids[4:]]
    assert not Path(out, "meta.json").exists()
    before = {path: time for path, time in times(out).items() if path.suffix == ".tar"}
    (split,) = reshard(pool.path, out, subset, shard_size=2, skip_bad_shards=True)
    assert (split.num_samples, split.num_bad) == (7, 1)
    assert "without 1 bad pool shards  1 pool shards with another count in their stats" in table([split])
    assert before.items() <= times(out).items()
    meta = read_meta(out)
    assert (list(meta["bad_shards"]), meta["kept_count"]) == ([str(bad)], 7)
    assert meta["wrong_stats"] == {f"{pool.path}/00000002.tar": "5, not 3"}
    assert not Path(out, ".reshard").exists()
    assert reshard(pool.path, out, subset, shard_size=2, skip_bad_shards=True)[0].reused
    for overwrite in (False, True):
        with pytest.raises(TicError, match="can't be read: 1"):
            reshard(pool.path, out, subset, shard_size=2, overwrite=overwrite)


def test_a_repaired_shard_is_read_again(make_pool, write_uids, out):
    """Of the same size, without more; of another one, with --overwrite."""
    pool = make_pool((2, 2, 1))
    subset, bad = write_uids(pool.uids), Path(pool.path, "00000001.tar")
    data = bad.read_bytes()
    reshard(pool.path, f"{out}/whole", subset)
    for name, damaged in (("same", data.replace(b".json", b".jsom", 1)), ("another", data[:700])):
        bad.write_bytes(damaged)
        with pytest.raises(TicError, match="can't be read"):
            reshard(pool.path, f"{out}/{name}", subset)
        bad.write_bytes(data)
        reshard(pool.path, f"{out}/{name}", subset, overwrite=name == "another")
        assert tree(f"{out}/{name}") == tree(f"{out}/whole")


def test_errors_of_the_machine_are_not_bad_shards(make_pool, write_uids, out, monkeypatch):
    """Only what is wrong with the bytes may be left out; all else ends the run, and nothing is finished."""
    pool = make_pool((2, 2, 1))
    with monkeypatch.context() as patch:
        patch.setattr(index, "open_shard", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            reshard(pool.path, out, write_uids(pool.uids), skip_bad_shards=True)
    assert not Path(out, "meta.json").exists()
    assert reshard(pool.path, out, write_uids(pool.uids), skip_bad_shards=True)[0].num_samples == 5


def test_other_arguments_are_refused_and_overwrite_replaces(make_pool, write_uids, tmp_path, out):
    pool = make_pool((3, 2))
    subset, other = write_uids(pool.uids), write_uids(pool.uids[:1], "other")
    classes = write_classes(tmp_path / "classes.npy", {pool.uids[0]: 3})
    reshard(pool.path, out, subset, shard_size=2)
    Path(out, "notes.txt").write_text("mine")
    before = tree(out)
    for pool_path, subset_file, class_file, message in (
        (pool.path, other, None, "subset .{8}, now .{8}; give --overwrite"),
        (pool.path, subset, classes, "classes None, now .{8}; give --overwrite"),
        (make_pool((4, 2), name="b").path, other, classes, "pool .{8}, now .{8}; subset .*; classes .*"),
    ):
        with pytest.raises(TicError, match=f"{out} was made with other arguments: {message}"):
            reshard(pool_path, out, subset_file, classes=class_file, shard_size=2)
    assert tree(out) == before
    reshard(pool.path, out, other, shard_size=2, overwrite=True)
    assert read_tars(out) == slow_reshard(pool.path, pool.uids[:1])
    assert tree(out).keys() == before.keys() - {f"0000000{i}{end}" for i in (1, 2) for end in (".tar", "_stats.json")}


def test_shards_of_others_are_left_alone(make_pool, write_uids, out):
    pool, subset, _ = make_pool(), write_uids(ABSENT), make_pool(name="out")
    before = tree(out)
    with pytest.raises(TicError, match=f"{out} has shards of something else"):
        reshard(pool.path, out, subset)
    assert tree(out) == before
    (split,) = reshard(pool.path, out, subset, overwrite=True)
    assert (split.wanted, split.num_samples, split.num_shards) == (2, 0, 0)
    assert set(tree(out)) == {"meta.json", "sizes.json", "sample_ids.npy"}
    Path(out, "meta.json").write_text("{")
    with pytest.raises(TicError, match="was made with other arguments"):
        reshard(pool.path, out, subset)
    assert not reshard(pool.path, out, subset, overwrite=True)[0].reused


def test_an_output_among_the_lists_is_not_a_list(make_pool, write_uids, tmp_path):
    pool, names = make_pool(), ("a", "b", "c/2014.5", "c/d/e")
    assert find_subsets(write_uids(pool.uids, "a")) == {"": f"{tmp_path}/uids/a.npy"}
    for name in names:
        write_uids(pool.uids, name)
    for reused in (False, True):
        splits = reshard(pool.path, f"{tmp_path}/uids/out", f"{tmp_path}/uids")
        assert [(split.name, split.reused) for split in splits] == [(name, reused) for name in names]


def test_what_is_refused(make_pool, write_uids, tmp_path, out):
    """Inputs that are missing are in tests/test_errors.py."""
    pool = make_pool()
    subset = write_uids(pool.uids)
    write_classes(tmp_path / "classes/other.npy", {pool.uids[0]: 3})
    np.save(tmp_path / "unsorted.npy", parse_uids(sorted(pool.uids))[[0, 1, 3, 2, 4]])
    for change, message in (
        ({"subsets": f"{tmp_path}/unsorted.npy"}, r"unsorted\.npy is not sorted"),
        ({"classes": subset}, f"{subset} has dtype"),
        ({"subsets": f"{tmp_path}/uids", "classes": f"{tmp_path}/classes"}, r"classes has a \{name\}\.npy for none of"),
        ({"shard_size": 0}, "must be at least 1"),
        ({"output_dir": ""}, "is empty"),
        ({"parts": 3}, "part None of 3: --parts must be between 1 and 2"),
    ):
        for more in ({"overwrite": True}, {"dry_run": True}):
            with pytest.raises(TicError, match=message):
                reshard(**{"pool": pool.path, "output_dir": out, "subsets": subset, **change, **more})
    assert not Path(out).exists()


def test_an_output_never_touches_the_pool(make_pool, write_uids, tmp_path):
    """A pool may be folders of tars: none of them is an output, and no output is a part of the next pool."""
    pool = make_pool((2, 2), name="pool/2014")
    root, subset = f"{tmp_path}/pool", write_uids(pool.uids, "2014")
    folder, before = str(Path(subset).parent), tree(root)
    (tmp_path / "link").symlink_to(root)
    for pool_path, output, subsets in (
        (pool.path, f"{pool.path}/../2014", subset),
        (pool.path, f"{pool.path}/out", folder),
        (root, f"{tmp_path}/link", folder),
        (root, f"{root}/other", subset),
        (pool.path, root, subset),
    ):
        for options in ({}, {"dry_run": True}, {"parts": 2, "overwrite": True}):
            with pytest.raises(TicError, match="lies in the pool or holds it; give another output folder"):
                reshard(pool_path, output, subsets, **options)
    assert tree(root) == before
