"""A shard's samples as byte ranges, and a tar written from byte ranges: no image is decoded, nothing is repacked.

Format: POSIX ustar, 512-byte headers, data padded to 512 bytes; GNU and PAX long names are read. Members that share a
key (the name up to the first dot of its last part, as webdataset has it) and follow each other are one sample.
"""

import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import ne
from pathlib import Path
from typing import Any

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

_CHECKSUM = slice(148, 156)
_NO_DATA = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "directory", b"6": "device"}
_REGULAR = b"0\0" + b"7"

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
            if not value.isdigit() or len(value) > 20:
                return None
            values["size"] = int(value)
        start += length
    return values


@dataclass(slots=True)
class _Entries:
    """Some entries of a tar, their checksums not yet looked at: where each ``head`` is, and the ``sizes`` of the data.

    ``others`` are no regular files: number of the entry -> type. ``names`` are long ones: number -> name.
    """

    positions: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    others: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    fault: str | None = None


def _walk(shard: Buffer) -> Iterator[_Entries]:
    """Go from header to header, a block at least each time; a damaged size leads to none, or beyond the end.

    Yields the entries some thousand at a time; ``fault`` of the last says what stopped the walk before the tar's end.
    """
    position, next_one = 0, {}
    while True:
        entries = _Entries()
        positions, sizes, heads = entries.positions, entries.sizes, entries.heads
        while position + BLOCK <= len(shard) and len(sizes) < 4096:
            head, size = shard[position : position + BLOCK], -1
            if head[156] in _REGULAR and head[135] in b"\0 " and not next_one:
                try:
                    size = int(head[124:135], 8)
                except ValueError:
                    size = -1
            if size < 0:
                size = _unusual(shard, position, next_one, entries)
                if size is None:
                    yield entries
                    return
            positions.append(position)
            sizes.append(size)
            heads.append(head)
            position += size + 2 * BLOCK - 1 & -BLOCK
        if position + BLOCK > len(shard):
            entries.fault = _cut_off(entries, position, len(shard))
            yield entries
            return
        yield entries


def _cut_off(entries: _Entries, position: int, end: int) -> str:
    """What is missing of a tar that ends at ``end`` where the next header should be at ``position``."""
    if position <= end or not entries.sizes:
        return f"truncated: no end of the tar after byte {position}"
    start, size = entries.positions[-1] + BLOCK, entries.sizes[-1]
    if start + size <= end:
        return f"truncated: no end of the tar after byte {end}"
    entries.others[len(entries.sizes) - 1] = b""  # not to be read
    return f"truncated: a member at byte {start} ends at {start + size} of {end}"


def _unusual(shard: Buffer, position: int, next_one: dict[str, Any], entries: _Entries) -> int | None:
    """The size of an entry that is no plain regular file, or None where the walk ends.

    ``next_one`` holds what GNU and PAX entries say of the next: its ``path`` and ``size``.
    """
    head, number = shard[position : position + BLOCK], len(entries.sizes)
    if not any(head):
        return None
    size, start, kind = _size(head[124:136]), position + BLOCK, bytes(head[156:157])
    if size is None:
        entries.fault = f"damaged header at byte {position}"
        return None
    if kind in b"xgLK":
        entries.others[number] = kind
        if kind in b"xL" and start + size <= len(shard):
            data = shard[start : start + size]
            values = _pax(data) if kind == b"x" else {"path": _text(data)}
            if values is None:
                entries.fault = f"damaged PAX header at byte {start}"
                return None
            next_one.update(values)
        return size
    if kind not in _REGULAR:
        entries.others[number] = kind
    elif "path" in next_one:
        entries.names[number] = next_one["path"]
    size = 0 if kind in _NO_DATA else next_one.get("size", size)
    next_one.clear()
    return size


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
    for entries in _walk(shard):
        heads = np.frombuffer(b"".join(entries.heads), np.uint8).reshape(-1, BLOCK)
        sound, names = _sound(heads), _names(heads)
        last = len(heads) if sound.all() else int(sound.argmin())
        for number, name in entries.names.items():
            names[number] = name
        found = zip(names[:last], [position + BLOCK for position in entries.positions], entries.sizes, strict=False)
        yield from (member for i, member in enumerate(found) if i not in entries.others) if entries.others else found
        for number, kind in entries.others.items():
            if ignored is not None and number < last and kind not in b"xgLK":
                ignored[_NO_DATA.get(kind, "other entry")] += 1
        if last < len(heads):
            raise TicError(f"wrong header checksum at byte {entries.positions[last]}")
        if entries.fault:
            raise TicError(entries.fault)


def _names(heads: np.ndarray) -> list[str]:
    """The names in headers (N, 512): 100 bytes at most, after the prefix that ustar may give them."""
    raw = heads.view(HEADER)["name"].ravel().tolist()
    names = b"\0".join(raw).decode(errors="surrogateescape").split("\0")
    if len(names) != len(raw):  # something stands behind the end of a name
        names = [_text(name) for name in raw]
    for i in np.flatnonzero(heads[:, 345]).tolist():
        head = heads[i].tobytes()
        if head[257:262] == b"ustar":
            names[i] = _text(head[345:500]) + "/" + names[i]
    return names


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member's name; the suffix is lower-case and empty if there is none."""
    if "/" not in name:
        key, _, suffix = name.partition(".")
        return key, suffix.lower()
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


@dataclass(frozen=True, kw_only=True)
class Table:
    """The N samples of a shard, in its order, and their M members.

    Sample n has the key ``keys[n]`` and the members ``start[n]`` to ``start[n + 1]``, start being (N + 1,). Member m
    has the suffix ``suffixes[suffix[m]]`` and ``size[m]`` bytes from ``offset[m]`` on: all (M,).
    """

    keys: list[str]
    start: np.ndarray
    suffixes: list[str]
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def find(self, suffix: str) -> np.ndarray:
        """(N,) the member of each sample that has a suffix, or -1."""
        found = np.full(len(self.keys), -1)
        if suffix in self.suffixes:
            member = np.flatnonzero(self.suffix == self.suffixes.index(suffix))
            found[np.searchsorted(self.start, member, "right") - 1] = member
        return found

    def members_of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in ``samples``, member) of each member of ``samples`` (K,), in their order."""
        count = np.diff(self.start)[samples]
        position = np.repeat(np.arange(len(samples)), count)
        member = np.arange(len(position)) + np.repeat(self.start[samples] - (np.cumsum(count) - count), count)
        return position, member

    def take(self, samples: np.ndarray) -> "Table":
        """The table of some samples (K,) alone."""
        _, member = self.members_of(samples)
        return Table(
            keys=[self.keys[i] for i in samples.tolist()],
            start=np.append(0, np.cumsum(np.diff(self.start)[samples])),
            suffixes=self.suffixes,
            suffix=self.suffix[member],
            offset=self.offset[member],
            size=self.size[member],
        )


def read_table(shard: Buffer, ignored: Counter | None = None) -> Table:
    """The samples of a shard; a suffix that comes again under the same key starts a new sample.

    Members without a key or a suffix belong to no sample, as in webdataset; they and entries that are no files are
    counted in ``ignored`` by kind.

    Raises:
        TicError: as ``members``.
    """
    found = list(members(shard, ignored))
    names, offset, size = zip(*found, strict=True) if found else ((), (), ())
    keys, texts = map(list, zip(*map(split_name, names), strict=True)) if found else ([], [])
    offset, size = np.array(offset, np.int64), np.array(size, np.int64)
    nameless = [i for i, text in enumerate(texts) if not text or keys[i][-1:] in ("", "/")]
    if nameless:
        if ignored is not None:
            ignored["file without a key or a suffix"] += len(nameless)
        offset, size = np.delete(offset, nameless), np.delete(size, nameless)
        for i in reversed(nameless):
            del keys[i], texts[i]
    codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    suffix = np.array([codes[text] for text in texts], np.int32)
    starts = _starts(keys, suffix, len(codes))
    return Table(
        keys=[keys[i] for i in starts.tolist()],
        start=np.append(starts, len(keys)),
        suffixes=list(codes),
        suffix=suffix,
        offset=offset,
        size=size,
    )


def _starts(keys: list[str], suffix: np.ndarray, num_suffixes: int) -> np.ndarray:
    """The members that start a sample: those with another key than the one before, or with a suffix that it has had."""
    new = np.ones(len(keys), bool)
    new[1:] = np.fromiter(map(ne, keys[1:], keys), bool, max(len(keys) - 1, 0))
    codes = (np.cumsum(new) - 1) * num_suffixes + suffix
    few = num_suffixes <= 64  # else one counter for each suffix in each sample would be too many
    if len(keys) and (np.bincount(codes).max() > 1 if few else len(np.unique(codes)) < len(codes)):
        seen: set[int] = set()
        for i, code in enumerate(suffix.tolist()):
            new[i] |= code in seen
            if new[i]:
                seen = set()
            seen.add(code)
    return np.flatnonzero(new)


def samples(shard: Buffer) -> Iterator[Sample]:
    """Yield the samples of a shard in its order, as ``read_table`` has them."""
    table = read_table(shard)
    names = [table.suffixes[code] for code in table.suffix.tolist()]
    places = list(zip(table.offset.tolist(), table.size.tolist(), strict=True))
    for key, start, stop in zip(table.keys, table.start.tolist(), table.start[1:].tolist(), strict=False):
        yield Sample(key, dict(zip(names[start:stop], places[start:stop], strict=True)))


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


def write_shard(path: object, content: Iterable[tuple[str, dict[str, bytes]]], *, sync: bool = True) -> int:
    """Write (key, {suffix: data}) samples as the tar ``path``, atomically; returns their number."""
    count, samples = 0, iter(content)
    with atomic_open(path, sync=sync) as file:
        while some := list(islice(samples, 32)):  # headers are cheap in numbers
            members = [(f"{key}.{suffix}", value) for key, data in some for suffix, value in data.items()]
            names = [name.encode(errors="surrogateescape") for name, _ in members]
            heads = iter(headers(names, np.array([len(value) for _, value in members])))
            for _, data in some:
                parts = ((next(heads), value, bytes(padded(len(value)) - len(value))) for value in data.values())
                file.write(b"".join(chain.from_iterable(parts)))
            count += len(some)
        file.write(END)
    return count
