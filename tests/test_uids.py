import hashlib
import random

import numpy as np
import pytest

import tic_clip.data.uids
from tic_clip import TicError
from tic_clip.data.uids import (
    CLASS_ROW,
    UID,
    check_size,
    find_uids,
    fingerprint,
    format_uid,
    is_uid,
    isin_sorted,
    make_uid,
    open_uids,
    parse_uids,
    read_uid,
    save_uids,
    sorted_blocks,
    unique_uids,
    write_blocks,
)

A = "00000000000000010000000000000002"
B = "ffffffffffffffff8000000000000000"


def of(*pairs):
    return np.array(list(pairs), dtype=UID)


def random_uids(rng, count, words):
    """UIDs whose words are among a few, so that many share one and some are equal."""
    return of(*((rng.choice(words), rng.choice(words)) for _ in range(count)))


def test_hex_digits_are_two_words():
    np.testing.assert_array_equal(parse_uids([B, A]), of((2**64 - 1, 2**63), (1, 2)))
    assert [format_uid(uid) for uid in parse_uids([B, A])] == [B, A]


def test_upper_case_is_read_and_lower_case_written():
    assert [format_uid(uid) for uid in parse_uids([B.upper()])] == [B]


def test_no_uids():
    assert parse_uids([]).shape == (0,)
    assert parse_uids([]).dtype == UID


@pytest.mark.parametrize(
    "text", ["", A[1:], A + "0", A[1:] + "g", A[1:] + " ", A + "\n", A[1:] + "١", "0x" + A[2:], None]
)
def test_what_is_no_uid(text):
    assert not is_uid(text)
    with pytest.raises(TicError, match="is not a UID") as error:
        parse_uids([A, text])
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("data", "uid"),
    [
        (b'{"uid": "%s", "caption": "gr\xc3\xb6\xc3\x9fe"}' % B.upper().encode(), B),
        (b'{"uid": "%s", "similarity": NaN}' % A.encode(), A),
        (b'{"uid": "%s", "caption": "\\ud800"}' % A.encode(), A),
        (b'{"uid": "%s", "number": %s}' % (A.encode(), b"1" * 4300), A),
        *(
            (data, None)
            for data in (b"{}", b"[]", b"3", b'{"uid": 3}', b'{"uid": "x"}', b'{"uid": "%s0"}' % A.encode())
        ),
    ],
)
def test_uid_of_a_record(data, uid):
    assert read_uid(data) == uid


@pytest.mark.parametrize(
    "end", [b"", b', "n": %s}' % (b"1" * 4301), b', "caption": "\xff"}', b', "a": %s}' % (b"[" * 100_000), b"}}"]
)
def test_record_that_json_does_not_read(end):
    with pytest.raises(ValueError):
        read_uid(b'{"uid": "%s"' % A.encode() + end)


def test_make_uid():
    assert make_uid("größe") == hashlib.sha256("größe".encode()).hexdigest()[:32]
    assert is_uid(make_uid(""))


def test_file_is_sorted_as_the_hex_digits_are(tmp_path):
    rng = random.Random(0)
    texts = [f"{rng.getrandbits(128):032x}" for _ in range(99)] + [A, B, A[:16] + B[16:], B[:16] + A[16:], A]
    save_uids(tmp_path / "x.npy", parse_uids(texts))
    assert (tmp_path / "x.npy").stat().st_size == 128 + 16 * len(texts)
    assert [format_uid(uid) for uid in np.load(tmp_path / "x.npy")] == sorted(texts)
    assert np.load(tmp_path / "x.npy").dtype.descr == [("f0", "<u8"), ("f1", "<u8")]


@pytest.mark.parametrize("count", [0, 1])
def test_file_is_mapped_read_only(tmp_path, count):
    save_uids(tmp_path / "x.npy", parse_uids([A] * count))
    rows = open_uids(tmp_path / "x.npy")
    assert isinstance(rows, np.memmap)
    assert not rows.flags.writeable
    assert rows.tolist() == [(1, 2)] * count


def test_class_table(tmp_path):
    rows = np.array([(2, 0, 7), (1, 9, 999), (1, 3, 0)], dtype=CLASS_ROW)
    save_uids(tmp_path / "x.npy", rows)
    assert open_uids(tmp_path / "x.npy", CLASS_ROW).tolist() == [(1, 3, 0), (1, 9, 999), (2, 0, 7)]
    with pytest.raises(TicError, match=r"x.npy has dtype"):
        open_uids(tmp_path / "x.npy")


@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros(3, ">u8,>u8")])
def test_another_dtype(tmp_path, wrong):
    np.save(tmp_path / "x.npy", wrong)
    with pytest.raises(TicError, match=r"x.npy has dtype"):
        open_uids(tmp_path / "x.npy")


@pytest.mark.parametrize("shape", [(2, 2), ()])
def test_another_shape(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, UID))
    with pytest.raises(TicError, match=r"x.npy is not a list of UIDs"):
        open_uids(tmp_path / "x.npy")


def test_an_archive_of_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros(3, UID))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(TicError, match=r"x.npy is not a list of UIDs"):
        open_uids(tmp_path / "x.npy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rubbish",
        b"\x93NUMPY\x01\x00",
        *(b"\x93NUMPY\x01\x00\x09\x00" + end for end in (b"{'a': (1}", b"\xff" * 9)),
    ],
)
def test_no_numpy_file(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(TicError, match=r"x.npy is not a NumPy file of UIDs"):
        open_uids(tmp_path / "x.npy")


def test_pickles_and_cut_off_files_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    save_uids(tmp_path / "y.npy", parse_uids([A, B]))
    (tmp_path / "y.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:-1])
    for name in ("x.npy", "y.npy"):
        with pytest.raises(TicError, match=f"{name} is not a NumPy file of UIDs"):
            open_uids(tmp_path / name)


@pytest.mark.parametrize("path", ["x.npy", "."])
def test_missing_file(tmp_path, path):
    with pytest.raises(TicError, match="is missing"):
        open_uids(tmp_path / path)


def test_fingerprint(tmp_path):
    for count in (0, 5, 2**20, 2**20 + 1):
        rows = np.zeros(count, dtype=UID)
        rows["f0"], rows["f1"] = np.arange(count) // 3, np.arange(count) % 3
        np.save(tmp_path / "x.npy", rows)
        assert fingerprint(tmp_path / "x.npy") == hashlib.sha256((tmp_path / "x.npy").read_bytes()[128:]).hexdigest()
    rows[2**20] = (0, 0)  # in the second block
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(TicError, match=r"x.npy is not sorted"):
        fingerprint(tmp_path / "x.npy")


@pytest.mark.parametrize("rows", [[(2, 0), (1, 9)], [(1, 1), (1, 0)], [(1, 1), (2, 1), (2, 0)]])
def test_unsorted_file(tmp_path, rows):
    np.save(tmp_path / "x.npy", of(*rows))
    with pytest.raises(TicError, match=r"x.npy is not sorted"):
        fingerprint(tmp_path / "x.npy")


def test_find_by_hand():
    subset = of((1, 5), (1, 7), (1, 7), (1, 7), (2, 0), (2**64 - 1, 2**64 - 1))
    uids = of((1, 7), (2**64 - 1, 2**64 - 1), (1, 6), (0, 0), (2, 0), (1, 5), (1, 7), (2, 1))
    first, repeats = find_uids(subset, uids)
    assert repeats.tolist() == [3, 1, 0, 0, 1, 1, 3, 0]
    assert first[repeats > 0].tolist() == [1, 5, 4, 0, 1]


@pytest.mark.parametrize("words", [[7], [0, 1, 2**63, 2**64 - 1], range(40), range(10**6)])
@pytest.mark.parametrize("dtype", [UID, CLASS_ROW])
def test_find_against_counting(tmp_path, words, dtype):
    rng = random.Random(0)
    rows = random_uids(rng, 300, words).astype(UID)
    table = np.zeros(len(rows), dtype=dtype)
    table["f0"], table["f1"] = rows["f0"], rows["f1"]
    save_uids(tmp_path / "x.npy", table)
    subset = open_uids(tmp_path / "x.npy", dtype)
    uids = np.concatenate([random_uids(rng, 200, words), rows[:50]])
    listed = [tuple(row)[:2] for row in subset.tolist()]
    first, repeats = find_uids(subset, uids)
    assert repeats.tolist() == [listed.count(uid) for uid in uids.tolist()]
    assert repeats.any()
    assert [listed[i] for i in first[repeats > 0]] == uids[repeats > 0].tolist()
    assert [listed.index(uid) for uid in uids[repeats > 0].tolist()] == first[repeats > 0].tolist()


def test_find_in_nothing_and_of_nothing():
    for subset, uids in ((of(), of((1, 2))), (of((1, 2)), of()), (of(), of())):
        first, repeats = find_uids(subset, uids)
        assert len(first) == len(repeats) == len(uids)
        assert not repeats.any()


@pytest.mark.parametrize("sizes", [(), (0,), (3,), (2, 0, 5), (1,) * 12])
def test_blocks_written_one_by_one_are_the_file_of_all(tmp_path, sizes):
    rng = random.Random(3)
    blocks = [random_uids(rng, size, [0, 1, 2**63, 2**64 - 1]) for size in sizes]
    with open(tmp_path / "x.npy", "wb") as file:
        assert write_blocks(file, iter(blocks)) == sum(sizes)
    np.save(tmp_path / "all.npy", np.concatenate([of(), *blocks]))
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "all.npy").read_bytes()


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_blocks_read_one_by_one_are_the_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tic_clip.data.uids, "BLOCK", block)
    rows = np.sort(random_uids(random.Random(4), 20, [1, 2, 3]))
    save_uids(tmp_path / "x.npy", rows)
    parts = list(sorted_blocks(tmp_path / "x.npy"))
    assert [len(part) for part in parts[:-1]] == [block] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), rows)


@pytest.mark.parametrize("rows", [[(2, 0), (1, 0)], [(1, 2), (1, 1)], [(1, 1), (1, 2), (1, 3), (1, 2)]])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_of_an_unsorted_file(tmp_path, monkeypatch, rows, block):
    monkeypatch.setattr(tic_clip.data.uids, "BLOCK", block)
    np.save(tmp_path / "x.npy", of(*rows))
    with pytest.raises(TicError, match=r"x.npy is not sorted"):
        list(sorted_blocks(tmp_path / "x.npy"))


@pytest.mark.parametrize("seed", range(20))
def test_membership_is_that_of_sets(seed):
    rng = random.Random(seed)
    words = [0, 1, 2, 2**63, 2**64 - 1]
    block = np.sort(random_uids(rng, rng.randrange(40), words))
    chosen = unique_uids(random_uids(rng, rng.randrange(10), words))
    wanted = [row in set(chosen.tolist()) for row in block.tolist()]
    assert isin_sorted(block, chosen).tolist() == wanted


def test_distinct():
    for count in (0, 1, 2, 30):
        rows = random_uids(random.Random(count), count, [0, 5, 2**64 - 1])
        assert unique_uids(rows).tolist() == sorted(set(rows.tolist()))


def test_check_size(tmp_path):
    save_uids(tmp_path / "x.npy", of((1, 2), (3, 4)))
    check_size(tmp_path / "x.npy")
    check_size(tmp_path / "x.npy", 2)
    with pytest.raises(TicError, match="holds 2 UIDs, not 3"):
        check_size(tmp_path / "x.npy", 3)
    with open(tmp_path / "x.npy", "ab") as file:
        file.write(bytes(16))
    with pytest.raises(TicError, match="has 176 bytes, its header says 160"):
        check_size(tmp_path / "x.npy")
