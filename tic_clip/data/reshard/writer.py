"""Append samples to the shards of a split: headers anew, the data as byte ranges of the pool shard."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import IO, Any, NamedTuple

import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.folder import SHARD_FORMAT
from tic_clip.data.reshard.index import Index
from tic_clip.data.split import STATS
from tic_clip.data.tar import BLOCK, END, Table, headers
from tic_clip.storage import is_remote, to_path, upload, write_json

WINDOW = 1 << 19
"""Bytes that are put together before they are written: large for the kernel, small for the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class OutputSplit:
    """A split (or a part of it): its name and folder, the files of its UIDs and of class ids (or None), and the
    ``arguments`` that it depends on.
    """

    name: str
    path: str
    subset: str
    classes: str | None
    arguments: dict[str, Any]


class SplitWriter:
    """Writes one split in the pool's order: ``rows`` so far; ``written`` maps an output shard to its bytes when it has
    its name. Only the last shard may hold fewer than ``shard_size`` rows.
    """

    def __init__(
        self, split: OutputSplit, shard_size: int, work: Path, threads: Executor, written: dict[int, int], dry_run: bool
    ) -> None:
        self.folder, self.shard_size, self.written, self.dry_run = split.path, shard_size, written, dry_run
        self.work, self.threads = work, threads
        self.taken = np.zeros(len(uids.open_uids(split.subset)), bool)  # entries of the list that were found
        self.rows = 0
        self.size = 0  # bytes in the shard that is being filled
        self.num_complete = len(written)
        self.finishing: list[Future] = []
        work.mkdir()

    def select(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows whose entries of the list no sample before has taken, and take these."""
        fresh = np.zeros(len(rows), bool)
        fresh[np.unique(rows["entry"], return_index=True)[1]] = True
        fresh &= ~self.taken[rows["entry"]]
        self.taken[rows["entry"]] = True
        return rows[fresh]

    def skip(self, entries: np.ndarray) -> None:
        """Count rows that an earlier run has written, by their entries of the list."""
        self.taken[entries] = True
        self.rows += len(entries)

    def append(self, tar: str, index: Index, rows: np.ndarray) -> None:
        """Write rows of the pool shard in the local file ``tar``, but for those in shards that are complete."""
        start = 0
        while start < len(rows):
            number, used = divmod(self.rows, self.shard_size)
            count = min(self.shard_size - used, len(rows) - start)
            if number >= self.num_complete and not self.dry_run:
                piece = arrange(index.table, index.uids, rows[start : start + count])
                append_piece(tar, self.work / f"{number}.unfinished", piece)
                self.size += piece.length
            start, self.rows = start + count, self.rows + count
            if used + count == self.shard_size:
                self._finish(number, self.shard_size)

    def close(self) -> None:
        """Finish the last shard."""
        number, used = divmod(self.rows, self.shard_size)
        if used:
            self._finish(number, used)

    def _finish(self, number: int, count: int) -> None:
        if number >= self.num_complete and not self.dry_run:
            self.finishing.append(self.threads.submit(self._finish_shard, number, count, self.size))
            self.size = 0

    def _finish_shard(self, number: int, count: int, size: int) -> None:
        """End the shard, give it its name (or upload it), and write its stats."""
        unfinished, path = self.work / f"{number}.unfinished", to_path(self.folder) / SHARD_FORMAT.format(number)
        with _named(unfinished), open(unfinished, "ab", buffering=0) as file:
            _write(file, memoryview(END))
        if is_remote(path):
            upload(unfinished, path)
            unfinished.unlink()
        else:
            os.replace(unfinished, path)
        write_json(to_path(self.folder) / STATS.format(number), {"successes": count}, sync=False)
        self.written[number] = size

    def wait(self, max_pending: int = 0) -> None:
        """Wait until at most ``max_pending`` shards are being finished; their errors are raised here."""
        while len(self.finishing) > max_pending or (self.finishing and self.finishing[0].done()):
            self.finishing.pop(0).result()


class Piece(NamedTuple):
    """What is written for some rows: ``length`` bytes, copied from the pool shard in runs, with new blocks laid over.

    Run r goes to bytes ``begin[r]`` to ``end[r]`` of the piece and stands at ``source[r]``: all (R,), in order.
    ``blocks`` (B, 512) go to the bytes ``places`` (B,), in order.
    """

    length: int
    begin: np.ndarray
    end: np.ndarray
    source: np.ndarray
    blocks: np.ndarray
    places: np.ndarray


def arrange(table: Table, found: np.ndarray, rows: np.ndarray) -> Piece:
    """Return the members of some rows under their new names; members that are neighbours in the pool are one run."""
    class_id = rows["class_id"].astype("S11")
    row, member = _members(table, rows["sample"], rows["class_id"] >= 0)
    new = member < 0
    size = np.where(new, np.char.str_len(class_id)[row], table.size[member]) if new.any() else table.size[member]
    suffix = np.where(new, len(table.suffixes), table.suffix[member])
    end = np.cumsum(BLOCK + -(-size // BLOCK) * BLOCK)
    begin = np.append(0, end[:-1])
    names = _names(table, uids.format_uids(found[rows["sample"]]), rows["copy"], row, suffix)
    length, blocks, places = int(end[-1]), headers(names, size), begin
    if new.any():
        values = class_id[row[new]].astype(f"S{BLOCK}").view(np.uint8).reshape(-1, BLOCK)
        order = np.argsort(places := np.append(places, begin[new] + BLOCK))
        blocks, places = np.append(blocks, values, axis=0)[order], places[order]
        begin, end, member = begin[~new], end[~new], member[~new]
    source = table.offset[member] - BLOCK
    first = np.append(True, (begin[1:] != end[:-1]) | (np.diff(source) != np.diff(begin)))
    return Piece(length, begin[first], end[np.append(first[1:], True)], source[first], blocks, places)


def _members(table: Table, sample: np.ndarray, has_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, member) of all that is written for rows with a ``sample`` each (R,), in order. Rows of which a class
    id is known, ``has_class`` (R,), get it as member -1, in place of the sample's own.
    """
    row, member = table.members_of(sample)
    if not has_class.any():
        return row, member
    own = np.isin(member, table.find("cls")) & has_class[row]
    extra = np.flatnonzero(has_class)
    row, member = np.append(row[~own], extra), np.append(member[~own], np.full(len(extra), -1))
    order = np.argsort(row, kind="stable")
    return row[order], member[order]


def _names(table: Table, texts: list[str], copy: np.ndarray, row: np.ndarray, suffix: np.ndarray) -> list[bytes]:
    """Return the names {uid}-{copy}.{suffix} of members (M,), each of a ``row``, of which ``texts`` are the UIDs."""
    keys = [f"{text}-{number}.".encode() for text, number in zip(texts, copy.tolist(), strict=True)]
    suffixes = [*(text.encode(errors="surrogateescape") for text in table.suffixes), b"cls"]
    return [keys[i] + suffixes[code] for i, code in zip(row.tolist(), suffix.tolist(), strict=True)]


_thread = local()


def append_piece(tar: str, target: Path, piece: Piece) -> None:
    """Append ``piece`` of the pool shard in the local file ``tar`` to ``target``.

    Raises:
        TicError: the pool shard has not all of it. OSError: something can't be read or written.
    """
    if not hasattr(_thread, "window"):  # memory that is new each time costs more than the copying
        _thread.window = np.empty((WINDOW // BLOCK, BLOCK), np.uint8)
    buffer, view = _thread.window, memoryview(_thread.window).cast("B")
    with open(tar, "rb", buffering=0) as source, open(target, "ab", buffering=0) as file:
        for start in range(0, piece.length, WINDOW):
            stop = min(start + WINDOW, piece.length)
            runs = slice(np.searchsorted(piece.end, start, "right"), np.searchsorted(piece.begin, stop))
            begin, end = np.maximum(piece.begin[runs], start), np.minimum(piece.end[runs], stop)
            places = piece.source[runs] + begin - piece.begin[runs]
            with _named(tar):
                for a, b, place in zip((begin - start).tolist(), (end - start).tolist(), places.tolist(), strict=True):
                    if os.preadv(source.fileno(), [view[a:b]], place) != b - a:
                        raise TicError(f"{tar} was cut short while it was read")
            new = slice(*np.searchsorted(piece.places, [start, stop]))
            buffer[(piece.places[new] - start) // BLOCK] = piece.blocks[new]
            with _named(target):
                _write(file, view[: stop - start])


@contextmanager
def _named(path: object) -> Iterator[None]:
    """Put the path into an error of the system that has none."""
    try:
        yield
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None


def _write(file: IO[bytes], data: memoryview) -> None:
    """Append all of ``data`` to a file without a buffer."""
    while data:
        data = data[file.write(data) :]
