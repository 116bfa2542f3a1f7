"""Read the rows of YFCC15M and RedCaps: a sample's key, its image, its texts and its time.

A row that can't be used is not an error here: ``BadRow`` stands in its place, and the caller decides.
"""

import csv
import json
import math
import re
from collections import deque
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

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
        if not _FILE_NAME.fullmatch(name):
            return BadRow("unusable key", f"{where}: {name!r} is not a name for a file")
    seconds = parse_seconds(timestamp)
    if seconds is None:
        message = f"{where}: the date of {names[0]} is not a time in seconds since 1970: {timestamp!r}"
        return BadRow("impossible date", message)
    return Row(names[0], image, texts, seconds)


def parse_seconds(timestamp: object) -> int | None:
    """Return a number or its text as whole seconds since 1970, rounded down; None if it is not a time up to 9999."""
    try:
        value = float(timestamp)
    except (TypeError, ValueError, OverflowError):
        return None
    return math.floor(value) if 0 <= value < _YEAR_10000 else None


def read_yfcc15m(path: str) -> Iterator[Row | BadRow]:
    """Yield the rows of ``yfcc15m.csv``; its images are ``{key[:3]}/{key[3:6]}/{key}.jpg``.

    Bytes that are not UTF-8 become U+FFFD; other columns are ignored. Raises a ``TicError`` if a column is missing.
    """
    rows = _read_csv(path)
    _, header = next(rows, (1, []))
    header = [name.strip() for name in header] if isinstance(header, list) else []
    if missing := [name for name in YFCC_COLUMNS if name not in header]:
        names = ascii(", ".join(header)[:80])
        raise TicError(f"{path} has no column {' and no column '.join(missing)}; its columns are {names}")
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


def read_redcaps(path: str) -> Iterator[Row | BadRow]:
    """Yield the annotations of a file of RedCaps; images are ``{subreddit}/{image_id}.jpg``.

    The format is that of https://github.com/redcaps-dataset/redcaps-downloader. Where the subreddit is missing or a
    number (an index of classes, in some copies) the file's name has it; the file's year is not used. Raises a
    ``TicError`` if the file is cut off or holds something else.
    """
    try:
        annotations = json.loads(Path(path).read_bytes())["annotations"]
        if not all(isinstance(annotation, dict) for annotation in annotations):
            raise TypeError("an annotation is not an object")
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise TicError(f"{path} is cut off or holds no annotations: {error}") from None
    file_subreddit = re.sub(r"_\d{4}(-\d\d)?$", "", Path(path).stem)
    for number, annotation in enumerate(annotations, 1):
        key, subreddit = _text(annotation.get("image_id")).strip(), annotation.get("subreddit")
        subreddit = _text(subreddit).strip() if isinstance(subreddit, str) else file_subreddit
        texts, image = (_text(annotation.get("caption")),), f"{subreddit}/{key}.jpg"
        yield make_row(f"{path}, annotation {number}", (key, subreddit), image, texts, annotation.get("created_utc"))


def _text(value: object) -> str:
    """Return a text, halves of surrogate pairs as U+FFFD, or a number, a whole one without a point; else nothing."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
