"""Local paths and cloud URLs (``s3://``, ``gs://``, ``az://``) as one thing, through fsspec.

Errors that may pass are retried. What remains is one line: ``NotFoundError``, ``TicError`` for other lasting errors (no
access, no such bucket), ``StorageError`` when the store could not be reached. Credentials come from the usual places.

Nothing is visible under its final name before it is complete: local files are written beside it and renamed, objects
are uploaded from a complete local file.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tic_clip import TicError

ATTEMPTS = 6
"""Tries of a request before the store counts as out of reach."""

BACKOFF = 0.5
"""Seconds before the second try; doubled before each further one, at most 20."""

TIMEOUT = 60.0
"""Seconds that a connection, or the next bytes on it, may take."""

SCHEMES = ("s3", "gs", "az")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class StorageError(OSError):
    """A store that could not be reached after several tries."""


class NotFoundError(FileNotFoundError, TicError):
    """A file, an object or a folder that does not exist."""


def is_remote(path: object) -> bool:
    """Return whether ``path`` is a URL such as ``s3://bucket/key``.

    Raises:
        TicError: a URL with one slash, which would be a folder called ``s3:``.
    """
    if re.match(r"(s3|gs|az|https?):/(?!/)", str(path)):
        raise TicError(f"{path} is not a path; a URL has two slashes: {str(path).replace(':/', '://', 1)}")
    return "://" in str(path)


def to_path(path: object) -> Any:
    """Return ``path`` as a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``, which share their interface for names.

    Raises:
        TicError: a URL of an unknown cloud, or one whose package or credentials are missing.
    """
    if not is_remote(path):
        return Path(str(path))
    from cloudpathlib import CloudPath

    url = _normalize(path)
    try:
        return CloudPath(url)
    except Exception as error:
        raise TicError(f"{url}: {_one_line(error)}") from error


# --- Requests to a store ---


def _normalize(url: object) -> str:
    """Return a URL with its scheme in lower case and without repeated slashes.

    Raises:
        TicError: unknown scheme, or no bucket.
    """
    scheme, _, rest = str(url).partition("://")
    names = [name for name in rest.split("/") if name]
    if scheme.lower() not in SCHEMES:
        raise TicError(f"{url} is neither a local path nor an s3://, gs:// or az:// URL")
    if not names:
        raise TicError(f"{url} has no bucket name")
    return f"{scheme.lower()}://{'/'.join(names)}"


def _filesystem(url: str) -> Any:
    """Return fsspec's filesystem of a URL; fsspec keeps one for each thread and forgets them in a forked process."""
    import fsspec

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme == "s3":  # retries are ours, the same for every cloud
        waits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
        options |= {"config_kwargs": {**waits, "retries": {"total_max_attempts": 1}}, "max_concurrency": 1}
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise TicError(f"{url} needs a package that is not installed: pip install 'tic-clip[{scheme}]'") from error
    filesystem.retries = 1
    return filesystem


def _request(url: object, method: str, *args: object, **kwargs: object) -> Any:
    """Call a method of a URL's filesystem with the URL's path and ``args``; see ``_retry``."""
    url = _normalize(url)
    return _retry(url, lambda: getattr(_filesystem(url), method)(url, *args, **kwargs))


def _retry(url: str, call: Callable[[], Any]) -> Any:
    """Return ``call()``, retried with growing pauses after errors that may pass.

    Raises:
        NotFoundError: the object does not exist.
        TicError: another error that lasts.
        StorageError: the last try failed as well.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            pause = min(BACKOFF * 2 ** (attempt - 1), 20.0)
            time.sleep(pause * random.uniform(0.5, 1))  # not all workers at the same moment
        try:
            return call()
        except TicError:
            raise
        except Exception as error:
            lasting = _lasting_error(url, error)
            if lasting:
                raise lasting from error
            last = error
    raise StorageError(f"{url} could not be reached, tried {ATTEMPTS} times: {_one_line(last)}") from last


def _lasting_error(url: str, error: Exception) -> TicError | None:
    """Return the error to raise if a retry is pointless, else None."""
    text = _one_line(error)
    if isinstance(error, FileNotFoundError):
        is_bucket = re.search("NoSuchBucket|bucket does not exist|ContainerNotFound", f"{text} {error.__cause__}")
        return TicError(f"{url}: no such bucket ({text})") if is_bucket else NotFoundError(f"{url} is missing")
    if isinstance(error, PermissionError):
        return TicError(f"{url}: no access ({text})")
    if type(error).__name__ == "FileExpired":
        return TicError(f"{url}: changed while it was read")
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int) or (isinstance(status, str) and status.isdigit()):
        return None if int(status) in (408, 409, 429) or int(status) >= 500 else TicError(f"{url}: {text}")
    passing: tuple[type[Exception], ...] = (OSError, EOFError)
    if "s3fs" in sys.modules:
        from aiohttp import ClientError
        from botocore.exceptions import ConnectionError
        from s3fs.core import S3_RETRYABLE_ERRORS

        passing += (ClientError, ConnectionError, *S3_RETRYABLE_ERRORS)
    return None if isinstance(error, passing) else TicError(f"{url}: {text}")


def _one_line(error: BaseException) -> str:
    """Return an error's text, or its type's name, cut to what fits into one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


# --- Listing ---


def exists(path: object) -> bool:
    """Return whether a file, an object or a folder exists."""
    if not is_remote(path):
        return Path(path).exists()
    return _info(path) is not None


def is_dir(path: object) -> bool:
    """Return whether a folder exists; in a cloud, whether an object lies below that name."""
    if not is_remote(path):
        return Path(path).is_dir()
    info = _info(path)
    return info is not None and info["type"] == "directory"


def size(path: object) -> int:
    """Return the bytes of a file or an object.

    Raises:
        NotFoundError: there is none.
    """
    if is_remote(path):
        info = _info(path)
        if info is None or info["type"] == "directory":
            raise NotFoundError(f"{_normalize(path)} is missing")
        return info["size"]
    with _named_if_missing(path):
        return Path(path).stat().st_size


def _info(url: object) -> dict[str, Any] | None:
    """Return fsspec's facts of an object or a folder in a cloud, or None."""
    with suppress(NotFoundError):
        return _request(url, "info")


@contextmanager
def _named_if_missing(path: object) -> Iterator[None]:
    """Turn the operating system's error of a missing file into a ``NotFoundError``."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"{path} is missing") from None


def list_files(folder: object, pattern: str = "*") -> list[tuple[str, int]]:
    """Return (path, size in bytes) of the files below ``folder`` that match, sorted by path, hidden ones left out.

    ``pattern`` is matched name by name, as in ``*.tar`` or ``*/*.tar``; ``**`` stands for any number of folders. A link
    to nothing is listed with 0 bytes. One request lists 1,000 objects.

    Raises:
        NotFoundError: there is no such folder.
    """
    if is_remote(folder):
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate(pattern)).match
        entries = _list_remote(folder, deep="/" in pattern).items()
        sizes = {name: entry["size"] for name, entry in entries if entry["type"] == "file" and matches(name)}
        folder = _normalize(folder)
    else:
        _check_folder(folder)
        folder = Path(folder)
        names = glob.glob(pattern, root_dir=folder, recursive=True)
        sizes = {name: _size_or_zero(folder / name) for name in names if not os.path.isdir(folder / name)}
    return [(_join(folder, name), sizes[name]) for name in sorted(sizes, key=lambda name: name.split("/"))]


def list_folders(folder: object) -> list[str]:
    """Return the folders in ``folder``, sorted by name, hidden ones left out.

    Raises:
        NotFoundError: there is no such folder.
    """
    if is_remote(folder):
        entries = _list_remote(folder, deep=False).items()
        names = [name for name, entry in entries if entry["type"] == "directory"]
        return [_join(_normalize(folder), name) for name in sorted(names)]
    _check_folder(folder)
    return sorted(_join(folder, entry.name) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _list_remote(url: object, deep: bool) -> dict[str, dict[str, Any]]:
    """Return name below the URL -> fsspec's facts, for what lies in a cloud folder, hidden names left out."""
    url = _normalize(url)
    root = url.partition("://")[2]
    try:
        entries = _request(url, "find", detail=True).values() if deep else _request(url, "ls", detail=True)
    except NotFoundError:
        entries = []
    names = {entry["name"].rstrip("/").removeprefix(f"{root}/"): entry for entry in entries}
    names.pop(root, None)  # an object that marks the folder, or an object of the folder's name
    if not names and "/" in root:
        raise NotFoundError(f"{url} is missing or not a folder")
    return {name: entry for name, entry in names.items() if not any(part[0] == "." for part in name.split("/"))}


def _check_folder(folder: object) -> None:
    if not Path(folder).is_dir():
        raise NotFoundError(f"{folder} is missing or not a folder")


def _size_or_zero(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _join(folder: object, name: str) -> str:
    return f"{folder}/{name}" if is_remote(folder) else str(Path(folder) / name)


# --- Reading ---


def read_bytes(path: object) -> bytes:
    """Return the content of a file or an object.

    Raises:
        NotFoundError: there is none.
    """
    if is_remote(path):
        return _request(path, "cat_file")
    with _named_if_missing(path):
        return Path(path).read_bytes()


def read_json(path: object) -> Any:
    """Return the JSON value in ``path``.

    Raises:
        TicError: ``path`` is missing or not valid JSON.
    """
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: object) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        TicError: ``path`` is missing or something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise TicError(f"{path} is not a JSON object")
    return value


def download(url: object, local: Path) -> None:
    """Copy an object, with one GET, or a local file to the local file ``local``, which appears when it is complete.

    Raises:
        NotFoundError: there is no such object.
    """
    if not is_remote(url):
        with _named_if_missing(url):
            upload(Path(url), local)
        return
    with atomic_open(local, sync=False) as file:
        _request(url, "get_file", file.name)


def local_copy(path: object, folder: Path) -> Path:
    """Return ``path`` itself if it is local, else its copy in ``folder``, downloaded if it is not there yet."""
    if not is_remote(path):
        return Path(path)
    url = _normalize(path)
    copy = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]
    if not copy.exists():
        download(url, copy)
    return copy


def open_file(path: object, block_size: int = 1 << 18) -> IO[bytes]:
    """Open a file or an object for reads at any position; of an object, ``block_size`` bytes are read ahead.

    Raises:
        NotFoundError: there is none.
        TicError: from a read, if the object has changed since.
    """
    if not is_remote(path):
        with _named_if_missing(path):
            return open(path, "rb")
    file = _request(path, "open", "rb", block_size=block_size, cache_type="readahead")
    fetch, url = file.cache.fetcher, _normalize(path)
    file.cache.fetcher = lambda start, stop: _retry(url, lambda: fetch(start, stop))
    return file


# --- Writing ---


@contextmanager
def atomic_open(path: object, mode: str = "wb", *, sync: bool = True) -> Iterator[IO]:
    """Open ``path`` for writing so that it changes only when the block ends without an error.

    ``sync``: flush it to the disk by then.
    """
    if is_remote(path):
        url = _normalize(path)
        with tempfile.TemporaryDirectory() as folder:
            with open(Path(folder) / "object", mode) as file:
                yield file
            upload(Path(folder) / "object", url)
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


def upload(local: Path, url: object) -> None:
    """Upload a local file, or copy it to a local path; it appears under its name when it is complete."""
    with open(local, "rb") as source:  # also: a missing local file is not an error of the store
        if is_remote(url):
            url = _normalize(url)
            _retry(url, lambda: _filesystem(url).put_file(str(local), url))
            return
        with atomic_open(url, sync=False) as file:
            shutil.copyfileobj(source, file, 1 << 20)


def remove(path: object) -> None:
    """Remove a file or an object if it exists."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    with suppress(NotFoundError):
        _request(path, "rm_file")


def write_text(path: object, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_open(path, sync=sync) as file:
        file.write(text.encode())


def write_json(path: object, value: object, *, sync: bool = True) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON that ends in a newline."""
    write_text(path, json.dumps(value, indent=2) + "\n", sync=sync)


# --- Locks ---


@contextmanager
def lock_folder(folder: Path, timeout: float = 0.0, label: object = None) -> Iterator[None]:
    """Hold an exclusive lock on a local folder, creating it if needed; wait ``timeout`` seconds for another process.

    ``label`` is what the error calls the folder. Where the file system has no locks (some NFS, Lustre), warn and go on.

    Raises:
        TicError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + timeout
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        while not _lock(descriptor, folder):
            if time.monotonic() >= end:
                raise TicError(f"another process is writing {label or folder}; wait for it or end it")
            time.sleep(0.5)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    """Lock an open folder; return False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        note = "the file system has no locks; do not start two processes for this folder"
        print(f"warning: {folder}: {note}", file=sys.stderr)
    return True


@contextmanager
def temporary_folder(prefix: str = "tic-clip-") -> Iterator[Path]:
    """Make a folder in TMPDIR and remove it at the end of the block; remove those that killed processes left there."""
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError, TicError):
            _remove_unlocked(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix) as name, lock_folder(Path(name)):
        yield Path(name)


def _remove_unlocked(folder: Path) -> None:
    """Remove a folder of this user that no process holds."""
    if folder.stat().st_uid == os.getuid():
        with lock_folder(folder):
            shutil.rmtree(folder)
