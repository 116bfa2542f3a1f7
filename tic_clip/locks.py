"""Locks on folders of this machine, and temporary folders that such a lock keeps from being cleaned up."""

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tic_clip import TicError


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
    """Make a folder in TMPDIR and remove it at the end of the block; remove those that killed processes left there.

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
