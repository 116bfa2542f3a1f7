"""Rows with a date cut by time: a training and a test list of each step, as CSV.

The lists are in the order of the rows' UIDs. Memory is bounded: rows go into 256 bucket files by the first byte of
their UID, and each bucket is sorted by itself. ``manifest.json`` is written last: a folder that has it is finished.
"""

import csv
import hashlib
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import progress
from tic_clip.data.captions import plain_caption, yfcc_caption
from tic_clip.data.sources import BadRow, Row, read_redcaps, read_yfcc15m
from tic_clip.data.uids import make_uid
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import (
    NotFoundError,
    atomic_open,
    is_remote,
    list_files,
    lock_folder,
    read_json_object,
    remove,
    write_json,
)

MANIFEST, BUCKETS = "manifest.json", ".buckets.tmp"
COLUMNS = ["key", "image", "caption", "date"]
SPLITS = ("train", "test")
CHUNK = 2000
"""Rows that a process captions at a time."""

OUTSIDE, NO_CAPTION = "outside the steps", "no caption"
_OWN_NAME = re.compile(r"manifest\.json|(train|test)_batch_\d{4}(-\d{4})?\.csv")

READERS = {"yfcc15m": read_yfcc15m, "redcaps": read_redcaps}
CAPTIONS = {"yfcc15m": yfcc_caption, "redcaps": plain_caption}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides which list a sample is in. ``dataset`` is part of its UID, and the same for all its benchmarks."""

    benchmark: str
    dataset: str
    seed: int = 0
    test_share: float = 0.01

    def steps_by_year(self) -> dict[int, str]:
        """Return the step that each year belongs to; a step is called by its year, or by its first and last."""
        steps = [step.name for step in get_benchmark(self.benchmark).steps]
        return {year: step for step in steps for year in range(int(step[:4]), int(step[-4:]) + 1)}

    def split_of(self, key: str) -> str:
        """Return "test" if the first 64 bits of the SHA-256 of ``{seed}/{dataset}/{key}`` are below the test share."""
        digest = hashlib.sha256(f"{self.seed}/{self.dataset}/{key}".encode()).digest()
        return "test" if int.from_bytes(digest[:8]) < self.test_share * 2.0**64 else "train"  # both sides are exact


@dataclass
class RowCounter:
    """How many rows were read, and how many of them dropped, by reason."""

    skip_bad_rows: bool
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def good_rows(self, rows: Iterable[Row | BadRow]) -> Iterator[Row]:
        """Count the rows and yield those without a fault."""
        for row in rows:
            self.read += 1
            if isinstance(row, Row):
                yield row
            else:
                self.reject(row.reason, row.message)

    def reject(self, reason: str, message: str) -> None:
        """Count a bad row, or raise TicError if bad rows are not to be skipped."""
        if not self.skip_bad_rows:
            raise TicError(f"{message} (--skip-bad-rows leaves such rows out)")
        self.dropped[reason] += 1


def create_splits(
    dataset: str,
    input_path: str,
    output_path: str,
    *,
    benchmark: str | None = None,
    num_workers: int = 1,
    test_share: float = 0.01,
    seed: int = 0,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write ``{train,test}_batch_{step}.csv`` (``COLUMNS``, in UTF-8) and ``manifest.json``, unless they are there.

    Returns the manifest, and whether it was there. ``dataset`` is one of ``READERS``, ``input_path`` the table or the
    folder of annotations; the lists do not depend on ``num_workers``.

    Raises:
        TicError: a row is bad or none can be used, the folder holds something else, or another process is writing it;
            nothing has changed then.
    """
    if not 0 <= test_share < 1:
        raise TicError(f"the test share is a fraction from 0 to below 1, not {test_share}")
    get_benchmark(benchmark or dataset)  # an error if there is no such one
    settings = Settings(benchmark=benchmark or dataset, dataset=dataset, seed=seed, test_share=test_share)
    inputs, folder = _list_inputs(input_path), Path(output_path)
    _check_folder(output_path, inputs)
    digests = {Path(path).name: file_digest(path) for path in progress(inputs, "check the input", len(inputs), "file")}
    made_from = {**asdict(settings), "input": digests}
    if manifest := _load_finished(folder, made_from, overwrite):
        return manifest, True
    counter = RowCounter(skip_bad_rows)
    rows = counter.good_rows(progress(chain.from_iterable(map(READERS[dataset], inputs)), "read", unit=" rows"))
    with lock_folder(folder):
        _remove_leftovers(folder)
        try:
            _fill_buckets(folder / BUCKETS, rows, settings, num_workers)
            manifest = {**made_from, **_write_lists(folder, settings, counter), "order": "uid"}
        finally:
            _remove_leftovers(folder)
        for path in folder.glob("*.csv"):
            if path.name not in manifest["files"] and _OWN_NAME.fullmatch(path.name):  # another benchmark's
                remove(path)
        write_json(folder / MANIFEST, manifest)
    return manifest, False


def make_records(settings: Settings, rows: list[Row]) -> dict[int, bytes]:
    """Return {first byte of the UID: lines} of the rows: UID, list or reason to drop it, line of CSV, tabs between."""
    records, steps, caption_of = defaultdict(list), settings.steps_by_year(), CAPTIONS[settings.dataset]
    lines: list[str] = []
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n")
    for row in rows:
        date = datetime.fromtimestamp(row.seconds, UTC)
        step, uid = steps.get(date.year), make_uid(f"{settings.dataset}/{row.key}")
        caption = caption_of(row.texts) if step else ""
        name = OUTSIDE if not step else list_name(settings.split_of(row.key), step) if caption else NO_CAPTION
        writer.writerow((row.key, row.image, caption, date.isoformat().replace("+00:00", "Z")))
        records[int(uid[:2], 16)].append(f"{uid}\t{name}\t{lines.pop()}")
    return {bucket: "".join(found).encode() for bucket, found in records.items()}


def _fill_buckets(folder: Path, rows: Iterator[Row], settings: Settings, num_workers: int) -> None:
    """Write the records of the rows to a file for each first byte of a UID, in the order of the rows."""
    folder.mkdir()
    with make_pool(num_workers) as pool, ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{number:02x}", "wb")) for number in range(256)]
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        for records in map_in_pool(pool, partial(make_records, settings), chunks, 4 * num_workers):
            for bucket, data in records.items():
                files[bucket].write(data)


def _write_lists(folder: Path, settings: Settings, counter: RowCounter) -> dict[str, Any]:
    """Write the lists from the buckets and remove the manifest; return the new one's counts and digests."""
    names = {step: {split: list_name(split, step) for split in SPLITS} for step in settings.steps_by_year().values()}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(atomic_open(folder / name)) for step in names.values() for name in step.values()
        }
        rows, dropped = _sort_buckets(folder / BUCKETS, files, counter), dict(sorted(counter.dropped.items()))
        if not rows.total():
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise TicError(f"the input has no row that can be used ({why or 'it has none at all'})")
        if counter.read != rows.total() + counter.dropped.total():
            raise TicError(f"{counter.read} rows read, but {rows.total()} kept and {counter.dropped.total()} dropped")
        for file in files.values():
            file.flush()
        digests = {name: file_digest(file.name) for name, file in files.items()}
        remove(folder / MANIFEST)  # before any list is replaced
    counts = {step: {split: rows[name] for split, name in lists.items()} for step, lists in names.items()}
    return {"counts": counts, "read": counter.read, "dropped": dropped, "files": digests}


def _sort_buckets(folder: Path, files: dict[str, IO[bytes]], counter: RowCounter) -> Counter[str]:
    """Write the records of the buckets to their lists in the order of their UIDs; return the rows of each list."""
    rows: Counter[str] = Counter()
    for file in files.values():
        file.write(",".join(COLUMNS).encode() + b"\n")
    for bucket in progress(sorted(folder.iterdir()), "sort", 256, "bucket"):
        with open(bucket, "rb") as file:
            records = sorted(file, key=itemgetter(slice(32)))  # stable: of one key, the row that was read first
        last = b""
        for record in records:
            uid, name, line = record.split(b"\t", 2)
            name = name.decode()
            if uid == last:
                key = next(csv.reader([line.decode()]))[0]
                counter.reject("duplicate key", f"the key {key} is in more than one row of the input")
            elif name in files:
                files[name].write(line)
                rows[name] += 1
            else:
                counter.dropped[name] += 1
            last = uid
    return rows


def format_table(path: str, manifest: dict[str, Any], reused: bool) -> str:
    """Return the lists as text: how many samples each has, and how many rows were dropped, by reason."""
    counts = manifest["counts"]
    rows = [(step, *(f"{count[split]:,}" for split in SPLITS)) for step, count in counts.items()]
    totals = (f"{sum(count[split] for count in counts.values()):,}" for split in SPLITS)
    rows = [("step", *SPLITS), *rows, ("all", *totals)]
    lines = [f"{step:<9}  {train:>11}  {test:>9}" for step, train, test in rows]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items())
    summary = f"{manifest['read']:,} rows read; dropped: {dropped or 'none'}"
    return "\n".join([f"{path}{': already there' if reused else ''}", "", *lines, "", summary])


# --- Input and output ---


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def read_rows(path: str, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of the rows of a list, or of those from byte ``start`` on.

    Raises:
        TicError: it has other columns, or a row has another number of fields.
    """
    csv.field_size_limit(sys.maxsize)
    position = start

    def read_lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode()

    with open(path, "rb") as file:
        file.seek(start)
        table = csv.reader(read_lines())
        header = COLUMNS if start else next(table, [])
        if header != COLUMNS:
            raise TicError(f"{path} has the columns {', '.join(header) or 'none'}; they must be {', '.join(COLUMNS)}")
        first = position
        for row in table:
            if len(row) != len(COLUMNS):
                raise TicError(f"{path}: the row at byte {first} has not {len(COLUMNS)} fields")
            yield first, row
            first = position


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list_inputs(path: str) -> list[str]:
    """Return the files to read: ``path``, or the annotation files in it, sorted by name."""
    if is_remote(path):
        raise TicError(f"{path} is not local; copy it here first")
    if not Path(path).exists():
        raise NotFoundError(f"{path} is missing")
    paths = [file for file, _ in list_files(path, "*.json")] if Path(path).is_dir() else [path]
    if not paths:
        raise TicError(f"{path} has no annotation file ({{subreddit}}_{{year}}.json)")
    return paths


def _remove_leftovers(folder: Path) -> None:
    """Remove the buckets, and the lists that a killed run was writing."""
    shutil.rmtree(folder / BUCKETS, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        remove(path)


def _check_folder(output_path: str, inputs: list[str]) -> None:
    """Raise TicError if the output folder can't be used: it is not local, or holds the input or something else."""
    folder = Path(output_path)
    if is_remote(output_path):
        raise TicError(f"{output_path} is not local; write to a local folder and copy it there")
    if inside := [path for path in inputs if Path(path).resolve().parent == folder.resolve()]:
        raise TicError(f"{inside[0]} lies in {folder}; give another output folder")
    others = sorted(path.name for path in folder.glob("[!.]*") if not _OWN_NAME.fullmatch(path.name))
    if others and not (folder / MANIFEST).exists():
        raise TicError(f"{folder} holds something else ({others[0]}); give another output folder")


def _load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of lists that were made from the same input with the same settings; None to make them.

    Raises:
        TicError: without ``overwrite``, something else is there; the message says what differs.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json_object(folder / MANIFEST)
    if not manifest.keys() >= {*made_from, "counts", "dropped", "files"}:
        raise TicError(f"{folder / MANIFEST} is not what this script writes; give another output folder")
    names = [name for name, now in made_from.items() if manifest[name] != now]
    values = [name if name == "input" else f"{name} ({manifest[name]}, now {made_from[name]})" for name in names]
    changed = [
        name
        for name, sha in manifest["files"].items()
        if not (folder / name).is_file() or file_digest(folder / name) != sha
    ]
    if overwrite and (names or changed or manifest.get("order") != "uid"):  # earlier versions kept the input's order
        return None
    if names:
        raise TicError(f"{folder} was made with another {' and another '.join(values)}; give --overwrite to replace it")
    if changed:
        raise TicError(f"{folder} has a {changed[0]} that is not as it was made; give --overwrite to make it again")
    return manifest


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest
