"""A shard's samples as byte ranges, and a tar written from byte ranges: no image is decoded, nothing is repacked.

Format: POSIX ustar, 512-byte headers, data padded to 512 bytes; GNU and PAX long names are read. Members that share a
key (the name up to the first dot of its last part, as webdataset has it) and follow each other are one sample.
"""

import mmap
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from tic_clip import TicError
from tic_clip.storage import atomic_open, is_remote, local_copy

BLOCK = 512
END = bytes(2 * BLOCK)
IMAGES = ("jpg", "jpeg", "png", "webp")

HEADER = np.dtype(
    [
        *(("name", "S100"), ("mode", "S8"), ("uid", "S8"), ("gid", "S8"), ("size", "S12"), ("mtime", "S12")),
        *(("checksum", "S8"), ("type", "S1"), ("link", "S100"), ("magic", "S8"), ("owner", "S32"), ("group", "S32")),
        *(("device", "S16"), ("prefix", "S155"), ("padding", "S12")),
    ]
)
"""The 512 bytes before each member (POSIX.1-1988, ustar)."""

_SIZE_AND_TYPE = struct.Struct("124x12s20xc355x")
_CHECKSUM = slice(148, 156)
_CUT_OFF = b"!"  # no type of any tar
_NO_DATA = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "directory", b"6": "device"}

Buffer = bytes | mmap.mmap


@dataclass(slots=True)
class Sample:
    """One sample: ``members`` maps a suffix ("jpg", "json", …) to (offset, size) of its data in the shard, in bytes."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, shard: Buffer, suffix: str) -> bytes:
        """The data of one member."""
        offset, size = self.members[suffix]
        return shard[offset : offset + size]


def padded(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _size(field: bytes) -> int | None:
    """A header's size: octal text, or base 256 where the top bit is set (GNU, from 8 GiB on); None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << 95) - 1)
    try:
        size = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def _text(name: bytes) -> str:
    """A name's bytes up to the first NUL as text; bytes that are no UTF-8 survive, as in Python's tarfile."""
    return name.partition(b"\0")[0].decode(errors="surrogateescape")


def _pax(records: bytes) -> dict[str, Any] | None:
    """The path and size in PAX records ("length key=value\\n") as far as there are any; None if they are damaged."""
    values, start = {}, 0
    while start < len(records) and records[start]:
        digits = records[start : start + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if length <= len(digits) + 1 or start + length > len(records):
            return None
        key, _, value = records[start + len(digits) + 1 : start + length - 1].partition(b"=")
        if key == b"path":
            values["path"] = _text(value)
        elif key == b"size":
            if not value.isdigit():
                return None
            values["size"] = int(value)
        start += length
    return values


def _walk(shard: Buffer, faults: list[str]) -> Iterator[tuple[int, bytes, int, int, str | None]]:
    """Yield (position of the header, type, start of the data, size, long name if it has one) of each entry of a tar.

    Checksums are not looked at: a damaged header leads to one that is none, or beyond the end. What stops the walk
    before the end of the tar goes into ``faults``; each step goes forward by a block at least.
    """
    position, end, name, pax_size = 0, len(shard), None, None
    while position + BLOCK <= end:
        text, kind = _SIZE_AND_TYPE.unpack_from(shard, position)
        size = _size(text)
        if size == 0 and not any(shard[position : position + BLOCK]):
            return
        if size is None:
            return faults.append(f"damaged header at byte {position}")
        if kind in _NO_DATA:
            size = 0
        elif kind not in b"xgLK" and pax_size is not None:
            size = pax_size
        start = position + BLOCK
        if start + size > end:
            faults.append(f"truncated: a member at byte {start} ends at {start + size} of {end}")
            yield position, _CUT_OFF, start, 0, None
            return
        yield position, kind, start, size, name
        if kind == b"L":
            name = _text(shard[start : start + size])
        elif kind == b"x":
            values = _pax(shard[start : start + size])
            if values is None:
                return faults.append(f"damaged PAX header at byte {start}")
            name, pax_size = values.get("path", name), values.get("size")
        elif kind not in b"gK":
            name, pax_size = None, None
        position = start + padded(size)
    faults.append(f"truncated: no end of the tar after byte {position}")


def _heads(shard: Buffer, positions: Sequence[int]) -> np.ndarray:
    """The headers at ``positions`` (N,), which are multiples of 512, as bytes (N, 512)."""
    blocks = np.frombuffer(shard, np.uint8, len(shard) // BLOCK * BLOCK).reshape(-1, BLOCK)
    return blocks[np.array(positions) // BLOCK]


def _sound(heads: np.ndarray) -> np.ndarray:
    """Which of the headers (N, 512) have the checksum that stands in them (bytes may count as signed): (N,) bool."""
    written = np.zeros(len(heads), np.int64)
    for column in heads[:, _CHECKSUM].T:
        digit = column - ord("0")  # unsigned: what is no digit becomes large
        written = np.where(digit < 8, written * 8 + digit, np.where(column & ~np.uint8(32), -(1 << 40), written))
    spaces = 8 * ord(" ")
    sums = heads.sum(1, np.int32) - heads[:, _CHECKSUM].sum(1, np.int32) + spaces
    sound = sums == written
    if not sound.all():
        signed = heads.view(np.int8)
        sound |= signed.sum(1, np.int32) - signed[:, _CHECKSUM].sum(1, np.int32) + spaces == written
    return sound


def members(shard: Buffer, ignored: Counter | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of each regular file in a tar, in its order.

    Entries that are none (links, directories, devices, …) are counted in ``ignored`` by kind.

    Raises:
        TicError: a header is damaged, or the tar ends inside a member or without the block of zeros that ends a tar.
    """
    faults: list[str] = []
    walk = _walk(shard, faults)
    while batch := list(islice(walk, 4096)):
        heads = _heads(shard, [entry[0] for entry in batch])
        sound = _sound(heads)
        names = heads.view(HEADER)["name"].ravel().tolist()
        for (position, kind, start, size, name), short, good in zip(batch, names, sound.tolist(), strict=True):
            if not good:
                raise TicError(f"wrong header checksum at byte {position}")
            if kind in b"0\0" + b"7":
                yield (_short_name(short, shard, position) if name is None else name), start, size
            elif ignored is not None and kind not in b"xgLK" and kind != _CUT_OFF:
                ignored[_NO_DATA.get(kind, "other entry")] += 1
    if faults:
        raise TicError(faults[0])


def _short_name(name: bytes, shard: Buffer, position: int) -> str:
    """A name of at most 100 bytes, after the prefix that ustar may give it."""
    if shard[position + 345] and shard[position + 257 : position + 262] == b"ustar":
        return _text(shard[position + 345 : position + 500]) + "/" + _text(name)
    return _text(name)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name; the suffix is lower-case and empty if there is none."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def samples(shard: Buffer, ignored: Counter | None = None) -> Iterator[Sample]:
    """Yield the samples of a shard in its order; a suffix that comes again under the same key starts a new sample.

    Members without a key or a suffix belong to no sample, as in webdataset; they and entries that are no files are
    counted in ``ignored`` by kind.
    """
    sample = None
    for name, offset, size in members(shard, ignored):
        key, suffix = split_name(name)
        if not suffix or key[-1:] in ("", "/"):
            if ignored is not None:
                ignored["file without a key or a suffix"] += 1
            continue
        if sample is None or key != sample.key or suffix in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(key)
        sample.members[suffix] = (offset, size)
    if sample is not None:
        yield sample


@contextmanager
def open_shard(path: object) -> Iterator[Buffer]:
    """The bytes of a shard: memory-mapped if it is local, fetched into a temporary file before if it is not.

    Raises:
        TicError: an error inside the block names the shard.
    """
    try:
        with (
            tempfile.TemporaryDirectory() if is_remote(path) else nullcontext() as folder,
            open(local_copy(path, Path(folder)) if folder else path, "rb") as file,
        ):
            if os.fstat(file.fileno()).st_size == 0:
                raise TicError("empty file")
            yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last that looks at it
    except FileNotFoundError:
        raise TicError(f"{path} is missing") from None
    except TicError as error:
        raise TicError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def octal(values: np.ndarray, digits: int) -> np.ndarray:
    """Each of ``values`` (N,) as octal text of ``digits`` digits: (N,) of dtype S{digits}."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8).view(f"S{digits}").ravel()


def headers(names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """The ustar headers of regular files, as bytes (N, 512); owner, mode and time are fixed: equal data, equal tars.

    Args:
        names: N names of at most 100 bytes.
        sizes: (N,), below 8 GiB.

    Raises:
        TicError: a name or a file does not fit the format.
    """
    sizes = np.asarray(sizes, np.int64)
    if names and len(longest := max(names, key=len)) > 100:
        raise TicError(f"member name longer than 100 bytes: {longest.decode(errors='replace')}")
    if len(sizes) and sizes.max() >= 8**11:
        raise TicError(f"member of {sizes.max()} bytes: a tar's limit is 8 GiB")
    table = np.zeros(len(names), HEADER)
    table["name"], table["type"], table["magic"] = names, b"0", b"ustar\x0000"
    table["mode"], table["uid"], table["gid"], table["mtime"] = b"0000644", b"0000000", b"0000000", b"00000000000"
    table["size"], table["checksum"] = octal(sizes, 11), b" " * 8
    blocks = table.view(np.uint8).reshape(-1, BLOCK)
    sums = blocks.sum(1, np.int32)
    table["checksum"] = np.char.add(octal(sums, 6), b"\0 ")
    return blocks


def header(name: str, size: int) -> bytes:
    """The header of one member."""
    return headers([name.encode(errors="surrogateescape")], np.array([size])).tobytes()


def write_member(file: IO[bytes], name: str, data: bytes | memoryview) -> None:
    """Append one member to an open tar."""
    file.write(header(name, len(data)))
    file.write(data)
    file.write(bytes(padded(len(data)) - len(data)))


def write_shard(path: object, content: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write (key, {suffix: data}) samples as the tar ``path``, atomically; returns their number."""
    count = 0
    with atomic_open(path) as file:
        for key, data in content:
            for suffix, value in data.items():
                write_member(file, f"{key}.{suffix}", value)
            count += 1
        file.write(END)
    return count
