"""Split dated rows by time into a training and a test list of each step, as CSV sorted by UID.

Memory is bounded: rows go into 256 bucket files by the first byte of their UID, and each bucket is sorted by itself.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, date, datetime
from functools import partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.cli import Parser, add_flags, from_flags, progress
from tic_clip.data import dates, lists
from tic_clip.data.images import store_images
from tic_clip.data.lists import Options, OwnOptions, file_digest, list_names
from tic_clip.data.sources import Reject, Row, read_redcaps, read_yfcc15m, redcaps_caption, yfcc_caption
from tic_clip.data.tables import Columns, find_tables, read_dates, read_rows
from tic_clip.data.uids import make_uid
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import list_files
from tic_clip.timeline import span

HEADER = b"key,image,caption,date"
CHUNK = 2000  # rows that a process captions at a time
NO_CAPTION = "no caption"
SOURCES = {"yfcc15m": (read_yfcc15m, yfcc_caption), "redcaps": (read_redcaps, redcaps_caption)}

Spans = dict[str, list[tuple[int, int, str]]]
"""train or test -> the first second of each of its lists, the second after its last, and its name."""


def main(parser: Parser, dataset: str) -> None:
    """Parse a script's flags and the common ones, write the lists, and print how many samples they have."""
    add_flags(parser, Options)
    args = parser.parse_args()
    options, benchmark = from_flags(Options, args), getattr(args, "benchmark", dataset)
    print(lists.describe(options.output_path, *create_splits(dataset, args.input_path, options, benchmark)))


def create_splits(
    dataset: str, input_path: str, options: Options, benchmark: str | None = None
) -> tuple[dict[str, Any], bool]:
    """Write the lists of YFCC15M's table or RedCaps' folder; return the manifest and whether it was already there."""
    steps, (read, caption) = get_benchmark(benchmark or dataset), SOURCES[dataset]
    settings = options.settings(steps.name, dataset)
    inputs = [path for path, _ in list_files(input_path, "*.json")] if Path(input_path).is_dir() else [input_path]
    return write_lists(inputs, read, caption, lambda _: steps, settings, options)


def create_own_splits(tables: list[str], columns: Columns, options: OwnOptions) -> tuple[dict[str, Any], bool]:
    """Write the lists and ``benchmark.yaml`` of tables; return the manifest and whether it was already there."""
    columns.require("image", "caption", "date")
    settings, tables = {**options.own_settings(), "columns": vars(columns)}, find_tables(tables)

    def find_benchmark(folder: Path) -> Benchmark:
        months = count_months(tables, columns, options) if options.every else Counter()
        return options.write_benchmark(folder, months, columns.label)

    return write_lists(tables, partial(read_rows, columns), redcaps_caption, find_benchmark, settings, options)


def count_months(tables: list[str], columns: Columns, options: OwnOptions) -> Counter[date]:
    """Return month -> rows of tables; raise a TicError for a date that can't be read."""
    columns.require("date")
    read = partial(read_dates, columns, reject=partial(options.reject, Counter()))
    seconds = progress(chain.from_iterable(map(read, find_tables(tables))), "dates", unit=" rows")
    return dates.count_months(Counter(each // 86_400 for each in seconds))


def write_lists(
    inputs: Sequence[str],
    read: Callable[[str, Reject], Iterator[Row]],
    make_caption: Callable[[tuple[str, ...]], str],
    find_benchmark: Callable[[Path], Benchmark],
    settings: dict[str, Any],
    options: Options,
) -> tuple[dict[str, Any], bool]:
    """Write the lists of the rows that ``read`` yields of each input; see ``make_lists``."""
    with make_pool(options.num_workers, fork=True) as pool:  # before a progress bar starts a thread

        def write(new: Path, work: Path) -> dict[str, Any]:
            benchmark, dropped = find_benchmark(new), Counter()
            reject, dataset = partial(options.reject, dropped), settings["dataset"]
            rows = progress(chain.from_iterable(read(path, reject) for path in inputs), "read", unit=" rows")
            rows = store_images(rows, new)
            chunks = iter(lambda: list(islice(rows, CHUNK)), [])
            records = partial(make_records, dataset, options, make_caption, _find_spans(benchmark))
            for found in map_in_pool(pool, records, chunks, 4 * options.num_workers):
                for bucket, data in found.items():
                    with open(work / bucket, "ab") as file:
                        file.write(data)
            return _write_lists(work, new, benchmark, dropped, reject)

        return lists.make_lists(options, {**settings, "input": digest_inputs(inputs)}, write)


def digest_inputs(paths: Sequence[str]) -> dict[str, str]:
    """Return file -> SHA-256, by name, or by path where names repeat."""
    names = Counter(Path(path).name for path in paths)
    return {path if names[Path(path).name] > 1 else Path(path).name: file_digest(path) for path in paths}


def _find_spans(benchmark: Benchmark) -> Spans:
    spans = {split: [] for split in lists.SPLITS}
    for name, (split, step) in list_names(benchmark).items():
        spans[split].append((*map(dates.to_seconds, span(step)), name))
    return spans


def make_records(
    dataset: str, options: Options, make_caption: Callable, spans: Spans, rows: list[Row]
) -> dict[str, bytes]:
    """Return {first byte of the UID: lines} of the rows: UID, list or reason to drop it, line of CSV, tabs between."""
    records, lines = defaultdict(list), []
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n")
    for row in rows:
        split = lists.SPLITS[options.is_test(dataset, row.key)]
        name = next((name for first, after, name in spans[split] if first <= row.seconds < after), None)
        uid, caption = make_uid(f"{dataset}/{row.key}"), make_caption(row.texts) if name else ""
        name = lists.OUTSIDE if not name else name if caption else NO_CAPTION
        time = f"{datetime.fromtimestamp(row.seconds, UTC).replace(tzinfo=None).isoformat()}Z"
        writer.writerow((row.key, row.image, caption, time, *row.label))
        records[uid[:2]].append(f"{uid}\t{name}\t{lines.pop()}")
    return {bucket: "".join(found).encode() for bucket, found in records.items()}


def _write_lists(work: Path, new: Path, benchmark: Benchmark, dropped: Counter[str], reject: Reject) -> dict[str, Any]:
    """Write the lists from the buckets, in the order of the UIDs; return their part of the manifest."""
    rows, labels, last, names = Counter(), Counter(), b"", list_names(benchmark)
    buckets = sorted(work.iterdir())
    has_labels = "classification" in benchmark.tasks.values()
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(new / name, "wb")) for name in names}
        for file in files.values():
            file.write(HEADER + b",label" * has_labels + b"\n")
        for bucket in progress(buckets, "sort", len(buckets), "bucket"):
            lines = bucket.read_bytes().splitlines(keepends=True)
            for record in sorted(lines, key=itemgetter(slice(32))):  # stable: of one key, the row that was read first
                uid, name, line = record.split(b"\t", 2)
                name = name.decode()
                if uid == last:
                    key = _fields(line)[0]
                    reject("duplicate key", f"the key {key} is in more than one row of the input")
                elif name in files:
                    files[name].write(line)
                    rows[names[name]] += 1
                    if has_labels and (label := _fields(line)[-1]):  # one without a label is of no class
                        labels[*names[name], label] += 1
                else:
                    dropped[name] += 1
                last = uid
    part = lists.count_samples(benchmark, rows, dropped, {name: file_digest(new / name) for name in names})
    return part | (count_classes(labels, benchmark.periods) if has_labels else {})


def _fields(line: bytes) -> list[str]:
    return next(csv.reader([line.decode()]))


def count_classes(labels: Counter[tuple[str, str, str]], periods: tuple[str, ...]) -> dict[str, Any]:
    """Return the manifest's part on (split, step, class) -> samples: classes, and how many a period's test lacks."""
    classes, tested = Counter(), Counter(step for split, step, _ in labels if split == "test")
    for (*_, label), count in labels.items():
        classes[label] += count
    if not classes:
        raise TicError("the column of labels is empty")
    missing = {period: len(classes) - tested[period] for period in periods}
    return {"classes": dict(sorted(classes.items())), "missing_classes": missing}
