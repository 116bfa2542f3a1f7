"""Cut a user's own table of dated images by time: lists by step as of YFCC15M, and the YAML file of their benchmark."""

import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, Benchmark, check_steps, get_benchmark
from tic_clip.cli import progress
from tic_clip.data.dates import count_months, month_after, suggest_steps
from tic_clip.data.images import UnusableImage, detect_format
from tic_clip.data.pairs import Source, write_lists
from tic_clip.data.sources import BadRow, Row, redcaps_caption
from tic_clip.data.tables import Columns, find_tables, read_dates, read_rows
from tic_clip.runs import BENCHMARK_FILE
from tic_clip.storage import write_text
from tic_clip.timeline import cut_spans

CADENCES = {"year": "yearly", "quarter": "quarterly", "month": "monthly", None: "steps"}
ZIP_IMAGES = 10_000  # images in a zip
IMAGES = "images"  # the folder of the zips
FEW = 50  # samples of a test set
HELP_STEPS = "--suggest N shows near-equal ones"


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
    check_name(name)
    needed = {"--image": columns.image, "--caption": columns.caption}
    if missing := [flag for flag, value in needed.items() if not value]:
        raise TicError(f"{' and '.join(missing)}: give the name of a column")
    names = parse_steps(steps) if steps else []
    tables = find_tables(tables)
    settings = {"benchmark": name, "dataset": name, "seed": seed, "test_share": test_share}
    settings |= {"columns": vars(columns), "steps": steps or f"every {every}"}
    images = ImageStore(columns)

    def find_benchmark(new: Path) -> Benchmark:
        images.folder = new / IMAGES
        months = count_dates(tables, columns, skip_bad_rows)
        return save_benchmark(new, name, names or cut_every(every, months), every, bool(columns.label))

    flags = {"num_workers": num_workers, "skip_bad_rows": skip_bad_rows, "overwrite": overwrite}
    source = Source(name, tables, images.read_rows, redcaps_caption, bool(columns.label))
    return write_lists(source, settings, find_benchmark, output_path, **flags)


def suggest(tables: list[str], columns: Columns, steps: int, skip_bad_rows: bool = False) -> list[tuple[str, int]]:
    """Return (name, samples) of near-equal steps of the rows of tables."""
    return suggest_steps(count_dates(find_tables(tables), columns, skip_bad_rows), steps)


def count_dates(tables: list[str], columns: Columns, skip_bad_rows: bool) -> Counter:
    """Return how many rows of tables each month has; see ``count_months``."""
    dates = chain.from_iterable(read_dates(path, columns) for path in tables)
    return count_months(progress(dates, "dates", unit=" rows"), skip_bad_rows)


def check_name(name: str) -> None:
    """Raise a TicError if the name of a benchmark is one of ours, or can't be the name of a folder."""
    if name in BENCHMARKS and not BENCHMARKS[name].text:
        raise TicError(f"--name {name} is a benchmark of ours; give another name")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise TicError(f"--name: {name!r} is not made of letters, digits, - and _")


def parse_steps(steps: str) -> list[str]:
    """Return the names of steps that have commas between; raise a TicError if they are not dates in order."""
    names = [name.strip() for name in steps.split(",") if name.strip()]
    try:
        check_steps(names)
    except ValueError as error:
        raise TicError(f"--{error}") from None
    return names


def cut_every(every: str | None, months: Counter) -> list[str]:
    """Return the names of all years, quarters or months from the first to the last month that has rows."""
    if not every:
        raise TicError(f"give --steps or --every; {HELP_STEPS}")
    return cut_spans(every, min(months), month_after(max(months)))


def save_benchmark(folder: Path, name: str, steps: list[str], every: str | None, has_labels: bool) -> Benchmark:
    """Write ``benchmark.yaml`` and return its benchmark."""
    tasks = {"retrieval": "retrieval"} | ({"labels": "classification"} if has_labels else {})
    file = {"name": name, "title": name, "cadence": CADENCES[every], "steps": steps, "tasks": tasks}
    write_text(folder / BENCHMARK_FILE, yaml.safe_dump(file, sort_keys=False, allow_unicode=True))
    return get_benchmark(str(folder / BENCHMARK_FILE))


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
    lines = []
    if small:
        sets = ", ".join(f"{step} ({count})" for step, count in small.items())
        lines.append(f"test sets of fewer than {FEW} samples say little: {sets}; give a larger --test-share")
    single = [label for label, count in manifest.get("classes", {}).items() if count == 1]
    if single:
        lines.append(f"{len(single):,} labels have one sample, such as {', '.join(map(repr, single[:3]))}")
    return lines


def next_step(folder: str) -> str:
    """Return the command that packs lists, as a line."""
    images = f"{folder}/{IMAGES}" if (Path(folder) / IMAGES).is_dir() else "IMAGES"
    note = f"the images are in {images}\n" if images != "IMAGES" else ""
    command = f"dataset_creation/create_tars.py --csv-path {folder} --image-path {images} --output-path data"
    return f"{note}next: python {command}"
