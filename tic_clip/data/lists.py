"""A folder of lists of dated samples, by step: how it is made, replaced as a whole, described and read.

``manifest.json`` is written last: a folder that has it is finished.
"""

import csv
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark
from tic_clip.cli import flag
from tic_clip.data.tables import open_table
from tic_clip.storage import is_remote, local_folder, lock_folder, read_json, remove, write_json

MANIFEST, JOURNAL, WORK, NEW = "manifest.json", ".replacing.tmp", ".buckets.tmp", "new"
SPLITS = ("train", "test")
OUTSIDE = "outside the steps"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How rows become lists, and where: the flags that each create_splits.py has."""

    output_path: str = flag("folder of the lists", "", metavar="LISTS")
    test_share: float = flag("the fraction to hold out", 0.01)
    seed: int = flag("changes which samples are held out", 0)
    num_workers: int = flag("processes", 1, short="-j")
    skip_bad_rows: bool = flag("drop and count unusable rows", False)
    overwrite: bool = flag("make the lists again", False)

    @property
    def new(self) -> Path:
        """Return the folder in which new lists are made."""
        return Path(self.output_path, WORK, NEW)

    def check(self, *others: str) -> None:
        """Raise a TicError if a value can't be, or ``others``, names beside the lists, are something else's there."""
        if not self.output_path:
            raise TicError("--output-path must be given")
        check_free(local_folder(self.output_path), *others)
        if not 0 <= self.test_share < 1:
            raise TicError(f"the test share is a fraction from 0 to below 1, not {self.test_share}")

    def is_test(self, dataset: str, key: str) -> bool:
        """Return whether a sample is held out, by a hash of its key."""
        digest = hashlib.sha256(f"{self.seed}/{dataset}/{key}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.test_share * 2.0**64  # both are exact


def make_lists(
    options: Options, made_from: dict[str, Any], write: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], bool]:
    """Let ``write`` fill ``options.new``, given a folder of work, and move all that to the folder of the lists.

    The manifest is ``made_from`` and what ``write`` returns. Returns it, and whether it was there already. An error,
    such as a bad row, leaves old lists as they are.
    """
    folder = local_folder(options.output_path)
    if manifest := _load_finished(folder, made_from, options.overwrite):
        return manifest, True
    with lock_folder(folder):
        try:
            shutil.rmtree(folder / WORK, ignore_errors=True)
            options.new.mkdir(parents=True)
            manifest = {**made_from, **write(folder / WORK), "order": "uid"}
            _replace_lists(folder, manifest)
        finally:
            shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest, False


def _load_finished(folder: Path, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of lists of the same input and settings; TicError if they are of another."""
    if overwrite or not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    changed = [name for name, value in made_from.items() if manifest.get(name) != value]
    if changed:
        raise TicError(f"{folder} has another {' and another '.join(changed)}; give --overwrite to replace it")
    return manifest if all((folder / name).exists() for name in manifest["files"]) else None


def check_free(folder: Path, *names: str) -> None:
    """Raise a TicError if something that is not of lists has one of the names in their folder."""
    old = _old_names(folder)
    if foreign := [name for name in names if name not in old and (folder / name).exists()]:
        raise TicError(f"{folder} has {foreign[0]}, which is not of lists: give another --output-path")


def _replace_lists(folder: Path, manifest: dict[str, Any]) -> None:
    """Move what is new into the folder in place of older lists, and write the manifest, last."""
    new, journal = {path.name: path for path in sorted((folder / WORK / NEW).iterdir())}, folder / JOURNAL
    if others := [name for name in new if name not in _top_names(manifest)]:
        manifest = {**manifest, "others": others}
    old = _old_names(folder)
    write_json(journal, {"files": [*old, *new]})  # what a run that is killed from here on may leave
    remove(folder / MANIFEST)  # before any list is replaced
    for name in old | new.keys():
        (shutil.rmtree if (folder / name).is_dir() else remove)(folder / name)
    for name, path in new.items():
        os.replace(path, folder / name)
    write_json(folder / MANIFEST, manifest)
    remove(journal)


def _old_names(folder: Path) -> set[str]:
    """Return the names that older lists have, or may have, in their folder."""
    paths = (folder / MANIFEST, folder / JOURNAL)
    return {name for path in paths if path.exists() for name in _top_names(read_json(path))}


def _top_names(manifest: dict[str, Any]) -> set[str]:
    """Return the files and folders that a manifest names, without what is in the folders."""
    return {name.partition("/")[0] for name in [*manifest.get("files", ()), *manifest.get("others", ())]}


def list_names(benchmark: Benchmark) -> dict[str, tuple[str, str]]:
    """Return of each list its (train or test, split or period), step by step."""
    pairs = [pair for step in benchmark.steps for pair in zip_longest(step.splits, step.periods)]
    names = [(split, name) for pair in pairs for split, name in zip(SPLITS, pair, strict=True) if name]
    return {list_name(*name): name for name in names}


def list_name(split: str, step: str) -> str:
    """Return the file name of a list."""
    return f"{split}_batch_{step}.csv"


def count_samples(
    benchmark: Benchmark, rows: Counter[tuple[str, str]], dropped: Counter[str], files: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest's part on (split, step) -> ``rows``, what was dropped by reason, and ``files`` -> SHA-256.

    A TicError says that there are none at all, or none to train on in a step of a user's own.
    """
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
