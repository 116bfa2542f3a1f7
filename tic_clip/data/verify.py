"""Whether a split is as it should be: its shards, their keys, its tables, and how much of its UID list is there."""

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.split import (
    META,
    SIZES,
    STARTED,
    SUBSET,
    list_tars,
    read_meta,
    read_sizes,
    read_stats,
    split_folders,
    stats_path,
)
from tic_clip.data.tar import IMAGES, Buffer, Sample, open_shard, samples
from tic_clip.parallel import map_ordered
from tic_clip.storage import exists, is_remote, list_files, local_copy

KEY = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("copy", "<u4"), ("shard", "<u4")])
"""A sample's key ``{uid}-{copy}`` and the number of the shard that holds it."""

BUCKETS = 256
"""Keys are compared in so many turns, by the first byte of their UID; memory holds those of one turn."""

LINES = 10
"""How many faults of a kind that a split may have by the million are told one by one."""

_KEY = re.compile(r"([0-9a-f]{32})-(0|[1-9][0-9]{0,8})")


@dataclass
class VerifyReport:
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


def verify(
    split: str, subset: str | None = None, num_workers: int = 1, seen: VerifyReport | None = None
) -> Iterator[str]:
    """Yield the faults of a split, one line each; UIDs of the subset that are not there are counted, they are no fault.

    Args:
        split: the split, in either layout; parts are verified one by one, keys and coverage over all of them.
        subset: the ``.npy`` of the UIDs it was made for; a UID that stands there n times must have the copies 0…n-1.
        num_workers: processes.
        seen: gets the counts.

    Raises:
        TicError: there is no split, or no subset.
    """
    seen = seen if seen is not None else VerifyReport()
    for fault in _faults(split, subset, num_workers, seen):
        seen.faults += 1
        yield fault


def _faults(split: str, subset: str | None, num_workers: int, seen: VerifyReport) -> Iterator[str]:
    read_sizes.cache_clear()
    tars = [] if _is_empty(split) else list_tars(split)
    shards_in = Counter(map(os.path.dirname, tars))
    try:
        shards_in.update(dict.fromkeys(split_folders(split), 0))  # a part without a sample has no tar
    except TicError as error:
        yield str(error)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = None if subset is None else _open_subset(subset, Path(temporary))
        keys = _Keys(Path(temporary))
        results = progress(
            map_ordered(_check_shard, tars, num_workers, use_processes=True), "verify", len(tars), "shard"
        )
        results = enumerate(zip(tars, results, strict=True))
        for folder in sorted(shards_in, key=lambda folder: folder.split("/")):
            yield from _verify_folder(folder, islice(results, shards_in[folder]), keys, seen)
        yield from _verify_keys(keys, tars, wanted, seen)


def _is_empty(split: str) -> bool:
    """Whether a split says that it has no sample, and has no tar either."""
    try:
        return not any(read_sizes(folder) for folder in split_folders(split)) and not list_files(split, "**/*.tar")
    except TicError:
        return False


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


def _verify_folder(folder: str, results: Iterator, keys: "_Keys", seen: VerifyReport) -> Iterator[str]:
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


def _check_subset(folder: str, meta: dict[str, Any]) -> Iterator[str]:
    """Whether ``sample_ids.npy`` is still the list that the split was made with."""
    path, arguments = f"{folder}/{SUBSET}", meta.get("arguments", {})
    if is_remote(folder) or "subset" not in arguments or not exists(path):
        return
    try:
        same = uids.fingerprint(path) == arguments["subset"]
    except TicError as error:
        yield str(error)
    else:
        if not same:
            yield f"{path} is not the list that the split was made with"


def _check_meta(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """What ``meta.json``, if there is one, says that is not so."""
    try:
        meta = read_meta(folder)
    except TicError as error:
        yield str(error)
        return
    if meta is None:
        if exists(f"{folder}/{STARTED}"):
            yield f"{folder} is not finished: give the command that makes it again"
        return
    yield from _check_subset(folder, meta)
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


def _verify_keys(keys: _Keys, tars: list[str], subset: np.ndarray | None, seen: VerifyReport) -> Iterator[str]:
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
