"""Cut rows with a date by time: a training and a test list of each step, as CSV, in the order of the rows' UIDs.

Memory is bounded: rows go into 256 bucket files by the first byte of their UID, and each bucket is sorted by itself.
``manifest.json`` is written last: a folder that has it is finished.
"""

import csv
import hashlib
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, progress
from tic_clip.data.sources import BadRow, Row, read_redcaps, read_yfcc15m, redcaps_caption, yfcc_caption
from tic_clip.data.uids import make_uid
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import list_files, local_folder, lock_folder, read_json, remove, write_json

MANIFEST, WORK = "manifest.json", ".buckets.tmp"
HEADER = b"key,image,caption,date\n"
SPLITS = ("train", "test")
CHUNK = 2000  # rows that a process captions at a time
OUTSIDE, NO_CAPTION = "outside the steps", "no caption"
SOURCES = {"yfcc15m": (read_yfcc15m, yfcc_caption), "redcaps": (read_redcaps, redcaps_caption)}


def main(parser: Parser, dataset: str) -> None:
    """Parse a script's own flags and those of both create_splits.py, cut, and print how many samples the lists have."""
    flag = parser.add_argument
    flag("--output-path", required=True, help="folder of the lists")
    flag("-j", "--num-workers", type=int, default=1, help="processes that make captions (default: 1)")
    flag("--test-share", type=float, default=0.01, help="fraction that is held out (default: 0.01)")
    flag("--seed", type=int, default=0, help="which samples are held out (default: 0)")
    flag("--skip-bad-rows", action="store_true", help="leave out rows with a fault, and count them")
    flag("--overwrite", action="store_true", help="make the lists again")
    args = parser.parse_args()
    manifest, reused = create_splits(dataset, **vars(args))
    print(f"{args.output_path}{': already there' if reused else ''}\n\n{'step':<9}  {'train':>11}  {'test':>9}")
    counts = {**manifest["counts"], "all": sum(map(Counter, manifest["counts"].values()), Counter())}
    for step, count in counts.items():
        print(f"{step:<9}  {count['train']:>11,}  {count['test']:>9,}")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "none"
    print(f"\n{manifest['read']:,} rows read; dropped: {dropped}")


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
    """Write ``{train,test}_batch_{step}.csv`` and ``manifest.json`` of the table or folder ``input_path``.

    Returns the manifest, and whether it was there already. An error, such as a bad row, leaves old lists as they are.
    """
    if not 0 <= test_share < 1:
        raise TicError(f"the test share is a fraction from 0 to below 1, not {test_share}")
    settings = {"benchmark": benchmark or dataset, "dataset": dataset, "seed": seed, "test_share": test_share}
    steps = [step.name for step in get_benchmark(settings["benchmark"]).steps]
    folder, is_folder = local_folder(output_path), Path(input_path).is_dir()
    inputs = [path for path, _ in list_files(input_path, "*.json")] if is_folder else [input_path]
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(num_workers, fork=True))  # before a progress bar starts a thread
        made_from = {**settings, "input": {Path(path).name: file_digest(path) for path in inputs}}
        if manifest := _load_finished(folder, made_from, overwrite):
            return manifest, True
        stack.enter_context(lock_folder(folder))
        work = folder / WORK
        shutil.rmtree(work, ignore_errors=True)
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        work.mkdir()
        reject = partial(_reject, skip_bad_rows, dropped := Counter())
        rows = progress(chain.from_iterable(map(SOURCES[dataset][0], inputs)), "read", unit=" rows")
        good_rows = (row for row in rows if isinstance(row, Row) or reject(row))
        chunks = iter(lambda: list(islice(good_rows, CHUNK)), [])
        for records in map_in_pool(pool, partial(make_records, settings), chunks, 4 * num_workers):
            for bucket, data in records.items():
                with open(work / bucket, "ab") as file:
                    file.write(data)
        manifest = {**made_from, **_write_lists(work, steps, dropped, reject), "order": "uid"}
        remove(folder / MANIFEST)  # before any list is replaced
        for name in manifest["files"]:
            os.replace(work / name, folder / name)
        write_json(folder / MANIFEST, manifest)
    return manifest, False


def _reject(skip_bad_rows: bool, dropped: Counter[str], row: BadRow) -> None:
    """Count a bad row by its reason, or raise TicError if bad rows are not to be skipped."""
    if not skip_bad_rows:
        raise TicError(f"{row.message} (--skip-bad-rows leaves such rows out)")
    dropped[row.reason] += 1


def make_records(settings: dict[str, Any], rows: list[Row]) -> dict[str, bytes]:
    """Return {first byte of the UID: lines} of the rows: UID, list or reason to drop it, line of CSV, tabs between."""
    dataset, records, lines = settings["dataset"], defaultdict(list), []
    steps = [step.name for step in get_benchmark(settings["benchmark"]).steps]  # a year, or its first and last
    step_of_year = {year: step for step in steps for year in range(int(step[:4]), int(step[-4:]) + 1)}
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n")
    for row in rows:
        date = datetime.fromtimestamp(row.seconds, UTC)
        step, uid = step_of_year.get(date.year), make_uid(f"{dataset}/{row.key}")
        caption = SOURCES[dataset][1](row.texts) if step else ""
        digest = hashlib.sha256(f"{settings['seed']}/{dataset}/{row.key}".encode()).digest()
        is_test = int.from_bytes(digest[:8]) < settings["test_share"] * 2.0**64  # both are exact
        name = OUTSIDE if not step else list_name(SPLITS[is_test], step) if caption else NO_CAPTION
        writer.writerow((row.key, row.image, caption, date.isoformat().replace("+00:00", "Z")))
        records[uid[:2]].append(f"{uid}\t{name}\t{lines.pop()}")
    return {bucket: "".join(found).encode() for bucket, found in records.items()}


def _write_lists(work: Path, steps: list[str], dropped: Counter[str], reject: Callable) -> dict[str, Any]:
    """Write the lists from the buckets, in the order of the UIDs; return their part of the manifest."""
    buckets, rows, last = sorted(work.iterdir()), Counter(), b""
    names = [list_name(split, step) for step in steps for split in SPLITS]
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(work / name, "wb")) for name in names}
        for file in files.values():
            file.write(HEADER)
        for bucket in progress(buckets, "sort", len(buckets), "bucket"):
            lines = bucket.read_bytes().splitlines(keepends=True)
            for record in sorted(lines, key=itemgetter(slice(32))):  # stable: of one key, the row that was read first
                uid, name, line = record.split(b"\t", 2)
                name = name.decode()
                if uid == last:
                    key = next(csv.reader([line.decode()]))[0]
                    reject(BadRow("duplicate key", f"the key {key} is in more than one row of the input"))
                elif name in files:
                    files[name].write(line)
                    rows[name] += 1
                else:
                    dropped[name] += 1
                last = uid
    if not rows:
        raise TicError(f"the input has no row that can be used; dropped: {dict(dropped) or 'none'}")
    counts = {step: {split: rows[list_name(split, step)] for split in SPLITS} for step in steps}
    files, read = {name: file_digest(work / name) for name in names}, rows.total() + dropped.total()
    return {"counts": counts, "read": read, "dropped": dict(sorted(dropped.items())), "files": files}


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def read_rows(path: str, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of the rows of a list, or of those from byte ``start`` on."""
    csv.field_size_limit(sys.maxsize)
    with open(path, "rb") as file:
        first = file.seek(start or len(HEADER))
        for row in csv.reader(map(bytes.decode, iter(file.readline, b""))):
            yield first, row
            first = file.tell()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of lists of the same input and settings; TicError if they are of another."""
    if overwrite or not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    changed = [name for name, value in made_from.items() if manifest.get(name) != value]
    if changed:
        raise TicError(f"{folder} has another {' and another '.join(changed)}; give --overwrite to replace it")
    return manifest
