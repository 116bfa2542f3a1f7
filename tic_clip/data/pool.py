"""Cut a pool of webdataset tars by a date in each sample's JSON: the lists of UIDs that reshard.py takes.

Memory is bounded: 21 bytes a sample go into 256 files by the first byte of its UID, and each is sorted by itself.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.cli import progress
from tic_clip.data import dates
from tic_clip.data.dates import EPOCH
from tic_clip.data.lists import FOLDERS, OUTSIDE, SPLITS, OwnOptions, count_samples, file_digest, list_names, make_lists
from tic_clip.data.reshard.index import usable_uids
from tic_clip.data.sources import BAD_DATE
from tic_clip.data.split import list_shards, pool_digest
from tic_clip.data.tables import Columns
from tic_clip.data.tar import open_shard, read_table
from tic_clip.data.uids import UID
from tic_clip.parallel import map_ordered
from tic_clip.storage import atomic_open
from tic_clip.timeline import span

ROW = np.dtype([*UID.descr, ("day", "<i4"), ("is_test", "?")])
"""A sample: its UID, its day counted from 1970, and whether it is held out."""


def create_pool_splits(pool: str, columns: Columns, options: OwnOptions) -> tuple[dict[str, Any], bool]:
    """Write ``uids/{train,eval/retrieval}/{step}.npy`` of a pool, and all else as ``create_own_splits``."""
    columns.require("date")
    tars, made_from = list_shards(pool), options.own_settings()
    made_from |= {"date_field": columns.date, "date_format": columns.date_format}
    made_from |= {"input": {"pool": pool_digest(tars.items())}}

    def write(new: Path, work: Path) -> dict[str, Any]:
        dropped, days = Counter(), Counter()
        for rows, reasons in _read_shards(tars, columns, options):
            dropped += reasons
            days.update(rows["day"].tolist())
            for byte in np.unique(bucket := rows["f0"] >> np.uint64(56)).tolist():
                with open(work / f"{byte:02x}", "ab") as file:
                    rows[bucket == byte].tofile(file)
        if not days:
            raise TicError(f"{pool} has no sample that can be used; dropped: {dict(dropped) or 'none'}")
        return _write_lists(work, new, options.write_benchmark(new, dates.count_months(days)), dropped)

    return make_lists(options, made_from, write)


def count_months(pool: str, columns: Columns, options: OwnOptions) -> Counter[date]:
    """Return how many samples of a pool each month has; a TicError says which date can't be read."""
    columns.require("date")
    days = Counter()
    for rows, _ in _read_shards(list_shards(pool), columns, options):
        days.update(rows["day"].tolist())
    return dates.count_months(days)


def _read_shards(
    tars: Collection[str], columns: Columns, options: OwnOptions
) -> Iterator[tuple[np.ndarray, Counter[str]]]:
    """Yield of each pool shard the rows (R,) of ``ROW``, and the number of other samples by reason."""
    read, workers = partial(read_shard, columns, options), options.num_workers
    return progress(map_ordered(read, tars, workers, use_processes=workers > 1), "dates", len(tars), "shard")


def read_shard(columns: Columns, options: OwnOptions, tar: str) -> tuple[np.ndarray, Counter[str]]:
    """Return the rows of a pool shard, and the number of other samples by reason."""
    dropped, rows = Counter(), []
    reject = partial(options.reject, dropped)
    with open_shard(tar) as shard:
        table = read_table(shard)
        for sample, uid, data in usable_uids(shard, table, dropped):
            record, where = json.loads(data), f"{tar}, sample {table.keys[sample]}"
            if columns.date not in record:
                reject(BAD_DATE, f"{where} has no field {columns.date} in its JSON; it has {', '.join(record)}")
            elif (seconds := columns.read_date(where, record[columns.date], reject)) is not None:
                rows.append((*divmod(int(uid, 16), 1 << 64), seconds // 86_400, options.is_test(options.name, uid)))
    return np.array(rows, ROW), dropped


def _write_lists(work: Path, new: Path, benchmark: Benchmark, dropped: Counter[str]) -> dict[str, Any]:
    """Write the lists from the buckets, each UID once; return their part of the manifest."""
    buckets, lists, rows = sorted(work.iterdir()), {}, Counter()
    for split, step in list_names(benchmark).values():
        lists[split, step] = [day.toordinal() - EPOCH for day in span(step)]
    with ExitStack() as stack:
        raw = {key: stack.enter_context(open(work / "-".join(key), "wb")) for key in lists}
        for bucket in progress(buckets, "sort", len(buckets), "bucket"):
            found = np.fromfile(bucket, ROW)
            found = found[np.lexsort((found["f1"], found["f0"]))]  # stable: the first in the pool is kept
            uids = found[["f0", "f1"]].astype(UID)
            is_first = np.append(True, uids[1:] != uids[:-1])
            dropped["duplicate uid"] += int((~is_first).sum())
            dropped[OUTSIDE] += int(is_first.sum())  # and in no list
            for (split, step), (first, after) in lists.items():
                is_split = is_first & (found["is_test"] == (split == SPLITS[1]))
                chosen = uids[is_split & (found["day"] >= first) & (found["day"] < after)]
                raw[split, step].write(chosen.tobytes())
                rows[split, step] += len(chosen)
    dropped[OUTSIDE] -= rows.total()
    files = {f"uids/{FOLDERS[split]}/{step}.npy": (split, step) for split, step in lists}
    for name, key in files.items():
        with atomic_open(new / name, sync=False) as file:
            np.save(file, np.memmap(work / "-".join(key), UID, "r") if rows[key] else np.empty(0, UID))
    return count_samples(benchmark, rows, dropped, {name: file_digest(new / name) for name in files})
