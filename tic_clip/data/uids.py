"""UIDs as arrays: a UID is 128 bits, written as 32 hex digits; a UID file is a sorted ``.npy`` of (high, low) words."""

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
_DECODER = msgspec.json.Decoder(msgspec.defstruct("Record", [("uid", str)]))


def make_uid(text: str) -> str:
    """Make a UID: the first 128 bits of the SHA-256 of ``text``, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_uid(data: bytes) -> str | None:
    """Return the UID in a sample's JSON as lower-case hex, or None; raise a ValueError if ``json`` can't read it."""
    try:
        data.decode()  # msgspec does not look at the text of other keys, but is as fast as a regular expression
        uid = _DECODER.decode(data).uid
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # also NaN and lone surrogates, which json reads
        uid = None
    if uid is None or (len(data) > 4300 and _LONG_NUMBER.search(data)):
        try:
            record = json.loads(data)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        uid = record.get("uid") if isinstance(record, dict) else None
    return uid.lower() if isinstance(uid, str) and _HEX.fullmatch(uid) else None


def parse_uids(texts: Iterable[str]) -> np.ndarray:
    """Return the UIDs written in N ``texts`` as a ``UID`` array (N,); raise a TicError if one is not 32 hex digits."""
    texts = list(texts)
    try:
        data = bytes.fromhex("".join(texts))  # it skips spaces, which leaves too few bytes
    except (ValueError, TypeError):
        data = b""
    if len(data) != 16 * len(texts) or any(len(text) != 32 for text in texts):
        wrong = next(text for text in texts if not _HEX.fullmatch(str(text)))
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
    """Memory-map the rows of a ``.npy`` file; raise a TicError if they are not of that dtype."""
    if not Path(str(path)).is_file():
        raise NotFoundError(f"{path} is missing")
    try:
        rows = np.lib.format.open_memmap(str(path), mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header is read as Python text, and fails in many ways
        raise TicError(f"{path} is not a NumPy file of UIDs: {' '.join(str(error).split())}") from error
    if rows.dtype != dtype or rows.ndim != 1:
        raise TicError(f"{path} has dtype {rows.dtype} and shape {rows.shape}, not rows of {dtype.descr}")
    return rows


def fingerprint(path: object, dtype: np.dtype = UID) -> str:
    """Return the SHA-256 of the rows of a file of UIDs or classes; raise a TicError if they are not sorted."""
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
    """Return the position of each of ``uids`` (N,) in the sorted ``subset``, and how often it is there: (N,) each."""
    high, low = subset["f0"], subset["f1"]
    start = np.searchsorted(high, uids["f0"])
    repeats = np.zeros(len(uids), np.int64)
    hits = np.flatnonzero(start < len(subset))
    hits = hits[high[start[hits]] == uids["f0"][hits]]
    stop = np.searchsorted(high, uids["f0"][hits], side="right")
    is_single = stop == start[hits] + 1
    repeats[hits[is_single]] = low[start[hits[is_single]]] == uids["f1"][hits[is_single]]
    for i, end in zip(hits[~is_single], stop[~is_single], strict=True):  # rows that share their high words
        begin, uid = start[i], uids["f1"][i]
        start[i] += np.searchsorted(low[begin:end], uid)
        repeats[i] = begin + np.searchsorted(low[begin:end], uid, side="right") - start[i]
    return start, repeats
