"""Cut a pool of webdataset tars by a date in each sample's JSON: the lists of UIDs that reshard.py takes.

Memory is bounded: 21 bytes a sample go into 256 files by the first byte of its UID, and each is sorted by itself.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.cli import progress
from tic_clip.data.dates import EPOCH, Months, first_of_month, read_date
from tic_clip.data.lists import OUTSIDE, SPLITS, count_samples, file_digest, list_names, make_lists
from tic_clip.data.own import OwnOptions
from tic_clip.data.reshard.index import usable_json
from tic_clip.data.split import list_shards
from tic_clip.data.tar import open_shard, read_table
from tic_clip.data.uids import UID, parse_uids, read_uid
from tic_clip.parallel import map_ordered
from tic_clip.storage import atomic_open, to_path
from tic_clip.timeline import span

ROW = np.dtype([*UID.descr, ("day", "<i4"), ("is_test", "?")])
"""A sample: its UID, its day counted from 1970, and whether it is held out."""
UIDS, FOLDERS = "uids", {"train": "train", "test": "eval/retrieval"}  # where the lists lie


class Field(NamedTuple):
    """The field of a sample's JSON that has its date, and how that is written."""

    name: str
    form: str = "auto"

    def check(self) -> None:
        """Raise a TicError if there is no name, or one with characters that JSON writes as something else."""
        if not self.name:
            raise TicError("--date-field must be given")
        if not self.name.isprintable() or {'"', "\\"} & set(self.name):
            raise TicError(f"--date-field {self.name!r} has a character that a field's name can't have here")


class Shard(NamedTuple):
    """The ``rows`` of a pool shard (R,) of ``ROW``, and of the others: the number by reason, and the bad dates."""

    rows: np.ndarray
    dropped: Counter[str]
    bad: list[tuple[None, str, Any]]


def create_pool_splits(pool: str, field: Field, options: OwnOptions) -> tuple[dict[str, Any], bool]:
    """Write ``uids/{train,eval/retrieval}/{step}.npy``, ``benchmark.yaml`` and ``manifest.json`` of a pool.

    Returns the manifest, and whether it was there already.
    """
    field.check()
    options.check(UIDS)
    tars, made_from = list_shards(pool), options.settings()
    made_from |= {"date_field": field.name, "date_format": field.form, "input": {"pool": _digest(tars)}}

    def write(work: Path) -> dict[str, Any]:
        dropped, months = Counter(), Months()
        for shard in _read_shards(list(tars), field, options, months):
            dropped += shard.dropped
            for byte in np.unique(bucket := shard.rows["f0"] >> np.uint64(56)).tolist():
                with open(work / f"{byte:02x}", "ab") as file:
                    shard.rows[bucket == byte].tofile(file)
        if not months.counts and not months.bad:
            raise TicError(f"{pool} has no sample that can be used; dropped: {dict(dropped) or 'none'}")
        months.check(options.skip_bad_rows)
        return _write_lists(work, options.new, options.write_benchmark(months), dropped)

    return make_lists(options, made_from, write)


def count_months(pool: str, field: Field, options: OwnOptions) -> Months:
    """Return how many samples of a pool each month has; a TicError says which dates can't be read."""
    field.check()
    months = Months()
    for _ in _read_shards(list(list_shards(pool)), field, options, months):
        pass
    months.check(options.skip_bad_rows)
    return months


def _digest(tars: dict[str, int]) -> str:
    """Return the SHA-256 of the names and bytes of a pool's shards, as reshard has it."""
    return hashlib.sha256("".join(f"{to_path(tar).name} {size}\n" for tar, size in tars.items()).encode()).hexdigest()


def _read_shards(tars: list[str], field: Field, options: OwnOptions, months: Months) -> Iterator[Shard]:
    """Yield the shards of a pool in its order, and count their months."""
    read, workers = partial(read_shard, field, options), options.num_workers
    shards = map_ordered(read, tars, workers, use_processes=workers > 1)
    for shard in progress(shards, "dates", len(tars), "shard"):
        for day, count in zip(*np.unique(shard.rows["day"], return_counts=True), strict=True):
            months.counts[first_of_month(int(day))] += int(count)
        for date in shard.bad:
            months.add(*date)
        yield shard


def read_shard(field: Field, options: OwnOptions, tar: str) -> Shard:
    """Return the UIDs and dates of a pool shard; a TicError says that no sample has the field, and names the others."""
    record = msgspec.defstruct("Record", [("date", Any, None)], rename={"date": field.name})
    decoder, dropped, rows, bad, names = msgspec.json.Decoder(record), Counter(), [], [], None
    with open_shard(tar) as shard:
        table = read_table(shard)
        for sample, data in usable_json(shard, table, dropped):
            try:
                uid, value = read_uid(data), _read_field(decoder, data, field.name)
            except ValueError:
                dropped["invalid json"] += 1
                continue
            if uid is None:
                dropped["no valid uid"] += 1
                continue
            seconds = read_date(value, field.form)
            if seconds is None:
                names = names or json.loads(data)
                dropped["impossible date"] += 1
                bad.append((None, f"{tar}, sample {table.keys[sample]}", value))
            else:
                rows.append((uid, seconds // 86_400, options.is_test(options.name, uid)))
    if names and not rows and field.name not in names:
        raise TicError(f"{tar} has no field {field.name} in its samples' JSON; it has {', '.join(names)}")
    found, uids = np.empty(len(rows), ROW), parse_uids(uid for uid, *_ in rows)
    found["f0"], found["f1"] = uids["f0"], uids["f1"]
    found["day"], found["is_test"] = [day for _, day, _ in rows], [is_test for *_, is_test in rows]
    return Shard(found, dropped, bad)


def _read_field(decoder: msgspec.json.Decoder, data: bytes, name: str) -> object:
    """Return a field of a sample's JSON, or None."""
    try:
        return decoder.decode(data).date
    except (msgspec.DecodeError, UnicodeDecodeError):  # also NaN, which json reads
        record = json.loads(data)
        return record.get(name) if isinstance(record, dict) else None


def _write_lists(work: Path, new: Path, benchmark: Benchmark, dropped: Counter[str]) -> dict[str, Any]:
    """Write the lists from the buckets, each UID once; return their part of the manifest."""
    buckets, lists, rows = sorted(path for path in work.iterdir() if path.is_file()), {}, Counter()
    for split, step in list_names(benchmark).values():
        lists[split, step] = [day.toordinal() - EPOCH for day in span(step)]
    with ExitStack() as stack:
        raw = {key: stack.enter_context(open(work / "-".join(key), "wb")) for key in lists}
        for bucket in progress(buckets, "sort", len(buckets), "bucket"):
            found = np.fromfile(bucket, ROW)
            found = found[np.lexsort((found["f1"], found["f0"]))]  # stable: the first in the pool is kept
            uids = np.stack([found["f0"], found["f1"]])
            is_first = np.append(True, (uids[:, 1:] != uids[:, :-1]).any(0))
            dropped["duplicate uid"] += int((~is_first).sum())
            found, is_listed = found[is_first], 0
            for key, (first, after) in lists.items():
                is_split = found["is_test"] == (key[0] == SPLITS[1])
                chosen = found[is_split & (found["day"] >= first) & (found["day"] < after)]
                raw[key].write(np.rec.fromarrays([chosen["f0"], chosen["f1"]], UID).tobytes())
                rows[key] += len(chosen)
                is_listed += len(chosen)
            dropped[OUTSIDE] += len(found) - is_listed
    files = {f"{UIDS}/{FOLDERS[split]}/{step}.npy": (split, step) for split, step in lists}
    for name, key in files.items():
        with atomic_open(new / name, sync=False) as file:
            np.save(file, np.memmap(work / "-".join(key), UID, "r") if rows[key] else np.empty(0, UID))
    return count_samples(benchmark, rows, dropped, {name: file_digest(new / name) for name in files})
