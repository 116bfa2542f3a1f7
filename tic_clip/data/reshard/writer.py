"""Append samples to the shards of a split: new headers, data as byte ranges of the pool shard."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from threading import local
from typing import IO, Any, NamedTuple

import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.folder import SHARD_FORMAT
from tic_clip.data.reshard.index import Index, ShardCounts
from tic_clip.data.split import STATS
from tic_clip.data.tar import BLOCK, END, headers
from tic_clip.storage import is_remote, to_path, upload, write_json

WINDOW = 1 << 19  # bytes put together before they are written: large for the kernel, small for the processor's cache


class OutputSplit(NamedTuple):
    """A split or a part of it: name, folder, and the ``arguments`` that it depends on."""

    name: str
    path: str
    arguments: dict[str, Any]


def shard_names(number: int) -> list[str]:
    """Return the names of an output shard and its stats."""
    return [form.format(number) for form in (SHARD_FORMAT, STATS)]


class SplitWriter:
    """Writes one split in the pool's order, after the ``entries`` of its list that an earlier run has taken;
    ``written`` maps an output shard to its bytes when it has its name. Without ``work``, rows are only counted.
    """

    def __init__(
        self, split: OutputSplit, subset: str, entries: Any, written: dict[int, int], work: Any, threads: Executor
    ) -> None:
        self.folder, self.shard_size, self.written = to_path(split.path), split.arguments["shard_size"], written
        self.work, self.threads = work, threads
        self.num_complete = len(written) if work else sys.maxsize
        self.taken = np.zeros(len(uids.open_uids(subset)), bool)
        self.taken[entries] = True
        self.rows = len(entries)
        self.size = 0  # bytes in the shard that is being filled

    def select(self, rows: np.ndarray, counts: ShardCounts) -> np.ndarray:
        """Return the rows whose entries of the list are still free; take and count these."""
        is_new = np.zeros(len(rows), bool)
        is_new[np.unique(rows["entry"], return_index=True)[1]] = True
        is_new &= ~self.taken[rows["entry"]]
        self.taken[rows["entry"]] = True
        found, rows = int((rows["copy"] == 0).sum()), rows[is_new]
        samples = int((rows["copy"] == 0).sum())
        counts.splits.append((samples, len(rows), found - samples))
        counts.entries.append(rows["entry"].tobytes())
        return rows

    def append(self, tar: Path, index: Index, rows: np.ndarray) -> list[Future]:
        """Append rows of the pool shard in the local file ``tar``; return the threads that finish full shards."""
        finishing = []
        while len(rows):
            number, used = divmod(self.rows, self.shard_size)
            first, rows = np.split(rows, [self.shard_size - used])
            if number >= self.num_complete:
                piece = arrange(index, first)
                append_piece(tar, Path(f"{self.work}-{number}"), *piece)
                self.size += piece[0]
            self.rows += len(first)
            if used + len(first) == self.shard_size:
                finishing += self.finish()
        return finishing

    def finish(self) -> list[Future]:
        """Finish the current shard, if any, in a thread."""
        number, last = divmod(self.rows - 1, self.shard_size)
        size, self.size = self.size, 0
        return [self.threads.submit(self._finish, number, last + 1, size)] if size else []

    def _finish(self, number: int, count: int, size: int) -> None:
        """End the shard, rename or upload it, and write its stats."""
        unfinished, (shard, stats) = Path(f"{self.work}-{number}"), map(self.folder.joinpath, shard_names(number))
        with _named(unfinished), open(unfinished, "ab", buffering=0) as file:
            _write(file, memoryview(END))
        if is_remote(shard):
            upload(unfinished, shard)
            unfinished.unlink()
        else:
            os.replace(unfinished, shard)
        write_json(stats, {"successes": count}, sync=False)
        self.written[number] = size


def arrange(index: Index, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Return (length, ranges, places, blocks) that make the members of rows under their new names.

    Of ``length`` bytes, (begin, end, source) of ``ranges`` (3, R) are copied from the pool shard's byte source on; then
    ``blocks`` (B, 512) are laid over the bytes ``places`` (B,): headers, and class ids in place of a sample's own.
    """
    table = index.table
    row, member = table.members_of(index.samples[rows["sample"]])
    has_class = rows["class_id"] >= 0
    is_class = np.array([suffix == "cls" for suffix in table.suffixes])
    is_kept = ~(is_class[table.suffix[member]] & has_class[row])
    row = np.append(row[is_kept], np.flatnonzero(has_class))
    member = np.append(member[is_kept], np.full(has_class.sum(), -1))  # -1: a class id
    order = np.argsort(row, kind="stable")
    row, member = row[order], member[order]
    is_new = member < 0
    class_ids = rows["class_id"][row[is_new]].astype(f"S{BLOCK}")
    size = np.append(table.size, 0)[member]
    size[is_new] = np.char.str_len(class_ids)
    suffix = np.append(table.suffix, len(table.suffixes))[member]
    texts = zip(uids.format_uids(index.uids[rows["sample"]]), rows["copy"].tolist(), strict=True)
    keys = [f"{text}-{copy}.".encode() for text, copy in texts]
    suffixes = [*(text.encode(errors="surrogateescape") for text in table.suffixes), b"cls"]
    names = [keys[i] + suffixes[code] for i, code in zip(row.tolist(), suffix.tolist(), strict=True)]
    end = np.cumsum(BLOCK + -(-size // BLOCK) * BLOCK)
    begin = np.append(0, end[:-1])
    new = np.flatnonzero(is_new) + 1  # a class id comes after its header
    places = np.insert(begin, new, begin[is_new] + BLOCK)
    blocks = np.insert(headers(names, size), new, class_ids.view(np.uint8).reshape(-1, BLOCK), axis=0)
    ranges = np.stack([begin, end, np.append(table.offset, 0)[member] - BLOCK])[:, ~is_new]
    is_joined = (ranges[0, 1:] == ranges[1, :-1]) & (np.diff(ranges[2]) == np.diff(ranges[0]))
    first, last = np.append(True, ~is_joined), np.append(~is_joined, True)
    return int(end[-1]), np.stack([ranges[0, first], ranges[1, last], ranges[2, first]]), places, blocks


_thread = local()


def append_piece(
    tar: Path, target: Path, length: int, ranges: np.ndarray, places: np.ndarray, blocks: np.ndarray
) -> None:
    """Append what ``arrange`` returns for rows of the pool shard in the local file ``tar`` to ``target``."""
    if not hasattr(_thread, "window"):  # memory that is new each time costs more than the copying
        _thread.window = np.empty((WINDOW // BLOCK, BLOCK), np.uint8)
    window, view = _thread.window, memoryview(_thread.window).cast("B")
    with open(tar, "rb", buffering=0) as source, open(target, "ab", buffering=0) as file:
        for start in range(0, length, WINDOW):
            stop = min(start + WINDOW, length)
            here = ranges[:, slice(np.searchsorted(ranges[1], start, "right"), np.searchsorted(ranges[0], stop))]
            begin, end = np.maximum(here[0], start), np.minimum(here[1], stop)
            with _named(tar):
                for a, b, offset in np.stack([begin, end, here[2] + begin - here[0]], axis=1).tolist():
                    if os.preadv(source.fileno(), [view[a - start : b - start]], offset) != b - a:
                        raise TicError(f"{tar} was cut short while it was read")
            new = slice(*np.searchsorted(places, [start, stop]))
            window[(places[new] - start) // BLOCK] = blocks[new]
            with _named(target):
                _write(file, view[: stop - start])


@contextmanager
def _named(path: object) -> Iterator[None]:
    """Add the path to an OSError without one."""
    try:
        yield
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None


def _write(file: IO[bytes], data: memoryview) -> None:
    while data:  # the file has no buffer
        data = data[file.write(data) :]
