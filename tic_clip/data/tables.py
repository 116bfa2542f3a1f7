"""Read the rows of a user's own tables: CSV, TSV, JSON Lines (also .gz) and Parquet; local, in a cloud or of a server.

An image is a path, or bytes in Parquet: as they are or, as on the hub, a struct of bytes and path.
"""

import gzip
import io
import json
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import IO, Any

from tic_clip import TicError
from tic_clip.cli import flag
from tic_clip.data.dates import check_format, read_date
from tic_clip.data.images import strip_suffix
from tic_clip.data.sources import NOT_DOWNLOADED, BadRow, Row, check_columns, read_csv
from tic_clip.storage import StorageError, exists, is_dir, list_files, open_file

WEB = re.compile("https?://", re.IGNORECASE)
SUFFIXES = re.compile(r"\.(?:(csv|tsv|jsonl|ndjson)(?:\.gz)?|(parquet))$", re.IGNORECASE)
BATCH = 256  # rows of Parquet, which may hold images
ROLES = ("image", "caption", "date", "label", "key")  # of columns
_CONTROL = re.compile("[\x00-\x1f\x7f]")  # what no key and no path may have


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of a table's columns, and how its dates are written: flags of create_splits.py."""

    date: str = flag("the column of dates", "", metavar="COLUMN")
    image: str = flag("the column of paths, or of images", "", metavar="COLUMN")
    caption: str = flag("the column of captions", "", metavar="COLUMN")
    label: str = flag("a column of classes: adds classification", "", metavar="COLUMN")
    key: str = flag("the column of keys; by default the image's path without suffix", "", metavar="COLUMN")
    date_format: str = flag("auto, year, s, ms, or a strptime format such as %%d.%%m.%%Y", "auto")

    def __post_init__(self) -> None:
        check_format(self.date_format)

    def require(self, *names: str) -> None:
        """Raise a TicError that says which of the columns are not named."""
        if missing := [f"--{name}" for name in names if not getattr(self, name)]:
            raise TicError(f"{' and '.join(missing)} must be given")


def find_tables(paths: list[str]) -> list[str]:
    """Return the tables, in place of a folder those in it; raise a TicError for what is none."""
    tables = []
    for path in paths:
        is_folder = not WEB.match(path) and is_dir(path)
        found = [file for file, _ in list_files(path) if _kind(file)] if is_folder else [path]
        if not found or not _kind(found[0]):
            what = "has no table" if is_folder else "is not a table"
            raise TicError(f"{path} {what}: give .csv, .tsv, .jsonl (also with .gz) or .parquet")
        tables += found
    return tables


def _kind(path: str) -> str:
    """Return csv, tsv, jsonl, ndjson or parquet, or "" if a file is not a table."""
    found = SUFFIXES.search(path.partition("?")[0] if WEB.match(path) else path)
    return (found[1] or found[2]).lower() if found else ""


def open_table(path: str) -> IO[bytes]:
    """Open a table for reading at any position; one of a web server is fetched once."""
    return open(_fetch(path).name, "rb") if WEB.match(path) else open_file(path)


@cache
def _fetch(url: str) -> IO[bytes]:
    """Return a temporary file with what is at a URL; a StorageError says why it can't be fetched."""
    file = tempfile.NamedTemporaryFile(prefix="tic-table-")  # noqa: SIM115  lasts as long as this process
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            shutil.copyfileobj(answer, file)
            if answer.length:
                raise ConnectionError(f"cut off, {answer.length:,} bytes are missing")
    except (OSError, HTTPException) as error:
        raise StorageError(f"{url} could not be fetched: {error}") from None
    file.flush()
    return file


def read_dates(columns: Columns, path: str) -> Iterator[tuple[int | None, str, Any]]:
    """Yield the dates of a table, where they stand and what stands there; malformed rows have none."""
    for row in read_values(path, [columns.date]):
        if not isinstance(row, BadRow):
            where, (value,) = row
            yield read_date(value, columns.date_format), where, value


def read_rows(columns: Columns, path: str) -> Iterator[Row | BadRow | tuple[Row, bytes]]:
    """Yield the rows of a table; where a column has the images themselves, with their bytes."""
    names = [name for name in (getattr(columns, role) for role in ROLES) if name]
    for row in read_values(path, names):
        yield row if isinstance(row, BadRow) else _make_row(row[0], columns, dict(zip(names, row[1], strict=True)))


def _make_row(where: str, columns: Columns, values: dict[str, Any]) -> Row | BadRow | tuple[Row, bytes]:
    """Return the row of a table's values, or what is wrong with it."""
    image, caption, date, label, key = (values.get(getattr(columns, role)) for role in ROLES)
    data = None
    if isinstance(image, dict):  # as the hub has images
        data, image = image.get("bytes"), image.get("path")
    elif isinstance(image, bytes):
        data, image = image, None
    image = to_text(image).strip()
    key = to_text(key).strip() if columns.key else strip_suffix(image)
    if data is not None:
        key, image = key or where.rpartition("/")[2].replace(", row ", "/"), image or "in the table"
    for value, name in ((key, "key"), (image, "path of an image")):
        if not value or _CONTROL.search(value):
            return BadRow("unusable key", f"{where}: {value!r} is no {name}")
    seconds = read_date(date, columns.date_format)
    if seconds is None:
        return BadRow("impossible date", f"{where}: the date of {key} can't be read: {to_text(date)!r}")
    texts = (to_text(caption), *[" ".join(to_text(label).split())] * bool(columns.label))
    row = Row(key, image, texts, seconds)
    return row if data is None else (row, data)


def to_text(value: object) -> str:
    """Return a value as text: "" for none, with halves of surrogate pairs as U+FFFD."""
    return "" if value is None else re.sub("[\ud800-\udfff]", "\ufffd", str(value))


# --- One table ---


def read_values(path: str, columns: list[str]) -> Iterator[tuple[str, list[Any]] | BadRow]:
    """Yield (where it stands, the values of ``columns``) of each row of a table, or a BadRow in its place."""
    kind = _kind(path)
    if kind == "parquet":
        yield from _read_parquet(path, columns)
        return
    with _open_text(path) as file:
        if kind in ("csv", "tsv"):
            yield from read_csv(file, path, columns, "\t" if kind == "tsv" else ",")
        else:
            yield from _read_json_lines(file, path, columns)


@contextmanager
def _open_text(path: str) -> Iterator[IO[str]]:
    """Open a text file, also one that gzip has made; what is wrong with that is a TicError."""
    with open_table(path) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.partition("?")[0].lower().endswith(".gz") else raw
        try:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
        except (gzip.BadGzipFile, EOFError) as error:
            raise TicError(f"{path} is cut off or damaged: {error}") from None
        except UnicodeDecodeError as error:
            raise TicError(f"{path} is not UTF-8 text ({error.reason}): convert it, as with iconv -t UTF-8") from None


def _read_json_lines(file: IO[str], path: str, columns: list[str]) -> Iterator[tuple[str, list[Any]] | BadRow]:
    """Yield the rows of JSON Lines; each column must be in one of them, what is not in a row is None."""
    names = {}
    for line in file:
        names |= dict.fromkeys(_read_object(line) or {})
        if names.keys() >= set(columns):
            break
    check_columns(path, columns, names)
    file.seek(0)
    for number, line in enumerate(file, 1):
        where, record = f"{path}, line {number}", _read_object(line)
        if record is not None:
            yield where, [record.get(name) for name in columns]
        elif line.strip():
            yield BadRow("malformed row", f"{where} is not a JSON object")


def _read_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None


def _read_parquet(path: str, columns: list[str]) -> Iterator[tuple[str, list[Any]] | BadRow]:
    """Yield the rows of a Parquet file; of img2dataset's only what it has downloaded."""
    import pyarrow
    import pyarrow.parquet

    with open_table(path) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw)
            check_columns(path, columns, names := file.schema_arrow.names)
            has_status = "status" in names and not WEB.match(path) and exists(f"{path.removesuffix('.parquet')}.tar")
            used, number = list(dict.fromkeys([*columns, *["status"] * has_status])), 0
            for batch in file.iter_batches(batch_size=BATCH, columns=used):
                values = {name: batch.column(name).to_pylist() for name in used}
                for i in range(batch.num_rows):
                    number += 1
                    if has_status and values["status"][i] != "success":
                        yield BadRow(NOT_DOWNLOADED, f"{path}, row {number} was not downloaded")
                    else:
                        yield f"{path}, row {number}", [values[name][i] for name in columns]
        except (pyarrow.ArrowException, ValueError) as error:
            if isinstance(error, TicError):
                raise
            raise TicError(f"{path} can't be read as Parquet: {' '.join(str(error).split())[:200]}") from None
