"""Cut rows with a date by time: a training and a test list of each step, as CSV.

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
from tic_clip.storage import atomic_open, is_remote, list_files, lock_folder, read_json_object, remove, size, write_json

MANIFEST, BUCKETS = "manifest.json", ".buckets.tmp"
COLUMNS = ["key", "image", "caption", "date"]
SPLITS = ("train", "test")
CHUNK = 2000
"""Rows that a process captions at a time."""

OUTSIDE, NO_CAPTION = "outside the steps", "no caption"
_OWN_NAME = re.compile(r"manifest\.json|(train|test)_batch_\d{4}(-\d{4})?\.csv")

READERS = {"yfcc15m": read_yfcc15m, "redcaps": read_redcaps}
CAPTIONS = {"yfcc15m": yfcc_caption, "redcaps": plain_caption}


class RowCounter:
    """Counts the rows read, and those dropped by reason."""

    def __init__(self, skip_bad_rows: bool) -> None:
        self.skip_bad_rows, self.read, self.dropped = skip_bad_rows, 0, Counter()

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
    folder of annotations; the lists do not depend on ``num_workers``. Raises a ``TicError``, and changes nothing, if a
    row is bad or none can be used, the folder holds something else, or another process is writing it.
    """
    if not 0 <= test_share < 1:
        raise TicError(f"the test share is a fraction from 0 to below 1, not {test_share}")
    if remote := next(filter(is_remote, (input_path, output_path)), None):
        raise TicError(f"{remote} is not local; lists are made from and in local folders")
    settings = {"benchmark": benchmark or dataset, "dataset": dataset, "seed": seed, "test_share": test_share}
    steps, inputs, folder = _step_names(settings["benchmark"]), _list_inputs(input_path), Path(output_path)
    others = sorted(path.name for path in folder.glob("[!.]*") if not _OWN_NAME.fullmatch(path.name))
    if others and not (folder / MANIFEST).exists():
        raise TicError(f"{folder} holds something else ({others[0]}); give another output folder")
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(num_workers, fork=True))  # before a progress bar starts a thread
        digests = {Path(path).name: file_digest(path) for path in progress(inputs, "check", len(inputs), "file")}
        made_from = {**settings, "input": digests}
        if manifest := _load_finished(folder, made_from, overwrite):
            return manifest, True
        counter = RowCounter(skip_bad_rows)
        rows = counter.good_rows(progress(chain.from_iterable(map(READERS[dataset], inputs)), "read", unit=" rows"))
        stack.enter_context(lock_folder(folder))
        _remove_leftovers(folder)
        stack.callback(_remove_leftovers, folder)
        (folder / BUCKETS).mkdir()
        chunks = iter(lambda: list(islice(rows, CHUNK)), [])
        _fill_buckets(folder / BUCKETS, map_in_pool(pool, partial(make_records, settings), chunks, 4 * num_workers))
        manifest = {**made_from, **_write_lists(folder, steps, counter), "order": "uid"}
        for path in folder.glob("*.csv"):
            if path.name not in manifest["files"] and _OWN_NAME.fullmatch(path.name):  # another benchmark's
                remove(path)
        write_json(folder / MANIFEST, manifest)
    return manifest, False


def make_records(settings: dict[str, Any], rows: list[Row]) -> dict[int, bytes]:
    """Return {first byte of the UID: lines} of the rows: UID, list or reason to drop it, line of CSV, tabs between."""
    dataset, records, lines = settings["dataset"], defaultdict(list), []
    steps = _step_names(settings["benchmark"])  # a year, or its first and last
    step_of_year = {year: step for step in steps for year in range(int(step[:4]), int(step[-4:]) + 1)}
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n")
    for row in rows:
        date = datetime.fromtimestamp(row.seconds, UTC)
        step, uid = step_of_year.get(date.year), make_uid(f"{dataset}/{row.key}")
        caption = CAPTIONS[dataset](row.texts) if step else ""
        name = OUTSIDE if not step else list_name(_choose_split(settings, row.key), step) if caption else NO_CAPTION
        writer.writerow((row.key, row.image, caption, date.isoformat().replace("+00:00", "Z")))
        records[int(uid[:2], 16)].append(f"{uid}\t{name}\t{lines.pop()}")
    return {bucket: "".join(found).encode() for bucket, found in records.items()}


def _choose_split(settings: dict[str, Any], key: str) -> str:
    """Return "test" if the first 64 bits of the SHA-256 of ``{seed}/{dataset}/{key}`` are below the test share."""
    digest = hashlib.sha256(f"{settings['seed']}/{settings['dataset']}/{key}".encode()).digest()
    return "test" if int.from_bytes(digest[:8]) < settings["test_share"] * 2.0**64 else "train"  # both are exact


def _fill_buckets(folder: Path, chunks: Iterable[dict[int, bytes]]) -> None:
    """Write what ``make_records`` returns to a file for each first byte of a UID, in the order of the rows."""
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{number:02x}", "wb")) for number in range(256)]
        for records in chunks:
            for bucket, data in records.items():
                files[bucket].write(data)


def _write_lists(folder: Path, steps: list[str], counter: RowCounter) -> dict[str, Any]:
    """Write the lists from the buckets and remove the manifest; return the new one's counts and digests."""
    names = [list_name(split, step) for step in steps for split in SPLITS]
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_open(folder / name)) for name in names}
        rows, dropped = _sort_buckets(folder / BUCKETS, files, counter), dict(sorted(counter.dropped.items()))
        if not rows.total():
            why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise TicError(f"the input has no row that can be used ({why or 'it has none at all'})")
        for file in files.values():
            file.flush()
        digests = {name: file_digest(file.name) for name, file in files.items()}
        remove(folder / MANIFEST)  # before any list is replaced
    counts = {step: {split: rows[list_name(split, step)] for split in SPLITS} for step in steps}
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
    counts = {**manifest["counts"], "all": sum(map(Counter, manifest["counts"].values()), Counter())}
    lines = [f"{step:<9}  {count['train']:>11,}  {count['test']:>9,}" for step, count in counts.items()]
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "none"
    head = [f"{path}{': already there' if reused else ''}", "", f"{'step':<9}  {'train':>11}  {'test':>9}"]
    return "\n".join([*head, *lines, "", f"{manifest['read']:,} rows read; dropped: {dropped}"])


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def _step_names(benchmark: str) -> list[str]:
    return [step.name for step in get_benchmark(benchmark).steps]


def read_rows(path: str, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of the rows of a list, or of those from byte ``start`` on.

    Raises a ``TicError`` if it has other columns, or a row another number of fields.
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
    if not Path(path).is_dir():
        size(path)  # an error if it is missing
        return [path]
    paths = [file for file, _ in list_files(path, "*.json")]
    if not paths:
        raise TicError(f"{path} has no annotation file ({{subreddit}}_{{year}}.json)")
    return paths


def _remove_leftovers(folder: Path) -> None:
    """Remove the buckets, and the lists that a killed run was writing."""
    shutil.rmtree(folder / BUCKETS, ignore_errors=True)
    for path in folder.glob(".*.tmp"):
        remove(path)


def _load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of lists that were made from the same input with the same settings; None to make them.

    Raises a ``TicError`` if something else is there and it is not to be overwritten.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json_object(folder / MANIFEST)
    changed = [
        name if name == "input" else f"{name} ({manifest.get(name)}, now {now})"
        for name, now in made_from.items()
        if manifest.get(name) != now
    ]
    files = manifest.get("files", {}).items()
    changed += [name for name, sha in files if not (folder / name).is_file() or file_digest(folder / name) != sha]
    if overwrite and (changed or manifest.get("order") != "uid"):  # earlier versions kept the input's order
        return None
    if changed:
        raise TicError(f"{folder} has another {' and another '.join(changed)}; give --overwrite to replace it")
    return manifest
