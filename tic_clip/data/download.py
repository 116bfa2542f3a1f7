"""The released lists of TiC-DataComp: where they are, fetching them so that it can be cut off anywhere, reading them.

A file appears under its name when all of it is there; until then it is ``{name}.part``, and ``{name}.part.json`` says
what it is a part of, so that the next attempt asks for the rest of the same file (HTTP's ``Range`` and ``If-Range``).
"""

import http.client
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tic_clip import TicError
from tic_clip.benchmarks import MONTHS
from tic_clip.cli import progress
from tic_clip.data.released import MONTHLY, TABLES, YEARLY, YEARS, local_folder
from tic_clip.data.uids import check_size
from tic_clip.storage import atomic_open, read_json_object, write_json

SOURCES = (
    "https://docs-assets.developer.apple.com/ml-research/datasets/tic-clip",
    "https://huggingface.co/datasets/apple/TiC-DataComp/resolve/main",
)
"""The two places that hold the lists; what the first lacks is looked for in the second.

They differ in two ways: the second has the tables as JSON too, and one file a month instead of a tar a year.
"""

LISTS = ("yearly", "monthly", "eval")

ATTEMPTS = 6  # in a row that bring nothing new
WAIT = 1.0  # seconds before the second attempt, doubled before each further one
TIMEOUT = 60.0  # seconds without a byte
BLOCK = 1 << 20  # bytes
BUSY = {408, 425, 429, 500, 502, 503, 504}
ABSENT = {401, 403, 404, 410}  # the stores behind both sources say 401 or 403 for a file that they don't have
MONTH_FILE = re.compile(r"([0-9]{4})/\1[0-9]{2}\.npy")


class Absent(TicError):
    """The server has no such file."""


class CutOff(TicError):
    """The transfer ended early, or the server is busy: worth another attempt."""


class Changed(CutOff):
    """The server has another file now: what came of the old one is of no use."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file that is being fetched, and what was written down of it when the first byte came."""

    path: Path

    @property
    def notes(self) -> Path:
        """The file that says what ``path`` is a part of."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        """The bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    def state(self, url: str) -> dict[str, Any]:
        """``{"url", "validator", "length"}`` of what is there; empty if it can't be continued from ``url``."""
        state = read_json_object(self.notes) if self.notes.exists() else {}
        return state if state.get("url") == url and state.get("validator") else {}

    def drop(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)


def fetch(url: str, path: Path, check: Callable[[Path], object] | None = None, *, wait: float = WAIT) -> bool:
    """Download ``url`` to ``path`` unless it is there; returns whether it was fetched.

    ``check`` raises a ``TicError`` for a file that is not what it should be; such a file is not kept.

    Raises:
        Absent: the server has no such file.
        TicError: the server can't be reached, or stops the transfer again and again; the message names the URL.
    """
    if path.exists():
        _check_again(path, check)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Part(path=path.with_name(path.name + ".part"))
    best, failures = part.size, 0
    while True:
        try:
            _transfer(url, part, path.name)
            break
        except CutOff as error:
            if isinstance(error, Changed):
                part.drop()
            failures = 1 if part.size > best else failures + 1
            best = max(best, part.size)
            if failures == ATTEMPTS:
                again = f"gave up after {ATTEMPTS} attempts, the same command goes on from here"
                raise TicError(f"{url}: {error} ({again})") from None
            time.sleep(wait * 2 ** (failures - 1))
    try:
        if check:
            check(part.path)
    except TicError as error:
        part.drop()
        raise TicError(f"{url}: {error}") from None
    part.path.replace(path)
    part.drop()
    return True


def _check_again(path: Path, check: Callable[[Path], object] | None) -> None:
    try:
        if check:
            check(path)
    except TicError as error:
        raise TicError(f"{error}; delete it to fetch it again") from None


def _transfer(url: str, part: Part, label: str) -> None:
    """One attempt: ask for what is missing and append it, or start again where the server sends the whole file."""
    state, have = part.state(url), part.size
    if state and have == state["length"]:
        return
    resume = {"Range": f"bytes={have}-", "If-Range": state["validator"]} if state and have else {}
    with _open(url, {"Accept-Encoding": "identity", **resume}) as response:
        start, length = _extent(response)
        validator = _validator(response.headers)
        if start and (start != have or {"url": url, "validator": validator, "length": length} != state):
            raise Changed("the file has changed on the server")
        with open(part.path, "ab" if start else "wb") as file:
            if not start:
                write_json(part.notes, {"url": url, "validator": validator, "length": length})
            blocks = None if length is None else -(-(length - start) // BLOCK)
            for block in progress(_read(response), label, blocks, " MiB"):
                file.write(block)
    if length is not None and part.size != length:
        raise (Changed if part.size > length else CutOff)(f"{part.size} of {length} bytes came")


def _open(url: str, headers: dict[str, str]) -> Any:
    """The response to a request, with status 200 or 206."""
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        message = f"the server answers {error.code} {error.reason}"
        if error.code in ABSENT:
            raise Absent(f"{url}: {message}") from None
        if error.code == 416:  # there is nothing so far into the file
            raise Changed(message) from None
        if error.code in BUSY:
            raise CutOff(message) from None
        raise TicError(f"{url}: {message}") from None
    except (URLError, OSError, http.client.HTTPException) as error:
        raise CutOff(str(getattr(error, "reason", error)) or type(error).__name__) from None
    except ValueError as error:
        raise TicError(f"{url} is no URL: {error}") from None


def _read(response: Any) -> Iterator[bytes]:
    try:
        while block := response.read(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise CutOff(str(error) or type(error).__name__) from None


def _extent(response: Any) -> tuple[int, int | None]:
    """(offset of the first byte that comes, length of the whole file or None) of a response."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found:
            raise TicError(f"{response.url}: the server sends a part but not which")
        return int(found[1]), int(found[2])
    length = response.headers.get("Content-Length")
    return 0, None if length is None else int(length)


def _validator(headers: Any) -> str | None:
    """What ``If-Range`` takes: a strong ETag, or the date of the last change; None without either."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def fetch_any(urls: list[str], path: Path, check: Callable[[Path], object] | None = None) -> bool:
    """``fetch`` the first of ``urls`` that exists.

    Raises:
        Absent: none does; the message is what the servers said.
    """
    errors = []
    for url in urls:
        try:
            return fetch(url, path, check)
        except Absent as error:
            errors.append(str(error))
    raise Absent("; ".join(errors))


def download_lists(
    output: str,
    *,
    sources: tuple[str, ...] = SOURCES,
    lists: tuple[str, ...] = LISTS,
    years: tuple[str, ...] = YEARS,
) -> Iterator[tuple[str, bool]]:
    """Fetch the released lists into ``output`` under their released names; yields (name, whether it is new).

    The tars of the monthly lists are unpacked to ``{year}/{YYYYMM}.npy`` and removed.

    Raises:
        TicError: one can't be fetched or is damaged.
    """
    folder, sources = local_folder(output), tuple(source.rstrip("/") for source in sources)
    if "eval" in lists:
        for table in TABLES.values():
            yield _fetch_table(folder, sources, table)
    for name, fetch_year in (("yearly", _fetch_year), ("monthly", _fetch_months)):
        for year in years if name in lists else ():
            yield from fetch_year(folder, sources, year)


def _fetch_table(folder: Path, sources: tuple[str, ...], table: str) -> tuple[str, bool]:
    """A table as JSON, or as a pickle where no source has it as JSON."""
    names = (f"{table}.json", f"{table}.pkl")
    for name in names:
        if (folder / name).exists():
            return name, False
    errors = []
    for name in names:
        try:
            return name, fetch_any([f"{source}/{name}" for source in sources], folder / name)
        except Absent as error:
            errors.append(str(error))
    raise Absent("; ".join(errors))


def _fetch_year(folder: Path, sources: tuple[str, ...], year: str) -> Iterator[tuple[str, bool]]:
    sizes = f"{YEARLY}/sizes.json"  # {"2014": number of UIDs, ...}
    fetch_any([f"{source}/{sizes}" for source in sources], folder / sizes, read_json_object)
    count, name = read_json_object(folder / sizes).get(year), f"{YEARLY}/{year}.npy"
    urls = [f"{source}/{name}" for source in sources]
    yield name, fetch_any(urls, folder / name, lambda path: check_size(path, count))


def _fetch_months(folder: Path, sources: tuple[str, ...], year: str) -> Iterator[tuple[str, bool]]:
    """A year's months: from its tar, or one by one where no source has that."""
    months = [month for month in MONTHS if month.startswith(year)]
    paths = {month: folder / MONTHLY / year / f"{month}.npy" for month in months}
    missing, tar = [month for month in months if not paths[month].exists()], folder / MONTHLY / f"{year}.tar"
    if missing:
        try:
            fetch_any([f"{source}/{MONTHLY}/{year}.tar" for source in sources], tar)
            unpack(tar, folder / MONTHLY, year)
        except Absent:
            for month in missing:
                fetch_any([f"{source}/{MONTHLY}/{month}.npy" for source in sources], paths[month], check_size)
    for month, path in paths.items():
        if not path.exists():
            raise TicError(f"{tar} holds no {year}/{month}.npy")
        _check_again(path, check_size)
        yield f"{MONTHLY}/{year}/{month}.npy", month in missing
    tar.unlink(missing_ok=True)


def unpack(tar: Path, folder: Path, year: str) -> None:
    """Unpack a year's ``{year}/{YYYYMM}.npy`` below ``folder``; each appears when all of it is there.

    Folders and what macOS adds to a tar (``._*``) are passed over.

    Raises:
        TicError: the tar holds anything else, or is damaged; nothing is written under a name of the tar's own choice.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            members = {member: member.name.removeprefix("./") for member in archive if not _is_passed_over(member)}
            for member, name in members.items():
                plain = MONTH_FILE.fullmatch(name)
                if not (member.isreg() and plain and plain[1] == year):
                    raise TicError(f"{tar} holds {member.name!r}; only files {year}/{{YYYYMM}}.npy are unpacked")
            for member, name in progress(members.items(), f"unpack {tar.name}", len(members), " months"):
                if not (folder / name).exists():
                    with atomic_open(folder / name) as file:
                        shutil.copyfileobj(archive.extractfile(member), file, BLOCK)
    except tarfile.TarError as error:
        raise TicError(f"{tar} is damaged ({error}); delete it to fetch it again") from None


def _is_passed_over(member: tarfile.TarInfo) -> bool:
    return member.isdir() or Path(member.name).name.startswith("._")
