"""Lists of dated images (CSV) and folders of pictures to shards in the format of every other split.

A split's samples stand in the order of their UIDs, which are hashes: shuffled, and the same on every machine. First it
is found out which pictures are there; then each shard is made in one pass over its pictures. The index in memory takes
some 90 bytes a row.
"""

import csv
import hashlib
import json
import mmap
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.cli import progress
from tic_clip.data import clip_benchmark, uids
from tic_clip.data.annotations import MAX_FIELD
from tic_clip.data.images import (
    PLACE,
    Unusable,
    find_file,
    find_zips,
    fingerprints,
    index_zip,
    read_picture,
    suffix_of,
)
from tic_clip.data.reshard import Split, output
from tic_clip.data.reshard.part import SHARD_FORMAT, Target
from tic_clip.data.split import META, STARTED, STATS, SUBSET, write_sizes
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import UID, make_uid
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_remote, list_files, lock_folder, read_json_object, remove, size, write_json

MANIFEST = "manifest.json"
COLUMNS = ["key", "image", "caption", "date"]
FOLDERS = {"train": "train", "test": "eval/retrieval"}
"""The lists of a step, and where the splits made of them lie below the benchmark's folder."""

ROW = np.dtype([*UID.descr, ("offset", "<u8"), *PLACE.descr])
"""A row of a list: its UID, its first byte in the file, and where its picture is."""

NO_FILE, NO_CAPTION = "no image file", "no caption"
COMPARED = {
    "list": "list",
    "found": "set of images that are there",
    "shard_size": "shard size",
    "placeholders": "set of placeholders",
}
"""What a split depends on."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where lists and pictures are; ``dataset`` is part of the UIDs."""

    csv_path: str
    image_path: str
    dataset: str
    benchmark: Benchmark
    digests: dict[str, str]  # SHA-256 of the lists, as create_splits.py has them


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard to be made."""

    path: str
    csv: str
    rows: np.ndarray  # (N,) ROW
    image_path: str
    zips: list[str]
    dataset: str
    placeholders: tuple[tuple[int, str], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A split to be made of the ``rows`` (N,) of a list that have a picture."""

    target: Target
    rows: np.ndarray
    zips: list[str]
    source: Source
    placeholders: tuple[tuple[int, str], ...]

    @property
    def there(self) -> np.ndarray:
        """The rows whose picture has been found."""
        return self.rows[self.rows["how"] > 0]

    @property
    def expected(self) -> dict[str, Any]:
        """What ``meta.json`` would say if all pictures that are there can be used."""
        count = len(self.there)
        return {"output_count": count, "dropped": Counter({NO_FILE: len(self.rows) - count})}

    def jobs(self, done: Container[int]) -> Iterator[Job]:
        """The shards but those that are ``done``."""
        rows, size = self.there, self.target.arguments["shard_size"]
        for number in range(-(-len(rows) // size)):
            if number not in done:
                yield Job(
                    path=f"{self.target.path}/{SHARD_FORMAT.format(number)}",
                    csv=self.target.arguments["csv"],
                    rows=rows[number * size : (number + 1) * size],
                    image_path=self.source.image_path,
                    zips=self.zips,
                    dataset=self.source.dataset,
                    placeholders=self.placeholders,
                )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The splits that were made, or were there, and the rows that are in none of them, by reason."""

    splits: list[Split]
    dropped: Counter[str]


def create_tars(
    csv_path: str,
    image_path: str,
    output_path: str,
    *,
    num_workers: int = 1,
    shard_size: int = 10_000,
    placeholders: list[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Packed:
    """Write ``train/{step}/`` and ``eval/retrieval/{step}/`` of the lists' benchmark below ``output_path``.

    Args:
        csv_path: what create_splits.py wrote: ``{train,test}_batch_{step}.csv`` and ``manifest.json``.
        image_path: the pictures, in any layout of ``tic_clip.data.images``; nothing there is changed.
        output_path: the folder of all data, ``data_dir`` of the other commands.
        num_workers: processes; the bytes do not depend on it.
        shard_size: the most samples in a shard.
        placeholders: files of pictures that are left out, beside the known ones.
        overwrite: replace splits that were made with other arguments.
        dry_run: look which pictures are there, write nothing.

    Raises:
        TicError: lists or pictures are missing or damaged, or a split was made with other arguments, or another
            process is writing it.
    """
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    source = open_source(csv_path, image_path)
    _check_output(source, output_path)
    unwanted = tuple(sorted(fingerprints(placeholders or [])))
    with make_pool(num_workers, fork=True) as pool:  # before anything starts a thread
        run = partial(map_in_pool, pool, most=4 * num_workers)
        plans = _plan(source, output_path, shard_size, unwanted, run)
        kept = _kept(plans, overwrite)
        with ExitStack() as locks:
            for plan, before in zip(plans, kept, strict=True):
                if before is None and not dry_run:
                    locks.enter_context(lock_folder(Path(plan.target.path)))
            kept = _kept(plans, overwrite)  # again: another process may have been at work until now
            metas = [plan.expected for plan in plans] if dry_run else list(_make(plans, kept, run))
    return Packed(
        splits=[
            _split(plan.target, len(plan.rows), meta, reused=before is not None)
            for plan, before, meta in zip(plans, kept, metas, strict=True)
        ],
        dropped=sum((Counter(meta["dropped"]) for meta in metas), Counter()),
    )


def _plan(
    source: Source, output_path: str, shard_size: int, unwanted: tuple[tuple[int, str], ...], run: Callable
) -> list[Plan]:
    """A split for each list: which of its rows have a picture, and where.

    Raises:
        TicError: a list is missing or damaged, a key is there twice, or no picture is there at all.
    """
    steps = [step.name for step in source.benchmark.steps]
    names = [f"{kind}_batch_{step}.csv" for step in steps for kind in FOLDERS]
    root = f"{Path(output_path)}/{source.benchmark.root}"
    paths = [f"{root}/{folder}/{step}" for step in steps for folder in FOLDERS.values()]
    lists = list(progress(run(partial(index_list, source), names), "find", len(names), "list"))
    _check_keys(source, names, lists)
    zips = find_in_zips(source, lists, run)
    if not any((rows["how"] > 0).any() for rows in lists):
        raise TicError(_nothing_found(source, names))
    return [
        Plan(
            target=_target(source, name, path, rows, shard_size, unwanted),
            rows=rows,
            zips=zips,
            source=source,
            placeholders=unwanted,
        )
        for name, path, rows in zip(names, paths, lists, strict=True)
    ]


def open_source(csv_path: str, image_path: str) -> Source:
    """What ``manifest.json`` says of the lists.

    Raises:
        TicError: there is none, or it is of something else, or a folder is missing.
    """
    for path, what in ((csv_path, "lists: run create_splits.py first"), (image_path, "pictures")):
        if is_remote(path):
            raise TicError(f"{path} is not local; lists and images are read from a local disk")
        if not Path(path).is_dir():
            raise TicError(f"{path} is no folder of {what}")
    path = Path(csv_path) / MANIFEST
    if not path.exists():
        raise TicError(f"{csv_path} has no {MANIFEST}: run create_splits.py first")
    manifest = read_json_object(path)
    kinds = {"benchmark": str, "dataset": str, "files": dict}
    found = {"files": {}, **manifest}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        raise TicError(f"{path} is not what create_splits.py writes")
    return Source(
        csv_path=str(Path(csv_path)),
        image_path=str(Path(image_path)),
        dataset=manifest["dataset"],
        benchmark=get_benchmark(manifest["benchmark"]),
        digests=found["files"],
    )


def _check_output(source: Source, output_path: str) -> None:
    """See that no split lies among the pictures, or pictures in a split."""
    if is_remote(output_path):
        raise TicError(f"{output_path} is not local; write to a local folder and copy it there")
    images, made = Path(source.image_path).resolve(), (Path(output_path) / source.benchmark.root).resolve()
    if made.is_relative_to(images) or images.is_relative_to(made):
        raise TicError(f"{output_path} and the images in {source.image_path} are in one another; give another output")


# --- The lists ---


def index_list(source: Source, name: str) -> np.ndarray:
    """The rows of a list as ``ROW``, sorted by UID, with the pictures that are files.

    Raises:
        TicError: it is missing, damaged, or not as create_splits.py made it.
    """
    path, words, offsets, hows, likely = f"{source.csv_path}/{name}", bytearray(), array("Q"), bytearray(), 1
    if source.digests and source.digests.get(name) != _digest(path):
        raise TicError(f"{path} is not as create_splits.py made it; run that again with --overwrite")
    for offset, (key, image, _, _) in read_rows(path):
        words += bytes.fromhex(make_uid(f"{source.dataset}/{key}"))
        offsets.append(offset)
        likely = (how := find_file(source.image_path, image, likely)) or likely
        hows.append(how)
    rows = np.zeros(len(offsets), dtype=ROW)
    rows["f0"], rows["f1"] = np.frombuffer(words, dtype=">u8").reshape(-1, 2).T
    rows["offset"], rows["how"] = offsets, hows
    return rows[np.lexsort((rows["f1"], rows["f0"]))]


def read_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of each row of a list.

    Raises:
        TicError: it is missing or has other columns, or a row has another number of fields.
    """
    try:
        with open(path, "rb") as file:
            lines = _Lines(file)
            csv.field_size_limit(MAX_FIELD)
            table = csv.reader(lines)
            header = next(table, [])
            if header != COLUMNS:
                raise TicError(
                    f"{path} has the columns {', '.join(header) or 'none'}; they must be {', '.join(COLUMNS)}"
                )
            start = lines.position
            for row in table:
                if len(row) != len(COLUMNS) or not lines.whole:
                    raise TicError(f"{path}: the row at byte {start} is cut off, or has not {len(COLUMNS)} fields")
                yield start, row
                start = lines.position
    except (UnicodeDecodeError, csv.Error) as error:
        raise TicError(f"{path} is no CSV in UTF-8: {error}") from None


class _Lines:
    """The lines of a binary file as text, and the position after the last one read."""

    def __init__(self, file: Any) -> None:
        self.file, self.position, self.whole = file, file.tell(), True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.position, self.whole = self.position + len(line), line.endswith(b"\n")
        return line.decode()


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_keys(source: Source, names: list[str], lists: list[np.ndarray]) -> None:
    """See that no UID is in the lists twice.

    Raises:
        TicError: one is; its key is named, and the lists.
    """
    high = np.concatenate([rows["f0"] for rows in lists])
    low = np.concatenate([rows["f1"] for rows in lists])
    order = np.lexsort((low, high))
    again = np.flatnonzero((high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1]))
    if not len(again):
        return
    ends, twice = np.cumsum([len(rows) for rows in lists]), order[again[0] : again[0] + 2]
    one, other = (int(np.searchsorted(ends, place, side="right")) for place in twice)
    with _Rows(f"{source.csv_path}/{names[one]}") as read:
        key = read(int(lists[one]["offset"][twice[0] - ends[one]]))[0]  # counted from the end
    raise TicError(f"{source.csv_path}: the key {key} is in {names[one]} and in {names[other]}")


def find_in_zips(source: Source, lists: list[np.ndarray], run: Callable) -> list[str]:
    """Note in ``lists`` which pictures that are no files lie in zip archives; returns the paths of these."""
    if all((rows["how"] > 0).all() for rows in lists):
        return []
    zips = find_zips(source.image_path)
    indexes = run(partial(index_zip, source.dataset), zips)
    for number, (uid, places) in enumerate(progress(indexes, "find", len(zips), "zip")):
        places["zip"] = number
        for rows in lists:
            first, count = uids.find_uids(rows[["f0", "f1"]], uid)
            at = first[count > 0]
            new = rows["how"][at] == 0
            for name in PLACE.names:
                rows[name][at[new]] = places[name][count > 0][new]
    return zips


def _nothing_found(source: Source, names: list[str]) -> str:
    image = next((row[1] for name in names for _, row in read_rows(f"{source.csv_path}/{name}")), None)
    if image is None:
        return f"the lists in {source.csv_path} have no row"
    return f"{source.image_path} has none of the images of the lists, such as {image}, as a file or in a zip archive"


# --- The shards ---


def _target(
    source: Source,
    name: str,
    path: str,
    rows: np.ndarray,
    shard_size: int,
    unwanted: tuple[tuple[int, str], ...],
) -> Target:
    """A split and what it depends on."""
    arguments = {
        "csv": f"{source.csv_path}/{name}",
        "image_path": source.image_path,
        "list": _digest(f"{source.csv_path}/{name}"),
        "subset": hashlib.sha256(_only_uids(rows).tobytes()).hexdigest(),
        "found": hashlib.sha256(_only_uids(rows[rows["how"] > 0]).tobytes()).hexdigest(),
        "shard_size": shard_size,
        "placeholders": [digest for _, digest in unwanted],
    }
    return Target(name=name, path=path, subset="", classes=None, arguments=arguments)


def _only_uids(rows: np.ndarray) -> np.ndarray:
    found = np.empty(len(rows), dtype=UID)
    found["f0"], found["f1"] = rows["f0"], rows["f1"]
    return found


def _kept(plans: list[Plan], overwrite: bool) -> list[dict[str, Any] | None]:
    """The ``meta.json`` of each split that is there, None where it is to be made."""
    return [output.finished(plan.target, overwrite, skip_bad_shards=False, compared=COMPARED) for plan in plans]


def _make(plans: list[Plan], kept: list[dict[str, Any] | None], run: Callable) -> Iterator[dict[str, Any]]:
    """Make the splits that are not there, ``kept`` is None; yields each one's ``meta.json``."""
    done = [_done(plan.target) for plan in plans]
    jobs = [[] if before else list(plan.jobs(made)) for plan, before, made in zip(plans, kept, done, strict=True)]
    for plan, before, made in zip(plans, kept, done, strict=True):
        if before is None:  # of all splits before the first shard is made, as it removes what is not of this run
            output.begin(plan.target, set(made))
    total = sum(map(len, jobs))
    results = progress(run(make_tar, chain(*jobs)), "pack", total, "shard")
    for plan, before, made, todo in zip(plans, kept, done, jobs, strict=True):
        if before is None:
            new = {int(Path(job.path).stem): next(results) for job in todo}
            before = _finish(plan, {**made, **new})
        if plan.target.name.startswith("test") and before["output_count"]:
            list(clip_benchmark.convert(plan.target.path, "retrieval"))
        yield before


def _finish(plan: Plan, stats: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Write the tables of a split whose shards have the ``stats``; returns ``meta.json``.

    Raises:
        TicError: of a shard before the last ones none of the pictures can be used.
    """
    path, rows = plan.target.path, plan.rows
    counts = [stats[i]["successes"] for i in range(len(stats))]
    while counts and not counts[-1]:
        counts.pop()
        remove(f"{path}/{STATS.format(len(counts))}")
    if 0 in counts:
        raise TicError(
            f"{path}: none of the images of shard {counts.index(0)} can be used; are these the images? "
            "If they are, a larger --shard-size with --overwrite leaves no shard empty"
        )
    dropped = sum((Counter(entry["dropped"]) for entry in stats.values()), plan.expected["dropped"])
    if len(rows) != sum(counts) + dropped.total():
        raise TicError(f"{path}: {len(rows)} rows, but {sum(counts)} kept and {dropped.total()} dropped")
    sizes = {SHARD_FORMAT.format(i): count for i, count in enumerate(counts)}
    write_sizes(path, sizes)
    uids.save_uids(f"{path}/{SUBSET}", _only_uids(rows))
    meta = {
        "output_shard_count": len(counts),
        "output_count": sum(counts),
        "output_bytes": sum(size(f"{path}/{name}") for name in sizes),
        "output_shard_format": SHARD_FORMAT,
        "subset_count": len(rows),
        "processed_count": len(rows),
        "kept_count": sum(counts),
        "dropped": dict(sorted((+dropped).items())),
        "arguments": plan.target.arguments,
    }
    write_json(f"{path}/{META}", meta, sync=False)
    remove(f"{path}/{STARTED}")
    return meta


def _done(target: Target) -> dict[int, dict[str, Any]]:
    """The stats of shards that an unfinished run with the same arguments has made."""
    try:
        before = read_json_object(f"{target.path}/{STARTED}").get("arguments", {})
    except (TicError, FileNotFoundError):
        return {}
    if any(before.get(name) != target.arguments[name] for name in COMPARED):
        return {}
    there = {Path(tar).stem for tar, _ in list_files(target.path, "[0-9]*.tar")}
    found = {}
    for file, _ in list_files(target.path, "[0-9]*_stats.json"):
        name = Path(file).name.removesuffix("_stats.json")
        with suppress(TicError):  # a machine that went off may have left it empty: the shard is made again
            stats = read_json_object(file)
            if stats.keys() >= {"successes", "dropped"} and (name in there or not stats["successes"]):
                found[int(name)] = stats
    return found


def make_tar(job: Job) -> dict[str, Any]:
    """Write a shard, unless it has no sample, and then its stats; returns these: the samples, and what was dropped."""
    dropped: Counter[str] = Counter()
    samples = _samples(job, dropped)
    first = next(samples, None)
    count = write_shard(job.path, chain([first], samples), sync=False) if first else 0
    stats = {"successes": count, "dropped": dict(sorted(dropped.items()))}
    write_json(Path(job.path).parent / STATS.format(int(Path(job.path).stem)), stats, sync=False)
    return stats


def _samples(job: Job, dropped: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard as ``write_shard`` takes them; counts those that can't be used."""
    with _Rows(job.csv) as read:
        for row in job.rows:
            key, image, caption, date = read(int(row["offset"]))
            if not caption.strip():
                dropped[NO_CAPTION] += 1
                continue
            try:
                data = read_picture(job.image_path, image, row, job.zips)
                suffix = suffix_of(data, job.placeholders)
            except Unusable as reason:
                dropped[str(reason)] += 1
                continue
            record = {
                "uid": uids.format_uid(row),
                "caption": caption,
                "key": key,
                "date": date,
                "dataset": job.dataset,
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            text = json.dumps(record).encode()
            yield f"{record['uid']}-0", {suffix: data, "json": text, "txt": caption.encode()}


class _Rows:
    """Reads single rows of a list by their first byte."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "rb")  # noqa: SIM115, closed by __exit__
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        csv.field_size_limit(MAX_FIELD)

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self.map.close()
        self.file.close()

    def __call__(self, offset: int) -> list[str]:
        self.map.seek(offset)
        return next(csv.reader(_Lines(self.map)))


def _split(target: Target, wanted: int, meta: dict[str, Any], *, reused: bool) -> Split:
    return Split(
        name=target.name,
        path=target.path,
        wanted=wanted,
        num_samples=meta["output_count"],
        num_shards=meta.get("output_shard_count", 0),
        num_bytes=meta.get("output_bytes", 0),
        reused=reused,
    )
