"""Cut a user's own table of dated images by time: lists by step as of YFCC15M, and the YAML file of their benchmark."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, Benchmark, check_steps, is_name, read_benchmark
from tic_clip.cli import progress
from tic_clip.data.dates import Months, check_format, cut_every, suggest_steps
from tic_clip.data.images import UnusableImage, detect_format
from tic_clip.data.pairs import MANIFEST, Source, write_lists
from tic_clip.data.sources import BadRow, Row, redcaps_caption
from tic_clip.data.tables import Columns, find_tables, read_dates, read_rows
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import read_json, write_text

CADENCES = {"year": "yearly", "quarter": "quarterly", "month": "monthly", None: "steps"}
ZIP_IMAGES = 10_000  # images in a zip
IMAGES = "images"  # the folder of the zips
FEW = 50  # samples of a test set


def create_own_splits(
    tables: list[str],
    output_path: str,
    columns: Columns,
    *,
    name: str,
    steps: str | None = None,
    every: str | None = None,
    num_workers: int = 1,
    test_share: float = 0.01,
    seed: int = 0,
    skip_bad_rows: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write the lists of tables, ``manifest.json`` and ``benchmark.yaml``; images in the table go to ``images/``.

    ``steps`` are their names, with commas between. Returns the manifest, and whether it was there already.
    """
    require({"image": columns.image, "caption": columns.caption, "date": columns.date, "output-path": output_path})
    check_format(columns.date_format)
    settings = {**describe_cut(name, steps, every, seed, test_share), "columns": vars(columns)}
    tables, images = find_tables(tables), ImageStore(columns)

    def find_benchmark(new: Path) -> Benchmark:
        images.folder = new / IMAGES
        return save_benchmark(new, name, steps, every, count_months(tables, columns, skip_bad_rows), columns.label)

    flags = {"num_workers": num_workers, "skip_bad_rows": skip_bad_rows, "overwrite": overwrite}
    source = Source(name, tables, images.read_rows, redcaps_caption, bool(columns.label))
    return write_lists(source, settings, find_benchmark, output_path, **flags)


def suggest(
    tables: list[str], columns: Columns, steps: int, *, num_workers: int = 1, skip_bad_rows: bool = False
) -> list[tuple[str, int]]:
    """Return (name, samples) of near-equal steps of the rows of tables, which one process reads."""
    require({"date": columns.date})
    check_format(columns.date_format)
    return suggest_steps(count_months(find_tables(tables), columns, skip_bad_rows), steps)


def count_months(tables: list[str], columns: Columns, skip_bad_rows: bool) -> Counter:
    """Return how many rows of tables each month has; a TicError says which dates can't be read."""
    months, dates = Months(), chain.from_iterable(read_dates(path, columns) for path in tables)
    for date in progress(dates, "dates", unit=" rows"):
        months.add(date)
    months.check(skip_bad_rows)
    return months.counts


def require(flags: dict[str, str]) -> None:
    """Raise a TicError that names the flags that have no value."""
    if missing := [f"--{flag}" for flag, value in flags.items() if not value]:
        raise TicError(f"{' and '.join(missing)} must be given")


def describe_cut(name: str, steps: str | None, every: str | None, seed: int, test_share: float) -> dict[str, Any]:
    """Return the part of a manifest that says how to cut; a TicError says what is wrong with it."""
    if name in BENCHMARKS and not BENCHMARKS[name].text:
        raise TicError(f"--name {name} is a benchmark of ours; give another name")
    if not is_name(name):
        raise TicError(f"--name: {name!r} is not made of letters, digits, _, . and -, from a letter or digit on")
    if steps is not None and not split_names(steps):
        raise TicError("--steps has no name of a step")
    if not 0 <= test_share < 1:
        raise TicError(f"the test share is a fraction from 0 to below 1, not {test_share}")
    try:
        check_steps(split_names(steps))
    except ValueError as error:
        raise TicError(f"--{error}") from None
    cut = {"steps": ",".join(split_names(steps)) or f"every {every}"}
    return {"benchmark": name, "dataset": name, "seed": seed, "test_share": test_share, **cut}


def split_names(steps: str | None) -> list[str]:
    """Return the names of steps that have commas between."""
    return [name.strip() for name in (steps or "").split(",") if name.strip()]


def save_benchmark(
    folder: Path, name: str, steps: str | None, every: str | None, months: Counter, label: str = ""
) -> Benchmark:
    """Write ``benchmark.yaml`` and return its benchmark; ``every``: the steps are cut from the first to the last."""
    names = cut_every(every, months) if every else split_names(steps)
    tasks = {"retrieval": "retrieval"} | ({"labels": "classification"} if label else {})
    file = {"name": name, "title": name, "cadence": CADENCES[every], "steps": names, "tasks": tasks}
    write_text(folder / BENCHMARK_FILE, yaml.safe_dump(file, sort_keys=False, allow_unicode=True))
    return read_benchmark(str(folder / BENCHMARK_FILE))


class ImageStore:
    """Reads rows, and writes the images that a table holds to zips in ``folder``, as create_tars.py reads them."""

    def __init__(self, columns: Columns) -> None:
        self.columns, self.folder, self.count = columns, Path(), 0

    def read_rows(self, path: str) -> Iterator[Row | BadRow]:
        """Yield the rows of a table; an image in it is called by its number in the zips."""
        archive = None
        try:
            for row in read_rows(self.columns, path):
                if isinstance(row, Row | BadRow):
                    yield row
                    continue
                row, data = row
                if archive is None or self.count % ZIP_IMAGES == 0:
                    archive = self._next_zip(archive)
                name = f"{self.count:09d}.{_suffix(data)}"
                archive.writestr(zipfile.ZipInfo(name), data)
                self.count += 1
                yield row._replace(image=name)
        finally:
            if archive:
                archive.close()

    def _next_zip(self, archive: zipfile.ZipFile | None) -> zipfile.ZipFile:
        if archive:
            archive.close()
        self.folder.mkdir(exist_ok=True)
        return zipfile.ZipFile(self.folder / f"{len(list(self.folder.iterdir())):05d}.zip", "w")


def _suffix(data: bytes) -> str:
    """Return the suffix of an image; create_tars.py counts those that can't be used."""
    try:
        return detect_format(data)
    except UnusableImage:
        return "jpg"


def warnings(manifest: dict[str, Any]) -> list[str]:
    """Return what is likely to be wrong with lists: small test sets, classes of one sample."""
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
    """Return the command that makes shards of lists, as a line."""
    if pool:
        root = f"data/{read_benchmark(f'{folder}/{BENCHMARK_FILE}').root}"
        command = f"dataset_creation/reshard.py -i {pool} -o {root} -s {folder}/uids"
        return f"next: python {command} && cp {folder}/{BENCHMARK_FILE} {root}/"
    has_images = IMAGES in read_json(f"{folder}/{MANIFEST}").get("others", ())
    images = f"{folder}/{IMAGES}" if has_images else "IMAGES"
    note = f"the images are in {images}\n" if has_images else ""
    command = f"dataset_creation/create_tars.py --csv-path {folder} --image-path {images} --output-path data"
    return f"{note}next: python {command}"
