"""Locks on folders of this machine, and temporary folders that such a lock keeps from being cleaned up."""

import errno
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tic_clip import TicError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""What a file system without locks (some NFS, Lustre) answers."""


@contextmanager
def lock_folder(folder: Path, timeout: float = 0.0, label: object = None) -> Iterator[None]:
    """Hold an exclusive lock on a local folder, creating it if needed; wait ``timeout`` seconds for another process.

    ``label`` is what the error calls the folder. Where the file system has no locks (some NFS, Lustre), warn and go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + timeout
    with _open_folder(folder) as descriptor:
        try:
            while not _lock(descriptor):
                if time.monotonic() >= end:
                    raise TicError(f"another process is writing {label or folder}; wait for it or end it")
                time.sleep(0.5)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            note = "the file system has no locks; do not start two processes for this folder"
            print(f"warning: {folder}: {note}", file=sys.stderr)
        yield


@contextmanager
def temporary_folder(prefix: str = "tic-clip-") -> Iterator[Path]:
    """Make a folder in TMPDIR and remove it at the end of the block; remove those that killed processes left there.

    A lock shows that its process lives. Names hold the machine's, for a TMPDIR that others share and can't lock.
    """
    prefix += f"{os.uname().nodename}-"
    for leftover in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError), _open_folder(leftover) as descriptor:  # without locks, leftovers stay
            if os.fstat(descriptor).st_uid == os.getuid() and _lock(descriptor):
                shutil.rmtree(leftover)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{prefix}"))  # hidden, so that others don't take it for a leftover
    folder = unlocked.with_name(unlocked.name[1:])
    with _open_folder(unlocked) as descriptor:
        try:
            with suppress(OSError):
                _lock(descriptor)
            unlocked.rename(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; return False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
