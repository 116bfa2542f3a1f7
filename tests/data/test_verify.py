"""``tic_clip.data.verify``, the stats, and the scripts verify.py, generate_stats.py and add_sizes.py."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import call_script, make_png, tree, write_tar
from test_tar import pax, raw

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.split import add_sizes, generate_stats, split_sizes
from tic_clip.data.verify import verify
from tic_clip.storage import list_files, read_bytes, read_json, upload, write_json, write_text

UIDS = [f"{i:02x}" + "0" * 29 + f"{i:x}" for i in range(8)]
PNG = make_png(1)


def sample(uid, copy=0, key=None, **changes):
    """The members of a sample of a split; a change is other data, or None to leave the member out."""
    members = {"png": PNG, "json": b'{"uid": "%s"}' % uid.encode(), "txt": b"a picture"} | changes
    return [(f"{key or f'{uid}-{copy}'}.{suffix}", data) for suffix, data in members.items() if data is not None]


def make_split(folder, contents, **arguments):
    """Write a split of shards with lists of samples, as reshard leaves it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, content in enumerate(contents):
        write_tar(f"{folder}/{i:08d}.tar", [member for members in content for member in members])
        write_json(f"{folder}/{i:08d}_stats.json", {"successes": len(content)})
    write_json(f"{folder}/sizes.json", {f"{i:08d}.tar": len(content) for i, content in enumerate(contents)})
    counts = {"output_shard_count": len(contents), "output_count": sum(map(len, contents))}
    write_json(f"{folder}/meta.json", {**counts, "arguments": arguments})
    return str(folder)


def write_subset(tmp_path, texts, name="subset"):
    uids.save_uids(tmp_path / f"{name}.npy", uids.parse_uids(texts))
    return str(tmp_path / f"{name}.npy")


@pytest.fixture
def split(tmp_path):
    return make_split(tmp_path / "split", [list(map(sample, UIDS[:3])), list(map(sample, UIDS[3:5]))])


def faults_of(split, subset=None, **options):
    """The faults, with the split's folder left out of them."""
    return [fault.replace(f"{split}/", "") for fault in verify(split, subset, **options)]


def test_a_whole_split(split, tmp_path):
    subset, seen = write_subset(tmp_path, UIDS[:5]), Counter()
    assert faults_of(split, subset, seen=seen) == []
    assert seen == Counter(shards=2, samples=5, wanted=5, there=5)
    os.unlink(f"{split}/meta.json")  # data from elsewhere
    assert faults_of(f"{split}/") == []


def test_faults_by_the_million_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("tic_clip.data.verify.LINES", 2)
    split = make_split(tmp_path / "split", [list(map(sample, UIDS))] * 2)
    assert faults_of(split, write_subset(tmp_path, UIDS[:1])) == [
        *(f"00000000.tar: {uid}-0 is not in the subset" for uid in UIDS[1:3]),
        f"00000001.tar: {UIDS[0]}-0 is in the split already",
        "12 more keys: each is not in the subset",
    ]
    assert faults_of(split) == [
        *(f"{uid}-0 is in the split already" for uid in UIDS[:2]),
        "6 more keys: each is in the split already",
    ]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        *((sample(UIDS[5], **{end: None}), f"no {kind}") for end, kind in (("png", "image"), ("txt", "text"))),
        (sample(UIDS[5], json=None), "no json"),
        *((sample(UIDS[5], json=data), "json that can't be read or has no uid") for data in (b"{", b'{"uid": 5}')),
        (sample(UIDS[6], key=f"{UIDS[5]}-0"), "key with another uid than its json"),
        *((sample(UIDS[5], key=key), "key that is not {uid}-{copy}") for key in ("000001", f"{UIDS[5]}-00")),
        (sample("ab" * 16, json=b'{"uid": "%s"}' % (b"AB" * 16)), None),
    ],
)
def test_samples_that_are_not_as_they_should_be(tmp_path, wrong, kind):
    split = make_split(tmp_path / "split", [[sample(UIDS[0]), wrong, sample(UIDS[1])]])
    key = wrong[0][0].partition(".")[0]
    assert faults_of(split) == ([f"00000000.tar: {kind}: 1 of 3 samples, first {key}"] if kind else [])


def test_names_and_gaps(split):
    for old, new in (("00000001", "00000003"), ("00000000", "1")):
        for path in Path(split).glob(f"{old}*"):
            path.rename(str(path).replace(old, new))
    assert faults_of(split) == [
        f"{split} has 2 shards, but no 00000000.tar: their numbers have a gap, or they other names",
        "sizes.json lists 00000000.tar, which is not there",
        "sizes.json lists 00000001.tar, which is not there",
        "sizes.json says no samples for 00000003.tar, the tar holds 2",
        "sizes.json says no samples for 1.tar, the tar holds 3",
    ]


def test_a_sparse_member_is_named(split):
    path = Path(split, "00000000.tar")
    path.write_bytes(raw("x", pax(**{"GNU.sparse.map": "0,1"}), b"x") + path.read_bytes())
    (line,) = faults_of(split)
    assert line.startswith("00000000.tar: sparse member: 1 of 3 samples, first ")


def test_tables_that_say_something_else(split):
    write_json(f"{split}/00000000_stats.json", {"successes": 4})
    os.unlink(f"{split}/00000001_stats.json")
    write_json(f"{split}/sizes.json", {"00000000.tar": 2, "00000001.tar": 2})
    write_json(f"{split}/meta.json", {"output_shard_count": 3, "output_count": 6})
    assert faults_of(split) == [
        "00000000.tar holds 3 samples, its stats say 4",
        f"00000001.tar has no stats: run dataset_creation/tic-datacomp/generate_stats.py --url {split} first",
        "sizes.json says 2 samples for 00000000.tar, the tar holds 3",
        "meta.json says 3 shards, there are 2",
        "meta.json says 6 samples, the shards hold 5",
    ]
    for name in ("sizes.json", "meta.json", "00000000_stats.json"):
        Path(split, name).write_text("{")
    faults = "\n".join(faults_of(split))
    assert "meta.json is not valid JSON" in faults
    assert "sizes.json is not a JSON object of" in faults
    assert "00000000_stats.json holds no count of successes" in faults
    os.unlink(f"{split}/sizes.json")
    assert f"{split} has no sizes.json: finish reshard.py, or count shards" in "\n".join(faults_of(split))


def make_parts(folder, parts=3):
    """A split in parts, the last of them without a sample."""
    contents = [[[sample(UIDS[0]), sample(UIDS[1])], [sample(UIDS[2])]], [[sample(UIDS[3])]], []]
    for part, content in enumerate(contents):
        make_split(f"{folder}/{part:05d}", content, part=part, parts=parts)
    write_subset(Path(folder, "00000"), UIDS[:4], "sample_ids")
    return str(folder)


def test_a_split_in_parts(tmp_path):
    split, seen = make_parts(tmp_path / "split"), Counter()
    subset = write_subset(tmp_path, UIDS[:5])
    assert faults_of(split, subset, seen=seen, num_workers=2) == []
    assert seen == Counter(shards=3, samples=4, wanted=5, there=4)
    make_split(f"{split}/00001", [[sample(UIDS[3]), sample(UIDS[0])]], part=1, parts=3)
    assert faults_of(split, subset) == [f"00001/00000000.tar: {UIDS[0]}-0 is in the split already"]
    write_json(f"{split}/00002/sizes.json", {"00000000.tar": 1})
    os.unlink(f"{split}/00000/sample_ids.npy")  # no other part has one
    assert [fault for fault in faults_of(split) if "already" not in fault] == [
        "00000/sample_ids.npy is missing",
        "00002/sizes.json lists 00000000.tar, which is not there",
    ]


def test_a_pool_is_not_a_split(make_pool):
    pool = make_pool((2, 1)).path
    with pytest.raises(TicError, match=f"^{pool} is a pool, not a split: no meta.json, no key .*"):
        list(verify(pool))


def test_in_the_folder_itself(split, monkeypatch, tmp_path):
    """``.`` is a folder as any other."""
    expected = read_bytes(f"{split}/sizes.json")
    monkeypatch.chdir(split)
    assert list(verify(".")) == []
    os.unlink("sizes.json")
    assert generate_stats(".") == (2, 0)
    os.unlink("00000001_stats.json")
    assert generate_stats(".") == (2, 1)
    assert add_sizes(".") == {".": 5}
    assert read_bytes(f"{split}/sizes.json") == expected
    assert list(verify(".")) == []


def test_in_the_cloud(tmp_path, s3):
    folder = make_parts(tmp_path / "split")
    Path(folder, "00000/00000001.tar").write_bytes(b"x" * 600)
    for path, _ in [*list_files(folder, "*/*.tar"), *list_files(folder, "*/meta.json")]:
        upload(Path(path), path.replace(folder, f"{s3}/split"))
    upload(Path(write_subset(tmp_path, UIDS[:5])), f"{s3}/subset.npy")
    with pytest.raises(TicError, match=r"00000/00000001.tar: damaged header"):
        generate_stats(f"{s3}/split/")
    write_json(f"{s3}/split/00000/00000001_stats.json", {"successes": 1})
    assert generate_stats(f"{s3}/split/") == (3, 0)
    assert add_sizes(f"{s3}/split/") == {f"{s3}/split/00000": 3, f"{s3}/split/00001": 1}
    write_json(f"{s3}/split/00002/sizes.json", {})
    seen = Counter()
    assert faults_of(f"{s3}/split/", f"{s3}/subset.npy", seen=seen, num_workers=2) == [
        f"{s3}/split/00000/00000001.tar: damaged header at byte 0",
        f"{s3}/split/00000/sample_ids.npy is missing",
    ]
    assert (seen["there"], seen["wanted"], seen["shards"]) == (3, 5, 3)


@pytest.mark.parametrize("seed", range(8))
def test_keys_are_compared_as_plain_python_does(tmp_path, seed):
    random = np.random.default_rng(seed)
    listed = [UIDS[i] for i in random.integers(0, len(UIDS), random.integers(0, 12))]
    keys = [(UIDS[i], int(random.integers(0, 3))) for i in random.integers(0, len(UIDS), random.integers(1, 12))]
    split = make_split(tmp_path / "split", [[sample(*key) for key in keys[:5]], [sample(*key) for key in keys[5:]]])
    expected, distinct = {(uid, copy) for uid in listed for copy in range(listed.count(uid))}, set(keys)
    duplicates = [key for i, key in enumerate(keys) if key in keys[:i]]
    faults = Counter(f"{uid}-{copy} is in the split already" for uid, copy in duplicates)
    assert Counter(verify(split)) == faults
    faults = Counter({text: n for text, n in faults.items() if (text[:32], int(text[33])) in expected})
    faults += Counter(f"{uid}-{copy} is not in the subset" for uid, copy in keys if (uid, copy) not in expected)
    there = Counter(uid for uid, _ in distinct & expected)
    incomplete = [uid for uid in there if there[uid] < listed.count(uid)]
    faults += Counter(f"{uid} is there, but other copies of it are missing" for uid in incomplete)
    seen = Counter()
    found = Counter(fault.rpartition(": ")[2] for fault in verify(split, write_subset(tmp_path, listed), seen=seen))
    assert (found, seen["there"], seen["wanted"]) == (faults, len(distinct & expected), len(listed))


def test_a_new_table_is_seen_at_once(split):
    assert sum(split_sizes(split).values()) == 5
    write_tar(Path(split, "00000001.tar"), sample(UIDS[7]))
    write_json(f"{split}/00000001_stats.json", {"count": 9, "successes": 2, "failed_to_download": 7})
    write_json(f"{split}/00000000_stats.json", ["damaged"])
    with pytest.raises(TicError, match=f"^{split}/00000000_stats.json holds no count of successes"):
        add_sizes(split)
    assert generate_stats(split, overwrite=True) == (2, 2)
    assert read_json(f"{split}/00000000_stats.json") == {"successes": 3}
    assert read_json(f"{split}/00000001_stats.json") == {"count": 9, "successes": 1, "failed_to_download": 7}
    add_sizes(split)
    assert list(split_sizes(split).values()) == [3, 1]


def test_damaged_shards_do_not_stop_the_others(split):
    for path in Path(split).glob("*.json"):
        path.unlink()
    with pytest.raises(TicError, match=rf"^{split}/00000000.tar has no stats: run .*--url {split} first$"):
        add_sizes(split)
    Path(split, "00000000.tar").write_bytes(b"x")
    with pytest.raises(TicError, match=rf"^{split}/00000000.tar: truncated: [^\n]* in 1 bytes$"):
        generate_stats(split)
    assert [path.name for path in Path(split).glob("*.json")] == ["00000001_stats.json"]
    Path(split, "00000001.tar").write_bytes(b"")
    with pytest.raises(TicError, match=r"00000000.tar: truncated: .* \(and 1 more damaged shards\)$"):
        generate_stats(split, overwrite=True)


def test_scripts(split, tmp_path):
    expected, subset = tree(split), write_subset(tmp_path, UIDS[:6])
    os.unlink(f"{split}/sizes.json")
    os.unlink(f"{split}/00000001_stats.json")
    for name, flags, printed in (
        ("tic-datacomp/generate_stats", ("--url", split, "--num-proc", 2), "2 shards, 1 of them counted now\n"),
        ("tic-datacomp/add_sizes", ("--url", split, "--num-proc", 2), "5 samples\n"),
        (
            *("verify", (split, "--subset", subset, "-j", 2)),
            f"5 samples in 2 shards, no faults\n{subset}: 5 UIDs there, 1 missing (coverage 83.33 %)\n",
        ),
    ):
        done = call_script(f"dataset_creation/{name}.py", *flags)
        assert (done.returncode, done.stdout) == (0, f"{split}: {printed}")
    assert tree(split) == expected
    write_text(f"{split}/00000001.tar", "")
    done = call_script("dataset_creation/verify.py", split)
    report = f"{split}/00000001.tar: empty file\n{split}: 3 samples in 2 shards, 1 fault\n"
    assert (done.returncode, done.stdout) == (1, report)


def test_another_list_beside_the_shards(tmp_path):
    subset = write_subset(tmp_path, UIDS[:2])
    split = make_split(tmp_path / "split", [list(map(sample, UIDS[:2]))], subset=uids.fingerprint(subset))
    os.symlink(subset, f"{split}/sample_ids.npy")
    assert faults_of(split) == []
    write_subset(tmp_path, UIDS[:3])
    assert faults_of(split) == ["sample_ids.npy is not the list that the split was made with"]
    Path(subset).write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': [(1)]}")
    (fault,) = faults_of(split)
    assert fault.startswith("sample_ids.npy is not a NumPy file of UIDs: ")
    Path(subset).unlink()  # the link leads nowhere
    assert faults_of(split) == ["sample_ids.npy is missing"]
