"""Read the rows of a user's own tables: CSV, TSV, JSON Lines (also .gz) or Parquet; local, in a cloud or on the web.

An image is a path, or in Parquet also bytes, or a struct of bytes and path, as on the hub.
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
from itertools import chain
from typing import IO, Any

from tic_clip import TicError
from tic_clip.cli import flag
from tic_clip.data.dates import check_format, read_date
from tic_clip.data.images import strip_suffix
from tic_clip.data.sources import BAD_DATE, NOT_DOWNLOADED, Reject, Row, check_columns, read_csv, to_text
from tic_clip.storage import StorageError, exists, is_dir, list_files, open_file

WEB = re.compile("https?://", re.IGNORECASE)
SUFFIXES = re.compile(r"\.(?:(csv|tsv|jsonl|ndjson)(?:\.gz)?|(parquet))$", re.IGNORECASE)
BATCH = 256  # rows of Parquet, which may hold images
ROLES = ("image", "caption", "date", "label", "key")  # of columns
Record = tuple[str, dict[str, Any]]  # where a row stands, and column -> value
_CONTROL = re.compile("[\x00-\x1f\x7f]")  # what no key and no path may have


@dataclass(frozen=True, kw_only=True)
class Columns:
    """A table's columns and date format: flags of create_splits.py."""

    date: str = flag("the column of dates; of a pool, the field", "", short="--date-field", dest="date", metavar="NAME")
    image: str = flag("the column of paths, or of images", "", metavar="COLUMN")
    caption: str = flag("the column of captions", "", metavar="COLUMN")
    label: str = flag("a column of classes: adds classification", "", metavar="COLUMN")
    key: str = flag("the column of keys; by default the image's path without suffix", "", metavar="COLUMN")
    date_format: str = flag("auto, year, s, ms, or a strptime format such as %%d.%%m.%%Y", "auto")

    def __post_init__(self) -> None:
        check_format(self.date_format)

    def require(self, *names: str) -> None:
        """Raise a TicError if one of these flags is missing."""
        if missing := [f"--{name}" for name in names if not getattr(self, name)]:
            raise TicError(f"{' and '.join(missing)} must be given")

    def read_date(self, where: str, value: object, reject: Reject) -> int | None:
        """Return a date as seconds since 1970 (UTC); reject one that can't be read and return None."""
        seconds = read_date(value, self.date_format)
        if seconds is None:
            shown = "" if value is None else str(value)[:60]
            reject(BAD_DATE, f"{where}: the date can't be read: {shown!r}; --date-format says how dates are written")
        return seconds


def find_tables(paths: list[str]) -> list[str]:
    """Return the tables, with folders replaced by those in them; raise a TicError for other files."""
    tables = []
    for path in paths:
        is_folder = not WEB.match(path) and is_dir(path)
        found = list(filter(_kind, (file for file, _ in list_files(path)) if is_folder else [path]))
        if not found:
            what = "has no table" if is_folder else "is not a table"
            raise TicError(f"{path} {what}: give .csv, .tsv, .jsonl (also with .gz) or .parquet")
        tables += found
    return tables


def _kind(path: str) -> str:
    """Return csv, tsv, jsonl, ndjson or parquet, or "" if a file is not a table."""
    found = SUFFIXES.search(path.partition("?")[0] if WEB.match(path) else path)
    return (found[1] or found[2]).lower() if found else ""


def open_table(path: str) -> IO[bytes]:
    """Open a table for random access; one on the web is downloaded once."""
    return open(_fetch(path).name, "rb") if WEB.match(path) else open_file(path)


@cache
def _fetch(url: str) -> IO[bytes]:
    """Download a URL to a temporary file; raise a StorageError if that fails."""
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


def read_dates(columns: Columns, path: str, reject: Reject) -> Iterator[int]:
    """Yield the dates of a table in seconds since 1970."""
    for where, record in read_records(path, [columns.date], reject):
        if (seconds := columns.read_date(where, record.get(columns.date), reject)) is not None:
            yield seconds


def read_rows(columns: Columns, path: str, reject: Reject) -> Iterator[Row]:
    """Yield the rows of a table."""
    names = [name for name in (getattr(columns, role) for role in ROLES) if name]
    for where, record in read_records(path, names, reject):
        image, caption, date, label, key = (record.get(getattr(columns, role)) for role in ROLES)
        data = None
        if isinstance(image, dict):  # as the hub has images
            data, image = image.get("bytes"), image.get("path")
        elif isinstance(image, bytes):
            data, image = image, None
        image = to_text(image).strip()
        key = to_text(key).strip() if columns.key else strip_suffix(image)
        if data is not None:
            key, image = key or where.rpartition("/")[2].replace(", row ", "/"), image or "in the table"
        texts = {"key": key, "path of an image": image}
        if bad := [name for name, text in texts.items() if not text or _CONTROL.search(text)]:
            reject("unusable key", f"{where}: {texts[bad[0]]!r} is no {bad[0]}")
        elif (seconds := columns.read_date(where, date, reject)) is not None:
            labels = (" ".join(to_text(label).split()),) if columns.label else ()
            yield Row(key, image, (to_text(caption),), seconds, labels, data)


# --- One table ---


def read_records(path: str, columns: list[str], reject: Reject) -> Iterator[Record]:
    """Yield the rows of a table, which must have ``columns``."""
    kind = _kind(path)
    if kind == "parquet":
        yield from _read_parquet(path, columns, reject)
        return
    with _open_text(path) as file:
        if kind in ("csv", "tsv"):
            for where, fields in read_csv(file, path, columns, reject, "\t" if kind == "tsv" else ","):
                yield where, dict(zip(columns, fields, strict=True))
        else:
            yield from _read_json_lines(file, path, columns, reject)


@contextmanager
def _open_text(path: str) -> Iterator[IO[str]]:
    """Open a text file, maybe gzipped; raise a TicError if it is damaged."""
    with open_table(path) as raw:
        file = gzip.GzipFile(fileobj=raw) if path.partition("?")[0].lower().endswith(".gz") else raw
        try:
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
        except (gzip.BadGzipFile, EOFError) as error:
            raise TicError(f"{path} is cut off or damaged: {error}") from None
        except UnicodeDecodeError as error:
            raise TicError(f"{path} is not UTF-8 text ({error.reason}): convert it, as with iconv -t UTF-8") from None


def _read_json_lines(file: IO[str], path: str, columns: list[str], reject: Reject) -> Iterator[Record]:
    """Yield the rows of JSON Lines; missing values are None, but each column must be in some row."""
    names = {}
    for line in file:
        names |= dict.fromkeys(_read_object(line) or {})
        if names.keys() >= set(columns):
            break
    check_columns(path, columns, list(names))
    file.seek(0)
    for number, line in enumerate(file, 1):
        where, record = f"{path}, line {number}", _read_object(line)
        if record is not None:
            yield where, record
        elif line.strip():
            reject("malformed row", f"{where} is not a JSON object")


def _read_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        return record if isinstance(record, dict) else None


def _read_parquet(path: str, columns: list[str], reject: Reject) -> Iterator[Record]:
    """Yield the rows of a Parquet file; of img2dataset's, only the downloaded ones."""
    import pyarrow
    import pyarrow.parquet

    with open_table(path) as raw:
        try:
            file = pyarrow.parquet.ParquetFile(raw)
            check_columns(path, columns, names := file.schema_arrow.names)
            has_status = "status" in names and not WEB.match(path) and exists(f"{path.removesuffix('.parquet')}.tar")
            batches = file.iter_batches(BATCH, columns=list(dict.fromkeys([*columns, *["status"] * has_status])))
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                if has_status and row["status"] != "success":
                    reject(NOT_DOWNLOADED, f"{path}, row {number} was not downloaded")
                else:
                    yield f"{path}, row {number}", row
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            if isinstance(error, TicError):
                raise
            raise TicError(f"{path} can't be read as Parquet: {' '.join(str(error).split())[:200]}") from None
