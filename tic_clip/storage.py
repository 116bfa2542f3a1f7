"""The same functions for local paths and cloud URLs (``s3://``, ``gs://``, ``az://``, through fsspec).

Requests that may succeed later are retried; other errors are one line, ``NotFoundError`` or ``StorageError``.
Credentials come from the usual places. A file appears under its final name only when it is complete.
"""

import errno
import fcntl
import glob
import json
import logging
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import IO, Any

from tic_clip import TicError, check_installed

ATTEMPTS = 6
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
TIMEOUT = 60.0  # seconds that a connection, or the next bytes on it, may take

FILESYSTEMS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # scheme -> package
LASTING = {"FileNotFoundError", "PermissionError", "FileExpired", "ValueError", "TypeError", "ImportError"}
LASTING |= {"NoCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_BUCKET = re.compile("NoSuchBucket|bucket does not exist|ContainerNotFound")


class StorageError(OSError):
    """A request that a store refused, or a store that could not be reached after several attempts."""


class NotFoundError(FileNotFoundError, TicError):
    """A missing file, object or folder."""


def is_remote(path: object) -> bool:
    """Return whether ``path`` is a URL such as ``s3://bucket/key``; ``s3:/bucket`` raises a ``TicError``."""
    if re.match(r"(s3|gs|az|https?):/(?!/)", str(path)):
        raise TicError(f"{path} is not a path; a URL has two slashes: {str(path).replace(':/', '://', 1)}")
    return "://" in str(path)


def local_folder(path: str) -> Path:
    """Return the path of a local folder; raise a ``TicError`` for a URL."""
    if is_remote(path):
        raise TicError(f"{path} is not local; give a folder on a local disk")
    return Path(path)


def to_path(path: object) -> Any:
    """Return a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``; both handle names alike."""
    if not is_remote(path):
        return Path(str(path))
    from cloudpathlib import CloudPath

    url = _normalize(path)
    try:
        return CloudPath(url)
    except Exception as error:  # a missing package or credentials, in the words of many packages
        raise TicError(f"{url}: {error}") from error


def _normalize(url: object) -> str:
    """Return a URL with a lower-case scheme and single slashes; raise a ``TicError`` if it is not a bucket's."""
    scheme, _, rest = str(url).partition("://")
    names = [name for name in rest.split("/") if name]
    if scheme.lower() not in FILESYSTEMS or not names:
        raise TicError(f"{url} is neither a local path nor the URL of an s3://, gs:// or az:// bucket")
    check_installed(FILESYSTEMS[scheme.lower()])
    return f"{scheme.lower()}://{'/'.join(names)}"


def _filesystem(url: str) -> Any:
    """Return fsspec's filesystem for a URL; fsspec caches one per thread and process."""
    import fsspec

    scheme = url.partition("://")[0]
    config = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}
    options = {"config_kwargs": config, "max_concurrency": 1} if scheme == "s3" else {}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback with each error that it raises
    filesystem = fsspec.filesystem(scheme, use_listings_cache=False, **options)
    filesystem.retries = 1  # it is _retry that tries again, in the same way for every cloud
    return filesystem


def _request(url: object, method: str, *arguments: object, **options: object) -> Any:
    """Call a method of the URL's filesystem on the URL; see ``_retry``."""
    url = _normalize(url)
    return _retry(url, lambda: getattr(_filesystem(url), method)(*arguments, url, **options))


def _retry(url: str, call: Callable[[], Any]) -> Any:
    """Return ``call()``; after errors that may pass, try again with exponential backoff."""
    for attempt in count(1):
        try:
            return call()
        except Exception as error:
            final = _final_error(url, error, is_last=attempt == ATTEMPTS)
            if final:
                raise final from error
        time.sleep(BACKOFF * 2**attempt * random.uniform(0.25, 0.5))  # not all workers at the same moment


def _final_error(url: str, error: Any, is_last: bool) -> OSError | None:
    """Return the one-line error to raise if a retry is pointless or this attempt was the last, else None."""
    text = shorten(str(error) or type(error).__name__, 200, placeholder=" …")
    status = getattr(error, "status_code", None) or getattr(error, "code", None)
    if getattr(error, "errno", None) in FULL_DISK:
        return OSError(error.errno, error.strerror)  # atomic_open names the local file
    if isinstance(error, FileNotFoundError) and not NO_BUCKET.search(f"{error} {error.__cause__}"):
        return NotFoundError(f"{url} is missing")
    is_wrong = getattr(error, "errno", None) == errno.EINVAL or status in (400, 401, 403)
    if is_wrong or text.startswith("Forbidden") or not LASTING.isdisjoint(cls.__name__ for cls in type(error).__mro__):
        return StorageError(f"{url}: {text}")
    return StorageError(f"{url} could not be reached, tried {ATTEMPTS} times: {text}") if is_last else None


def exists(path: object) -> bool:
    """Return whether a file, an object or a folder exists."""
    return bool(describe(path))


def is_dir(path: object) -> bool:
    """Return whether a folder exists; in a cloud, whether the prefix has objects."""
    return describe(path).get("type") == "directory"


def size(path: object) -> int:
    """Return the size of a file or object in bytes; raise a ``NotFoundError`` if it is missing."""
    info = describe(path)
    if info.get("type") != "file":
        raise NotFoundError(f"{path} is missing")
    return info["size"]


def describe(path: object) -> dict[str, Any]:
    """Return "type" and "size" of ``path``, or {} if it does not exist."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if is_remote(path):
            return _request(path, "info")
        status = os.stat(path)
        return {"type": "directory" if stat.S_ISDIR(status.st_mode) else "file", "size": status.st_size}
    return {}


def list_files(folder: object, pattern: str = "*") -> list[tuple[str, int]]:
    """Return (path, size in bytes) of the files below ``folder`` that match, sorted by path, without hidden ones.

    ``pattern`` is a glob such as ``*.tar``, ``*/*.tar`` or ``**/*.tar``. A broken link has 0 bytes. Raises a
    ``NotFoundError`` if the folder is missing.
    """
    return [(path, info["size"]) for path, info in _list(folder, pattern) if info["type"] == "file"]


def list_folders(folder: object) -> list[str]:
    """Return the folders in ``folder``, sorted, without hidden ones; raise a ``NotFoundError`` if it is missing."""
    return [path for path, info in _list(folder, "*") if info["type"] == "directory"]


def _list(folder: object, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, {"type", "size"}) of all matches below ``folder``; see ``list_files``."""
    if is_remote(folder):
        from fsspec.utils import glob_translate

        url = _normalize(folder)
        scheme, _, root = url.partition("://")
        is_match = re.compile(re.escape(f"{root}/") + glob_translate(pattern)).match
        found = _request(url, "find", detail=True).values() if "/" in pattern else _request(url, "ls", detail=True)
        names = {info["name"].rstrip("/"): info for info in found}
        matches = [name for name in names if is_match(name) and "/." not in name.removeprefix(root)]
        infos = {f"{scheme}://{name}": names[name] for name in matches}
    else:
        paths = [Path(folder) / name for name in glob.glob(pattern, root_dir=folder, recursive=True)]
        infos = {str(path): describe(path) or {"type": "file", "size": 0} for path in paths}
    if not infos and not is_dir(folder):
        raise NotFoundError(f"{folder} is missing or not a folder")
    return sorted(infos.items(), key=lambda item: item[0].split("/"))


def read_bytes(path: object) -> bytes:
    """Return the content of a file or object; raise a ``NotFoundError`` if it is missing."""
    if is_remote(path):
        return _request(path, "cat_file")
    with open_file(path) as file:
        return file.read()


def read_json(path: object) -> dict[str, Any]:
    """Return the JSON object in ``path``; raise a ``TicError`` if it is missing or not a JSON object."""
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TicError(f"{path} is not a JSON object")
    return value


def download(url: object, local: Path) -> None:
    """Copy an object (one GET) or a local file to ``local``, atomically."""
    with atomic_open(local, sync=False) as file:
        if is_remote(url):
            _request(url, "get_file", lpath=file.name)
        else:
            size(url)  # raises if it is missing
            shutil.copyfile(url, file.name)


def upload(local: Path, url: object) -> None:
    """Upload a local file, or copy it to a local path, atomically."""
    if is_remote(url):
        _request(url, "put_file", str(local))
    else:
        download(local, Path(url))


def local_copy(path: object, folder: Path) -> Path:
    """Return ``path`` if it is local, else the path of its copy in ``folder``, downloading it if needed."""
    if not is_remote(path):
        return Path(path)
    copy = folder / _normalize(path).replace("://", "/")
    if not copy.exists():
        download(path, copy)
    return copy


def open_file(path: object, block_size: int = 1 << 18) -> IO[bytes]:
    """Open a file or object for random access; read ``block_size`` bytes of an object ahead.

    Raises a ``NotFoundError`` if it is missing; a read raises a ``StorageError`` if the object has changed since.
    """
    if not is_remote(path):
        size(path)
        return open(path, "rb")
    file = _request(path, "open", mode="rb", block_size=block_size, cache_type="readahead")
    fetch, url = file.cache.fetcher, _normalize(path)
    file.cache.fetcher = lambda start, stop: _retry(url, lambda: fetch(start, stop))
    return file


@contextmanager
def atomic_open(path: object, *, sync: bool = True) -> Iterator[IO]:
    """Open ``path`` for writing; replace it when the block ends without an error, after an fsync if ``sync``."""
    if is_remote(path):
        with temporary_folder() as folder:
            with open(folder / "object", "wb") as file:
                yield file
            upload(folder / "object", path)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: object) -> None:
    """Remove a file or an object if it exists."""
    with suppress(FileNotFoundError):
        if is_remote(path):
            _request(path, "rm_file")
        else:
            os.unlink(path)


def write_text(path: object, text: str, *, sync: bool = True) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_open(path, sync=sync) as file:
        file.write(text.encode())


def write_json(path: object, value: object, *, sync: bool = True) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON that ends in a newline."""
    write_text(path, json.dumps(value, indent=2) + "\n", sync=sync)


@contextmanager
def lock_folder(folder: Path, timeout: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on a local folder, creating it if needed; wait up to ``timeout`` seconds for it.

    If the file system has no locks (some NFS, Lustre), warn and go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + timeout
    with ExitStack() as stack:
        try:
            while not _lock(folder, stack):
                if time.monotonic() >= end:
                    raise TicError(f"another process is writing {folder}; wait for it or end it")
                time.sleep(0.5)
        except OSError as error:
            note = f"no lock ({error.strerror}); do not start two processes for this folder"
            print(f"warning: {folder}: {note}", file=sys.stderr)
        yield


@contextmanager
def temporary_folder(prefix: str = "tic-clip-") -> Iterator[Path]:
    """Yield a new folder in TMPDIR, removed at the end; also remove those of this machine's killed processes.

    A folder whose process is alive is locked. Its name has the machine's, as others may share TMPDIR without locks.
    """
    prefix += f"{os.uname().nodename}-"
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), ExitStack() as stack:  # without locks, keep leftovers
            if _lock(leftover, stack):
                shutil.rmtree(leftover)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{prefix}"))  # hidden from others until it is locked
    folder = unlocked.with_name(unlocked.name[1:])
    with ExitStack() as stack:
        with suppress(OSError):
            _lock(unlocked, stack)
        unlocked.rename(folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Lock a folder until ``stack`` closes; return False if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
