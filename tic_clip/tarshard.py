"""A shard's samples as byte ranges, and a tar written from byte ranges: no image is decoded, nothing is repacked.

Format: POSIX ustar, 512-byte headers, data padded to 512 bytes. Members that share a key (the name up to the first dot
of its last part, as webdataset has it) and follow each other are one sample.
"""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from tic_clip import TicError
from tic_clip.storage import atomic_open, to_path

BLOCK = 512
END = bytes(2 * BLOCK)
IMAGES = ("jpg", "jpeg", "png", "webp")

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


def _number(field: bytes) -> int:
    """A header's number: octal text, or base 256 where the top bit is set (GNU, for sizes of 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.rstrip(b" \0") or b"0", 8)


def _text(name: bytes) -> str:
    """A name's bytes up to the first NUL as text; bytes that are no UTF-8 survive, as in Python's tarfile."""
    return name.partition(b"\0")[0].decode(errors="surrogateescape")


def _pax_path(records: bytes) -> str | None:
    """The path in PAX records ("length key=value\\n"), if they have one."""
    path, start = None, 0
    while start < len(records):
        digits, _, _ = records[start:].partition(b" ")
        length = int(digits)
        if length <= len(digits):
            raise ValueError("PAX record without an end")
        record = records[start + len(digits) + 1 : start + length - 1]
        start += length
        if record.startswith(b"path="):
            path = _text(record[5:])
    return path


def members(shard: Buffer) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of each regular file in a tar, in its order.

    Raises:
        TicError: a header is damaged, or the tar ends inside a member or without the block of zeros that ends a tar.
    """
    position, name = 0, None
    while position + BLOCK <= len(shard):
        header = shard[position : position + BLOCK]
        if header.count(0) == BLOCK:
            return
        try:
            size, checksum = _number(header[124:136]), _number(header[148:156])
        except ValueError:
            raise TicError(f"damaged header at byte {position}") from None
        if sum(header) - sum(header[148:156]) + 8 * 32 != checksum:
            raise TicError(f"wrong header checksum at byte {position}")
        start, kind = position + BLOCK, header[156:157]
        position = start + padded(size)
        if start + size > len(shard):
            raise TicError(f"truncated: a member at byte {start} ends at {start + size} of {len(shard)}")
        if kind == b"L":  # GNU: the next member's long name
            name = _text(shard[start : start + size])
        elif kind == b"x":
            try:
                name = _pax_path(shard[start : start + size]) or name
            except ValueError:
                raise TicError(f"damaged PAX header at byte {start}") from None
        elif kind in b"0\0":
            if name is None:
                name = _text(header[:100])
                if header[257:262] == b"ustar" and header[345]:
                    name = _text(header[345:500]) + "/" + name
            yield name, start, size
            name = None
        elif kind != b"g":
            name = None
    raise TicError(f"truncated: no end of the tar after byte {position}")


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name; the suffix is lower-case and empty if there is none."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def samples(shard: Buffer) -> Iterator[Sample]:
    """Yield the samples of a shard in its order; a suffix that comes again under the same key starts a new sample."""
    sample = None
    for name, offset, size in members(shard):
        key, suffix = split_name(name)
        if sample is None or key != sample.key or suffix in sample.members:
            if sample is not None:
                yield sample
            sample = Sample(key)
        sample.members[suffix] = (offset, size)
    if sample is not None:
        yield sample


@contextmanager
def open_shard(path: object) -> Iterator[Buffer]:
    """The bytes of a shard: memory-mapped if it is local, downloaded if it is not.

    Raises:
        TicError: an error inside the block names the shard.
    """
    path = to_path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise TicError("empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as shard:
                yield shard
    except FileNotFoundError:
        raise TicError(f"{path} is missing") from None
    except TicError as error:
        raise TicError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def header(name: str, size: int) -> bytes:
    """The ustar header of a regular file; owner, mode and time are fixed so that equal data give equal tars."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) > 100:
        raise TicError(f"member name longer than 100 bytes: {name}")
    block = bytearray(BLOCK)
    block[: len(encoded)] = encoded
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148] = b"%011o\0" % size, b"00000000000\0"
    block[148:156], block[156:157], block[257:265] = b" " * 8, b"0", b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


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
