"""Read the rows of YFCC15M and RedCaps (a sample's key, image, texts and time), and make captions of their texts."""

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote, unquote_plus

import ftfy

from tic_clip import TicError
from tic_clip.data.dates import read_date

YFCC_COLUMNS = ("key", "title", "description", "usertags", "dateuploaded")
REDCAPS_FIELDS = ("image_id", "subreddit", "caption", "created_utc")
NOT_DOWNLOADED = "not downloaded"  # a reason that is no fault of the table
BAD_DATE = "impossible date"
MAX_FIELD = 1 << 22  # characters; csv's own limit is 131,072
_FILE_NAME = re.compile(r"(?!\.$)(?!.*\.\.)[^/\\\x00-\x1f\x7f\ufffd]+")

_MENDING = ftfy.TextFixerConfig(unescape_html=True, explain=False)
_PLAIN = re.compile(r"[\t\n -%'-~]*")  # ASCII, no entity: nothing to mend, and mending takes 100 times as long
_BLOCKS = "address|article|blockquote|br|center|dd|div|dl|dt|h[1-6]|hr|li|ol|p|pre|table|td|th|tr|ul"
_NAME = r"[a-z][a-z0-9]*(?::[a-z]+)?(?=[\s/>])"
_QUOTED = r"""(?:[^<>"']|"[^"<]*"|'[^'<]*')*+>"""  # attributes, which may have > in quotes
_BREAK = re.compile(rf"</?(?:{_BLOCKS})\b(?:{_QUOTED}|[^<>]*>)", re.IGNORECASE)
_TAG = re.compile(rf"<!--(?:(?!<!--).)*?-->|</?{_NAME}(?:{_QUOTED}|[^<>]*>)", re.IGNORECASE | re.DOTALL)


Reject = Callable[[str, str], object]
"""What a reader calls in place of a row that can't be used, with the kind of fault and a line that says which."""


class Row(NamedTuple):
    """A sample: its image's path in the folder of images, its time in seconds since 1970 (UTC), its label in a table
    that has some, and its image if that stands there.
    """

    key: str
    image: str
    texts: tuple[str, ...]
    seconds: int
    label: tuple[str, ...] = ()
    data: bytes | None = None


def make_row(
    where: str, names: tuple[str, ...], image: str, texts: tuple[str, ...], timestamp: object, reject: Reject
) -> Iterator[Row]:
    """Yield a row, unless something is wrong with it; ``names``: its key, and what else is in the image's path."""
    seconds = read_date(timestamp, "s")
    if bad := [name for name in names if not _FILE_NAME.fullmatch(name)]:
        reject("unusable key", f"{where}: {bad[0]!r} is not a name for a file")
    elif seconds is None or seconds < 0:
        message = f"{where}: the date of {names[0]} is not a time in seconds since 1970: {timestamp!r}"
        reject(BAD_DATE, message)
    else:
        yield Row(names[0], image, texts, seconds)


def read_yfcc15m(path: str, reject: Reject) -> Iterator[Row]:
    """Yield the rows of ``yfcc15m.csv``, with U+FFFD for what is not UTF-8."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for where, (key, *texts, timestamp) in read_csv(file, path, YFCC_COLUMNS, reject):
            key = key.strip()
            image = f"{key[:3]}/{key[3:6]}/{key}.jpg"
            yield from make_row(where, (key,), image, tuple(texts), timestamp, reject)


def read_csv(
    file: IO[str], path: str, columns: Sequence[str], reject: Reject, delimiter: str = ","
) -> Iterator[tuple[str, list[str]]]:
    """Yield (where it stands, the fields of ``columns``) of each row; a TicError names the columns that are missing."""
    rows = _read_fields(file, delimiter)
    _, header = next(rows, (1, []))
    header = [name.strip() for name in header] if isinstance(header, list) else []
    check_columns(path, columns, header)
    places = list(map(header.index, columns))
    for number, (line, fields) in enumerate(rows, 1):
        where = f"{path}, row {number} (line {line})"
        if isinstance(fields, csv.Error):
            reject("malformed row", f"{where} can't be read: {fields}")
        elif len(fields) != len(header):
            reject("wrong number of fields", f"{where} has {len(fields)} fields, not {len(header)}")
        else:
            yield where, [fields[place] for place in places]


def check_columns(path: str, columns: Iterable[str], header: Sequence[str]) -> None:
    """Raise a TicError that names the columns that are missing, and those that are there."""
    if twice := [name for name in columns if header.count(name) > 1]:
        raise TicError(f"{path} has the column {twice[0]} twice")
    if missing := [name for name in columns if name not in header]:
        raise TicError(f"{path} has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}")


def _read_fields(file: IO[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield (line number, fields) of each row; where quotes are wrong the error, which costs that line alone."""
    csv.field_size_limit(MAX_FIELD)
    number, taken, again = 1, [], deque()

    def read_lines() -> Iterator[str]:
        while line := again.popleft() if again else file.readline(MAX_FIELD):
            taken.append(line)
            yield line.rstrip("\r\n").replace("\r", " ") + "\n"  # csv would end the row at a single carriage return

    while True:
        try:
            for fields in csv.reader(read_lines(), strict=True, delimiter=delimiter):
                if fields:  # else an empty line
                    yield number, fields
                number += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            yield number, error
            number += 1
            again.extendleft(reversed(taken[1:]))
            taken.clear()


def read_redcaps(path: str, reject: Reject) -> Iterator[Row]:
    """Yield the annotations of a file of RedCaps; images are ``{subreddit}/{image_id}.jpg``.

    Where the subreddit is missing or a number (an index of classes, in some copies) the file's name has it.
    """
    file_subreddit = re.sub(r"_\d{4}(-\d\d)?$", "", Path(path).stem)
    try:
        annotations = json.loads(Path(path).read_bytes())["annotations"]
        fields = [[annotation.get(name) for name in REDCAPS_FIELDS] for annotation in annotations]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise TicError(f"{path} is cut off or holds no annotations: {error}") from None
    for number, (*texts, timestamp) in enumerate(fields, 1):
        key, subreddit, caption = (text if isinstance(text, str) else None for text in texts)
        names = to_text(key).strip(), file_subreddit if subreddit is None else to_text(subreddit).strip()
        where, image = f"{path}, annotation {number}", f"{names[1]}/{names[0]}.jpg"
        yield from make_row(where, names, image, (to_text(caption),), timestamp, reject)


def to_text(value: object) -> str:
    """Return a value as text: "" for none, with halves of surrogate pairs as U+FFFD."""
    return "" if value is None else re.sub("[\ud800-\udfff]", "\ufffd", str(value))


def redcaps_caption(texts: tuple[str, ...]) -> str:
    """Return the caption of a sample as it is given, on one line."""
    return " ".join(texts[0].split())


def yfcc_caption(texts: tuple[str, ...]) -> str:
    """Return the first 500 characters of "title. description. usertags", cleaned, without those that are empty."""
    return ". ".join(filter(None, map(clean_field, texts)))[:500]


def clean_field(text: str) -> str:
    """Return a field of YFCC100M's metadata as people read it: decoded, without mojibake and HTML, on one line.

    Fields are form-encoded, tag by tag: ``canon,canon+powershot``; with white space it is a decoded copy, where + is +.
    """
    text = text.strip()
    text = unquote(text) if len(text.split(maxsplit=1)) > 1 else unquote_plus(text)
    if not _PLAIN.fullmatch(text):
        text = ftfy.fix_text(text, _MENDING)
    if "<" in text:  # "1 < 2", "<3" and "<me@home>" stay
        text = _TAG.sub("", _BREAK.sub(" ", text))
    return " ".join(text.split())
