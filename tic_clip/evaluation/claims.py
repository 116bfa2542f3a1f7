"""Share work among any number of processes, on machines that share the output folder.

A claim is a POSIX lock on one byte of a file, which works on NFS and ends with its process, even if that is killed.
Without locks, the ranks of a launcher still divide the work, and each writes its own file.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from time import sleep
from typing import IO, TypeVar

from tic_clip.cli import is_rank_zero

Unit = TypeVar("Unit")
Part = TypeVar("Part", bound=Hashable)

LOCK = ".eval.lock"
RANKS = (("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), ("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))
"""The variables of a Slurm job array, of srun and of torchrun; each of the first may start several of the next."""
PAUSE = 0.5  # seconds before trying again what others have


def process_rank() -> tuple[int, int]:
    """Return (rank, number of ranks) of a launcher; (0, 1) without one."""
    rank, count = 0, 1
    for name, total in RANKS:
        size = int(os.environ.get(total, "1"))
        rank, count = rank * size + int(os.environ.get(name, "0")) % size, count * size
    return rank, count


def local_rank() -> int:
    """Return this process's rank on its machine, from torchrun or srun, else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def open_lock(folder: Path) -> IO:
    """Open a folder's file of claims, creating both if needed; closing it ends this process's claims."""
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / LOCK, "ab")


def claim(lock: IO, name: str, operation: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Claim ``name``; return False if another process has it. Without locks, warn and return True."""
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    try:
        fcntl.lockf(lock, operation, 1, offset)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        _warn(lock.name, error.strerror)
    return True


def release(lock: IO, name: str) -> None:
    """End a claim of this process."""
    claim(lock, name, fcntl.LOCK_UN)


@cache
def _warn(path: str, reason: str) -> None:
    print(f"warning: {path}: no lock ({reason}): processes may do a few things twice", file=sys.stderr)


def take(
    lock: IO, units: Sequence[Unit], list_missing: Callable[[Unit], list[Part]]
) -> Iterator[tuple[Unit, list[Part]]]:
    """Yield each unit with the missing parts that this process has claimed, until no part is missing.

    A launcher's ranks start at different units. Wait for parts that another process has claimed, in case it is killed.
    """
    rank, count = process_rank()
    left = [*units[rank::count], *(unit for i, unit in enumerate(units) if i % count != rank)]
    is_said = False
    while left:
        others = []
        for unit in left:
            missing = list_missing(unit)
            claimed = list(takewhile(lambda part: claim(lock, str(part)), missing))  # or two would split a unit
            now = set(list_missing(unit)) if claimed else ()  # one that has ended meanwhile may have done it
            if parts := [part for part in claimed if part in now]:
                yield unit, parts
            for part in claimed:
                release(lock, str(part))
            if len(claimed) < len(missing):
                others.append(unit)
        if others and len(others) == len(left) and not is_said and is_rank_zero():
            is_said = True
            print(f"waiting for another process, which has {len(others)} of the folders", file=sys.stderr)
        left = others
        sleep(PAUSE if left else 0)
