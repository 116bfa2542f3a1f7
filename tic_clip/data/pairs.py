"""Cut rows with a date by time: a training and a test list of each step, as CSV, in the order of the rows' UIDs.

Memory is bounded: rows go into 256 bucket files by the first byte of their UID, and each bucket is sorted by itself.
``manifest.json`` is written last: a folder that has it is finished.
"""

import csv
import hashlib
import os
import shutil
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice, zip_longest
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.cli import Parser, progress
from tic_clip.data.dates import first_second
from tic_clip.data.sources import NOT_DOWNLOADED, BadRow, Row, read_redcaps, read_yfcc15m, redcaps_caption, yfcc_caption
from tic_clip.data.tables import open_table
from tic_clip.data.uids import make_uid
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_remote, list_files, local_folder, lock_folder, read_json, remove, write_json
from tic_clip.timeline import span

MANIFEST, JOURNAL, WORK, NEW = "manifest.json", ".replacing.tmp", ".buckets.tmp", "new"
HEADER, LABEL_HEADER = b"key,image,caption,date\n", b"key,image,caption,date,label\n"
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
    print(describe(args.output_path, manifest, reused))


def describe(folder: str, manifest: dict[str, Any], reused: bool) -> str:
    """Return how many samples the lists in a folder have, as lines of text."""
    lines = [f"{folder}{': already there' if reused else ''}", "", f"{'step':<9}  {'train':>11}  {'test':>9}"]
    missing = manifest.get("missing_classes", {})
    counts = {**manifest["counts"], "all": sum(map(Counter, manifest["counts"].values()), Counter())}
    for step, count in counts.items():
        note = f"  {missing[step]:,} classes missing in test" if missing.get(step) else ""
        lines.append(f"{step:<9}  {count['train']:>11,}  {count['test']:>9,}{note}")
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "none"
    return "\n".join([*lines, "", f"{manifest['read']:,} rows read; dropped: {dropped}"])


class Source(NamedTuple):
    """What lists are made of: files, what reads one, and what makes a caption; ``dataset`` is a part of each UID.

    ``has_labels``: the second text of a row is its label.
    """

    dataset: str
    inputs: Sequence[str]
    read: Callable[[str], Iterator]
    caption: Callable[[tuple[str, ...]], str]
    has_labels: bool = False


class Cut(NamedTuple):
    """Where a row goes: of the training and of the test lists the first seconds, the seconds after all, the names."""

    starts: tuple[list[int], list[int]]
    ends: tuple[list[int], list[int]]
    names: tuple[list[str], list[str]]
    seed: int
    test_share: float

    def find(self, is_test: bool, seconds: int) -> str | None:
        """Return the list of a time, or None."""
        place = bisect_right(self.starts[is_test], seconds) - 1
        return self.names[is_test][place] if place >= 0 and seconds < self.ends[is_test][place] else None


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
    """Write ``{train,test}_batch_{step}.csv`` and ``manifest.json`` of YFCC15M's table, or RedCaps' folder.

    Returns the manifest, and whether it was there already. An error, such as a bad row, leaves old lists as they are.
    """
    settings = {"benchmark": benchmark or dataset, "dataset": dataset, "seed": seed, "test_share": test_share}
    steps = get_benchmark(settings["benchmark"])
    inputs = [path for path, _ in list_files(input_path, "*.json")] if Path(input_path).is_dir() else [input_path]
    source = Source(dataset, inputs, *SOURCES[dataset])
    flags = {"num_workers": num_workers, "skip_bad_rows": skip_bad_rows, "overwrite": overwrite}
    return write_lists(source, settings, lambda _: steps, output_path, **flags)


def write_lists(
    source: Source,
    settings: dict[str, Any],
    find_benchmark: Callable[[Path], Benchmark],
    output_path: str,
    *,
    num_workers: int,
    skip_bad_rows: bool,
    overwrite: bool,
) -> tuple[dict[str, Any], bool]:
    """Write the lists of a source, and what ``find_benchmark`` puts into the new folder that it is given.

    Returns the manifest, which begins with the ``settings``, and whether it was there already.
    """
    if not 0 <= settings["test_share"] < 1:
        raise TicError(f"the test share is a fraction from 0 to below 1, not {settings['test_share']}")
    folder = local_folder(output_path)
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(num_workers, fork=True))  # before a progress bar starts a thread
        made_from = {**settings, "input": digest_inputs(source.inputs)}
        if manifest := load_finished(folder, made_from, overwrite):
            return manifest, True
        work = stack.enter_context(work_folder(folder))
        benchmark = find_benchmark(work / NEW)
        reject = partial(_reject, skip_bad_rows, dropped := Counter())
        rows = progress(chain.from_iterable(map(source.read, source.inputs)), "read", unit=" rows")
        good_rows = (row for row in rows if isinstance(row, Row) or reject(row))
        chunks = iter(lambda: list(islice(good_rows, CHUNK)), [])
        records = partial(make_records, source._replace(inputs=(), read=None), _make_cut(benchmark, settings))
        for found in map_in_pool(pool, records, chunks, 4 * num_workers):
            for bucket, data in found.items():
                with open(work / bucket, "ab") as file:
                    file.write(data)
        manifest = {**made_from, **_write_lists(work, benchmark, dropped, reject), "order": "uid"}
        finish_lists(folder, manifest)
    return manifest, False


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """Lock the folder of lists, and make one of work in it, with an empty ``new/`` for what ``finish_lists`` moves."""
    work = folder / WORK
    with lock_folder(folder):
        try:
            shutil.rmtree(work, ignore_errors=True)
            (work / NEW).mkdir(parents=True)
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def finish_lists(folder: Path, manifest: dict[str, Any]) -> None:
    """Move what is in the folder's ``new/`` to it in place of older lists, and write the manifest, last.

    A TicError says that something that is not of lists has one of the names.
    """
    new, journal = {path.name: path for path in sorted((folder / WORK / NEW).iterdir())}, folder / JOURNAL
    if others := [name for name in new if name not in _top_names(manifest)]:
        manifest = {**manifest, "others": others}
    old = {name for path in (folder / MANIFEST, journal) if path.exists() for name in _top_names(read_json(path))}
    foreign = [name for name in new if name not in old and name not in manifest["files"] and (folder / name).exists()]
    if foreign:
        raise TicError(f"{folder} has {foreign[0]}, which is not of lists: give another --output-path")
    write_json(journal, {"files": [*old, *new]})  # what a run that is killed from here on may leave
    remove(folder / MANIFEST)  # before any list is replaced
    for name in old | new.keys():
        (shutil.rmtree if (folder / name).is_dir() else remove)(folder / name)
    for name, path in new.items():
        os.replace(path, folder / name)
    write_json(folder / MANIFEST, manifest)
    remove(journal)


def _top_names(manifest: dict[str, Any]) -> set[str]:
    """Return the files and folders that a manifest names, without what is in the folders."""
    return {name.partition("/")[0] for name in [*manifest.get("files", ()), *manifest.get("others", ())]}


def digest_inputs(paths: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files, by their names, or by their paths where two have the same name."""
    names = Counter(Path(path).name for path in paths)
    return {path if names[Path(path).name] > 1 else Path(path).name: file_digest(path) for path in paths}


def list_names(benchmark: Benchmark) -> dict[str, tuple[str, str]]:
    """Return of each list its (train or test, split or period), step by step."""
    pairs = [pair for step in benchmark.steps for pair in zip_longest(step.splits, step.periods)]
    names = [(split, name) for pair in pairs for split, name in zip(SPLITS, pair, strict=True) if name]
    return {list_name(*name): name for name in names}


def _make_cut(benchmark: Benchmark, settings: dict[str, Any]) -> Cut:
    names, starts, ends = ([], []), ([], []), ([], [])
    for name, (split, step) in list_names(benchmark).items():
        first, after = map(first_second, span(step))
        for values, value in ((names, name), (starts, first), (ends, after)):
            values[SPLITS.index(split)].append(value)
    return Cut(starts, ends, names, settings["seed"], settings["test_share"])


def _reject(skip_bad_rows: bool, dropped: Counter[str], row: BadRow) -> None:
    """Count a bad row by its reason, or raise TicError if bad rows are not to be skipped."""
    if not skip_bad_rows and row.reason != NOT_DOWNLOADED:
        raise TicError(f"{row.message} (--skip-bad-rows leaves such rows out)")
    dropped[row.reason] += 1


def make_records(source: Source, cut: Cut, rows: list[Row]) -> dict[str, bytes]:
    """Return {first byte of the UID: lines} of the rows: UID, list or reason to drop it, line of CSV, tabs between."""
    records, lines = defaultdict(list), []
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n")
    for row in rows:
        digest = hashlib.sha256(f"{cut.seed}/{source.dataset}/{row.key}".encode()).digest()
        is_test = int.from_bytes(digest[:8]) < cut.test_share * 2.0**64  # both are exact
        name, uid = cut.find(is_test, row.seconds), make_uid(f"{source.dataset}/{row.key}")
        caption = source.caption(row.texts) if name else ""
        name = OUTSIDE if not name else name if caption else NO_CAPTION
        label = row.texts[1:2] if source.has_labels else ()
        writer.writerow((row.key, row.image, caption, format_time(row.seconds), *label))
        records[uid[:2]].append(f"{uid}\t{name}\t{lines.pop()}")
    return {bucket: "".join(found).encode() for bucket, found in records.items()}


def format_time(seconds: int) -> str:
    """Return seconds since 1970 as ISO 8601 in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()}Z"


class Labels:
    """Counts the samples of each class, and which classes each period's test list has."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.periods: defaultdict[str, set[str]] = defaultdict(set)

    def add(self, split: str, step: str, label: str) -> None:
        """Add a sample of a list; one without a label is of no class."""
        if label:
            self.counts[label] += 1
            if split == "test":
                self.periods[step].add(label)

    def facts(self, periods: tuple[str, ...]) -> dict[str, Any]:
        """Return their part of the manifest: class -> samples, sorted, and period -> classes without a test sample."""
        if not self.counts:
            raise TicError("the column of labels is empty")
        missing = {period: len(self.counts) - len(self.periods[period]) for period in periods}
        return {"classes": dict(sorted(self.counts.items())), "missing_classes": missing}


def _write_lists(work: Path, benchmark: Benchmark, dropped: Counter[str], reject: Callable) -> dict[str, Any]:
    """Write the lists from the buckets, in the order of the UIDs; return their part of the manifest."""
    new, rows, last, names = work / NEW, Counter(), b"", list_names(benchmark)
    buckets = sorted(path for path in work.iterdir() if path != new)
    labels = Labels() if "classification" in benchmark.tasks.values() else None
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(new / name, "wb")) for name in names}
        for file in files.values():
            file.write(HEADER if labels is None else LABEL_HEADER)
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
                    rows[names[name]] += 1
                    if labels is not None:
                        labels.add(*names[name], next(csv.reader([line.decode()]))[-1])
                else:
                    dropped[name] += 1
                last = uid
    counts = count_samples(benchmark, rows, dropped)
    files, read = {name: file_digest(new / name) for name in names}, rows.total() + dropped.total()
    part = {"counts": counts, "read": read, "dropped": dict(sorted(dropped.items())), "files": files}
    return part if labels is None else {**part, **labels.facts(benchmark.periods)}


def count_samples(benchmark: Benchmark, rows: Counter[tuple[str, str]], dropped: Counter[str]) -> dict[str, Any]:
    """Return step -> train or test -> samples of (split, step) -> ``rows``.

    A TicError says that there are none at all, or none to train on in a step of a user's own.
    """
    if not rows:
        raise TicError(f"the input has no row that can be used; dropped: {dict(dropped) or 'none'}")
    counts, names = {}, list_names(benchmark).values()
    for split, step in names:
        counts.setdefault(step, dict.fromkeys(SPLITS, 0))[split] = rows[split, step]
    empty = [step for split, step in names if split == "train" and not rows[split, step]]
    if benchmark.text and empty:
        found = [step for split, step in names if split == "train" and rows[split, step]] or ["no step"]
        named = ", ".join(empty[:3]) + f" and {len(empty) - 3:,} more" * (len(empty) > 3)
        reason = f"the first that has one is {found[0]}, the last {found[-1]}"
        raise TicError(f"step {named} has no sample to train on ({reason}); --suggest N shows near-equal steps")
    return counts


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def read_rows(path: str, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of the rows of a list, or of those from byte ``start`` on."""
    csv.field_size_limit(sys.maxsize)
    with open(path, "rb") as file:
        first = file.seek(start) or len(file.readline())
        for row in csv.reader(map(bytes.decode, iter(file.readline, b""))):
            yield first, row
            first = file.tell()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open_table(path) if is_remote(path) else open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of lists of the same input and settings; TicError if they are of another."""
    if overwrite or not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    changed = [name for name, value in made_from.items() if manifest.get(name) != value]
    if changed:
        raise TicError(f"{folder} has another {' and another '.join(changed)}; give --overwrite to replace it")
    return manifest if all((folder / name).exists() for name in manifest["files"]) else None
