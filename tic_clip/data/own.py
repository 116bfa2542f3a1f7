"""Cut a user's own table of dated images by time: lists by step as of YFCC15M, and the YAML file of their benchmark."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, CADENCES, Benchmark, check_name, check_steps, read_benchmark
from tic_clip.cli import flag, progress
from tic_clip.data.dates import Months, cut_every
from tic_clip.data.images import UnusableImage, detect_format
from tic_clip.data.lists import MANIFEST, Options, check_free
from tic_clip.data.pairs import Source, write_lists
from tic_clip.data.sources import BadRow, Row, redcaps_caption
from tic_clip.data.tables import Columns, find_tables, read_dates, read_rows
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import read_json, write_text

ZIP_IMAGES = 10_000  # images in a zip
IMAGES = "images"  # the folder of the zips
FEW = 50  # samples of a test set


@dataclass(frozen=True, kw_only=True)
class OwnOptions(Options):
    """Also the name of a user's own benchmark and its steps: their names, with commas between, or a period each."""

    name: str = flag("the benchmark's name", "")
    steps: str | None = None
    every: str | None = None

    @property
    def step_names(self) -> list[str]:
        """Return the names of the steps that are given."""
        return [name.strip() for name in (self.steps or "").split(",") if name.strip()]

    def settings(self) -> dict[str, Any]:
        """Return the part of a manifest that says how to cut; a TicError says what is wrong with it."""
        if self.name in BENCHMARKS and not BENCHMARKS[self.name].text:
            raise TicError(f"--name {self.name} is a benchmark of ours; give another name")
        if self.steps is not None and not self.step_names:
            raise TicError("--steps has no name of a step")
        try:
            check_name(self.name, "name")
            check_steps(self.step_names)
        except ValueError as error:
            raise TicError(f"--{error}") from None
        self.check(BENCHMARK_FILE)
        cut = {"steps": ",".join(self.step_names) or f"every {self.every}"}
        return {"benchmark": self.name, "dataset": self.name, "seed": self.seed, "test_share": self.test_share, **cut}

    def write_benchmark(self, months: Months, label: str = "") -> Benchmark:
        """Write ``benchmark.yaml`` of the steps, with ``every`` from the first month on; return its benchmark."""
        names = cut_every(self.every, months.counts) if self.every else self.step_names
        tasks = {"retrieval": "retrieval"} | ({"labels": "classification"} if label else {})
        file = {"name": self.name, "title": self.name, "cadence": CADENCES[self.every], "steps": names, "tasks": tasks}
        write_text(self.new / BENCHMARK_FILE, yaml.safe_dump(file, sort_keys=False, allow_unicode=True))
        return read_benchmark(str(self.new / BENCHMARK_FILE))


def create_own_splits(tables: list[str], columns: Columns, options: OwnOptions) -> tuple[dict[str, Any], bool]:
    """Write the lists of tables, ``manifest.json`` and ``benchmark.yaml``; images in the table go to ``images/``.

    Returns the manifest, and whether it was there already.
    """
    columns.require("image", "caption", "date")
    settings, tables = {**options.settings(), "columns": vars(columns)}, find_tables(tables)

    def find_benchmark() -> Benchmark:
        return options.write_benchmark(count_months(tables, columns, options), columns.label)

    rows = chain.from_iterable(map(partial(read_rows, columns), tables))
    source = Source(tables, store_images(rows, options.new / IMAGES), redcaps_caption, find_benchmark)
    return write_lists(source, settings, options)


def count_months(tables: list[str], columns: Columns, options: OwnOptions) -> Months:
    """Return how many rows of tables each month has; a TicError says which dates can't be read."""
    columns.require("date")
    months, dates = Months(), chain.from_iterable(map(partial(read_dates, columns), find_tables(tables)))
    for date in progress(dates, "dates", unit=" rows"):
        months.add(*date)
    months.check(options.skip_bad_rows)
    return months


def store_images(rows: Iterable[Row | BadRow | tuple[Row, bytes]], folder: Path) -> Iterator[Row | BadRow]:
    """Yield the rows; images that stand in the table go to zips in ``folder``, called by their numbers."""
    count, archive = 0, None
    with ExitStack() as stack:
        for row in rows:
            if isinstance(row, Row | BadRow):
                yield row
                continue
            row, data = row
            if count % ZIP_IMAGES == 0:
                stack.close()
                check_free(folder.parents[2], folder.name)
                folder.mkdir(exist_ok=True)
                archive = stack.enter_context(zipfile.ZipFile(folder / f"{count // ZIP_IMAGES:05d}.zip", "w"))
            name = f"{count:09d}.{_suffix(data)}"
            archive.writestr(zipfile.ZipInfo(name), data)
            count += 1
            yield row._replace(image=name)


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
