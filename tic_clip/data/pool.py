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
from tic_clip.data.dates import EPOCH, Date, Months, check_format, first_of_month, read_date, suggest_steps
from tic_clip.data.own import describe_cut, require, save_benchmark
from tic_clip.data.pairs import (
    NEW,
    OUTSIDE,
    SPLITS,
    count_samples,
    file_digest,
    finish_lists,
    list_names,
    load_finished,
    work_folder,
)
from tic_clip.data.reshard.index import usable_json
from tic_clip.data.split import list_shards
from tic_clip.data.tar import open_shard, read_table
from tic_clip.data.uids import UID, parse_uids, read_uid
from tic_clip.parallel import map_ordered
from tic_clip.storage import atomic_open, local_folder, to_path
from tic_clip.timeline import span

ROW = np.dtype([*UID.descr, ("day", "<i4"), ("is_test", "?")])
"""A sample: its UID, its day counted from 1970, and whether it is held out."""
FOLDERS = {"train": "train", "test": "eval/retrieval"}  # where the lists lie in uids/


class Field(NamedTuple):
    """Where the date of a sample is, and what decides whether the sample is held out."""

    name: str
    form: str
    dataset: str = ""
    seed: int = 0
    test_share: float = 0.0


class Shard(NamedTuple):
    """The ``rows`` of a pool shard (R,) of ``ROW``, and of the others: the number by reason, and the bad dates."""

    rows: np.ndarray
    dropped: Counter[str]
    bad: list[Date]


def create_pool_splits(
    pool: str,
    output_path: str,
    *,
    date_field: str,
    name: str,
    date_format: str = "auto",
    steps: str | None = None,
    every: str | None = None,
    num_workers: int = 1,
    test_share: float = 0.01,
    seed: int = 0,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write ``uids/{train,eval/retrieval}/{step}.npy``, ``benchmark.yaml`` and ``manifest.json`` of a pool.

    Returns the manifest, and whether it was there already.
    """
    require({"date-field": date_field, "output-path": output_path})
    check_format(date_format)
    check_field(date_field)
    made_from = describe_cut(name, steps, every, seed, test_share)
    tars, folder = list_shards(pool), local_folder(output_path)
    made_from |= {"date_field": date_field, "date_format": date_format, "input": {"pool": _digest(tars)}}
    if manifest := load_finished(folder, made_from, overwrite):
        return manifest, True
    with work_folder(folder) as work:
        field, dropped, months = Field(date_field, date_format, name, seed, test_share), Counter(), Months()
        for shard in _read_shards(list(tars), field, num_workers, months):
            dropped += shard.dropped
            for byte in np.unique(bucket := shard.rows["f0"] >> np.uint64(56)).tolist():
                with open(work / f"{byte:02x}", "ab") as file:
                    shard.rows[bucket == byte].tofile(file)
        if not months.counts and not months.bad:
            raise TicError(f"{pool} has no sample that can be used; dropped: {dict(dropped) or 'none'}")
        months.check(skip_bad_rows)
        benchmark = save_benchmark(work / NEW, name, steps, every, months.counts)
        manifest = {**made_from, **_write_lists(work, benchmark, dropped), "order": "uid"}
        finish_lists(folder, manifest)
    return manifest, False


def suggest(
    pool: str,
    steps: int,
    *,
    date_field: str,
    date_format: str = "auto",
    num_workers: int = 1,
    skip_bad_rows: bool = False,
) -> list[tuple[str, int]]:
    """Return (name, samples) of near-equal steps of a pool."""
    require({"date-field": date_field})
    check_format(date_format)
    check_field(date_field)
    months = Months()
    for _ in _read_shards(list(list_shards(pool)), Field(date_field, date_format), num_workers, months):
        pass
    months.check(skip_bad_rows)
    return suggest_steps(months.counts, steps)


def check_field(name: str) -> None:
    """Raise a TicError if a name of a field has characters that JSON writes as something else."""
    if not name.isprintable() or {'"', "\\"} & set(name):
        raise TicError(f"--date-field {name!r} has a character that a field's name can't have here")


def _digest(tars: dict[str, int]) -> str:
    """Return the SHA-256 of the names and bytes of a pool's shards, as reshard has it."""
    return hashlib.sha256("".join(f"{to_path(tar).name} {size}\n" for tar, size in tars.items()).encode()).hexdigest()


def _read_shards(tars: list[str], field: Field, num_workers: int, months: Months) -> Iterator[Shard]:
    """Yield the shards of a pool in its order, and count their months."""
    shards = map_ordered(partial(read_shard, field), tars, num_workers, use_processes=num_workers > 1)
    for shard in progress(shards, "dates", len(tars), "shard"):
        for day, count in zip(*np.unique(shard.rows["day"], return_counts=True), strict=True):
            months.counts[first_of_month(int(day))] += int(count)
        for date in shard.bad:
            months.add(date)
        yield shard


def read_shard(field: Field, tar: str) -> Shard:
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
            date = read_date(value, field.form, f"{tar}, sample {table.keys[sample]}")
            if date.seconds is None:
                names = names or json.loads(data)
                dropped["impossible date"] += 1
                bad.append(date)
            else:
                rows.append((uid, date.seconds // 86_400, _is_test(field, uid)))
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


def _is_test(field: Field, uid: str) -> bool:
    digest = hashlib.sha256(f"{field.seed}/{field.dataset}/{uid}".encode()).digest()
    return int.from_bytes(digest[:8]) < field.test_share * 2.0**64


def _write_lists(work: Path, benchmark: Benchmark, dropped: Counter[str]) -> dict[str, Any]:
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
    counts, files = count_samples(benchmark, +rows, +dropped), {}
    for key in lists:
        name = f"uids/{FOLDERS[key[0]]}/{key[1]}.npy"
        with atomic_open(work / NEW / name, sync=False) as file:
            np.save(file, np.memmap(work / "-".join(key), UID, "r") if rows[key] else np.empty(0, UID))
        files[name] = file_digest(work / NEW / name)
    read = rows.total() + dropped.total()
    return {"counts": counts, "read": read, "dropped": dict(sorted((+dropped).items())), "files": files}
