"""UIDs as arrays: a UID is 128 bits, written as 32 hex digits; a UID file is a sorted ``.npy`` of (high, low) words.

``UID`` is DataComp's dtype, so its files are read and written byte for byte the same (128 bytes of header, 16 a UID).
Files are memory-mapped: nothing here copies a whole list of UIDs.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.storage import atomic_open

UID = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""High and low 64 bits; sorting by (f0, f1) is sorting by the hex digits."""

CLASS_ROW = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("class_id", "<i4")])
"""A UID and the class that its sample shows, sorted by UID."""

BLOCK = 1 << 20
"""UIDs that are read into memory at a time (16 MiB)."""

_HEX = re.compile(r"[0-9a-f]{32}", re.IGNORECASE | re.ASCII)
_LONG_NUMBER = re.compile(rb"[0-9]{4301}")  # more digits than Python reads as an integer


class _Record(msgspec.Struct):
    """The one key of a sample's JSON that is read."""

    uid: str


_DECODER = msgspec.json.Decoder(_Record)


def make_uid(text: str) -> str:
    """The UID of a sample that has none yet: the first 128 bits of the SHA-256 of ``text``, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_uid(text: object) -> bool:
    """Whether ``text`` is 32 hex digits, of either case."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def read_uid(data: bytes) -> str | None:
    """Return the UID in a sample's JSON as lower-case hex, or None if it has no valid one.

    Raises:
        ValueError: ``json.loads`` would not read ``data``.
    """
    try:
        try:
            uid = _DECODER.decode(data).uid  # as fast as a regular expression, but checks the syntax
            data.decode()
            is_read = len(data) <= 4300 or not _LONG_NUMBER.search(data)
        except (msgspec.DecodeError, UnicodeDecodeError):  # stricter than Python: it refuses NaN and lone surrogates
            is_read = False
        if not is_read:
            record = json.loads(data)
            uid = record.get("uid") if isinstance(record, dict) else None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return uid.lower() if is_uid(uid) else None


def parse_uids(texts: Iterable[str]) -> np.ndarray:
    """The UIDs written in ``texts`` in their order, as a ``UID`` array of shape (N,).

    Raises:
        TicError: one of them is not 32 hex digits.
    """
    texts = list(texts)
    try:
        data = bytes.fromhex("".join(texts))  # it skips spaces, which leaves too few bytes
    except (ValueError, TypeError):
        data = b""
    if len(data) != 16 * len(texts) or any(len(text) != 32 for text in texts):
        wrong = next(text for text in texts if not is_uid(text))
        raise TicError(f"{wrong!r} is not a UID (32 hex digits)")
    words = np.frombuffer(data, dtype=">u8").reshape(-1, 2)
    uids = np.empty(len(texts), dtype=UID)
    uids["f0"], uids["f1"] = words[:, 0], words[:, 1]
    return uids


def format_uid(uid: np.void) -> str:
    """One element of a ``UID`` array as 32 lower-case hex digits."""
    return f"{int(uid['f0']):016x}{int(uid['f1']):016x}"


def format_uids(uids: np.ndarray) -> list[str]:
    """The elements of a ``UID`` array (N,) as 32 lower-case hex digits each."""
    text = np.stack([uids["f0"], uids["f1"]], axis=-1).astype(">u8").tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]


def save_uids(path: object, rows: np.ndarray) -> None:
    """Sort ``rows`` (dtype ``UID`` or ``CLASSES``) by UID and write them to the ``.npy`` file ``path``, atomically."""
    rows = rows[np.lexsort((rows["f1"], rows["f0"]))]
    with atomic_open(path) as file:
        np.save(file, rows)


def write_blocks(file: IO, blocks: Iterable[np.ndarray]) -> int:
    """Write sorted ``UID`` arrays that follow one another to ``file`` as one ``.npy``; returns the number of UIDs.

    Their number is known at the end only, so the header is written twice; NumPy keeps room for any number in it.
    """
    count = 0
    _write_header(file, count)
    start = file.tell()
    for block in blocks:
        file.write(block.tobytes())
        count += len(block)
    file.seek(0)
    _write_header(file, count)
    assert file.tell() == start, "NumPy's header has grown into the rows"
    return count


def _write_header(file: IO, count: int) -> None:
    header = {"descr": UID.descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def check_size(path: object, count: int | None = None) -> None:
    """Check that a UID file has as many bytes as its header says, and ``count`` UIDs where that is known.

    Raises:
        TicError: it has not, or it is no UID file.
    """
    rows = open_uids(path)
    wanted, size = rows.offset + rows.nbytes, Path(str(path)).stat().st_size
    if size != wanted:
        raise TicError(f"{path} has {size} bytes, its header says {wanted}")
    if count not in (None, len(rows)):
        raise TicError(f"{path} holds {len(rows)} UIDs, not {count}")


def open_uids(path: object, dtype: np.dtype = UID) -> np.ndarray:
    """The rows of a ``.npy`` file, memory-mapped and read-only.

    Raises:
        TicError: the file is missing, is no ``.npy``, or has another dtype.
    """
    if not Path(str(path)).is_file():
        raise TicError(f"{path} is missing")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise TicError(f"{path} is no NumPy file of UIDs: {error}") from None
    if not isinstance(rows, np.ndarray) or rows.ndim != 1:
        raise TicError(f"{path} is no list of UIDs")
    if rows.dtype != dtype:
        raise TicError(f"{path} has dtype {rows.dtype}, not {dtype.descr}")
    return rows


def fingerprint(path: object, dtype: np.dtype = UID) -> str:
    """The SHA-256 of the rows of a file of UIDs or classes, read in blocks.

    Raises:
        TicError: the file is no sorted file of UIDs.
    """
    digest = hashlib.sha256()
    for block in sorted_blocks(path, dtype):
        digest.update(block.tobytes())
    return digest.hexdigest()


def sorted_blocks(path: object, dtype: np.dtype = UID) -> Iterator[np.ndarray]:
    """Yield the rows of a file of UIDs or classes, ``BLOCK`` at a time.

    Raises:
        TicError: the file is no sorted file of UIDs.
    """
    rows = open_uids(path, dtype)
    for start in range(0, len(rows), BLOCK):
        part = np.array(rows[start : start + BLOCK + 1])  # one more, to compare across the border
        high, low = part["f0"], part["f1"]
        if ((high[1:] < high[:-1]) | (high[1:] == high[:-1]) & (low[1:] < low[:-1])).any():
            raise TicError(f"{path} is not sorted")
        yield part[:BLOCK]


def isin_sorted(block: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Which rows of the sorted ``block`` (N,) are among the sorted, distinct ``chosen``; (N,) bool.

    Made for few chosen UIDs and long blocks: the chosen ones within the block's range are looked up in it.
    """
    inside = np.zeros(len(block) + 1, dtype=np.int8)
    if len(block):
        start = np.searchsorted(chosen["f0"], block["f0"][0], side="left")
        end = np.searchsorted(chosen["f0"], block["f0"][-1], side="right")
        first, count = find_uids(block, chosen[start:end])
        first, count = first[count > 0], count[count > 0]
        np.add.at(inside, first, 1)
        np.add.at(inside, first + count, -1)
    return np.cumsum(inside[:-1], dtype=np.int8) > 0


def unique_uids(uids: np.ndarray) -> np.ndarray:
    """The UIDs in ``uids`` (any order, of dtype ``UID``), sorted and each once."""
    uids = uids[np.lexsort((uids["f1"], uids["f0"]))]
    repeated = (uids["f0"][1:] == uids["f0"][:-1]) & (uids["f1"][1:] == uids["f1"][:-1])
    return uids[np.concatenate((np.ones(min(len(uids), 1), dtype=bool), ~repeated))]


def find_uids(subset: np.ndarray, uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of ``uids`` (N,) stands in the sorted ``subset``: first positions and numbers of repeats, both (N,).

    The high words are searched, in their order, so that a memory-mapped subset is read from front to back; rows that
    share theirs are told apart by the low words.
    """
    order = np.argsort(uids["f0"], kind="stable")  # of what is sorted already it costs little
    wanted, high = uids[order], subset["f0"]
    start = np.searchsorted(high, wanted["f0"])
    repeats = np.zeros(len(uids), np.int64)
    hits = np.flatnonzero(start < len(subset))
    hits = hits[high[start[hits]] == wanted["f0"][hits]]
    stop = np.searchsorted(high, wanted["f0"][hits], side="right")
    alone = stop == start[hits] + 1
    repeats[hits[alone]] = subset["f1"][start[hits[alone]]] == wanted["f1"][hits[alone]]
    for i, end in zip(hits[~alone], stop[~alone], strict=True):
        low, begin = subset["f1"][start[i] : end], start[i]
        start[i] = begin + np.searchsorted(low, wanted["f1"][i], side="left")
        repeats[i] = begin + np.searchsorted(low, wanted["f1"][i], side="right") - start[i]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return start[back], repeats[back]
