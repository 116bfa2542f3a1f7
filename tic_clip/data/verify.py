"""Whether a split is as it should be: its shards, their keys, its tables, and how much of its UID list is there."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
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
from tic_clip.data.tar import IMAGES, Buffer, Table, open_shard, read_table
from tic_clip.parallel import map_ordered
from tic_clip.storage import exists, is_remote, list_files, local_copy, temporary_folder, to_path

KEY = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("copy", "<u4")])
"""A sample's key ``{uid}-{copy}``."""

LINES = 10
"""How many faults of a kind that a split may have by the million are listed; the rest are counted."""

DUPLICATE, UNEXPECTED = "is in the split already", "is not in the subset"
INCOMPLETE = "is there, but other copies of it are missing"

_KEY = re.compile(r"([0-9a-f]{32})-(0|[1-9][0-9]{0,8})")


@dataclass
class VerifyReport:
    """What ``verify`` has seen: ``wanted`` counts the subset's UIDs (None without one), ``there`` those found."""

    shards: int = 0
    samples: int = 0
    wanted: int | None = None
    there: int = 0

    @property
    def coverage(self) -> float:
        """Return the per cent of the wanted UIDs that are there, rounded down to hundredths."""
        return self.there * 10_000 // self.wanted / 100 if self.wanted else 100.0


def verify(
    split: str, subset: str | None = None, num_workers: int = 1, seen: VerifyReport | None = None
) -> Iterator[str]:
    """Yield the faults of a split, one line each; missing UIDs of the subset are counted, not a fault.

    Args:
        split: the split, in either layout; parts are verified one by one, keys and coverage over all of them.
        subset: the ``.npy`` of the UIDs it was made for; a UID that stands there n times must have the copies 0…n-1.
        num_workers: processes.
        seen: gets the counts.

    Raises:
        TicError: there is no split, or no subset, or the split is a pool.
    """
    seen = seen if seen is not None else VerifyReport()
    read_sizes.cache_clear()
    folders, table_faults = [], []
    try:
        folders = split_folders(split)
    except TicError as error:
        table_faults = [str(error)]
    is_empty = folders and not any(map(read_sizes, folders)) and not list_files(split, "**/*.tar")
    tars = [] if is_empty else list_tars(split)
    shards_in = Counter(map(os.path.dirname, tars))
    _check_is_split(split, tars, shards_in)
    yield from table_faults
    shards_in.update(dict.fromkeys(folders, 0))  # a part without a sample has no tar
    with temporary_folder() as temporary:
        listed = subset and local_copy(subset, temporary)
        if listed:
            uids.fingerprint(listed)  # raises if it is not sorted
        keys = _KeyCheck(uids.open_uids(listed) if listed else None)
        results = map_ordered(_check_shard, tars, num_workers, use_processes=True)
        results = zip(tars, progress(results, "verify", len(tars), "shard"), strict=True)
        for folder in sorted(shards_in, key=lambda folder: folder.split("/")):
            counts: dict[str, int | None] = {}
            for tar, (count, faults, rows) in islice(results, shards_in[folder]):
                yield from faults
                counts[os.path.basename(tar)] = count
                seen.shards, seen.samples = seen.shards + 1, seen.samples + (count or 0)
                yield from keys.add(tar, rows)
            yield from (fault for check in (_check_names, _check_sizes, _check_meta) for fault in check(folder, counts))
        yield from keys.finish()
        if keys.subset is not None:
            seen.wanted, seen.there = len(keys.subset), int(keys.found.sum())


def _check_is_split(split: str, tars: list[str], folders: Iterable[str]) -> None:
    """Raise a TicError if no key of the first shard is a split's, and no folder has a ``meta.json``."""
    if not tars or any(exists(f"{folder}/{META}") for folder in folders):
        return
    total, _, rows = _check_shard(tars[0])
    if total and not len(rows):
        raise TicError(
            f"{split} is a pool, not a split: no key in {os.path.basename(tars[0])} is {{uid}}-{{copy}}, and there is "
            f"no {META}. generate_stats.py --overwrite counts and checks a pool's shards"
        )


# --- A shard ---


def _check_shard(tar: str) -> tuple[int | None, list[str], np.ndarray]:
    """Return (samples, or None if the shard is damaged; faults; keys as ``KEY`` rows)."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    try:
        with open_shard(tar) as shard:
            table = read_table(shard)
            for key, kind in _find_sample_faults(shard, table):
                counts[kind] += 1
                first.setdefault(kind, key)
    except TicError as error:
        return None, [str(error)], np.empty(0, KEY)
    total = len(table.keys)
    faults = [f"{tar}: {kind}: {n} of {total} samples, first {first[kind]}" for kind, n in counts.items()]
    try:
        stats = read_stats(tar)
        faults += [f"{stats_path(tar)} says {stats} samples, the tar holds {total}"] if stats != total else []
    except TicError as error:
        faults.append(str(error))
    matches = filter(None, map(_KEY.fullmatch, table.keys))
    rows = [(int(match[1][:16], 16), int(match[1][16:], 16), int(match[2])) for match in matches]
    return total, faults, np.array(rows, KEY)


def _find_sample_faults(shard: Buffer, table: Table) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong) for the samples of a shard."""
    has_image = np.any([table.find(suffix) >= 0 for suffix in IMAGES], axis=0).tolist()
    has_text, json_member = (table.find("txt") >= 0).tolist(), table.find("json").tolist()
    for i, key in enumerate(table.keys):
        match = _KEY.fullmatch(key)
        kinds = {
            "no image": not has_image[i],
            "no text": not has_text[i],
            "key that is not {uid}-{copy}": not match,
            table.flawed.get(i, ""): i in table.flawed,
            "no json": json_member[i] < 0,
        }
        yield from ((key, kind) for kind, is_so in kinds.items() if is_so)
        if json_member[i] < 0 or i in table.flawed:
            continue
        offset, size = table.offset[json_member[i]], table.size[json_member[i]]
        try:
            uid = uids.read_uid(shard[offset : offset + size])
        except ValueError:
            yield key, "json that can't be read"
            continue
        if uid is None:
            yield key, "json without a uid"
        elif match and match[1] != uid:
            yield key, "key with another uid than its json"


# --- A folder of shards ---


def _check_names(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Yield names that are not ``{:08d}.tar``, and gaps between them."""
    is_numbered = re.compile(r"[0-9]{8}\.tar").fullmatch
    yield from (f"{folder}/{name} is not named like 00000000.tar" for name in names if not is_numbered(name))
    numbers = {int(name[:8]) for name in names if is_numbered(name)}
    end = max(numbers, default=-1) + 1
    missing = (number for number in range(end) if number not in numbers)
    yield from (f"{folder}/{number:08d}.tar is missing" for number in islice(missing, LINES))
    if (rest := end - len(numbers) - LINES) > 0:
        yield f"{folder}: {rest} more shards are missing between those that are there"


def _check_sizes(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """Yield what ``sizes.json`` says that is not so."""
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
    """Yield what ``meta.json``, if there is one, says that is not so."""
    try:
        meta = read_meta(folder)
    except TicError as error:
        yield str(error)
        return
    if meta is None:
        work = [parent / ".reshard" for parent in (to_path(folder), *list(to_path(folder).parents)[:3])]
        if any(map(exists, (f"{folder}/{STARTED}", *work))):  # STARTED was written by earlier versions
            yield f"{folder} is not finished: give the command that makes it again"
        return
    yield from _check_list(f"{folder}/{SUBSET}", meta.get("arguments") or {})
    if meta.get("output_shard_count") != len(counts):
        yield f"{folder}/{META} says {meta.get('output_shard_count')} shards, there are {len(counts)}"
    if None not in counts.values() and meta.get("output_count") != sum(counts.values()):
        yield f"{folder}/{META} says {meta.get('output_count')} samples, the shards hold {sum(counts.values())}"


def _check_list(path: str, arguments: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the list beside the shards; of a split in parts, it lies in the first."""
    if not exists(path):
        if arguments and not arguments.get("part"):
            yield f"{path} is missing"
    elif "subset" in arguments and not is_remote(path):
        try:
            if uids.fingerprint(path) != arguments["subset"]:
                yield f"{path} is not the list that the split was made with"
        except TicError as error:
            yield str(error)


# --- Keys ---


class _KeyCheck:
    """Compares keys with the sorted UIDs of a subset (M,), or without one with each other.

    ``found`` (M,) says which rows of the subset are there; of n equal ones, the copies 0…n-1.
    """

    def __init__(self, subset: np.ndarray | None) -> None:
        self.subset = subset
        self.found = np.zeros(0 if subset is None else len(subset), bool)
        self.keys: list[np.ndarray] = []
        self.tars: list[str] = []
        self.totals: Counter[str] = Counter()

    def add(self, tar: str, keys: np.ndarray) -> Iterator[str]:
        """Add a shard's keys, ``KEY`` rows (N,); yield the faults known by then."""
        if self.subset is None:
            self.keys.append(keys)
            self.tars.append(tar)
            return
        start, repeats = uids.find_uids(self.subset, keys)
        is_expected = keys["copy"] < repeats
        rows = (start + keys["copy"])[is_expected]
        is_duplicate = np.ones(len(rows), bool)
        unique, first = np.unique(rows, return_index=True)
        is_duplicate[first] = self.found[unique]
        self.found[rows] = True
        yield from self._list(DUPLICATE, keys[is_expected][is_duplicate], tar)
        yield from self._list(UNEXPECTED, keys[~is_expected], tar)

    def finish(self) -> Iterator[str]:
        """Yield the faults that show when all keys are there, and how many were not listed."""
        if self.subset is None:
            keys = np.concatenate([np.empty(0, KEY), *self.keys])
            order = np.lexsort((keys["copy"], keys["f1"], keys["f0"]))  # stable: the first of equal ones stays first
            duplicates = np.sort(order[1:][keys[order[1:]] == keys[order[:-1]]])
            shard = np.searchsorted(np.cumsum(list(map(len, self.keys))), duplicates, "right")
            for number in np.unique(shard):
                yield from self._list(DUPLICATE, keys[duplicates[shard == number]], self.tars[number])
        else:
            pairs = np.flatnonzero(self.found[1:] != self.found[:-1])  # of equal neighbours, one is there
            pairs = pairs[self.subset[pairs] == self.subset[pairs + 1]]
            yield from self._list(INCOMPLETE, uids.unique_uids(self.subset[pairs]))
        for kind, total in self.totals.items():
            if total > LINES:
                yield f"{total - LINES} more keys: each {kind}"

    def _list(self, kind: str, rows: np.ndarray, tar: str | None = None) -> Iterator[str]:
        rest = rows[: max(LINES - self.totals[kind], 0)]
        for row, uid in zip(rest, uids.format_uids(rest), strict=True):
            yield f"{tar}: {uid}-{row['copy']} {kind}" if tar else f"{uid} {kind}"
        self.totals[kind] += len(rows)
