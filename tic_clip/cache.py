"""Cache shards of a cloud on a local disk, shared by all processes of a machine; evict the least recently used.

A copy's name has a digest of the object's URL and tag, and its size. ``NAME.lock`` is held while a process fetches it.
"""

import fcntl
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import chain, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from tic_clip import TicError, storage

T = TypeVar("T")

GB = 10**9
STEM = "[0-9a-f]" * 24 + "-*[0-9]"  # a glob: the digest and the bytes
THREADS = 2  # of a process, which fetch ahead


class Cache:
    """At most ``limit`` bytes of copies in ``folder``; POSIX allows to remove one while it is read."""

    def __init__(self, folder: str, limit: float) -> None:
        self.folder, self.limit = Path(folder), limit
        self.urls: SimpleQueue[str] = SimpleQueue()  # to fetch ahead
        for _ in range(THREADS):
            threading.Thread(target=self._fetch_ahead, daemon=True).start()

    def open(self, url: str) -> IO[bytes]:
        """Open the copy of an object, fetching it if no process has."""
        size, stem = identify(url)
        copy, lock = (self.folder / f"{stem}.{suffix}" for suffix in ("tar", "lock"))
        while not (file := _open_complete(copy, size)):
            with _exclusive(self.folder):
                held = self._reserve(url, size, lock)
            if held:
                try:
                    if not copy.exists():
                        storage.download(url, copy)
                    if file := _open_complete(copy, size):
                        return file
                    raise storage.StorageError(f"{url} changed while it was read: start again")
                finally:
                    lock.unlink()
                    held.close()
            _wait(lock)
        return file

    def prefetch(self, url: str) -> None:
        """Fetch an object in the background if needed; errors appear when it is opened."""
        if storage.is_remote(url):
            self.urls.put(url)

    def ahead(self, items: Iterable[T], url_of: Callable[[T], str]) -> Iterator[T]:
        """Yield ``items``, fetching the next one's object in the background."""
        for item, following in pairwise(chain(items, [None])):
            if following is not None:
                self.prefetch(url_of(following))
            yield item

    def _fetch_ahead(self) -> None:
        while True:
            url = self.urls.get()
            with suppress(Exception):
                self.open(url).close()

    def _reserve(self, url: str, size: int, lock: Path) -> IO[bytes] | None:
        """Return a held lock for an object, with room made for it; None if other fetches must end first."""
        copies, pending = self._scan()
        if lock.stem in pending:
            return None
        free = shutil.disk_usage(self.folder).free
        room = min(self.limit - sum(n for _, n, _ in copies), free) - sum(pending.values())
        for _, bytes_of_copy, path in sorted(copies):
            if room >= size or size > self.limit:
                break
            path.unlink(missing_ok=True)
            room += bytes_of_copy
        if room >= size:
            file = open(lock, "wb")  # noqa: SIM115  held until the copy is there
            _flock(file, fcntl.LOCK_EX)
            return file
        if size > self.limit or not pending:
            most = f"at most {self.limit / GB:g} GB (--cache_gb), and the disk has {free / GB:.3g} GB free"
            raise TicError(f"{url} has {size / GB:.3g} GB, more than fits into the cache {self.folder}: {most}")
        return None

    def _scan(self) -> tuple[list[tuple[float, int, Path]], dict[str, int]]:
        """Return (last use, bytes, path) of each evictable copy, and stem -> bytes of what is being fetched."""
        pending, copies = {}, []
        for lock in self.folder.glob(f"{STEM}.lock"):
            if _is_held(lock):
                pending[lock.stem] = int(lock.stem.partition("-")[2])
            else:  # a process was killed
                for leftover in (*self.folder.glob(f".{lock.stem}.tar.*.tmp"), lock):
                    leftover.unlink(missing_ok=True)
        for copy in self.folder.glob(f"{STEM}.tar"):
            with suppress(FileNotFoundError):
                if copy.stem not in pending:
                    copies.append((copy.stat().st_mtime, copy.stat().st_size, copy))
        return copies, pending


def open_cache(keep: dict[str, Any]) -> Cache | None:
    """Return this process's cache from a plan's ``keep``, or None without one."""
    return _open_cache(keep["cache"], keep["cache_gb"] * GB, os.getpid()) if keep.get("cache") else None


@functools.cache
def _open_cache(folder: str, limit: float, _: int) -> Cache:
    return Cache(folder, limit)


@functools.cache
def identify(url: str) -> tuple[int, str]:
    """Return the size of an object and the stem of its copy's name; ask the store once per process."""
    info = storage.describe(url)
    if info.get("type") != "file":
        raise storage.NotFoundError(f"{url} is missing")
    tag = info.get("ETag") or info.get("etag")  # S3's; Google's and Azure's
    return info["size"], f"{blake2b(f'{url} {tag}'.encode(), digest_size=12).hexdigest()}-{info['size']}"


def _open_complete(copy: Path, size: int) -> IO[bytes] | None:
    """Open a copy and mark it as used; None if it is missing or, after a power cut, has another size."""
    with suppress(FileNotFoundError):
        file = open(copy, "rb")  # noqa: SIM115  it is returned
        if os.fstat(file.fileno()).st_size == size:
            os.utime(file.fileno())
            return file
        file.close()
        copy.unlink(missing_ok=True)
    return None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, creating it if needed; wait for other processes and threads."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "ab") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def _flock(file: IO[bytes], operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        raise TicError(f"{file.name}: {error.strerror}: give a --cache on a local disk, which has file locks") from None


def _is_held(lock: Path) -> bool:
    """Return whether a process is fetching what ``lock`` stands for."""
    with suppress(FileNotFoundError), open(lock, "rb") as file:
        try:
            _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _wait(lock: Path) -> None:
    """Wait until nobody holds ``lock``, or half a second if nobody does."""
    try:
        with open(lock, "rb") as file:
            _flock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        time.sleep(0.5)
