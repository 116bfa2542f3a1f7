"""The rows of YFCC15M and RedCaps: a sample's key, its image, its texts and its time.

A row that can't be used is not an error here: ``BadRow`` stands in its place, and who reads the rows decides.
"""

import codecs
import csv
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tic_clip import TicError

YFCC_COLUMNS = ("key", "title", "description", "usertags", "dateuploaded")

MAX_FIELD = 1 << 22
"""Characters of a CSV field at most; csv's own limit is 131,072."""

_YEAR_10000 = 253_402_300_800  # in seconds since 1970
_SURROGATE = re.compile("[\ud800-\udfff]")
_FILE_NAME = re.compile(r"(?!\.$)(?!.*\.\.)[^/\\\x00-\x1f\x7f\ufffd]+")


class Row(NamedTuple):
    """A sample: its image's path in the folder of images, and its time in seconds since 1970 (UTC)."""

    key: str
    image: str
    texts: tuple[str, ...]
    seconds: int


class BadRow(NamedTuple):
    """What stands in the place of a row that can't be used: the kind of fault, and a line that says which and where."""

    reason: str
    message: str


def make_row(where: str, names: tuple[str, ...], image: str, texts: tuple[str, ...], timestamp: object) -> Row | BadRow:
    """Return a row, or what is wrong with it; ``names``: its key, and what else is in the image's path."""
    for name in names:
        if not name or name.isspace() or not _FILE_NAME.fullmatch(name):
            return BadRow("unusable key", f"{where}: {name!r} is not a name for a file")
    seconds = parse_seconds(timestamp)
    if seconds is None:
        message = f"{where}: the date of {names[0]} is not a time in seconds since 1970: {timestamp!r}"
        return BadRow("impossible date", message)
    return Row(names[0], image, texts, seconds)


def parse_seconds(timestamp: object) -> int | None:
    """Return a number or its text as whole seconds since 1970, rounded down; None if it is not a time up to 9999."""
    try:
        value = math.nan if isinstance(timestamp, bool) else float(timestamp)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(timestamp, str) and "_" in timestamp:  # Python's own way to write a number
        return None
    return math.floor(value) if 0 <= value < _YEAR_10000 else None


# --- YFCC15M ---


def read_yfcc15m(path: str) -> Iterator[Row | BadRow]:
    """Yield the rows of ``yfcc15m.csv``; its images are ``{key[:3]}/{key[3:6]}/{key}.jpg``.

    Bytes that are not UTF-8 become U+FFFD; other columns are ignored.

    Raises:
        TicError: a column is missing.
    """
    rows = _read_csv(path)
    line, header = next(rows, (1, []))
    header = [name.strip() for name in header] if isinstance(header, list) else []
    if missing := [name for name in YFCC_COLUMNS if name not in header]:
        names = re.sub(r"[^\x20-\x7e]", "\ufffd", ", ".join(header)[:200])
        raise TicError(f"{path} has no column {' and no column '.join(missing)}; its columns are {names or 'none'}")
    pick = itemgetter(*map(header.index, YFCC_COLUMNS))
    for number, (line, fields) in enumerate(rows, 1):
        where = f"{path}, row {number} (line {line})"
        if isinstance(fields, csv.Error):
            yield BadRow("malformed row", f"{where} can't be read: {fields}")
        elif len(fields) != len(header):
            yield BadRow("wrong number of fields", f"{where} has {len(fields)} fields, not {len(header)}")
        else:
            key, *texts, timestamp = pick(fields)
            key = key.strip()
            yield make_row(where, (key,), f"{key[:3]}/{key[3:6]}/{key}.jpg", tuple(texts), timestamp)


def _read_csv(path: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (line number, fields) of each row; for a row whose quotes are wrong the error in place of its fields.

    Only the first line of such a row is dropped, so that a quote without an end takes no other row with it.
    """
    csv.field_size_limit(MAX_FIELD)
    number, taken, again = 1, [], deque()

    def read_lines() -> Iterator[str]:
        while line := again.popleft() if again else file.readline(MAX_FIELD):
            taken.append(line)
            yield line.rstrip("\r\n").replace("\r", " ") + "\n"  # csv would end the row at a single carriage return

    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        table = csv.reader(read_lines(), strict=True)
        while True:
            taken.clear()
            try:
                fields = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                fields, table = error, csv.reader(read_lines(), strict=True)
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
            if fields:  # else an empty line
                yield number, fields
            number += len(taken)


# --- RedCaps ---


class _Annotation(msgspec.Struct):
    """What is read of an annotation, of whatever type it is."""

    image_id: Any = None
    subreddit: Any = None
    caption: Any = None
    created_utc: Any = None


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


def read_redcaps(path: str) -> Iterator[Row | BadRow]:
    """Yield the annotations of a file of RedCaps; images are ``{subreddit}/{image_id}.jpg``.

    The format is that of https://github.com/redcaps-dataset/redcaps-downloader. Where the subreddit is missing or a
    number (an index of classes, in some copies) the file's name has it; the file's year is not used.

    Raises:
        TicError: the file is cut off, or holds something else.
    """
    try:
        file = _decode(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:  # msgspec's own, or that of a text that is not UTF-8
        raise TicError(f"{path} is cut off or holds no annotations: {error}") from None
    file_subreddit = re.sub(r"_\d{4}(-\d\d)?$", "", Path(path).stem)
    for number, annotation in enumerate(file.annotations, 1):
        key, subreddit = _text(annotation.image_id).strip(), annotation.subreddit
        subreddit = _text(subreddit).strip() if isinstance(subreddit, str) else file_subreddit
        texts, image = (_text(annotation.caption),), f"{subreddit}/{key}.jpg"
        yield make_row(f"{path}, annotation {number}", (key, subreddit), image, texts, annotation.created_utc)


def _decode(data: bytes) -> _Annotations:
    """Decode a file of annotations; Python's own reader takes half a surrogate pair and NaN, too, but is slower."""
    try:
        return msgspec.json.decode(data, type=_Annotations)
    except ValueError:
        with suppress(ValueError):
            return msgspec.convert(json.loads(data), _Annotations)
        raise


def _text(value: object) -> str:
    """Return a text, halves of surrogate pairs as U+FFFD, or a number, a whole one without a point; else nothing."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
