"""Folders of lists of dated samples by step: make, replace as a whole, describe and read them."""

import csv
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, CADENCES, Benchmark, check_name, check_steps, read_benchmark
from tic_clip.cli import flag
from tic_clip.data.images import STORED
from tic_clip.data.sources import NOT_DOWNLOADED
from tic_clip.data.tables import open_table
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import local_folder, lock_folder, read_json, remove, write_json, write_text
from tic_clip.timeline import DAY, cut_spans

MANIFEST = "manifest.json"
BUILDING = ".building"  # in the folder of the lists, while they are made
SPLITS = ("train", "test")
FOLDERS = {"train": "train", "test": "eval/retrieval"}  # where a list's split lies below a benchmark's folder
OUTSIDE = "outside the steps"
FEW = 50  # samples of a test set


@dataclass(frozen=True, kw_only=True)
class Options:
    """How rows become lists: the flags of every create_splits.py."""

    output_path: str = flag("folder of the lists", "", metavar="LISTS")
    test_share: float = flag("the fraction to hold out", 0.01)
    seed: int = flag("changes which samples are held out", 0)
    num_workers: int = flag("processes", 1, short="-j")
    skip_bad_rows: bool = flag("drop and count unusable rows", False)
    overwrite: bool = flag("make the lists again", False)

    def settings(self, benchmark: str, dataset: str) -> dict[str, Any]:
        """Return the settings part of a manifest; raise a TicError for an invalid value."""
        if not self.output_path:
            raise TicError("--output-path must be given")
        local_folder(self.output_path)  # raises if it is in a cloud
        if not 0 <= self.test_share < 1:
            raise TicError(f"the test share is a fraction from 0 to below 1, not {self.test_share}")
        return {"benchmark": benchmark, "dataset": dataset, "seed": self.seed, "test_share": self.test_share}

    def reject(self, dropped: Counter[str], reason: str, message: str) -> None:
        """Count an unusable row, or raise a TicError if rows may not be skipped."""
        if not self.skip_bad_rows and reason != NOT_DOWNLOADED:
            raise TicError(f"{message} (--skip-bad-rows leaves such rows out)")
        dropped[reason] += 1

    def is_test(self, dataset: str, key: str) -> bool:
        """Return whether a sample is held out, by a hash of its key."""
        digest = hashlib.sha256(f"{self.seed}/{dataset}/{key}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.test_share * 2.0**64  # both are exact


@dataclass(frozen=True, kw_only=True)
class OwnOptions(Options):
    """Also the name of a user's own benchmark and its steps: names, or one every year, quarter or month."""

    name: str = flag("the benchmark's name", "")
    steps: str | None = None
    every: str | None = None

    @property
    def step_names(self) -> list[str]:
        """Return the names in ``steps``."""
        return [name.strip() for name in (self.steps or "").split(",") if name.strip()]

    def own_settings(self) -> dict[str, Any]:
        """Return ``settings`` of the user's own benchmark, and its steps."""
        if self.name in BENCHMARKS and not BENCHMARKS[self.name].text:
            raise TicError(f"--name {self.name} is a benchmark of ours; give another name")
        if self.steps is not None and not self.step_names:
            raise TicError("--steps has no name of a step")
        try:
            check_name(self.name, "name")
            check_steps(self.step_names)
        except ValueError as error:
            raise TicError(f"--{error}") from None
        cut = {"steps": ",".join(self.step_names) or f"every {self.every}"}
        return self.settings(self.name, self.name) | cut

    def write_benchmark(self, folder: Path, months: Counter[date], label: str = "") -> Benchmark:
        """Write ``benchmark.yaml`` of the steps, with ``every`` from the first month on; return its benchmark."""
        names = cut_spans(self.every, min(months), max(months) + DAY) if self.every else self.step_names
        tasks = {"retrieval": "retrieval"} | ({"labels": "classification"} if label else {})
        file = {"name": self.name, "title": self.name, "cadence": CADENCES[self.every], "steps": names, "tasks": tasks}
        write_text(folder / BENCHMARK_FILE, yaml.safe_dump(file, sort_keys=False, allow_unicode=True))
        return read_benchmark(str(folder / BENCHMARK_FILE))


def make_lists(
    options: Options, made_from: dict[str, Any], write: Callable[[Path, Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Call ``write(new folder, temporary folder)``, then replace the lists with the new ones; see ``_replace_lists``.

    Returns the manifest (``made_from`` and what ``write`` returns), and whether the lists were already there.
    """
    folder = Path(options.output_path)
    building = folder / BUILDING
    new, work = building / "new", building / "work"
    if (new / MANIFEST).exists():  # a run was killed while it replaced the lists
        with lock_folder(building):
            _replace_lists(folder)
    if manifest := _load_finished(folder, made_from, options.overwrite):
        return manifest, True
    _check_folder(folder)
    with lock_folder(building):
        try:
            for path in (new, work):
                shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
                path.mkdir()
            manifest = {**made_from, **write(new, work), "order": "uid"}
            if others := sorted({path.name for path in new.iterdir()} - _top_names(manifest)):
                manifest["others"] = others
            write_json(new / MANIFEST, manifest)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            with suppress(OSError):  # it has other files
                folder.rmdir()
            raise
        _replace_lists(folder)
    return manifest, False


def _replace_lists(folder: Path) -> None:
    """Move finished lists from ``BUILDING`` to their folder, in place of older ones, the manifest last.

    Other files stay. After a kill at any moment, another call goes on.
    """
    new, old = folder / BUILDING / "new", folder / BUILDING / "old.json"
    if not (new / MANIFEST).exists():
        return
    if (folder / MANIFEST).exists():
        os.rename(folder / MANIFEST, old)  # before any list goes
    for name in _top_names(read_json(old)) if old.exists() else ():
        (shutil.rmtree if (folder / name).is_dir() else remove)(folder / name)
    remove(old)
    for path in sorted(new.iterdir(), key=lambda path: path.name == MANIFEST):
        os.rename(path, folder / path.name)
    shutil.rmtree(folder / BUILDING, ignore_errors=True)


def _top_names(manifest: dict[str, Any]) -> set[str]:
    """Return the files and folders that a manifest of lists names, and its own; none of another's."""
    if not {"benchmark", "dataset", "files"} <= manifest.keys():
        return set()
    return {name.partition("/")[0] for name in [MANIFEST, *manifest["files"], *manifest.get("others", ())]}


def _load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of existing lists; raise a TicError if their input or settings differ."""
    if overwrite or not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    changed = [name for name, value in made_from.items() if manifest.get(name) != value]
    if changed:
        raise TicError(f"{folder} has another {' and another '.join(changed)}; give --overwrite to replace it")
    return manifest if all((folder / name).exists() for name in manifest["files"]) else None


def _check_folder(folder: Path) -> None:
    """Raise a TicError if a folder has other files, such as those of a table."""
    known = _top_names(read_json(folder / MANIFEST)) if (folder / MANIFEST).exists() else set()
    if foreign := sorted({path.name for path in folder.glob("[!.]*")} - known):
        raise TicError(f"{folder} has {foreign[0]}, which is not of lists: give another --output-path")


def list_names(benchmark: Benchmark) -> dict[str, tuple[str, str]]:
    """Return list -> (train or test, split or period), step by step."""
    pairs = [pair for step in benchmark.steps for pair in zip_longest(step.splits, step.periods)]
    names = [(split, name) for pair in pairs for split, name in zip(SPLITS, pair, strict=True) if name]
    return {list_name(*name): name for name in names}


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def count_samples(
    benchmark: Benchmark, rows: Counter[tuple[str, str]], dropped: Counter[str], files: dict[str, str]
) -> dict[str, Any]:
    """Return the counts part of a manifest; ``rows``: (split, step) -> rows, ``files``: file -> SHA-256."""
    if not rows.total():
        raise TicError(f"the input has no row that can be used; dropped: {dict(+dropped) or 'none'}")
    counts, names = {}, list_names(benchmark).values()
    for split, step in names:
        counts.setdefault(step, dict.fromkeys(SPLITS, 0))[split] = rows[split, step]
    empty = [step for split, step in names if split == "train" and not rows[split, step]]
    if benchmark.text and empty:
        found = [step for split, step in names if split == "train" and rows[split, step]] or ["no step"]
        named = ", ".join(empty[:3]) + f" and {len(empty) - 3:,} more" * (len(empty) > 3)
        reason = f"the first that has one is {found[0]}, the last {found[-1]}"
        raise TicError(f"step {named} has no sample to train on ({reason}); --suggest N shows near-equal steps")
    read = rows.total() + dropped.total()
    return {"counts": counts, "read": read, "dropped": dict(sorted((+dropped).items())), "files": files}


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


def warnings(manifest: dict[str, Any]) -> list[str]:
    """Return warnings about lists: small test sets, classes with one sample."""
    small = {step: count["test"] for step, count in manifest["counts"].items() if count["test"] < FEW}
    lines, missing = [], manifest.get("missing_classes", {})
    empty = [step for step, count in small.items() if not count]
    empty += [step for step in missing if missing[step] == len(manifest["classes"]) and step not in empty]
    if empty:
        lines.append(f"nothing to evaluate on in {', '.join(empty)}: give a larger --test-share, or fewer steps")
    if small:
        sets = ", ".join(f"{step} ({count})" for step, count in small.items())
        lines.append(f"test sets of fewer than {FEW} samples say little: {sets}; give a larger --test-share")
    single = [label for label, count in manifest.get("classes", {}).items() if count == 1]
    if single:
        lines.append(f"{len(single):,} labels have one sample, such as {', '.join(map(repr, single[:3]))}")
    return lines


def next_step(folder: str, pool: str | None) -> str:
    """Return a line with the command that makes shards from lists."""
    if pool:
        root = f"data/{read_benchmark(f'{folder}/{BENCHMARK_FILE}').root}"
        command = f"dataset_creation/reshard.py -i {pool} -o {root} -s {folder}/uids"
        return f"next: python {command} && cp {folder}/{BENCHMARK_FILE} {root}/"
    images = f"{folder}/{STORED}" if Path(folder, STORED).exists() else "IMAGES"
    script = "dataset_creation/create_tars.py"
    return f"next: python {script} --csv-path {folder} --image-path {images} --output-path data"


def read_rows(path: str, start: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (first byte, fields) of the rows of a list, from byte ``start`` on."""
    csv.field_size_limit(sys.maxsize)
    with open(path, "rb") as file:
        first = file.seek(start) or len(file.readline())
        for row in csv.reader(map(bytes.decode, iter(file.readline, b""))):
            yield first, row
            first = file.tell()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open_table(str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
