"""Local paths and cloud URLs (``s3://``, ``gs://``, ``az://``) through the same functions; clouds through fsspec.

Requests that may succeed later are tried again. What remains is one line: ``NotFoundError``, or ``StorageError`` in the
store's words. Credentials come from the usual places. Nothing is visible under its final name before it is complete.
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
    """A store that refuses a request, or could not be reached after several attempts."""


class NotFoundError(FileNotFoundError, TicError):
    """A file, an object or a folder that does not exist."""


def is_remote(path: object) -> bool:
    """Return whether ``path`` is a URL such as ``s3://bucket/key``; ``s3:/bucket`` raises a ``TicError``."""
    if re.match(r"(s3|gs|az|https?):/(?!/)", str(path)):
        raise TicError(f"{path} is not a path; a URL has two slashes: {str(path).replace(':/', '://', 1)}")
    return "://" in str(path)


def local_folder(path: str) -> Path:
    """Return the path of a folder of this machine; raise a ``TicError`` if it is in a cloud."""
    if is_remote(path):
        raise TicError(f"{path} is not local; give a folder on a local disk")
    return Path(path)


def to_path(path: object) -> Any:
    """Return a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``, which share their interface for names."""
    if not is_remote(path):
        return Path(str(path))
    from cloudpathlib import CloudPath

    url = _normalize(path)
    try:
        return CloudPath(url)
    except Exception as error:  # a missing package or credentials, in the words of many packages
        raise TicError(f"{url}: {error}") from error


def _normalize(url: object) -> str:
    """Return a URL with its scheme in lower case and without repeated slashes, or raise a ``TicError``."""
    scheme, _, rest = str(url).partition("://")
    names = [name for name in rest.split("/") if name]
    if scheme.lower() not in FILESYSTEMS or not names:
        raise TicError(f"{url} is neither a local path nor the URL of an s3://, gs:// or az:// bucket")
    check_installed(FILESYSTEMS[scheme.lower()])
    return f"{scheme.lower()}://{'/'.join(names)}"


def _filesystem(url: str) -> Any:
    """Return fsspec's filesystem of a URL; fsspec keeps one for each thread and forgets them in a forked process."""
    import fsspec

    scheme = url.partition("://")[0]
    config = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}
    options = {"config_kwargs": config, "max_concurrency": 1} if scheme == "s3" else {}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback with each error that it raises
    filesystem = fsspec.filesystem(scheme, use_listings_cache=False, **options)
    filesystem.retries = 1  # it is _retry that tries again, in the same way for every cloud
    return filesystem


def _request(url: object, method: str, *arguments: object, **options: object) -> Any:
    """Return what a method of the URL's filesystem returns for the URL; see ``_retry``."""
    url = _normalize(url)
    return _retry(url, lambda: getattr(_filesystem(url), method)(*arguments, url, **options))


def _retry(url: str, call: Callable[[], Any]) -> Any:
    """Return ``call()``, tried again with growing pauses after all errors but lasting ones."""
    for attempt in count(1):
        try:
            return call()
        except Exception as error:
            final = _final_error(url, error, is_last=attempt == ATTEMPTS)
            if final:
                raise final from error
        time.sleep(BACKOFF * 2**attempt * random.uniform(0.25, 0.5))  # not all workers at the same moment


def _final_error(url: str, error: Any, is_last: bool) -> OSError | None:
    """Return the error to raise, in one line, if another attempt is pointless or the last has failed, else None."""
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
    """Return whether a folder exists; in a cloud, whether an object lies below that name."""
    return describe(path).get("type") == "directory"


def size(path: object) -> int:
    """Return the bytes of a file or an object, or raise a ``NotFoundError``."""
    info = describe(path)
    if info.get("type") != "file":
        raise NotFoundError(f"{path} is missing")
    return info["size"]


def describe(path: object) -> dict[str, Any]:
    """Return "type" and "size" of what lies at ``path``, or nothing."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if is_remote(path):
            return _request(path, "info")
        status = os.stat(path)
        return {"type": "directory" if stat.S_ISDIR(status.st_mode) else "file", "size": status.st_size}
    return {}


def list_files(folder: object, pattern: str = "*") -> list[tuple[str, int]]:
    """Return (path, size in bytes) of the files below ``folder`` that match, sorted by path, hidden ones left out.

    ``pattern`` is matched name by name, as in ``*.tar`` or ``*/*.tar``; ``**`` stands for any number of folders.
    A link to nothing is listed with 0 bytes. A missing folder raises a ``NotFoundError``.
    """
    return [(path, info["size"]) for path, info in _list(folder, pattern) if info["type"] == "file"]


def list_folders(folder: object) -> list[str]:
    """Return the folders in ``folder``, sorted, hidden ones left out; raise a ``NotFoundError`` if it is missing."""
    return [path for path, info in _list(folder, "*") if info["type"] == "directory"]


def _list(folder: object, pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, its "type" and "size") of what matches below ``folder``; see ``list_files``."""
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
    """Return the content of a file or an object, or raise a ``NotFoundError``."""
    if is_remote(path):
        return _request(path, "cat_file")
    with open_file(path) as file:
        return file.read()


def read_json(path: object) -> dict[str, Any]:
    """Return the JSON object in ``path``; raise a ``TicError`` if it is missing or something else."""
    data = read_bytes(path)
    try:
        value = json.loads(data)
    except ValueError as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise TicError(f"{path} is not a JSON object")
    return value


def download(url: object, local: Path) -> None:
    """Copy an object, with one GET, or a local file to ``local``."""
    with atomic_open(local, sync=False) as file:
        if is_remote(url):
            _request(url, "get_file", lpath=file.name)
        else:
            size(url)  # raises if it is missing
            shutil.copyfile(url, file.name)


def upload(local: Path, url: object) -> None:
    """Upload a local file, or copy it to a local path; it appears under its name when it is complete."""
    if is_remote(url):
        _request(url, "put_file", str(local))
    else:
        download(local, Path(url))


def local_copy(path: object, folder: Path) -> Path:
    """Return ``path`` itself if it is local, else its copy in ``folder``, downloaded if it is not there yet."""
    if not is_remote(path):
        return Path(path)
    copy = folder / _normalize(path).replace("://", "/")
    if not copy.exists():
        download(path, copy)
    return copy


def open_file(path: object, block_size: int = 1 << 18) -> IO[bytes]:
    """Open a file or an object for reads at any position; of an object, ``block_size`` bytes are read ahead.

    Raises a ``NotFoundError`` if there is none; a read raises a ``StorageError`` if the object has changed since.
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
    """Open ``path`` for writing; it changes when the block ends without an error, with ``sync`` on the disk as well."""
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
    """Hold an exclusive lock on a local folder, creating it if needed; wait ``timeout`` seconds for another process.

    Where the file system has no locks (some NFS, Lustre), warn and go on.
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
    """Make a folder in TMPDIR for the block; remove those that killed processes left there.

    A lock shows that its process lives. Names hold the machine's, for a TMPDIR that others share and can't lock.
    """
    prefix += f"{os.uname().nodename}-"
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), ExitStack() as stack:  # without locks, leftovers stay
            if _lock(leftover, stack):
                shutil.rmtree(leftover)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{prefix}"))  # hidden, so that others don't take it for a leftover
    folder = unlocked.with_name(unlocked.name[1:])
    with ExitStack() as stack:
        with suppress(OSError):
            _lock(unlocked, stack)
        unlocked.rename(folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Lock a folder until ``stack`` is closed; return False if another process has it locked."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    stack.callback(os.close, descriptor)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
