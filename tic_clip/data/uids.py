"""UIDs as arrays: a UID is 128 bits, written as 32 hex digits; a UID file is a sorted ``.npy`` of (high, low) words.

``UID`` is DataComp's dtype, so its files are read and written byte for byte the same. They are memory-mapped.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.storage import NotFoundError, atomic_open

UID = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""High and low 64 bits; sorting by (f0, f1) is sorting by the hex digits."""

CLASS_ROW = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("class_id", "<i4")])
"""A UID and the class that its sample shows, sorted by UID."""

BLOCK = 1 << 20  # UIDs that are read into memory at a time (16 MiB)

_HEX = re.compile(r"[0-9a-f]{32}", re.IGNORECASE | re.ASCII)
_LONG_NUMBER = re.compile(rb"[0-9]{4301}")  # more digits than Python reads as an integer


class _Record(msgspec.Struct):
    """The one key of a sample's JSON that is read."""

    uid: str


_DECODER = msgspec.json.Decoder(_Record)


def make_uid(text: str) -> str:
    """Return the UID of a sample that has none yet: the first 128 bits of the SHA-256 of ``text``, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_uid(text: object) -> bool:
    """Return whether ``text`` is 32 hex digits, of either case."""
    return isinstance(text, str) and _HEX.fullmatch(text) is not None


def read_uid(data: bytes) -> str | None:
    """Return the UID in a sample's JSON as lower-case hex, or None if it has no valid one.

    Raises:
        ValueError: ``json.loads`` would not read ``data``.
    """
    try:
        uid = _DECODER.decode(data).uid  # as fast as a regular expression, but checks the syntax
        data.decode()
        is_read = len(data) <= 4300 or not _LONG_NUMBER.search(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # it also refuses NaN and lone surrogates
        is_read = False
    if not is_read:
        try:
            record = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        uid = record.get("uid") if isinstance(record, dict) else None
    return uid.lower() if is_uid(uid) else None


def parse_uids(texts: Iterable[str]) -> np.ndarray:
    """Return the UIDs written in ``texts`` in their order, as a ``UID`` array of shape (N,).

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
    return np.frombuffer(data, ">u8,>u8").astype(UID)


def format_uids(uids: np.ndarray) -> list[str]:
    """Return the elements of a ``UID`` array (N,) as 32 lower-case hex digits each."""
    text = np.stack([uids["f0"], uids["f1"]], axis=-1).astype(">u8").tobytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]


def save_uids(path: object, rows: np.ndarray) -> None:
    """Sort ``rows`` (dtype ``UID`` or ``CLASS_ROW``) by UID and write them to the ``.npy`` ``path``, atomically."""
    with atomic_open(path) as file:
        np.save(file, rows[np.lexsort((rows["f1"], rows["f0"]))])


def open_uids(path: object, dtype: np.dtype = UID) -> np.ndarray:
    """Return the rows of a ``.npy`` file, memory-mapped and read-only.

    Raises:
        TicError: the file is missing, or not one of rows of that dtype.
    """
    if not Path(str(path)).is_file():
        raise NotFoundError(f"{path} is missing")
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header is read as Python text, and fails in many ways
        raise TicError(f"{path} is not a NumPy file of UIDs: {' '.join(str(error).split())}") from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 1:
        raise TicError(f"{path} is not a list of UIDs")
    if rows.dtype != dtype:
        raise TicError(f"{path} has dtype {rows.dtype}, not {dtype.descr}")
    return rows


def fingerprint(path: object, dtype: np.dtype = UID) -> str:
    """Return the SHA-256 of the rows of a file of UIDs or classes.

    Raises:
        TicError: the file is not a sorted file of UIDs.
    """
    rows, digest = open_uids(path, dtype), hashlib.sha256()
    for start in range(0, len(rows), BLOCK):
        block = np.array(rows[start : start + BLOCK + 1])  # one more, to compare across the border
        high, low = block["f0"], block["f1"]
        if ((high[1:] < high[:-1]) | (high[1:] == high[:-1]) & (low[1:] < low[:-1])).any():
            raise TicError(f"{path} is not sorted")
        digest.update(block[:BLOCK].tobytes())
    return digest.hexdigest()


def unique_uids(uids: np.ndarray) -> np.ndarray:
    """Return the UIDs in ``uids`` (any order, of dtype ``UID``), sorted and each once."""
    uids = uids[np.lexsort((uids["f1"], uids["f0"]))]
    return uids[np.append(True, uids[1:] != uids[:-1])[: len(uids)]]


def find_uids(subset: np.ndarray, uids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each of ``uids`` (N,) stands in the sorted ``subset``: first positions and numbers of repeats, (N,).

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
