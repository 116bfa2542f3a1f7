"""Dated rows cut by time: a training and a test list of each step, as CSV.

The rows are read once, in bounded memory, and their captions made in several processes. The lists depend on the rows,
the benchmark, the seed and the test share alone. ``manifest.json`` is written last: a folder that has it is finished.
"""

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.data.annotations import BadRow, Inputs, Row
from tic_clip.markup import Table, thousands, to_text
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import atomic_open, is_remote, lock_folder, read_json, remove, write_json

MANIFEST = "manifest.json"
COLUMNS = ("key", "image", "caption", "date")
SPLITS = ("train", "test")
CHUNK = 2000
"""Rows that a process cleans at a time."""

OUTSIDE, NO_CAPTION, DUPLICATE = "outside the steps", "no caption", "duplicate key"
EXPECTED = (OUTSIDE, NO_CAPTION)
"""Why a good row is dropped; any other reason is a fault of the input."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides which list a sample is in. ``dataset`` is part of its UID, and the same for all its benchmarks."""

    benchmark: str
    dataset: str
    seed: int = 0
    test_share: float = 0.01

    def __post_init__(self) -> None:
        get_benchmark(self.benchmark)
        if not 0 <= self.test_share < 1:
            raise TicError(f"the test share is a fraction from 0 to below 1, not {self.test_share}")

    @property
    def steps(self) -> list[str]:
        """The names of the benchmark's steps."""
        return [step.name for step in get_benchmark(self.benchmark).steps]

    def steps_by_year(self) -> dict[int, str]:
        """The step that each year belongs to; a step is called by its year, or by its first and last."""
        return {year: step for step in self.steps for year in range(int(step[:4]), int(step[-4:]) + 1)}

    def hash_of(self, key: str) -> int:
        """The first 64 bits of the SHA-256 of ``{seed}/{dataset}/{key}``."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.dataset}/{key}".encode()).digest()[:8])

    def split_of(self, hashed: int) -> str:
        """``test`` for a hash that is, as a fraction of 2**64, below the test share; else ``train``."""
        return "test" if hashed < self.test_share * 2.0**64 else "train"  # the product and the comparison are exact


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The lists in a folder, as ``manifest.json`` says it. ``reused``: they were there already."""

    path: str
    manifest: dict[str, Any]
    reused: bool = False


def create_splits(
    rows: Iterable[Row | BadRow],
    inputs: Inputs,
    output_path: str,
    settings: Settings,
    caption: Callable[[tuple[str, ...]], str],
    *,
    num_workers: int = 1,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> Splits:
    """Write ``{train,test}_batch_{step}.csv`` and ``manifest.json``, unless they are there.

    The lists have the rows in their order, in UTF-8 with the columns of ``COLUMNS``; ``date`` is ISO 8601 in UTC.

    Args:
        rows: read ``inputs`` as they are taken.
        caption: makes one of a row's texts, on one line, empty if there is none; a function of a module.
        num_workers: processes that make captions; the bytes do not depend on it.
        skip_bad_rows: count rows with a fault, and those whose key has been before, instead of raising an error.
        overwrite: replace lists made from another input or with other settings.

    Raises:
        TicError: a row is bad, no row can be used, or the folder holds something else, or another process is writing
            it; nothing has changed then.
    """
    if is_remote(output_path):
        raise TicError(f"{output_path} is not local; write to a local folder and copy it there")
    finished = partial(_finished, Path(output_path), inputs, settings, skip_bad_rows, overwrite)
    if found := finished():
        return Splits(path=output_path, manifest=found, reused=True)
    with lock_folder(Path(output_path)):
        if found := finished():  # by a process that had the folder until now
            return Splits(path=output_path, manifest=found, reused=True)
        manifest = _write(rows, inputs, Path(output_path), settings, caption, num_workers, skip_bad_rows)
    return Splits(path=output_path, manifest=manifest)


def _write(
    rows: Iterable[Row | BadRow],
    inputs: Inputs,
    folder: Path,
    settings: Settings,
    caption: Callable[[tuple[str, ...]], str],
    num_workers: int,
    skip_bad_rows: bool,
) -> dict[str, Any]:
    """Write the lists and the manifest as ``create_splits`` does; returns the manifest."""
    tally = Tally(skip_bad_rows)
    for leftover in folder.glob(".*.tmp"):  # of a run that was killed
        remove(leftover)
    with ExitStack() as stack:
        lists = {name: ListFile(stack.enter_context(atomic_open(folder / name))) for name in _names(settings)}
        samples = _chunks(_sound(rows, tally), settings, tally)
        for lines, without_caption in _map(partial(make_lines, caption), samples, num_workers):
            tally.dropped[NO_CAPTION] += without_caption
            for name, (count, data) in lines.items():
                lists[name].write(count, data)
        manifest = _manifest(settings, inputs, tally, lists)
        for written in lists.values():
            written.file.flush()
        remove(folder / MANIFEST)  # before any list is replaced
    for path in folder.glob("*.csv"):
        if path.name not in lists and _is_own(path.name):  # another benchmark's
            remove(path)
    write_json(folder / MANIFEST, manifest)
    return manifest


def table(splits: Splits) -> str:
    """The lists as text: how many samples each has, and how many rows were dropped, by reason."""
    found, counts = splits.manifest, splits.manifest["counts"]
    totals = {split: sum(count[split] for count in counts.values()) for split in SPLITS}
    dropped = ", ".join(f"{thousands(count)} {reason}" for reason, count in found["dropped"].items())
    lists = Table(
        title=f"{splits.path}{': already there' if splits.reused else ''}",
        header=["step", *SPLITS],
        rows=[[step, *(thousands(n[split]) for split in SPLITS)] for step, n in {**counts, "all": totals}.items()],
        marked=set(),
        legend=f"{thousands(found['read'])} rows read; dropped: {dropped or 'none'}",
    )
    return to_text([lists])


# --- The rows, each in its list ---


class Seen:
    """The hashes that have been, of 64 bits: 8 bytes each, and 16 for the moment in which sorted runs are merged.

    That two of 15 million keys have the same hash, so that one counts as a duplicate, has a chance of 1 in 160,000.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []  # sorted, each at least twice as long as the next

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Which of ``hashes``, (N,) uint64, have been before, further ahead or in an earlier call; (N,) bool."""
        again = np.ones(len(hashes), dtype=bool)
        again[np.unique(hashes, return_index=True)[1]] = False
        for run in self.runs:
            again |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        new = hashes[~again]
        while self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.concatenate((self.runs.pop(), new))
        if len(new):
            new.sort()
            self.runs.append(new)
        return again


class Sample(NamedTuple):
    """A row on its way into the file ``name``, its caption not made yet."""

    name: str
    key: str
    image: str
    texts: tuple[str, ...]
    seconds: int


@dataclass
class Tally:
    """How many rows were read, and how many of them dropped, by reason."""

    skip_bad_rows: bool
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def fault(self, reason: str, message: str) -> None:
        """Count a bad row.

        Raises:
            TicError: bad rows are not to be skipped.
        """
        if not self.skip_bad_rows:
            raise TicError(f"{message} (--skip-bad-rows leaves such rows out)")
        self.dropped[reason] += 1


def _sound(rows: Iterable[Row | BadRow], tally: Tally) -> Iterator[Row]:
    """Count the rows and yield those without a fault."""
    for row in rows:
        tally.read += 1
        if isinstance(row, BadRow):
            tally.fault(row.reason, row.message)
        else:
            yield row


def _chunks(rows: Iterator[Row], settings: Settings, tally: Tally) -> Iterator[list[Sample]]:
    """The samples of the steps, each key once, in chunks."""
    seen, steps = Seen(), settings.steps_by_year()
    while chunk := list(islice(rows, CHUNK)):
        hashes = [settings.hash_of(row.key) for row in chunk]
        samples = []
        for row, hashed, again in zip(chunk, hashes, seen.add(np.array(hashes, dtype=np.uint64)), strict=True):
            step = steps.get(datetime.fromtimestamp(row.seconds, UTC).year)
            if again:
                tally.fault(DUPLICATE, f"{row.where}: the key {row.key} has been before")
            elif step is None:
                tally.dropped[OUTSIDE] += 1
            else:
                name = _name(settings.split_of(hashed), step)
                samples.append(Sample(name, row.key, row.image, row.texts, row.seconds))
        yield samples


def _map(work: Callable, jobs: Iterable, num_workers: int) -> Iterator:
    """Yield ``work(job)`` in order from processes that end with this one."""
    with make_pool(num_workers) as pool:
        yield from map_in_pool(pool, work, jobs, 4 * num_workers)


def make_lines(
    caption: Callable[[tuple[str, ...]], str], samples: list[Sample]
) -> tuple[dict[str, tuple[int, bytes]], int]:
    """The samples as lines of CSV, {file: (samples, bytes)}, and how many were left out since they have no caption."""
    found = [(sample, text) for sample in samples if (text := caption(sample.texts))]
    lines = {}
    for name in dict.fromkeys(sample.name for sample, _ in found):
        rows = [(s.key, s.image, text, _iso(s.seconds)) for s, text in found if s.name == name]
        lines[name] = len(rows), _to_csv(rows)
    return lines, len(samples) - len(found)


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _to_csv(rows: Iterable[tuple[str, ...]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


# --- The folder ---


class ListFile:
    """A list that is being written: how many samples it has, and the SHA-256 of its bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.digest = file, 0, hashlib.sha256()
        self.write(0, _to_csv([COLUMNS]))

    def write(self, count: int, data: bytes) -> None:
        """Add the lines of ``count`` samples."""
        self.count += count
        self.digest.update(data)
        self.file.write(data)


def _name(split: str, step: str) -> str:
    return f"{split}_batch_{step}.csv"


def _names(settings: Settings) -> list[str]:
    return [_name(split, step) for step in settings.steps for split in SPLITS]


def _is_own(name: str) -> bool:
    """Whether a file of that name is one of ours, of whatever benchmark."""
    return name == MANIFEST or re.fullmatch(r"(train|test)_batch_\d{4}(-\d{4})?\.csv", name) is not None


def _finished(
    folder: Path, inputs: Inputs, settings: Settings, skip_bad_rows: bool, overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of lists that were made from the same input with the same settings, or None: they are to be made.

    Raises:
        TicError: something else is there, and is not to be replaced; the message says what differs.
    """
    if folder.exists() and not folder.is_dir():
        raise TicError(f"{folder} is a file, not a folder")
    if inside := [path for path in inputs.paths if Path(path).resolve().parent == folder.resolve()]:
        raise TicError(f"{inside[0]} lies in {folder}; give another output folder")
    if not (folder / MANIFEST).exists():
        strange = sorted(path.name for path in folder.glob("[!.]*") if not _is_own(path.name))
        if strange:
            raise TicError(f"{folder} holds something else ({strange[0]}); give another output folder")
        return None
    found = read_json(folder / MANIFEST)
    if not isinstance(found, dict) or not found.keys() >= {*asdict(settings), "input", "dropped", "files"}:
        raise TicError(f"{folder / MANIFEST} is of something else; give another output folder")
    why = _difference(folder, found, inputs, settings, skip_bad_rows)
    if why and not overwrite:
        raise TicError(f"{folder} {why}")
    return None if why else found


def _difference(
    folder: Path, found: dict[str, Any], inputs: Inputs, settings: Settings, skip_bad_rows: bool
) -> str | None:
    """Why a manifest is not that of what would be made now, the cheapest reason first; None if it is."""
    other = [f"{name} ({found[name]}, now {now})" for name, now in asdict(settings).items() if found[name] != now]
    if not other:
        before, now = found["input"], inputs.fingerprints()
        files = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        other = [f"input ({', '.join(files[:3])}{', …' if files[3:] else ''})"] if files else []
    if other:
        return f"was made with another {' and another '.join(other)}; give --overwrite to replace it"
    bad = sum(count for reason, count in found["dropped"].items() if reason not in EXPECTED)
    if bad and not skip_bad_rows:
        return f"was made without {bad} bad rows; --skip-bad-rows leaves it so"
    changed = [name for name, digest in found["files"].items() if _digest(folder / name) != digest]
    return f"has a {changed[0]} that is not as it was made; give --overwrite to make it again" if changed else None


def _digest(path: Path) -> str | None:
    """The SHA-256 of a file; None if it is missing."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(settings: Settings, inputs: Inputs, tally: Tally, lists: dict[str, ListFile]) -> dict[str, Any]:
    """What ``manifest.json`` says.

    Raises:
        TicError: no row could be used, or the numbers do not add up.
    """
    kept, dropped = sum(written.count for written in lists.values()), dict(sorted((+tally.dropped).items()))
    if tally.read != kept + sum(dropped.values()):
        raise TicError(f"{tally.read} rows read, but {kept} kept and {sum(dropped.values())} dropped")
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise TicError(f"{inputs.name} has no row that can be used ({why or 'it has none at all'})")
    counts = {step: {split: lists[_name(split, step)].count for split in SPLITS} for step in settings.steps}
    return {
        **asdict(settings),
        "input": inputs.digests,
        "counts": counts,
        "read": tally.read,
        "dropped": dropped,
        "files": {name: written.digest.hexdigest() for name, written in lists.items()},
    }
