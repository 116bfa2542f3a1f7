"""The shards of a pool or a split: where they lie, how many samples they hold, and whether all is as it should be.

A split is ``split/*.tar``, or in parts ``split/part/*.tar``; beside the tars lie ``{:08d}_stats.json`` and
``sizes.json`` (shard -> samples), and ``meta.json`` where reshard has made them. All of it local or in a cloud.
"""

import json
import mmap
import os
import re
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tic_clip import TicError, uids
from tic_clip.cli import progress
from tic_clip.storage import (
    Missing,
    RandomAccess,
    is_remote,
    list_files,
    list_folders,
    local_copy,
    open_random,
    read_bytes,
    read_json,
    to_path,
    write_json,
)
from tic_clip.tarshard import BLOCK, IMAGES, Buffer, Sample, open_shard, padded, samples

SIZES, META = "sizes.json", "meta.json"
STATS = "{:08d}_stats.json"

_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")

Job, Result = TypeVar("Job"), TypeVar("Result")

# A fork would share the parent's open connections to a cloud.
_processes = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))


def _each(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_workers: int,
    executor: Callable[[int], Executor] = ThreadPoolExecutor,
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order; at most four jobs a worker are under way or waiting at any time."""
    if num_workers == 1:
        yield from map(work, jobs)
        return
    with executor(num_workers) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise TicError("a worker process died (out of memory?); try fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


# --- Where the shards are ---


def list_shards(path: object) -> list[tuple[str, int]]:
    """(path, size in bytes) of the tars of a pool or a split, flat or else in parts, sorted by path.

    Raises:
        TicError: there is no such folder, or no tar in it.
    """
    found = list_files(path, "*.tar") or list_files(path, "*/*.tar")
    if not found:
        raise TicError(f"{path} holds no .tar file")
    return found


def list_tars(path: object) -> list[str]:
    """The paths of ``list_shards``."""
    return [shard for shard, _ in list_shards(path)]


@cache
def read_sizes(folder: str) -> dict[str, int]:
    """The table of a folder of shards: file name -> samples. It is read once; ``write_sizes`` makes it be read again.

    Raises:
        TicError: it has none, or the table is not one of counts; the message names the folder.
    """
    path = f"{folder or '.'}/{SIZES}"
    try:
        sizes = json.loads(read_bytes(path))
    except Missing:
        raise Missing(f"{folder} has no {SIZES}: is the split there and finished?") from None
    except ValueError as error:
        raise error if isinstance(error, TicError) else TicError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise TicError(f"{path} is no table of shard name -> number of samples")
    return sizes


def write_sizes(folder: str, sizes: dict[str, int]) -> None:
    """Write the table of a folder of shards, sorted by name."""
    write_json(f"{folder}/{SIZES}", dict(sorted(sizes.items())))
    read_sizes.cache_clear()


def _sizes_or_none(folder: str) -> dict[str, int] | None:
    try:
        return read_sizes(folder)
    except Missing:
        return None


def split_folders(split: object) -> list[str]:
    """The folders that hold a split's shards: itself, or its parts (``split/part/*.tar``), sorted.

    Raises:
        TicError: neither it nor a folder in it has a ``sizes.json``, or a part is missing or not finished.
    """
    folder = str(to_path(split))
    if _sizes_or_none(folder) is not None:
        return [folder]
    try:
        folders = list_folders(folder)
    except Missing:
        raise TicError(f"{split} is missing: make this split first") from None
    tables = dict(zip(folders, _each(_sizes_or_none, folders, 16), strict=True))
    parts = [part for part, table in tables.items() if table is not None]
    if not parts:
        raise TicError(f"{split} has no {SIZES}: is the split there and finished?")
    _check_parts(split, parts)
    for part in folders:
        if tables[part] is None and list_files(part, "*.tar"):
            raise TicError(f"{part} has shards but no {SIZES}: finish reshard first, or run add_sizes.py")
    return parts


def _check_parts(split: object, parts: list[str]) -> None:
    """Check that all parts are there which ``meta.json`` tells of; parts without one come from elsewhere.

    Raises:
        TicError: some are not, or they come from runs of reshard with different numbers of parts.
    """
    known = [part for part in _each(_part_of, parts, 16) if part]
    wanted = {total for _, total in known}
    if len(wanted) > 1:
        raise TicError(f"{split} has parts of a split in {min(wanted)} and of one in {max(wanted)}: make it again")
    there = len({number for number, _ in known})
    if wanted and there < max(wanted):
        raise TicError(f"{split} has {there} of {max(wanted)} parts: finish reshard first")


def _part_of(folder: str) -> tuple[int, int] | None:
    """(number of this part, number of parts) as reshard's ``meta.json`` has them, or None."""
    meta = _meta_or_none(folder)
    arguments = meta.get("arguments") if meta else None
    numbers = [arguments.get(name) if isinstance(arguments, dict) else None for name in ("part", "parts")]
    return tuple(numbers) if all(type(number) is int for number in numbers) else None


def _meta_or_none(folder: str) -> dict[str, Any] | None:
    try:
        meta = read_json(f"{folder}/{META}")
    except FileNotFoundError:
        return None
    if not isinstance(meta, dict):
        raise TicError(f"{folder}/{META} is no table")
    return meta


def split_sizes(split: object) -> dict[str, int]:
    """Every shard of a split, in order: path -> samples; shards without a sample are left out.

    Raises:
        TicError: the split is missing, unfinished or empty.
    """
    sizes = {
        f"{folder}/{name}": count
        for folder in split_folders(split)
        for name, count in sorted(read_sizes(folder).items())
        if count
    }
    if not sizes:
        raise TicError(f"{split} holds no sample")
    return sizes


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """(samples, shards) of a list of shard paths or URLs that may lie in several folders, each with its own table.

    OpenCLIP's ``__len__`` file (one number for the whole folder) counts where there is no ``sizes.json``.

    Raises:
        TicError: a folder has no table, or its table lacks a shard; the message names it.
    """
    shards = list(shards)
    names_in = defaultdict(list)
    for shard in shards:
        folder, name = os.path.split(shard)
        names_in[folder].append(name)
    tables = _each(_sizes_or_none, names_in, 16)
    return sum(_count(*entry) for entry in zip(names_in, names_in.values(), tables, strict=True)), len(shards)


def _count(folder: str, names: list[str], sizes: dict[str, int] | None) -> int:
    """The samples of some shards of a folder."""
    if sizes is None:
        return _read_len(folder)
    for name in names:
        if name not in sizes:
            raise TicError(f"{folder}/{SIZES} has no entry for {name}")
    return sum(sizes[name] for name in names)


def _read_len(folder: str) -> int:
    """The number in OpenCLIP's ``__len__`` file."""
    try:
        text = read_bytes(f"{folder or '.'}/__len__").decode(errors="replace").strip()
    except FileNotFoundError:
        raise TicError(f"{folder} has no {SIZES}: is the split there and finished?") from None
    if not (text.isascii() and text.isdecimal()):
        raise TicError(f"{folder}/__len__ holds no number")
    return int(text)


# --- How many samples they hold ---


def count_samples(path: str) -> int:
    """The samples of a shard; only its headers are read, of a cloud object only the blocks that hold some.

    Raises:
        TicError: it is missing or damaged; the message names it.
    """
    if is_remote(path):
        with open_random(path) as file:
            headers = _headers(file)
        if headers is not None:
            try:
                return sum(1 for _ in samples(headers))
            except TicError as error:
                raise TicError(f"{path}: {error}") from None
    with open_shard(path) as shard:
        return sum(1 for _ in samples(shard))


def _headers(file: RandomAccess) -> mmap.mmap | None:
    """A tar with zeros for its members' data, which take no memory; None if it is a rare kind of tar, or damaged."""
    if not file.size:
        return None
    shard, position = mmap.mmap(-1, file.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
    while position + BLOCK <= file.size:
        head = file.read_at(position, BLOCK)
        shard[position : position + BLOCK] = head
        if not any(head):
            return shard
        digits, kind, start = _OCTAL.fullmatch(head[124:136]), head[156:157], position + BLOCK
        if not digits or kind not in b"0\0xL":
            return None
        size = int(digits[1], 8)
        if kind in b"xL":  # what follows has a long name, or a time with a fraction
            data = file.read_at(start, size)
            if b" size=" in data or len(data) < size:
                return None
            shard[start : start + size] = data
        position = start + padded(size)
    return None


def stats_path(tar: str) -> str:
    """Where the stats of a shard lie."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def generate_stats(folder: str, num_workers: int = 1, overwrite: bool = False) -> tuple[int, int]:
    """Write {"successes": samples} beside each shard of a pool or split; returns the shards (in all, counted now).

    Args:
        folder: the pool or the split, in either layout.
        num_workers: processes.
        overwrite: count shards again that have stats.

    Raises:
        TicError: shards are damaged; all others have their stats then.
    """
    tars = list_tars(folder)
    flat = os.path.dirname(tars[0]) == str(to_path(folder))
    there = {path for path, _ in list_files(folder, "*_stats.json" if flat else "*/*_stats.json")}
    todo = [tar for tar in tars if overwrite or stats_path(tar) not in there]
    results = progress(_each(_write_stats, todo, num_workers, _processes), "count", len(todo), "shard")
    faults = [fault for fault in results if fault]
    if faults:
        raise TicError(faults[0] + (f" (and {len(faults) - 1} more damaged shards)" if len(faults) > 1 else ""))
    return len(tars), len(todo)


def _write_stats(tar: str) -> str | None:
    """Count a shard's samples and write its stats; returns what is wrong with it, or None."""
    try:
        write_json(stats_path(tar), {"successes": count_samples(tar)}, sync=False)
    except TicError as error:
        return str(error)
    return None


def read_stats(tar: str) -> int:
    """The samples of a shard, as its stats have it.

    Raises:
        TicError: it has none, or they hold no count.
    """
    try:
        stats = read_json(stats_path(tar))
    except FileNotFoundError:
        raise TicError(f"{tar} has no stats: run generate_stats.py first") from None
    count = stats.get("successes") if isinstance(stats, dict) else None
    if type(count) is not int or count < 0:
        raise TicError(f"{stats_path(tar)} holds no count of successes: run generate_stats.py --overwrite")
    return count


def add_sizes(folder: str, num_workers: int = 1) -> dict[str, int]:
    """Write ``sizes.json`` from the stats into each folder of shards of a pool or split; returns folder -> samples.

    Raises:
        TicError: a shard has no stats; the message names it.
    """
    tars, tables = list_tars(folder), defaultdict(dict)
    counts = progress(_each(read_stats, tars, num_workers), "read stats", len(tars), "shard")
    for tar, count in zip(tars, counts, strict=True):
        tables[_folder(tar)][os.path.basename(tar)] = count
    for part, sizes in tables.items():
        write_sizes(part, sizes)
    return {part: sum(sizes.values()) for part, sizes in tables.items()}


# --- Whether all is as it should be ---

KEY = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("copy", "<u4"), ("shard", "<u4")])
"""A sample's key ``{uid}-{copy}`` and the number of the shard that holds it."""

BUCKETS = 256
"""Keys are compared in so many turns, by the first byte of their UID; memory holds those of one turn."""

LINES = 10
"""How many faults of a kind that a split may have by the million are told one by one."""

_KEY = re.compile(r"([0-9a-f]{32})-(0|[1-9][0-9]{0,8})")


@dataclass
class Verified:
    """What ``verify`` has seen: ``wanted`` counts the subset's UIDs (None without one), ``there`` those found."""

    shards: int = 0
    samples: int = 0
    faults: int = 0
    wanted: int | None = None
    there: int = 0

    @property
    def coverage(self) -> float:
        """The per cent of the wanted UIDs that are there, rounded down to hundredths."""
        return self.there * 10_000 // self.wanted / 100 if self.wanted else 100.0


def verify(split: str, subset: str | None = None, num_workers: int = 1, seen: Verified | None = None) -> Iterator[str]:
    """Yield the faults of a split, one line each; UIDs of the subset that are not there are counted, they are no fault.

    Args:
        split: the split, in either layout; parts are verified one by one, keys and coverage over all of them.
        subset: the ``.npy`` of the UIDs it was made for; a UID that stands there n times must have the copies 0…n-1.
        num_workers: processes.
        seen: gets the counts.

    Raises:
        TicError: there is no split, or no subset.
    """
    seen = seen if seen is not None else Verified()
    for fault in _faults(split, subset, num_workers, seen):
        seen.faults += 1
        yield fault


def _faults(split: str, subset: str | None, num_workers: int, seen: Verified) -> Iterator[str]:
    read_sizes.cache_clear()
    tars = list_tars(split)
    shards_in = Counter(_folder(tar) for tar in tars)
    try:
        shards_in.update(dict.fromkeys(split_folders(split), 0))  # a part without a sample has no tar
    except TicError as error:
        yield str(error)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = None if subset is None else _open_subset(subset, Path(temporary))
        keys = _Keys(Path(temporary))
        results = progress(_each(_check_shard, tars, num_workers, _processes), "verify", len(tars), "shard")
        results = enumerate(zip(tars, results, strict=True))
        for folder in sorted(shards_in, key=lambda folder: folder.split("/")):
            yield from _verify_folder(folder, islice(results, shards_in[folder]), keys, seen)
        yield from _verify_keys(keys, tars, wanted, seen)


def _folder(tar: str) -> str:
    return tar.rpartition("/")[0]


def _open_subset(subset: str, folder: Path) -> np.ndarray:
    """The UIDs of a subset file, memory-mapped, known to be sorted."""
    local = local_copy(subset, folder)
    uids.fingerprint(local)
    return uids.open_uids(local)


def _check_shard(tar: str) -> tuple[int | None, list[str], np.ndarray]:
    """(samples, or None if the shard is damaged; faults; keys as ``KEY`` rows)."""
    faults, keys, count = _Counts(), [], 0
    try:
        with open_shard(tar) as shard:
            for sample in samples(shard):
                count += 1
                found = _KEY.fullmatch(sample.key)
                faults.note(sample.key, _faults_of(shard, sample, found[1] if found else None))
                if found:
                    keys.append((int(found[1][:16], 16), int(found[1][16:], 16), int(found[2]), 0))
    except TicError as error:
        return None, [*faults.lines(tar, count), str(error)], np.array(keys, dtype=KEY)
    return count, [*faults.lines(tar, count), *_check_stats(tar, count)], np.array(keys, dtype=KEY)


class _Counts:
    """Faults of a shard's samples: how many of a kind, and the first key."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def note(self, key: str, kinds: Iterable[str]) -> None:
        for kind in kinds:
            self.counts[kind] += 1
            self.first.setdefault(kind, key)

    def lines(self, tar: str, total: int) -> list[str]:
        return [f"{tar}: {kind}: {n} of {total} samples, first {self.first[kind]}" for kind, n in self.counts.items()]


def _faults_of(shard: Buffer, sample: Sample, key_uid: str | None) -> Iterator[str]:
    """What is wrong with a sample; ``key_uid`` is the UID in its key, if that has one."""
    if not any(suffix in sample.members for suffix in IMAGES):
        yield "no image"
    if "txt" not in sample.members:
        yield "no text"
    if not key_uid:
        yield "key that is not {uid}-{copy}"
    if "json" not in sample.members:
        yield "no json"
        return
    try:
        record = json.loads(sample.read(shard, "json"))
    except ValueError:
        yield "json that can't be read"
        return
    uid = record.get("uid") if isinstance(record, dict) else None
    if not uids.is_uid(uid):
        yield "json without a uid"
    elif key_uid and key_uid != uid.lower():
        yield "key with another uid than its json"


def _check_stats(tar: str, count: int) -> Iterator[str]:
    try:
        stats = read_stats(tar)
    except TicError as error:
        yield str(error)
        return
    if stats != count:
        yield f"{stats_path(tar)} says {stats} samples, the tar holds {count}"


def _verify_folder(folder: str, results: Iterator, keys: "_Keys", seen: Verified) -> Iterator[str]:
    """The faults of one folder of shards, and of its tables; ``results`` are (number, (tar, what it holds))."""
    counts: dict[str, int | None] = {}
    for number, (tar, (count, faults, found)) in results:
        yield from faults
        counts[os.path.basename(tar)] = count
        keys.add(found, number)
        seen.shards, seen.samples = seen.shards + 1, seen.samples + (count or 0)
    yield from _check_names(folder, counts)
    yield from _check_sizes(folder, counts)
    yield from _check_meta(folder, counts)


def _check_names(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Names that are not ``{:08d}.tar``, or have gaps between them."""
    numbers = set()
    for name in names:
        if re.fullmatch(r"[0-9]{8}\.tar", name):
            numbers.add(int(name[:8]))
        else:
            yield f"{folder}/{name} is not named like 00000000.tar"
    gaps = max(numbers, default=-1) + 1 - len(numbers)
    missing = (number for number in range(max(numbers, default=-1)) if number not in numbers)
    for number in islice(missing, LINES):
        yield f"{folder}/{number:08d}.tar is missing"
    if gaps > LINES:
        yield f"{folder}: {gaps - LINES} more shards are missing between those that are there"


def _check_sizes(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """What ``sizes.json`` says that is not so."""
    try:
        sizes = read_sizes(folder)
    except TicError as error:
        yield str(error)
        return
    for name in sorted({*sizes, *counts}):
        if name not in counts:
            yield f"{folder}/{SIZES} lists {name}, which is not there"
        elif name not in sizes:
            yield f"{folder}/{SIZES} does not list {name}"
        elif counts[name] not in (None, sizes[name]):
            yield f"{folder}/{SIZES} says {sizes[name]} samples for {name}, the tar holds {counts[name]}"


def _check_meta(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """What ``meta.json``, if there is one, says that is not so."""
    try:
        meta = _meta_or_none(folder)
    except TicError as error:
        yield str(error)
        return
    if meta is None:
        return
    if meta.get("output_shard_count") != len(counts):
        yield f"{folder}/{META} says {meta.get('output_shard_count')} shards, there are {len(counts)}"
    if None not in counts.values() and meta.get("output_count") != sum(counts.values()):
        yield f"{folder}/{META} says {meta.get('output_count')} samples, the shards hold {sum(counts.values())}"


class _Keys:
    """The keys of a split, on disk, apart by the first byte of their UID."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / f"{i}.keys" for i in range(BUCKETS)]

    def add(self, keys: np.ndarray, shard: int) -> None:
        """Add a shard's keys, ``KEY`` rows (N,)."""
        keys["shard"] = shard
        bucket = keys["f0"] >> np.uint64(56)
        order = np.argsort(bucket, kind="stable")
        borders = np.searchsorted(bucket[order], np.arange(BUCKETS + 1))
        for i in np.unique(bucket):
            with open(self.files[i], "ab") as file:
                file.write(keys[order[borders[i] : borders[i + 1]]].tobytes())

    def read(self, i: int) -> np.ndarray:
        """The keys whose UID begins with byte ``i``, (N,)."""
        return np.fromfile(self.files[i], dtype=KEY) if self.files[i].exists() else np.empty(0, dtype=KEY)


def _verify_keys(keys: _Keys, tars: list[str], subset: np.ndarray | None, seen: Verified) -> Iterator[str]:
    """Keys that come several times, that are not of the subset, or lack copies that it has; counts those there."""
    seen.wanted, totals = None if subset is None else len(subset), Counter()
    firsts = np.arange(BUCKETS, dtype=np.uint64) << np.uint64(56)
    borders = [0] * (BUCKETS + 1) if subset is None else [*np.searchsorted(subset["f0"], firsts), len(subset)]
    for i in range(BUCKETS):
        wanted = None if subset is None else np.array(subset[borders[i] : borders[i + 1]])
        there, faults = compare(keys.read(i), wanted)
        seen.there += there
        for kind, rows in faults.items():
            for row in rows[: max(LINES - totals[kind], 0)]:
                yield f"{tars[row['shard']]}: {uids.format_uid(row)}-{row['copy']} {kind}"
            totals[kind] += len(rows)
    for kind, total in totals.items():
        if total > LINES:
            yield f"{total - LINES} more keys: each {kind}"


TWICE, STRANGE, TORN = "is in the split already", "is not in the subset", "is there, but other copies of it are missing"


def compare(keys: np.ndarray, subset: np.ndarray | None) -> tuple[int, dict[str, np.ndarray]]:
    """Compare keys, ``KEY`` rows (N,) in any order, with the sorted UIDs of a subset, ``UID`` rows (M,), if any.

    Returns:
        How many of the subset's rows are there, and the rows of ``keys`` that are at fault, by kind of fault.
    """
    wanted = np.empty(0, dtype=KEY) if subset is None else _numbered(subset)
    rows = np.concatenate((wanted, keys))
    order = np.lexsort((rows["copy"], rows["f1"], rows["f0"]))  # stable: of equal ones, the subset's comes first
    rows, is_key = rows[order], order >= len(wanted)
    new_uid = _changes(rows, "f0", "f1")
    new = new_uid | _changes(rows, "copy")
    first, number = np.flatnonzero(new), np.cumsum(new) - 1  # where each distinct key begins; which one a row is
    last = np.append(first[1:], len(rows)) - 1
    in_split, in_subset = np.bincount(number, is_key), np.bincount(number, ~is_key)
    there = (in_split > 0) & (in_subset > 0)
    uid = np.cumsum(new_uid[first]) - 1
    torn = np.bincount(uid, there) % np.maximum(np.bincount(uid, in_subset), 1) > 0
    _, one_each = np.unique(uid[there], return_index=True)
    torn_keys = np.flatnonzero(there)[one_each][torn[uid[there][one_each]]]
    again = is_key & ~new & np.append(False, is_key[:-1])
    strange = (in_subset == 0) & (subset is not None)
    return int(there.sum()), {TWICE: rows[again], STRANGE: rows[last[strange]], TORN: rows[last[torn_keys]]}


def _changes(rows: np.ndarray, *fields: str) -> np.ndarray:
    """Which rows (N,) differ from the one before in a field; the first does."""
    changes = np.ones(len(rows), dtype=bool)
    changes[1:] = np.logical_or.reduce([rows[field][1:] != rows[field][:-1] for field in fields])
    return changes


def _numbered(subset: np.ndarray) -> np.ndarray:
    """Sorted UIDs (M,) as ``KEY`` rows: equal ones get the copies 0, 1, …"""
    rows = np.zeros(len(subset), dtype=KEY)
    rows["f0"], rows["f1"] = subset["f0"], subset["f1"]
    place = np.arange(len(rows))
    rows["copy"] = place - np.maximum.accumulate(np.where(_changes(rows, "f0", "f1"), place, 0))
    return rows
