"""Local paths and cloud URLs (``s3://``, ``gs://``, ``az://``) through the same functions; clouds through fsspec.

Requests that may succeed later are tried again. What remains is one line: ``NotFoundError``, ``TicError`` for other
lasting errors (no access, no such bucket), ``StorageError`` for a store out of reach. Credentials come from the usual
places. Nothing is visible under its final name before it is complete.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import random
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

from tic_clip import TicError
from tic_clip.locks import lock_folder, temporary_folder  # noqa: F401 (also storage.lock_folder)

ATTEMPTS = 6
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one, at most 20
TIMEOUT = 60.0  # seconds that a connection, or the next bytes on it, may take

SCHEMES = ("s3", "gs", "az")
PASSING = {"OSError", "EOFError", "ConnectionError", "HTTPClientError", "IncompleteReadError", "ResponseParserError"}
PASSING |= {"ClientError", "ChecksumError", "TransportError", "ServiceRequestError", "ServiceResponseError"}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class StorageError(OSError):
    """A store that could not be reached after several attempts."""


class NotFoundError(FileNotFoundError, TicError):
    """A file, an object or a folder that does not exist."""


def is_remote(path: object) -> bool:
    """Return whether ``path`` is a URL such as ``s3://bucket/key``; ``s3:/bucket`` raises a ``TicError``."""
    if re.match(r"(s3|gs|az|https?):/(?!/)", str(path)):
        raise TicError(f"{path} is not a path; a URL has two slashes: {str(path).replace(':/', '://', 1)}")
    return "://" in str(path)


def to_path(path: object) -> Any:
    """Return a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``, which share their interface for names."""
    if not is_remote(path):
        return Path(str(path))
    from cloudpathlib import CloudPath

    url = _normalize(path)
    try:
        return CloudPath(url)
    except Exception as error:  # a missing package or credentials, in the words of many packages
        raise TicError(f"{url}: {_one_line(error)}") from error


def _normalize(url: object) -> str:
    """Return a URL with its scheme in lower case and without repeated slashes, or raise a ``TicError``."""
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
    if scheme == "s3":  # it is _retry that tries again, in the same way for every cloud
        waits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
        options |= {"config_kwargs": {**waits, "retries": {"total_max_attempts": 1}}, "max_concurrency": 1}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback with each error that it raises
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise TicError(f"{url} needs a package that is not installed: pip install 'tic-clip[{scheme}]'") from error
    filesystem.retries = 1
    return filesystem


def _request(url: object, method: str, **kwargs: object) -> Any:
    """Return what a method of the URL's filesystem returns for the URL; see ``_retry``."""
    url = _normalize(url)
    return _retry(url, lambda: getattr(_filesystem(url), method)(url, **kwargs))


def _retry(url: str, call: Callable[[], Any]) -> Any:
    """Return ``call()``, tried again with growing pauses after errors that may pass."""
    for attempt in range(ATTEMPTS):
        if attempt:
            pause = min(BACKOFF * 2 ** (attempt - 1), 20.0)
            time.sleep(pause * random.uniform(0.5, 1))  # not all workers at the same moment
        try:
            return call()
        except Exception as error:
            if isinstance(error, TicError) or getattr(error, "errno", None) in FULL_DISK:
                raise
            lasting = _lasting_error(url, error)
            if lasting:
                raise lasting from error
            last = error
    raise StorageError(f"{url} could not be reached, tried {ATTEMPTS} times: {_one_line(last)}") from last


def _lasting_error(url: str, error: Exception) -> TicError | None:
    """Return the error to raise if another attempt is pointless, else None."""
    text, status = _one_line(error), _http_status(error)
    if isinstance(error, FileNotFoundError):
        is_bucket = re.search("NoSuchBucket|bucket does not exist|ContainerNotFound", f"{text} {error.__cause__}")
        return TicError(f"{url}: no such bucket ({text})") if is_bucket else NotFoundError(f"{url} is missing")
    if isinstance(error, PermissionError) or status in (401, 403) or text.startswith("Forbidden"):
        return TicError(f"{url}: no access ({text})")
    if type(error).__name__ == "FileExpired":
        return TicError(f"{url}: changed while it was read")
    is_passing = not PASSING.isdisjoint(cls.__name__ for cls in type(error).__mro__)
    if status and not isinstance(error, TimeoutError):
        is_passing = status >= 500 or status in (408, 409, 429)
    return None if is_passing else TicError(f"{url}: {text}")


def _http_status(error: Exception) -> int | None:
    """Return the status of a store's answer, if the error is one."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):  # of botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = str(getattr(error, "status_code", None) or getattr(error, "code", None))
    return int(status) if status.isdecimal() else None


def _one_line(error: BaseException) -> str:
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …")


def exists(path: object) -> bool:
    """Return whether a file, an object or a folder exists."""
    return _info(path) is not None


def is_dir(path: object) -> bool:
    """Return whether a folder exists; in a cloud, whether an object lies below that name."""
    return (_info(path) or {}).get("type") == "directory"


def size(path: object) -> int:
    """Return the bytes of a file or an object, or raise a ``NotFoundError``."""
    info = _info(path)
    if info is None or info["type"] == "directory":
        raise NotFoundError(f"{path} is missing")
    return info["size"]


def _info(path: object) -> dict[str, Any] | None:
    """Return "type" and "size" of what lies at ``path``, or None."""
    if is_remote(path):
        with suppress(NotFoundError):
            return _request(path, "info")
        return None
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {"type": "directory" if stat.S_ISDIR(status.st_mode) else "file", "size": status.st_size}


def list_files(folder: object, pattern: str = "*") -> list[tuple[str, int]]:
    """Return (path, size in bytes) of the files below ``folder`` that match, sorted by path, hidden ones left out.

    ``pattern`` is matched name by name, as in ``*.tar`` or ``*/*.tar``; ``**`` stands for any number of folders. A link
    to nothing is listed with 0 bytes. One request lists 1,000 objects. A missing folder raises a ``NotFoundError``.
    """
    if is_remote(folder):
        from fsspec.utils import glob_translate

        is_match = re.compile(glob_translate(pattern)).match
        entries = _list_remote(folder, deep="/" in pattern).items()
        sizes = {name: entry["size"] for name, entry in entries if entry["type"] == "file" and is_match(name)}
    else:
        if not Path(folder).is_dir():
            raise NotFoundError(f"{folder} is missing or not a folder")
        names = glob.glob(pattern, root_dir=folder, recursive=True)
        infos = {name: _info(Path(folder) / name) or {"type": "file", "size": 0} for name in names}
        sizes = {name: info["size"] for name, info in infos.items() if info["type"] == "file"}
    return [(_join(folder, name), sizes[name]) for name in sorted(sizes, key=lambda name: name.split("/"))]


def list_folders(folder: object) -> list[str]:
    """Return the folders in ``folder``, sorted, hidden ones left out; raise a ``NotFoundError`` if it is missing."""
    if is_remote(folder):
        entries = _list_remote(folder, deep=False).items()
        names = [name for name, entry in entries if entry["type"] == "directory"]
    else:
        if not Path(folder).is_dir():
            raise NotFoundError(f"{folder} is missing or not a folder")
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    return [_join(folder, name) for name in sorted(names)]


def _list_remote(url: object, deep: bool) -> dict[str, dict[str, Any]]:
    """Return name below the URL -> fsspec's facts, for what lies in a cloud folder, hidden names left out."""
    root = _normalize(url).partition("://")[2]
    entries = []
    with suppress(NotFoundError):
        entries = _request(url, "find", detail=True).values() if deep else _request(url, "ls", detail=True)
    names = {entry["name"].rstrip("/").removeprefix(f"{root}/"): entry for entry in entries}
    names.pop(root, None)  # an object that marks the folder, or an object of the folder's name
    if not names and "/" in root:
        raise NotFoundError(f"{url} is missing or not a folder")
    return {name: entry for name, entry in names.items() if not any(part[0] == "." for part in name.split("/"))}


def _join(folder: object, name: str) -> str:
    return f"{_normalize(folder)}/{name}" if is_remote(folder) else str(Path(folder) / name)


def read_bytes(path: object) -> bytes:
    """Return the content of a file or an object, or raise a ``NotFoundError``."""
    if is_remote(path):
        return _request(path, "cat_file")
    size(path)
    return Path(path).read_bytes()


def read_json(path: object) -> Any:
    """Return the JSON value in ``path``; raise a ``TicError`` if it is missing or not valid JSON."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: object) -> dict[str, Any]:
    """Return the JSON object in ``path``; raise a ``TicError`` if it is missing or something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise TicError(f"{path} is not a JSON object")
    return value


def download(url: object, local: Path) -> None:
    """Copy an object, with one GET, or a local file to ``local``; raise a ``NotFoundError`` if there is none."""
    if not is_remote(url):
        size(url)
        upload(Path(url), local)
        return
    with atomic_open(local, sync=False) as file:
        _request(url, "get_file", lpath=file.name)


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

    Raises a ``NotFoundError`` if there is none; a read raises a ``TicError`` if the object has changed since.
    """
    if not is_remote(path):
        size(path)
        return open(path, "rb")
    file = _request(path, "open", mode="rb", block_size=block_size, cache_type="readahead")
    fetch, url = file.cache.fetcher, _normalize(path)
    file.cache.fetcher = lambda start, stop: _retry(url, lambda: fetch(start, stop))
    return file


@contextmanager
def atomic_open(path: object, mode: str = "wb", *, sync: bool = True) -> Iterator[IO]:
    """Open ``path`` for writing so that it changes only when the block ends without an error.

    ``sync``: flush it to the disk by then.
    """
    if is_remote(path):
        _normalize(path)  # a wrong URL is an error before anything is written
        with temporary_folder() as folder:
            with atomic_open(folder / "object", mode, sync=False) as file:
                yield file
            upload(folder / "object", path)
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
