"""The annotations of YFCC15M and RedCaps as rows: a sample's key, its image, its texts and its time.

A row that can't be used is not an error here: ``BadRow`` stands in its place, and who reads the rows decides.
"""

import codecs
import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tic_clip import TicError
from tic_clip.cli import progress_bar
from tic_clip.storage import is_remote, list_files, size

BLOCK = 1 << 20
"""Bytes that are read at a time."""

MAX_FIELD = 1 << 24
"""Characters of a CSV field at most: what a quote that is never closed can cost."""

MAX_SHOWN = 200
"""Characters of a header that an error shows at most: what is no table may have no end of line."""

MAX_SECONDS = 253_402_300_800
"""The beginning of the year 10000."""

WRONG_FIELDS, UNUSABLE_KEY, IMPOSSIBLE_DATE = "wrong number of fields", "unusable key", "impossible date"

_SURROGATE = re.compile("[\ud800-\udfff]")

_NAME = re.compile(r"(?!\.$)(?!.*\.\.)[^/\\\x00-\x1f\x7f\ufffd]+")


class Row(NamedTuple):
    """A sample: its image's path in the folder of images, its time in seconds since 1970 (UTC), and where it stood."""

    key: str
    image: str
    texts: tuple[str, ...]
    seconds: int
    where: str


class BadRow(NamedTuple):
    """What stands in the place of a row that can't be used: the kind of fault, and a line that says which and where."""

    reason: str
    message: str


@dataclass
class Inputs:
    """``name``, a file or a folder, and the files in their order; ``digests``: the SHA-256 of those read, by name."""

    name: str
    paths: list[str]
    digests: dict[str, str] = field(default_factory=dict)

    def read(self, description: str) -> Iterator[tuple[str, bytes]]:
        """Yield (path, block of at most ``BLOCK`` bytes), at least one a file, under a progress bar.

        Raises:
            Missing: a file is missing.
        """
        done, total = 0, sum(map(size, self.paths))
        with progress_bar(description, total >> 20, " MiB") as bar:
            for path, block in self._blocks():
                yield path, block
                done += len(block)
                bar.update((done >> 20) - bar.n)

    def _blocks(self) -> Iterator[tuple[str, bytes]]:
        for path in self.paths:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                for block in chain((file.read(BLOCK),), iter(partial(file.read, BLOCK), b"")):
                    digest.update(block)
                    yield path, block
            self.digests[Path(path).name] = digest.hexdigest()

    def fingerprints(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name."""
        for _ in self.read("check the input"):
            pass
        return dict(self.digests)


def make_row(where: str, names: tuple[str, ...], image: str, texts: tuple[str, ...], timestamp: object) -> Row | BadRow:
    """A row, or what is wrong with it; ``names`` are its key and what else of the input is in the image's path."""
    key = names[0]
    for name in names:
        if not name or name.isspace() or not _NAME.fullmatch(name):
            return BadRow(UNUSABLE_KEY, f"{where}: {name!r} is no name of a file")
    seconds = parse_seconds(timestamp)
    if seconds is None:
        return BadRow(IMPOSSIBLE_DATE, f"{where}: the date of {key} is no time in seconds since 1970: {timestamp!r}")
    return Row(key, image, texts, seconds, where)


def parse_seconds(timestamp: object) -> int | None:
    """Whole seconds since 1970 that a number or its text says, rounded down; None if it is no time up to 9999."""
    try:
        value = math.nan if isinstance(timestamp, bool) else float(timestamp)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(timestamp, str) and "_" in timestamp:  # Python's own way to write a number
        return None
    return math.floor(value) if 0 <= value < MAX_SECONDS else None


def _check_local(path: str) -> None:
    if is_remote(path):
        raise TicError(f"{path} is not local; copy it here first")


# --- YFCC15M ---

YFCC_COLUMNS = ("key", "title", "description", "usertags", "dateuploaded")


def find_yfcc15m(path: str) -> Inputs:
    """The table ``yfcc15m.csv``.

    Raises:
        TicError: there is none, or it is not on this machine.
    """
    _check_local(path)
    size(path)
    return Inputs(path, [path])


def read_yfcc15m(inputs: Inputs) -> Iterator[Row | BadRow]:
    """Yield the rows of ``yfcc15m.csv``; its images are ``{key[:3]}/{key[3:6]}/{key}.jpg``.

    The table is UTF-8 (what is not becomes U+FFFD), with any end of line, and further columns are not looked at.

    Raises:
        TicError: a column is missing, or quotes are wrong, so that it can't be told where a field ends.
    """
    (path,) = inputs.paths
    csv.field_size_limit(MAX_FIELD)
    table = csv.reader(_lines(block for _, block in inputs.read("read")), strict=True)
    line, number = 1, 0
    try:
        header = [name.strip() for name in next(table, ())]
        if missing := [name for name in YFCC_COLUMNS if name not in header]:
            names = "".join(c if c.isprintable() else "\ufffd" for c in ", ".join(header)[:MAX_SHOWN])
            there = f"its columns are {names}" if header else "it is empty"
            raise TicError(f"{path} has no column {' and no column '.join(missing)}; {there}")
        pick = itemgetter(*map(header.index, YFCC_COLUMNS))
        line = table.line_num + 1
        for fields in table:
            if fields:  # else a line with nothing in it
                number += 1
                yield _yfcc_row(f"{path}, row {number} (line {line})", fields, pick, header)
            line = table.line_num + 1
    except csv.Error as error:
        raise TicError(f"{path}: the row that begins in line {line} can't be read: {error}") from None


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    """The lines of a text in UTF-8; a carriage return that ends none is a space."""
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")("replace"), ""
    for block in blocks:
        *lines, rest = (rest + decoder.decode(block)).split("\n")
        for line in lines:
            yield line.removesuffix("\r").replace("\r", " ") + "\n"
        if len(rest) > MAX_FIELD:
            raise csv.Error(f"a line has more than {MAX_FIELD} characters")
    if rest := rest + decoder.decode(b"", final=True):
        yield rest.replace("\r", " ")


def _yfcc_row(where: str, fields: list[str], pick: itemgetter, header: list[str]) -> Row | BadRow:
    if len(fields) != len(header):
        place = header.index("key")
        key = f" (key {fields[place]!r})" if place < len(fields) else ""
        return BadRow(WRONG_FIELDS, f"{where} has {len(fields)} fields, not {len(header)}{key}")
    key, *texts, timestamp = pick(fields)
    key = key.strip()
    return make_row(where, (key,), f"{key[:3]}/{key[3:6]}/{key}.jpg", tuple(texts), timestamp)


# --- RedCaps ---


class _Annotation(msgspec.Struct):
    """What is read of an annotation, of whatever type it is."""

    image_id: Any = None
    subreddit: Any = None
    caption: Any = None
    created_utc: Any = None


class _Annotations(msgspec.Struct):
    annotations: list[_Annotation]


def find_redcaps(folder: str) -> Inputs:
    """The annotation files of a folder, ``{subreddit}_{year}.json``, sorted by name.

    Raises:
        TicError: there is none, or no such folder on this machine.
    """
    _check_local(folder)
    paths = [path for path, _ in list_files(folder, "*.json")]
    if not paths:
        raise TicError(f"{folder} has no annotation file ({{subreddit}}_{{year}}.json)")
    return Inputs(folder, paths)


def read_redcaps(inputs: Inputs) -> Iterator[Row | BadRow]:
    """Yield the annotations of RedCaps, a file in memory at a time; images are ``{subreddit}/{image_id}.jpg``.

    The format is that of https://github.com/redcaps-dataset/redcaps-downloader. Where the subreddit is missing or a
    number (an index of classes, in some copies) the file's name has it; the file's year is not looked at.

    Raises:
        TicError: a file is cut off, or has something else in it.
    """
    for path, blocks in groupby(inputs.read("read"), key=itemgetter(0)):
        try:
            found = _decode(b"".join(block for _, block in blocks).removeprefix(codecs.BOM_UTF8))
        except (ValueError, RecursionError) as error:  # msgspec's own, or that of a text that is no UTF-8
            raise TicError(f"{path} is cut off or holds no annotations: {error}") from None
        subreddit = re.sub(r"_\d{4}(-\d\d)?$", "", Path(path).stem)
        for number, annotation in enumerate(found.annotations, 1):
            yield _redcaps_row(f"{path}, annotation {number}", annotation, subreddit)


def _decode(data: bytes) -> _Annotations:
    """A file of annotations; Python's own reader takes half a surrogate pair and NaN, too, and is a lot slower."""
    try:
        return msgspec.json.decode(data, type=_Annotations)
    except ValueError:
        with suppress(ValueError):
            return msgspec.convert(json.loads(data), _Annotations)
        raise


def _redcaps_row(where: str, found: _Annotation, subreddit: str) -> Row | BadRow:
    key = _text(found.image_id).strip()
    subreddit = found.subreddit.strip() if isinstance(found.subreddit, str) else subreddit
    names, texts = (key, subreddit), (_text(found.caption),)
    return make_row(where, names, f"{subreddit}/{key}.jpg", texts, found.created_utc)


def _text(value: object) -> str:
    """A text, halves of surrogate pairs as U+FFFD, or a number, a whole one without a point; else what is missing."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)
