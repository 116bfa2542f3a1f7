"""One part of a reshard: its pool shards flow through index -> plan -> copy, each read once, all its splits at a time.

A pool shard's rows can be placed as soon as those of the shards before it are counted, so indexing runs a little ahead
of copying, and the bytes to be copied are still in the page cache. An output shard is written under ``work`` and
renamed (or uploaded) when it is whole.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.data.reshard.copy import Job as CopyJob
from tic_clip.data.reshard.copy import copy_shard, end_shard
from tic_clip.data.reshard.index import Index, index_shard
from tic_clip.data.reshard.index import Job as IndexJob
from tic_clip.data.reshard.journal import Counts, Journal
from tic_clip.data.reshard.plan import Cutter, to_read
from tic_clip.data.split import STATS
from tic_clip.data.tar import END
from tic_clip.storage import download, is_dir, is_remote, list_files, lock_folder, remove, to_path, upload, write_json

SHARD_FORMAT = "{:08d}.tar"

COMPARED = {
    "pool": "pool",
    "subset": "UID file",
    "classes": "class file",
    "shard_size": "shard size",
    "parts": "number of parts",
    "part": "part",
}
"""What a split depends on: the contents of its inputs, by fingerprint, not where they lie."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One split (or its part) to be made: its name and folder, the local files of UIDs and of class ids (or None), and
    the arguments that it depends on.
    """

    name: str
    path: str
    subset: str
    classes: str | None
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block of the pool, ``tars``, and what is to be made of it; ``work`` holds the journal and unfinished shards."""

    tars: tuple[str, ...]
    targets: tuple[Target, ...]
    work: str
    shard_size: int
    num_workers: int = 1
    skip_bad_shards: bool = False
    dry_run: bool = False
    patience: float = 0.0  # seconds for a process that was at work here, and is lost, to let go


@dataclass(kw_only=True)
class State:
    """Where a run stands. ``open``: bytes so far and copies under way of each (split, output shard) being filled;
    ``running``: what each future is for.
    """

    part: Part
    folder: Path
    journal: Journal
    cutters: list[Cutter]
    to_read: np.ndarray
    open: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    running: dict[Future, tuple] = field(default_factory=dict)


def fill(part: Part, journal: Journal, folder: Path, executor: Executor) -> Iterator[None]:
    """Write all output shards of a part that ``journal`` lacks; yields once for each pool shard that is done with.

    Raises:
        TicError: something can't be read or written; what is done stays done.
    """
    state = State(
        part=part,
        folder=folder,
        journal=journal,
        cutters=[Cutter(part.shard_size) for _ in part.targets],
        to_read=_to_read(part, journal),
    )
    try:
        yield from _flow(state, executor)
    except BrokenProcessPool:
        names = ", ".join(part.tars[kind[1]] for kind in state.running.values() if kind[0] != "finish")
        raise TicError(f"a worker process died (out of memory?); at work were {names}; try fewer workers") from None
    finally:
        for future in state.running:
            future.cancel()
        wait(state.running)
        for future, kind in state.running.items():
            if kind[0] == "finish" and not future.cancelled() and not future.exception():
                _, split, output, size = kind
                journal.written[split][output] = size
        journal.save(now=True)


@contextmanager
def workplace(part: Part) -> Iterator[Path]:
    """A folder on this machine for what is not whole yet; beside a local output. That and the splits are locked,
    and what an earlier process left in it is removed first.

    Raises:
        TicError: another process is at work there.
    """
    if part.dry_run or is_remote(part.work):
        with tempfile.TemporaryDirectory(prefix="tic-clip-reshard-") as folder:
            yield Path(folder)
        return
    work = Path(part.work)
    with ExitStack() as locks:
        for path in (work, *(Path(target.path) for target in part.targets)):
            locks.enter_context(lock_folder(path, part.patience, work.parent.parent if path == work else path))
        folder = work / "unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def clean(work: str) -> None:
    """Remove the journal and all else that lay beside the output while a part was made."""
    remove(to_path(work) / "journal.json")
    if not is_remote(work):
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            Path(work).parent.rmdir()  # if no other part is under way


def open_journal(part: Part, folder: Path) -> Journal:
    """What is known of a part; nothing if a shard that could not be read then can be read now."""
    splits = [{key: target.arguments[key] for key in COMPARED} for target in part.targets]
    path = to_path(part.work) / "journal.json"
    empty = Journal.empty(None if part.dry_run else path, splits, len(part.tars))
    if part.dry_run:
        return empty
    journal = Journal.load(path, splits, len(part.tars))
    for target, written in zip(part.targets, journal.written, strict=True):
        _check_written(target, written)
    bad = [number for number, counts in enumerate(journal.shards) if counts is not None and counts.fault]
    return empty if any(_index(part, number, folder).fault is None for number in bad) else journal


def _check_written(target: Target, written: dict[int, int]) -> None:
    """Take out of ``written`` what is not there, or not whole: removed, or the machine went down."""
    there = {to_path(file).name: size for file, size in list_files(target.path)} if is_dir(target.path) else {}
    for number, size in list(written.items()):
        if there.get(SHARD_FORMAT.format(number)) != size + len(END) or not there.get(STATS.format(number)):
            del written[number]


def _to_read(part: Part, journal: Journal) -> np.ndarray:
    """Which pool shards must be read: (N,) bool."""
    known = np.array([counts is not None for counts in journal.shards])
    nothing = [0] * len(part.targets)
    counts = np.array([counts.rows if counts else nothing for counts in journal.shards], np.int64)
    return to_read(counts, known, [set(written) for written in journal.written], part.shard_size)


def _flow(state: State, executor: Executor) -> Iterator[None]:
    """Index ahead, place in order, copy, finish; at most two pool shards a process are under way."""
    indexing: deque[tuple[int, Future | None]] = deque()
    numbers = iter(range(len(state.part.tars)))
    number = next(numbers, None)
    while number is not None or indexing or state.running or state.open:
        while number is not None and len(indexing) + _copies(state) < 2 * state.part.num_workers:
            future = None
            if state.to_read[number]:
                future = executor.submit(_index, state.part, number, state.folder)
                state.running[future] = ("index", number)
            indexing.append((number, future))
            number = next(numbers, None)
        while indexing and (indexing[0][1] is None or indexing[0][1].done()):
            ready, future = indexing.popleft()
            if _place(state, executor, ready, future.result() if future else None):
                yield
        if number is None and not indexing:
            _close(state, executor)
        if state.running:
            done, _ = wait(state.running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()  # after an error it stays among those at work
                yield from _ended(state, executor, state.running.pop(future))


def _copies(state: State) -> int:
    return sum(kind[0] == "copy" for kind in state.running.values())


def _local(part: Part, number: int, folder: Path) -> str:
    """Where the bytes of a pool shard lie, or are fetched to."""
    tar = part.tars[number]
    return str(folder / f"pool-{number:08d}.tar") if is_remote(tar) else tar


def _index(part: Part, number: int, folder: Path) -> Index:
    """Index a pool shard, which is fetched first if it lies in a cloud."""
    path = _local(part, number, folder)
    if is_remote(part.tars[number]):
        try:
            download(part.tars[number], Path(path))
        except TicError as error:
            return Index(fault=str(error))
    subsets, classes = zip(*((target.subset, target.classes) for target in part.targets), strict=True)
    return index_shard(IndexJob(path=path, subsets=subsets, classes=classes))


def _counts(index: Index, num_splits: int) -> Counts:
    return Counts(
        read=index.read,
        usable=index.usable,
        dropped=dict(sorted(index.dropped.items())),
        noted=dict(sorted(index.noted.items())),
        samples=[rows.num_samples for rows in index.rows] or [0] * num_splits,
        rows=[len(rows.sample) for rows in index.rows] or [0] * num_splits,
        fault=index.fault,
    )


def _place(state: State, executor: Executor, number: int, index: Index | None) -> bool:
    """Send the rows of a pool shard to their output shards; whether nothing of it is left to be done."""
    if index is None:
        for cutter, count in zip(state.cutters, state.journal.shards[number].rows, strict=True):
            cutter.skip(count)
        return True
    state.journal.shards[number] = _counts(index, len(state.part.targets))
    pieces = []
    for split, (cutter, rows) in enumerate(zip(state.cutters, index.rows, strict=index.fault is None)):
        for piece in cutter.place(rows.size):
            if not state.part.dry_run and piece.number not in state.journal.written[split]:
                shard = state.open.setdefault((split, piece.number), [0, 0])
                shard[0], shard[1] = piece.offset + int(rows.size[piece.first : piece.last].sum()), shard[1] + 1
                pieces.append((split, rows, piece))
    path = _local(state.part, number, state.folder)
    if not pieces:
        _forget(state, number)
        return True
    first = number % len(pieces)  # not all processes begin with the same output file, whose lock they would share
    pieces = pieces[first:] + pieces[:first]
    targets = [(_unfinished(state, split, piece.number), rows, piece) for split, rows, piece in pieces]
    job = CopyJob(path=path, table=index.table, uids=index.uids, targets=targets)
    keys = [(split, piece.number) for split, _, piece in pieces]
    state.running[executor.submit(copy_shard, job)] = ("copy", number, keys)
    return False


def _forget(state: State, number: int) -> None:
    """Remove a fetched pool shard."""
    if is_remote(state.part.tars[number]):
        with suppress(FileNotFoundError):
            os.unlink(_local(state.part, number, state.folder))


def _unfinished(state: State, split: int, number: int) -> str:
    return str(state.folder / f"{split}-{number:08d}.tar")


def _ended(state: State, executor: Executor, kind: tuple) -> Iterator[None]:
    """Go on after a job; yields when a pool shard is done with."""
    match kind:
        case ("copy", number, keys):
            _forget(state, number)
            for split, output in keys:
                state.open[split, output][1] -= 1
                if output < state.cutters[split].num_full:
                    _finish(state, executor, split, output)
            yield
        case ("finish", split, output, size):
            state.journal.written[split][output] = size
            state.journal.save()


def _close(state: State, executor: Executor) -> None:
    """Finish the last output shard of each split, when all that goes into it is written."""
    for split, output in list(state.open):
        _finish(state, executor, split, output)


def _finish(state: State, executor: Executor, split: int, output: int) -> None:
    """Put an output shard under its final name, unless copies into it are under way."""
    size, copies = state.open[split, output]
    if copies:
        return
    del state.open[split, output]
    count = min(state.part.shard_size, state.cutters[split].rows - output * state.part.shard_size)
    path = state.part.targets[split].path
    future = executor.submit(finish_shard, _unfinished(state, split, output), size, path, output, count)
    state.running[future] = ("finish", split, output, size)


def finish_shard(unfinished: str, size: int, folder: str, number: int, count: int) -> None:
    """End a tar after ``size`` bytes and make it shard ``number`` of ``folder``; its stats are ``count`` samples."""
    end_shard(unfinished, size)
    path = to_path(folder) / SHARD_FORMAT.format(number)
    if is_remote(path):
        upload(Path(unfinished), path)
        os.unlink(unfinished)
    else:
        os.replace(unfinished, path)
    write_json(to_path(folder) / STATS.format(number), {"successes": count}, sync=False)
