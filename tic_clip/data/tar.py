"""Read a shard's samples as byte ranges, and write a tar from byte ranges; no image is decoded.

Format: POSIX ustar, 512-byte headers, data padded to 512 bytes; GNU and PAX long names are read. Consecutive members
with the same key (the name up to the first dot of its last part, as in webdataset) are one sample.
"""

import io
import mmap
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import IO

import numpy as np

from tic_clip import TicError
from tic_clip.storage import atomic_open, is_remote, local_copy, open_file, temporary_folder

BLOCK = 512
END = bytes(2 * BLOCK)
IMAGES = ("jpg", "jpeg", "png", "webp")
UNUSABLE = (OSError, ValueError, SyntaxError)  # what decoding an image or a caption raises

LARGE = 8**11  # the first size, in bytes, that a header's eleven octal digits do not hold: 8 GiB
MAX_PADDING, EMPTY_TAR = 1 << 20, 20 * BLOCK  # most zeros after the last member, and in a tar without one, in bytes

_FIELDS = "name:S100 mode:S8 uid:S8 gid:S8 size:S12 mtime:S12 checksum:S8 type:S1 link:S100 magic:S8 rest:S247"
HEADER = np.dtype([tuple(field.split(":")) for field in _FIELDS.split()])
"""The 512 bytes before each member (POSIX.1-1988, ustar)."""

_REGULAR, _PAX = b"0\0" + b"7", ord("x")  # types
_PAX_RECORDS = re.compile(rb"path=|size=|GNU\.sparse\.|hdrcharset=")  # webdataset's writer has none, but times

Buffer = bytes | mmap.mmap


@dataclass(frozen=True, kw_only=True)
class Table:
    """The N samples of a shard, in its order, and their M members.

    Sample n has the key ``keys[n]`` and members ``start[n]`` to ``start[n + 1]``; start is (N + 1,). Member m has the
    suffix ``suffixes[suffix[m]]`` and ``size[m]`` bytes at ``offset[m]``, all (M,). ``flawed``: number of a sample ->
    why it can't be used.
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


@dataclass(slots=True)
class Sample:
    """A sample: suffix -> (offset, size) of each member's data in bytes; empty if it has a ``flaw``."""

    key: str
    members: dict[str, tuple[int, int]]
    flaw: str | None = None

    def read(self, shard: Buffer, suffix: str) -> bytes:
        """Return the data of a member."""
        offset, size = self.members[suffix]
        return shard[offset : offset + size]


@contextmanager
def open_shard(path: object, open_remote: Callable[[str], IO[bytes]] | None = None) -> Iterator[Buffer]:
    """Yield the bytes of a shard, memory-mapped; add the shard's name to a TicError inside the block.

    A shard in a cloud is opened by ``open_remote``, a cache's, or downloaded for the block.
    """
    try:
        with ExitStack() as stack:
            if open_remote and is_remote(path):
                file = stack.enter_context(open_remote(str(path)))
            else:
                folder = stack.enter_context(temporary_folder()) if is_remote(path) else Path()
                file = stack.enter_context(open_file(local_copy(path, folder)))
            if os.fstat(file.fileno()).st_size == 0:
                raise TicError("empty file")
            yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closed with the last view of it
    except TicError as error:
        if str(path) in str(error):
            raise
        raise TicError(f"{path}: {error}") from None


def samples(shard: Buffer) -> Iterator[Sample]:
    """Yield the samples of ``read_table``."""
    table = read_table(shard)
    places = zip(table.offset.tolist(), table.size.tolist(), strict=True)
    members = [(table.suffixes[code], place) for code, place in zip(table.suffix.tolist(), places, strict=True)]
    for i, (start, stop) in enumerate(pairwise(table.start.tolist())):
        flaw = table.flawed.get(i)
        yield Sample(table.keys[i], {} if flaw else dict(members[start:stop]), flaw)


def read_table(shard: Buffer) -> Table:
    """Return the samples of a shard; a suffix that repeats under the same key starts a new sample.

    Skips members without a key or suffix, as webdataset does, and entries that are not files.
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
    """Entries of a tar; ``names`` has those that are not a header's own, "" for what is not a file."""

    positions: list[int] = field(default_factory=list)  # of headers
    sizes: list[int] = field(default_factory=list)  # of the data behind them
    names: dict[int, str] = field(default_factory=dict)
    flaws: dict[int, str] = field(default_factory=dict)


def _walk(shard: Buffer, entries: _Entries) -> None:
    """Add the entries of a tar up to its end, without checking their checksums."""
    position = 0
    while position + BLOCK <= len(shard):
        numbers = shard[position + 124 : position + 157]  # size, time, checksum, type
        try:
            size = int(numbers[:11], 8) if numbers[11] in b"\0 " else -1
        except ValueError:
            size = -1
        end = position + size + 2 * BLOCK - 1 & -BLOCK
        if size < 0 or numbers[32] not in _REGULAR:
            if size >= 0 and numbers[32] == _PAX and not _PAX_RECORDS.search(shard, position + BLOCK, end):
                entries.names[len(entries.sizes)] = ""
            elif any(shard[position : position + BLOCK]):
                position = _add_special(shard, position, entries)
                continue
            else:
                return _check_padding(shard, position)
        entries.positions.append(position)
        entries.sizes.append(size)
        position = end
    raise TicError(f"truncated: no end of the tar in {len(shard)} bytes")


def _add_special(shard: Buffer, position: int, entries: _Entries) -> int:
    """Add an entry, read by Python's tarfile with the GNU and PAX headers before it; return where the next one is."""
    file = io.BytesIO(shard) if isinstance(shard, bytes) else shard
    file.seek(position)
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        (info,), end = tar.members, tar.offset
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError):
        end = -1
    if end <= position or info.size < 0:
        raise TicError(f"damaged header at byte {position}")
    number = len(entries.sizes)
    entries.names[number] = info.name.partition("\0")[0] if info.isreg() else ""
    if info.issparse():
        entries.flaws[number] = "sparse member"
    elif info.size >= LARGE:
        entries.flaws[number] = "member of 8 GiB or more"
    entries.positions.append(position if info.issparse() else info.offset_data - BLOCK)
    entries.sizes.append(info.size)
    return end


def _check_padding(shard: Buffer, position: int) -> None:
    """Raise a TicError if anything but padding follows the end of a tar at ``position``."""
    if shard[position : position + MAX_PADDING].strip(b"\0"):
        raise TicError(f"data after the end of the tar at byte {position}: two tars, or an overwritten header")
    padding = len(shard) - position
    if padding > (MAX_PADDING if position else EMPTY_TAR):
        raise TicError(f"{padding} bytes after byte {position} are zeros: the file was not written to its end")


def _read_names(shard: Buffer, entries: _Entries) -> list[str]:
    """Return the name of each entry; raise a TicError if the checksum of a header is wrong."""
    names = []
    for first in range(0, len(entries.positions), 4096):  # as many headers as stay in the processor's cache
        positions = np.array(entries.positions[first : first + 4096])
        blocks = np.frombuffer(shard, np.uint8, len(shard) // BLOCK * BLOCK).reshape(-1, BLOCK)[positions // BLOCK]
        fields = blocks.view(HEADER).ravel()
        sums = blocks.sum(1, np.int32) - blocks[:, 148:156].sum(1, np.int32) + 8 * ord(" ")
        short = b"\0".join(fields["name"].tolist()).decode("utf-8", "surrogateescape").split("\0")
        is_odd = (fields["checksum"] != np.char.add(octal(sums, 6), b"\0 ")) | (blocks[:, 345] != 0)  # it has a prefix
        if len(short) != len(fields):  # bytes behind the end of a name
            short, is_odd = [""] * len(fields), np.ones(len(fields), bool)
        for i in np.flatnonzero(is_odd).tolist():
            try:
                short[i] = tarfile.TarInfo.frombuf(blocks[i].tobytes(), "utf-8", "surrogateescape").name
            except tarfile.HeaderError:
                raise TicError(f"wrong header checksum at byte {positions[i]}") from None
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
    """Return the ustar headers (N, 512) of files with names of at most 100 bytes and sizes (N,) below 8 GiB."""
    if names and len(longest := max(names, key=len)) > 100:
        raise TicError(f"member name longer than 100 bytes: {longest.decode(errors='replace')}")
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
            entries = zip(headers(names, np.array(list(map(len, members)), np.int64)), members, strict=True)
            parts = ((header, data, bytes(-len(data) % BLOCK)) for header, data in entries)
            file.write(b"".join(chain.from_iterable(parts)))  # small writes are twice as slow
            count += len(batch)
        file.write(END)
    return count
