"""Read a shard's samples as byte ranges, and write a tar from byte ranges; no image is decoded.

Format: POSIX ustar, 512-byte headers, data padded to 512 bytes; GNU and PAX long names are read. Consecutive members
with the same key (the name up to the first dot of its last part, as in webdataset) are one sample.
"""

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.storage import NotFoundError, atomic_open, is_remote, local_copy, open_file, temporary_folder

BLOCK = 512
END = bytes(2 * BLOCK)
IMAGES = ("jpg", "jpeg", "png", "webp")

LARGE = 8**11  # the first size, in bytes, that a header's eleven octal digits do not hold: 8 GiB
MAX_PADDING, EMPTY_TAR = 1 << 20, 20 * BLOCK
"""Most bytes of zeros after the last member, and in a tar without one. GNU tar and Python write up to 10,240."""

HEADER = np.dtype(
    [
        *(("name", "S100"), ("mode", "S8"), ("uid", "S8"), ("gid", "S8"), ("size", "S12"), ("mtime", "S12")),
        *(("checksum", "S8"), ("type", "S1"), ("link", "S100"), ("magic", "S8"), ("owner", "S32"), ("group", "S32")),
        *(("device", "S16"), ("prefix", "S155"), ("padding", "S12")),
    ]
)
"""The 512 bytes before each member (POSIX.1-1988, ustar)."""

_REGULAR, _SPARSE, _WITHOUT_DATA = b"0\0" + b"7", b"S", b"123456"

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, kw_only=True)
class Table:
    """The N samples of a shard, in its order, and their M members.

    Sample n has the key ``keys[n]`` and the members ``start[n]`` to ``start[n + 1]``, start being (N + 1,). Member m
    has the suffix ``suffixes[suffix[m]]`` and ``size[m]`` bytes from ``offset[m]`` on: all (M,). ``flawed`` says of
    some sample numbers why their bytes can't be used as they are.
    """

    keys: list[str]
    start: np.ndarray
    suffixes: list[str]
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    flawed: dict[int, str] = field(default_factory=dict)

    def find(self, suffix: str) -> np.ndarray:
        """Return the member of each sample that has a suffix, or -1: (N,)."""
        found = np.full(len(self.keys), -1)
        if suffix in self.suffixes:
            member = np.flatnonzero(self.suffix == self.suffixes.index(suffix))
            found[np.searchsorted(self.start, member, "right") - 1] = member
        return found

    def members_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (position in ``samples``, member) of each member of ``samples`` (K,), in their order."""
        count = np.diff(self.start)[samples]
        position = np.repeat(np.arange(len(samples)), count)
        member = np.arange(len(position)) + np.repeat(self.start[samples] - (np.cumsum(count) - count), count)
        return position, member

    def take(self, samples: np.ndarray) -> "Table":
        """Return the table of ``samples`` (K,) alone."""
        _, member = self.members_of(samples)
        return Table(
            keys=[self.keys[i] for i in samples.tolist()],
            start=np.append(0, np.cumsum(np.diff(self.start)[samples])),
            suffixes=self.suffixes,
            suffix=self.suffix[member],
            offset=self.offset[member],
            size=self.size[member],
            flawed={new: self.flawed[old] for new, old in enumerate(samples.tolist()) if old in self.flawed},
        )


@dataclass(slots=True)
class Sample:
    """One sample: ``members`` maps a suffix ("jpg", "json", …) to (offset, size) of its data in the shard, in bytes."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, shard: Buffer, suffix: str) -> bytes:
        """Return the data of a member."""
        offset, size = self.members[suffix]
        return shard[offset : offset + size]


@contextmanager
def open_shard(path: object) -> Iterator[Buffer]:
    """Give the bytes of a shard, memory-mapped; a TicError inside the block gets the shard's name."""
    try:
        with (
            temporary_folder() if is_remote(path) else nullcontext(Path()) as folder,
            open_file(local_copy(path, folder)) as file,
        ):
            if os.fstat(file.fileno()).st_size == 0:
                raise TicError("empty file")
            yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last view of it
    except NotFoundError:
        raise
    except TicError as error:
        raise TicError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def samples(shard: Buffer) -> Iterator[Sample]:
    """Yield the samples of ``read_table``; a flawed one has no members."""
    table = read_table(shard)
    suffixes = [table.suffixes[code] for code in table.suffix.tolist()]
    members = list(zip(suffixes, zip(table.offset.tolist(), table.size.tolist(), strict=True), strict=True))
    for i, (key, (start, stop)) in enumerate(zip(table.keys, pairwise(table.start.tolist()), strict=True)):
        yield Sample(key, {} if i in table.flawed else dict(members[start:stop]))


def read_table(shard: Buffer) -> Table:
    """Return the samples of a shard; a suffix that comes again under the same key starts a new sample.

    Left out are members without a key or a suffix, as in webdataset, and entries that are not regular files. Raises a
    TicError if a header is damaged, the tar has no end, or something other than padding follows its end.
    """
    entries = _Entries()
    try:
        _walk(shard, entries)
    finally:
        names = _read_names(shard, entries)  # a wrong checksum further up is why the walk failed
    number, codes, suffixes, keys, start, flawed, last, seen = [], {}, [], [], [], {}, None, set()
    for i, name in enumerate(names):
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        key, suffix = name[:dot], name[dot + 1 :].lower()
        if dot <= base or not suffix:
            continue
        if key != last or suffix in seen:
            start.append(len(number))
            keys.append(key)
            last = key
            seen.clear()
        seen.add(suffix)
        suffixes.append(codes.setdefault(suffix, len(codes)))
        number.append(i)
        if i in entries.flaws:
            flawed[len(keys) - 1] = entries.flaws[i]
    return Table(
        keys=keys,
        start=np.array([*start, len(number)]),
        suffixes=list(codes),
        suffix=np.array(suffixes, np.int32),
        offset=np.array([entries.positions[i] for i in number], np.int64) + BLOCK,
        size=np.array([entries.sizes[i] for i in number], np.int64),
        flawed=flawed,
    )


# --- Headers ---


@dataclass(slots=True)
class _Entries:
    """Positions of headers, whose checksums are not compared yet, and sizes of the data behind them.

    ``names`` and ``flaws``: number of an entry -> its long name, or "" if it is not a file; why its data can't be used.
    """

    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    flaws: dict[int, str] = field(default_factory=dict)


def _walk(shard: Buffer, entries: _Entries) -> None:
    """Go from header to header up to the end of the tar."""
    position, overrides = 0, {}
    while position + BLOCK <= len(shard):
        numbers = shard[position + 124 : position + 157]  # size, time, checksum, type
        is_plain = numbers[32] in _REGULAR and numbers[11] in b"\0 " and not overrides
        try:
            size = int(numbers[:11], 8) if is_plain else -1
        except ValueError:
            size = -1
        if size < 0:
            size = _read_special(shard, position, overrides, entries)
            if size is None:
                return
        entries.positions.append(position)
        entries.sizes.append(size)
        position += size + 2 * BLOCK - 1 & -BLOCK
    raise TicError(f"truncated: no end of the tar in {len(shard)} bytes")


def _read_special(shard: Buffer, position: int, overrides: dict[str, Any], entries: _Entries) -> int | None:
    """Return the size of the data of an entry other than a plain file, or None at the end of the tar.

    ``overrides`` is what GNU and PAX entries say about the next one: "path", "size", "sparse".
    """
    header, number = shard[position : position + BLOCK], len(entries.sizes)
    if not any(header):
        _check_padding(shard, position)
        return None
    size, kind = _read_number(header[124:136]), header[156:157]
    if size is None:
        raise TicError(f"damaged header at byte {position}")
    if kind in b"xgLK":
        data = shard[position + BLOCK : position + BLOCK + size]
        if kind in b"xL" and len(data) == size:
            overrides |= {"path": _decode(data)} if kind == b"L" else _read_pax(data, position + BLOCK)
        entries.names[number] = ""
        return size
    size = 0 if kind in _WITHOUT_DATA else overrides.get("size", size)
    if "path" in overrides or kind not in _REGULAR + _SPARSE:
        entries.names[number] = overrides["path"] if kind in _REGULAR + _SPARSE else ""
    if size >= LARGE:
        entries.flaws[number] = "member of 8 GiB or more"
    if kind == _SPARSE or "sparse" in overrides:
        entries.flaws[number] = "sparse member"
    overrides.clear()
    flag = position + 482
    while kind == _SPARSE and any(shard[flag : flag + 1]):  # the map of an old GNU sparse member goes on in a block
        size += BLOCK
        flag += BLOCK + (22 if flag == position + 482 else 0)
    return size


def _check_padding(shard: Buffer, position: int) -> None:
    """Raise a TicError if the bytes from the end of a tar at ``position`` on are not its padding."""
    if shard[position : position + MAX_PADDING].strip(b"\0"):
        raise TicError(
            f"data after the end of the tar at byte {position}: two tars in one file, or an overwritten header"
        )
    padding = len(shard) - position
    if padding > (MAX_PADDING if position else EMPTY_TAR):
        raise TicError(f"{padding} bytes after byte {position} are zeros: the file was not written to its end")


def _read_number(field: bytes) -> int | None:
    """Return a header's number: octal, or base 256 if the top bit is set (GNU); None if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << 95) - 1)
    try:
        number = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return number if number >= 0 else None


def _read_pax(records: bytes, position: int) -> dict[str, Any]:
    """Return "path", "size" and "sparse" of the PAX records ("length key=value\\n") at byte ``position``."""
    values, start = {}, 0
    try:
        while start < len(records) and records[start]:
            digits = records[start : start + 20].partition(b" ")[0]
            end = start + int(digits)
            key, _, value = records[start + len(digits) + 1 : end - 1].partition(b"=")
            if key == b"size":
                values["size"] = int(value)
            elif key in (b"path", b"GNU.sparse.name"):
                values["path"] = _decode(value)
            if key.startswith(b"GNU.sparse."):
                values["sparse"] = True
            if not start + len(digits) + 1 < end <= len(records) or values.get("size", 0) < 0:
                raise ValueError
            start = end
    except ValueError:
        raise TicError(f"damaged PAX header at byte {position}") from None
    return values


def _decode(name: bytes) -> str:
    """Return a name up to its first NUL as text; bytes that are not UTF-8 survive, as in Python's tarfile."""
    return name.partition(b"\0")[0].decode(errors="surrogateescape")


def _read_names(shard: Buffer, entries: _Entries) -> list[str]:
    """Return the name of each entry; raise a TicError if the checksum of a header is wrong."""
    names = []
    for first in range(0, len(entries.positions), 4096):  # as many headers as stay in the processor's cache
        positions = np.array(entries.positions[first : first + 4096])
        blocks = np.frombuffer(shard, np.uint8, len(shard) // BLOCK * BLOCK).reshape(-1, BLOCK)[positions // BLOCK]
        fields = blocks.view(HEADER).ravel()
        sums = blocks.sum(1, np.int32) - blocks[:, 148:156].sum(1, np.int32) + 8 * ord(" ")
        for i in np.flatnonzero(fields["checksum"] != np.char.add(octal(sums, 6), b"\0 ")).tolist():
            if _read_number(fields["checksum"][i].ljust(8, b"\0")) != sums[i]:  # it is not only written in another way
                raise TicError(f"wrong header checksum at byte {positions[i]}")
        short = b"\0".join(fields["name"].tolist()).decode(errors="surrogateescape").split("\0")
        if len(short) != len(fields):  # bytes after the end of a name
            short = [_decode(name) for name in fields["name"].tolist()]
        for i in np.flatnonzero(blocks[:, 345]).tolist():
            if fields["magic"][i].startswith(b"ustar") and fields["type"][i] != _SPARSE:
                short[i] = _decode(fields["prefix"][i]) + "/" + short[i]
        names += short
    for number, name in entries.names.items():
        names[number] = name
    return names


# --- Writing ---


def octal(values: np.ndarray, digits: int) -> np.ndarray:
    """Return ``values`` (N,) as octal text of ``digits`` digits: (N,) of dtype S{digits}."""
    shifts = 3 * np.arange(digits - 1, -1, -1)
    return ((values[:, None] >> shifts & 7) + ord("0")).astype(np.uint8).view(f"S{digits}").ravel()


def headers(names: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Return the ustar headers of N regular files, bytes (N, 512); owner, mode and time are fixed.

    Raises a TicError if a name has over 100 bytes, or one of ``sizes`` (N,) is 8 GiB or more.
    """
    sizes = np.asarray(sizes, np.int64)
    if names and len(longest := max(names, key=len)) > 100:
        raise TicError(f"member name longer than 100 bytes: {longest.decode(errors='replace')}")
    if len(sizes) and sizes.max() >= LARGE:
        raise TicError(f"member of {sizes.max()} bytes: a tar's limit is 8 GiB")
    table = np.zeros(len(names), HEADER)
    table["name"], table["type"], table["magic"] = names, b"0", b"ustar\x0000"
    table["mode"], table["uid"], table["gid"], table["mtime"] = b"0000644", b"0000000", b"0000000", b"00000000000"
    table["size"], table["checksum"] = octal(sizes, 11), b" " * 8
    blocks = table.view(np.uint8).reshape(-1, BLOCK)
    table["checksum"] = np.char.add(octal(blocks.sum(1, np.int32), 6), b"\0 ")
    return blocks


def write_shard(path: object, content: Iterable[tuple[str, dict[str, bytes]]], *, sync: bool = True) -> int:
    """Write (key, {suffix: data}) samples as the tar ``path``, atomically; return their number."""
    count, content = 0, iter(content)
    with atomic_open(path, sync=sync) as file:
        while batch := list(islice(content, 32)):  # headers are cheap in numbers
            names = [f"{key}.{suffix}".encode(errors="surrogateescape") for key, sample in batch for suffix in sample]
            members = [data for _, sample in batch for data in sample.values()]
            for header, data in zip(headers(names, np.array(list(map(len, members)))), members, strict=True):
                file.write(b"".join((header, data, bytes(-len(data) % BLOCK))))
            count += len(batch)
        file.write(END)
    return count
