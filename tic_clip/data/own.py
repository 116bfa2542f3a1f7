"""Cut a user's own table of dated images by time: lists by step as of YFCC15M, and the YAML file of their benchmark."""

from collections import Counter
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import chain
from typing import Any

import yaml

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, CADENCES, Benchmark, check_name, check_steps, read_benchmark
from tic_clip.cli import flag, progress
from tic_clip.data import dates
from tic_clip.data.images import STORED
from tic_clip.data.lists import MANIFEST, Options
from tic_clip.data.pairs import write_lists
from tic_clip.data.sources import redcaps_caption
from tic_clip.data.tables import Columns, find_tables, read_dates, read_rows
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import read_json, write_text
from tic_clip.timeline import DAY, cut_spans

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

    def write_benchmark(self, months: Counter[date], label: str = "") -> Benchmark:
        """Write ``benchmark.yaml`` of the steps, with ``every`` from the first month on; return its benchmark."""
        names = cut_spans(self.every, min(months), max(months) + DAY) if self.every else self.step_names
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
        months = count_months(tables, columns, options) if options.every else Counter()
        return options.write_benchmark(months, columns.label)

    return write_lists(tables, partial(read_rows, columns), redcaps_caption, find_benchmark, settings, options)


def count_months(tables: list[str], columns: Columns, options: OwnOptions) -> Counter[date]:
    """Return how many rows of tables each month has; a TicError says which date can't be read."""
    columns.require("date")
    read = partial(read_dates, columns, reject=options.rejecter(Counter()))
    seconds = progress(chain.from_iterable(map(read, find_tables(tables))), "dates", unit=" rows")
    return dates.count_months(Counter(each // 86_400 for each in seconds))


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
    others = read_json(f"{folder}/{MANIFEST}").get("others", ())
    images = f"{folder}/{STORED}" if STORED in others else "IMAGES"
    script = "dataset_creation/create_tars.py"
    return f"next: python {script} --csv-path {folder} --image-path {images} --output-path data"
