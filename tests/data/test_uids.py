import hashlib
import random

import numpy as np
import pytest

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.uids import CLASS_ROW, UID, find_uids, fingerprint, format_uids, open_uids, parse_uids, save_uids

A = "00000000000000010000000000000002"
B = "ffffffffffffffff8000000000000000"


def of(*pairs):
    return np.array(list(pairs), dtype=UID)


def random_uids(rng, count, words):
    return of(*((rng.choice(words), rng.choice(words)) for _ in range(count)))


def test_hex_digits_are_two_words():
    np.testing.assert_array_equal(parse_uids([B.upper(), A]), of((2**64 - 1, 2**63), (1, 2)))
    assert format_uids(parse_uids([B.upper(), A])) == [B, A]
    assert (parse_uids([]).shape, parse_uids([]).dtype) == ((0,), UID)
    assert uids.make_uid("größe") == hashlib.sha256("größe".encode()).hexdigest()[:32]


@pytest.mark.parametrize("text", ["", A + "0", A[1:] + "g", A[1:] + " ", A[1:] + "١", None])
def test_what_is_not_a_uid(text):
    with pytest.raises(TicError, match="is not a UID") as error:
        parse_uids([A, text])
    assert repr(text) in str(error.value)


def test_file_is_sorted_as_the_hex_digits_are(tmp_path):
    rng = random.Random(0)
    texts = [f"{rng.getrandbits(128):032x}" for _ in range(99)] + [A, B, A[:16] + B[16:], B[:16] + A[16:], A]
    save_uids(tmp_path / "x.npy", parse_uids(texts))
    assert (tmp_path / "x.npy").stat().st_size == 128 + 16 * len(texts)
    rows = open_uids(tmp_path / "x.npy")
    assert format_uids(rows) == sorted(texts)
    assert (isinstance(rows, np.memmap), rows.flags.writeable) == (True, False)
    assert uids.unique_uids(rows[::-1]).tolist() == sorted(set(rows.tolist()))
    assert uids.unique_uids(rows[:0]).tolist() == []


def test_what_is_not_a_file_of_uids(tmp_path):
    path = tmp_path / "x.npy"
    for array in (np.zeros(3), np.zeros(3, ">u8,>u8"), np.zeros(3, CLASS_ROW), np.zeros((2, 2), UID)):
        np.save(path, array)
        with pytest.raises(TicError, match=r"x.npy has dtype .* and shape .*, not rows of "):
            open_uids(path)
    save_uids(path, parse_uids([A, B]))
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x09\x00{'a': (1}", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(TicError, match=r"x.npy is not a NumPy file of UIDs: [^\n]*$"):
            open_uids(path)


def test_fingerprint(tmp_path):
    for count in (0, 5, uids.BLOCK, uids.BLOCK + 1):
        rows = np.zeros(count, dtype=UID)
        rows["f0"], rows["f1"] = np.arange(count) // 3, np.arange(count) % 3
        np.save(tmp_path / "x.npy", rows)
        assert fingerprint(tmp_path / "x.npy") == hashlib.sha256((tmp_path / "x.npy").read_bytes()[128:]).hexdigest()
    rows[uids.BLOCK] = (0, 0)  # the only one in the second block
    for unsorted in (rows, of((2, 0), (1, 9)), of((1, 1), (1, 0)), of((1, 1), (2, 1), (2, 0))):
        np.save(tmp_path / "x.npy", unsorted)
        with pytest.raises(TicError, match=r"x.npy is not sorted"):
            fingerprint(tmp_path / "x.npy")


@pytest.mark.parametrize("words", [[7], [0, 1, 2**63, 2**64 - 1], range(40), range(10**6)])
@pytest.mark.parametrize("dtype", [UID, CLASS_ROW])
def test_find_against_counting(tmp_path, words, dtype):
    """UIDs whose words are among a few, so that many share one and some are equal."""
    rng = random.Random(0)
    rows = random_uids(rng, 300, words)
    table = np.zeros(len(rows), dtype=dtype)
    table["f0"], table["f1"] = rows["f0"], rows["f1"]
    save_uids(tmp_path / "x.npy", table)
    subset = open_uids(tmp_path / "x.npy", dtype)
    wanted = np.concatenate([random_uids(rng, 200, words), rows[:50]])
    listed = [tuple(row)[:2] for row in subset.tolist()]
    first, repeats = find_uids(subset, wanted)
    assert repeats.tolist() == [listed.count(uid) for uid in wanted.tolist()]
    assert repeats.any()
    assert find_uids(subset[:0], wanted)[1].tolist() == [0] * len(wanted)
    assert [len(array) for array in find_uids(subset, wanted[:0])] == [0, 0]
    assert [listed.index(uid) for uid in wanted[repeats > 0].tolist()] == first[repeats > 0].tolist()
