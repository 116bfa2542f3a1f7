"""Check a split: its shards, their keys, its tables, and how much of its UID list is there."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.folder import SHARD_FORMAT
from tic_clip.data.split import META, SIZES, SUBSET, list_shards, read_meta, read_sizes, read_stats, split_folders
from tic_clip.data.tar import IMAGES, Buffer, Sample, open_shard, samples
from tic_clip.parallel import map_ordered
from tic_clip.storage import exists, is_remote, list_files, local_copy, temporary_folder

KEY = np.dtype([("f0", "<u8"), ("f1", "<u8"), ("copy", "<u4")])  # a sample's key {uid}-{copy}
LINES = 10  # keys with a fault that are listed; there may be millions, the rest are counted
DUPLICATE, UNEXPECTED = "is in the split already", "is not in the subset"
INCOMPLETE = "is there, but other copies of it are missing"

_KEY = re.compile(r"([0-9a-f]{32})-(0|[1-9][0-9]{0,8})")


def verify(
    split: str, subset: str | None = None, num_workers: int = 1, seen: Counter[str] | None = None
) -> Iterator[str]:
    """Yield the faults of a split, one line each; raise a TicError for a pool.

    A UID that is in ``subset`` n times must have the copies 0…n-1; missing UIDs are not a fault. ``seen`` counts the
    "shards", the "samples", the UIDs "wanted" by the subset, and those that are "there".
    """
    seen = Counter() if seen is None else seen
    read_sizes.cache_clear()
    try:
        folders, table_faults = split_folders(split), []
    except TicError as error:
        folders, table_faults = [], [str(error)]
    tars = list(list_shards(split)) if not folders or list_files(split, "**/*.tar") else []
    counts = {folder: {} for folder in sorted({*folders, *map(os.path.dirname, tars)})}
    may_be_pool = not any(exists(f"{folder}/{META}") for folder in counts)
    with temporary_folder() as temporary:
        keys = _KeyCheck(local_copy(subset, temporary) if subset else None)
        results = map_ordered(_check_shard, tars, num_workers, use_processes=True)
        for tar, (count, faults, rows) in zip(tars, progress(results, "verify", len(tars), "shard"), strict=True):
            if may_be_pool and tar == tars[0] and count and not len(rows):
                advice = "generate_stats.py --overwrite counts and checks a pool's shards"
                raise TicError(f"{split} is a pool, not a split: no {META}, no key {{uid}}-{{copy}} in {tar}. {advice}")
            counts[os.path.dirname(tar)][os.path.basename(tar)] = count
            seen.update(shards=1, samples=count or 0)
            yield from faults
            yield from keys.add(tar, rows)
        yield from keys.finish()
        if subset:
            seen.update(wanted=len(keys.found), there=int(keys.found.sum()))
    yield from table_faults
    for folder, check in product(counts, (_check_sizes, _check_meta)):
        try:
            yield from check(folder, counts[folder])
        except TicError as error:
            yield str(error)


def _check_shard(tar: str) -> tuple[int | None, list[str], np.ndarray]:
    """Return (samples, or None if the shard is damaged; faults; keys as ``KEY`` rows)."""
    keys, faulty = [], {}
    try:
        with open_shard(tar) as shard:
            for sample in samples(shard):
                keys.append(sample.key)
                for kind in _find_faults(shard, sample):
                    faulty.setdefault(kind, []).append(sample.key)
    except TicError as error:
        return None, [str(error)], np.empty(0, KEY)
    total = len(keys)
    faults = [f"{tar}: {kind}: {len(some)} of {total} samples, first {some[0]}" for kind, some in faulty.items()]
    try:
        if (stats := read_stats(tar)) != total:
            faults.append(f"{tar} holds {total} samples, its stats say {stats}")
    except TicError as error:
        faults.append(str(error))
    matches = filter(None, map(_KEY.fullmatch, keys))
    rows = [(int(match[1][:16], 16), int(match[1][16:], 16), int(match[2])) for match in matches]
    return total, faults, np.array(rows, KEY)


def _find_faults(shard: Buffer, sample: Sample) -> Iterator[str]:
    """Yield what is wrong with a sample."""
    match, uid = _KEY.fullmatch(sample.key), None
    if not match:
        yield "key that is not {uid}-{copy}"
    if sample.flaw:
        yield sample.flaw
        return
    for kind, suffixes in {"image": IMAGES, "text": ["txt"], "json": ["json"]}.items():
        if sample.members.keys().isdisjoint(suffixes):
            yield f"no {kind}"
    if "json" in sample.members:
        with suppress(ValueError):
            uid = uids.read_uid(sample.read(shard, "json"))
        if uid is None:
            yield "json that can't be read or has no uid"
        elif match and match[1] != uid:
            yield "key with another uid than its json"


def _check_sizes(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """Yield what is wrong with a folder's shards, ``counts`` of samples (None: damaged), and their ``sizes.json``."""
    missing = [name for name in map(SHARD_FORMAT.format, range(len(counts))) if name not in counts]
    if missing:
        yield f"{folder} has {len(counts)} shards, but no {missing[0]}: their numbers have a gap, or they other names"
    sizes = read_sizes(folder)
    for name in sorted({*sizes, *counts}):
        if name not in counts:
            yield f"{folder}/{SIZES} lists {name}, which is not there"
        elif counts[name] not in (None, sizes.get(name)):
            yield f"{folder}/{SIZES} says {sizes.get(name, 'no')} samples for {name}, the tar holds {counts[name]}"


def _check_meta(folder: str, counts: dict[str, int | None]) -> Iterator[str]:
    """Yield what is wrong in ``meta.json``, if there is one."""
    if not (meta := read_meta(folder)):
        return
    if meta.get("output_shard_count") != len(counts):
        yield f"{folder}/{META} says {meta.get('output_shard_count')} shards, there are {len(counts)}"
    if None not in counts.values() and meta.get("output_count") != sum(counts.values()):
        yield f"{folder}/{META} says {meta.get('output_count')} samples, the shards hold {sum(counts.values())}"
    path, arguments = f"{folder}/{SUBSET}", meta.get("arguments") or {}
    if not exists(path):
        if arguments and not arguments.get("part"):  # of a split in parts, the list lies in the first
            yield f"{path} is missing"
    elif "subset" in arguments and not is_remote(path) and uids.fingerprint(path) != arguments["subset"]:
        yield f"{path} is not the list that the split was made with"


class _KeyCheck:
    """Compare keys with the sorted UIDs (M,) of a file, or with each other.

    ``found`` (M,) says which rows of the file are there; of n equal ones, the copies 0…n-1.
    """

    def __init__(self, subset: Path | None) -> None:
        if subset:
            uids.fingerprint(subset)  # raises if it is not sorted
        self.subset = uids.open_uids(subset) if subset else None
        self.found = np.zeros(len(self.subset) if subset else 0, bool)
        self.keys = [np.empty(0, KEY)]  # without a subset
        self.totals: Counter[str] = Counter()

    def add(self, tar: str, keys: np.ndarray) -> Iterator[str]:
        """Add a shard's keys, ``KEY`` rows (N,); yield those that are not in the subset or repeated."""
        if self.subset is None:
            self.keys.append(keys)
            return
        start, repeats = uids.find_uids(self.subset, keys)
        is_expected = keys["copy"] < repeats
        rows = (start + keys["copy"])[is_expected]
        is_new = ~self.found[rows] & np.isin(np.arange(len(rows)), np.unique(rows, return_index=True)[1])
        self.found[rows] = True
        yield from self._list(f"{tar}: ", DUPLICATE, keys[is_expected][~is_new])
        yield from self._list(f"{tar}: ", UNEXPECTED, keys[~is_expected])

    def finish(self) -> Iterator[str]:
        """Yield the faults that are known only after all keys, and how many faults were not listed."""
        if self.subset is None:
            keys = np.concatenate(self.keys)
            keys = keys[np.lexsort((keys["copy"], keys["f1"], keys["f0"]))]
            yield from self._list("", DUPLICATE, keys[1:][keys[1:] == keys[:-1]])
        else:
            pairs = np.flatnonzero(self.found[1:] != self.found[:-1])  # of equal neighbours, one is there
            pairs = pairs[self.subset[pairs] == self.subset[pairs + 1]]
            yield from self._list("", INCOMPLETE, uids.unique_uids(self.subset[pairs]))
        for kind, total in self.totals.items():
            if total > LINES:
                yield f"{total - LINES} more keys: each {kind}"

    def _list(self, where: str, kind: str, rows: np.ndarray) -> Iterator[str]:
        rest = rows[: max(LINES - self.totals[kind], 0)]
        copies = [f"-{copy}" for copy in rest["copy"]] if "copy" in rest.dtype.names else [""] * len(rest)
        yield from (f"{where}{uid}{copy} {kind}" for uid, copy in zip(uids.format_uids(rest), copies, strict=True))
        self.totals[kind] += len(rows)
