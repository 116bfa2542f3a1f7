"""Local paths and cloud URLs (``s3://``, ``gs://``, ``az://``) as one thing.

``to_path`` gives names to join and split; all that touches data is a function here, so that every request to a cloud is
tried again where that may help and ends in one clear line where it does not: ``TicError`` for what lasts (no access, no
such bucket), ``Unreachable`` for what may pass. cloudpathlib finds the credentials; nothing enters its cache.

Nothing is ever visible under its final name before it is whole: local files are written beside it and renamed, cloud
objects are written to a local file and uploaded when that is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from tic_clip import TicError
from tic_clip.clouds import Listing, NotFoundError, Window, locate


def is_remote(path: object) -> bool:
    """Whether ``path`` is a cloud URL such as ``s3://bucket/key``."""
    return "://" in str(path)


def to_path(path: object) -> Any:
    """``path`` as a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``, which share their interface.

    Use it for names (``/``, ``.name``, ``.parent``, ``str``); a cloud path's own requests are not tried again.

    Raises:
        TicError: a URL of no known cloud, or one whose package or credentials are missing.
    """
    if not is_remote(path):
        return Path(str(path))
    url = locate(path).url
    from cloudpathlib import CloudPath

    return CloudPath(url)


# --- Listing ---


def exists(path: object) -> bool:
    """Whether there is a file, an object or a folder."""
    if not is_remote(path):
        return Path(path).exists()
    found = locate(path)
    with suppress(NotFoundError):
        return not found.key or found.retry(found.stat) is not None
    return is_dir(path)


def is_dir(path: object) -> bool:
    """Whether there is a folder; in a cloud, whether an object lies under that name (or a bucket has it)."""
    if not is_remote(path):
        return Path(path).is_dir()
    found = locate(path)
    entries, _ = found.retry(found.page, True, None, 1)
    return bool(entries) or not found.key


def size(path: object) -> int:
    """The bytes of a file or an object.

    Raises:
        Missing: there is none.
    """
    if is_remote(path):
        found = locate(path)
        return found.retry(found.stat)[0]
    try:
        return Path(path).stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} is missing") from None


def list_files(folder: object, pattern: str = "*") -> Listing:
    """(path, size in bytes) of the files below ``folder`` whose names match, sorted by path, hidden ones left out.

    ``pattern`` is matched name by name, as in ``*.tar`` or ``*/*.tar``; ``**`` stands for any number of folders. A
    cloud is asked once for all of them: one request for each 1,000 objects. A link to nothing is there, with 0 bytes.

    Raises:
        Missing: there is no such folder.
    """
    patterns = pattern.split("/")
    found = _walk_cloud(folder, patterns) if is_remote(folder) else _walk(Path(folder), patterns)
    return sorted(found, key=lambda entry: entry[0].split("/"))


def list_folders(folder: object) -> list[str]:
    """The folders in ``folder``, sorted by name, hidden ones left out.

    Raises:
        Missing: there is no such folder.
    """
    if is_remote(folder):
        found = locate(folder)
        names = [name for name, _ in found.entries(deep=False) if name.endswith("/")]
        return sorted(f"{found.url}/{name.rstrip('/')}" for name in names if not name.startswith("."))
    return sorted(str(Path(entry.path)) for entry in _scan(Path(folder)) if entry.is_dir() and entry.name[0] != ".")


def _scan(folder: Path) -> Iterator[os.DirEntry]:
    """The entries of a local folder."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{folder} is missing or no folder") from None


def _walk(folder: Path, patterns: list[str]) -> Iterator[tuple[str, int]]:
    """(path, size) of a local folder's files that match."""
    first, *rest = patterns
    if first == "**":
        yield from _walk(folder, rest)
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        if first == "**" and entry.is_dir():
            yield from _walk(folder / entry.name, patterns)
        elif rest and fnmatchcase(entry.name, first) and entry.is_dir():
            yield from _walk(folder / entry.name, rest)
        elif not rest and fnmatchcase(entry.name, first) and not entry.is_dir():
            try:
                yield str(folder / entry.name), entry.stat().st_size
            except FileNotFoundError:  # a link to nothing: who reads it will say so
                yield str(folder / entry.name), 0


def _walk_cloud(folder: object, patterns: list[str]) -> Iterator[tuple[str, int]]:
    """(URL, size) of a cloud folder's objects that match."""
    found = locate(folder)
    for name, size in found.entries(deep=len(patterns) > 1):
        names = name.split("/")
        if not any(part.startswith(".") for part in names) and _matches(names, patterns):
            yield f"{found.url}/{name}", size


def _matches(names: list[str], patterns: list[str]) -> bool:
    """Whether a path, name by name, matches a pattern; the empty name after a folder's last slash never does."""
    if not patterns or not names:
        return not patterns and not names
    if patterns[0] == "**":
        return any(_matches(names[i:], patterns[1:]) for i in range(len(names)))
    return names[0] != "" and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


# --- Reading ---


def read_bytes(path: object) -> bytes:
    """The whole content of a file or an object.

    Raises:
        Missing: there is none.
    """
    if is_remote(path):
        found = locate(path)
        return found.retry(found.read, 0, None, None)
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} is missing") from None


def read_json(path: object) -> Any:
    """The JSON value in ``path``.

    Raises:
        TicError: ``path`` is missing or holds no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except TicError:
        raise
    except ValueError as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: object) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        TicError: ``path`` is missing or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise TicError(f"{path} is no table")
    return found


def download(url: object, local: Path) -> None:
    """Make a local file of a cloud object: in parts, each tried again on its own, all of the same version.

    What is local is copied.

    Raises:
        Missing: there is no such object.
    """
    if not is_remote(url):
        upload(Path(url), local)
        return
    with atomic_open(local, sync=False) as file:
        locate(url).download(file)


def local_copy(path: object, folder: Path) -> Path:
    """``path`` itself if it is local, else a copy of it in ``folder``, which is fetched if it is not there yet."""
    if not is_remote(path):
        return Path(path)
    url = locate(path).url
    copy = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    if not copy.exists():
        download(url, copy)
    return copy


class RandomAccess:
    """The bytes of a file by their position: ``read_at(offset, size)``, or as a slice ``file[start:stop]``."""

    def __init__(self, size: int, read_at: Callable[[int, int], bytes]) -> None:
        self.size, self.read_at = size, read_at

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return self.read_at(start, max(stop - start, 0))


@contextmanager
def open_random(path: object) -> Iterator[RandomAccess]:
    """Open a file or an object for reads at any position; of a cloud object only the blocks around them are fetched.

    Raises:
        Missing: there is none.
    """
    if is_remote(path):
        window = Window(locate(path))
        yield RandomAccess(window.size, window.read_at)
        return
    total = size(path)
    with open(path, "rb", buffering=0) as file:
        yield RandomAccess(total, lambda offset, count: os.pread(file.fileno(), count, offset))


# --- Writing ---


@contextmanager
def atomic_open(path: object, mode: str = "wb", *, sync: bool = True) -> Iterator[IO]:
    """Open ``path`` for writing so that it changes only when the block ends without an error.

    ``sync``: have it on the disk by then, whatever happens to the machine.
    """
    if is_remote(path):
        locate(path)  # a wrong URL is told before anything is written
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / "object", mode) as file:
                yield file
            upload(Path(folder) / "object", path)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path, patience: float = 0.0, busy: Path | None = None) -> Iterator[None]:
    """Keep a local folder, which is made if it is missing, from other processes of this machine that ask for it so.

    ``patience``: seconds that another one has to give it up; ``busy``: what the error calls the folder.

    Raises:
        TicError: another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(lock, patience):
            raise TicError(f"another process is writing {busy or folder}; wait for it or end it")
        yield
    finally:
        os.close(lock)


def _locked(file: int, patience: float) -> bool:
    """Lock an open file or folder, for which others have ``patience`` seconds to give it up; whether that came off."""
    end = time.monotonic() + patience
    while True:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.5)
        else:
            return True


def upload(local: Path, url: object) -> None:
    """Upload a local file, or copy it to a local path; it appears under its name when all of it is there."""
    if not is_remote(url):
        with open(local, "rb") as source, atomic_open(url, sync=False) as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return
    locate(url).upload(Path(local))


def remove(path: object) -> None:
    """Remove a file or an object; one that is not there is no error."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    found = locate(path)
    with suppress(NotFoundError):
        found.retry(found.delete)


def write_text(path: object, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_open(path, sync=sync) as file:
        file.write(text.encode())


def write_json(path: object, value: object, *, sync: bool = True) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with a newline at its end."""
    write_text(path, json.dumps(value, indent=2) + "\n", sync=sync)
