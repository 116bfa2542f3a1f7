"""Move bytes: rows of a pool shard are written at known places of output shards, headers anew, the rest as it is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np

from tic_clip import TicError
from tic_clip.data.reshard.index import Rows
from tic_clip.data.reshard.plan import Piece
from tic_clip.data.tar import BLOCK, END, Table, headers
from tic_clip.data.uids import format_uids

WINDOW = 1 << 19
"""Bytes that are put together before they are written."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The rows of one pool shard (local file ``path``) that go to the files ``targets``, a piece each.

    ``table`` and ``uids`` (N,) are of the samples that the rows name.
    """

    path: str
    table: Table
    uids: np.ndarray
    targets: list[tuple[str, Rows, Piece]]


def copy_shard(job: Job) -> None:
    """Write each piece of a pool shard into its output shard."""
    with _opened(job.path, os.O_RDONLY) as source:
        for target, rows, piece in job.targets:
            content = _content(job, rows, slice(piece.first, piece.last))
            with _opened(target, os.O_WRONLY | os.O_CREAT) as file:
                if not _write(source, file, piece.offset, content, _buffer()):
                    raise TicError(f"{job.path} was cut short while it was read")


@cache
def _buffer() -> np.ndarray:
    """(N, 512) this process's window; memory that is new each time costs more than the copying."""
    return np.empty((WINDOW // BLOCK, BLOCK), np.uint8)


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    file = os.open(path, flags, 0o666)
    try:
        yield file
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(file)


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is written for some rows: ``length`` bytes, copied from the source in runs, with new blocks laid over them.

    Run r goes to bytes ``begin[r]`` to ``end[r]`` of the content and stands at ``source[r]``: all (R,), in order.
    ``blocks`` (B, 512) go to the bytes ``places`` (B,), in order.
    """

    length: int
    begin: np.ndarray
    end: np.ndarray
    source: np.ndarray
    blocks: np.ndarray
    places: np.ndarray


def _content(job: Job, rows: Rows, part: slice) -> Content:
    """The members of some rows under their new names; what is together in the source is one run."""
    table, sample, label = job.table, rows.sample[part], rows.label[part].astype("S11")
    row, member = _members(table, sample, rows.label[part] >= 0)
    new = member < 0
    size = np.where(new, np.char.str_len(label)[row], table.size[member])
    suffix = np.where(new, len(table.suffixes), table.suffix[member])
    names = _names(table, format_uids(job.uids[sample]), rows.copy[part], row, suffix)
    end = np.cumsum(BLOCK + -(-size // BLOCK) * BLOCK)
    begin = np.concatenate([[0], end[:-1]])
    blocks, places = headers(names, size), begin
    if new.any():
        values = label[row[new]].astype(f"S{BLOCK}").view(np.uint8).reshape(-1, BLOCK)
        order = np.argsort(places := np.append(places, begin[new] + BLOCK))
        blocks, places = np.append(blocks, values, axis=0)[order], places[order]
    begin, end, source = begin[~new], end[~new], table.offset[member[~new]] - BLOCK
    first = np.append(True, (begin[1:] != end[:-1]) | (np.diff(source) != np.diff(begin)))
    return Content(
        length=int(rows.size[part].sum()),
        begin=begin[first],
        end=end[np.append(first[1:], True)],
        source=source[first],
        blocks=blocks,
        places=places,
    )


def _members(table: Table, sample: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, member) of all that is written for rows (R,) of ``sample``, in order; member -1 is a class that is listed.

    Args:
        table: the samples.
        sample: (R,) the sample of each row.
        labelled: (R,) bool, whether a class is listed for it, which replaces the sample's own.
    """
    row, member = table.members_of(sample)
    if not labelled.any():
        return row, member
    own = np.isin(member, table.find("cls")) & labelled[row]
    extra = np.flatnonzero(labelled)
    row, member = np.append(row[~own], extra), np.append(member[~own], np.full(len(extra), -1))
    order = np.argsort(row, kind="stable")
    return row[order], member[order]


def _names(table: Table, uids: list[str], copy: np.ndarray, row: np.ndarray, suffix: np.ndarray) -> list[bytes]:
    """The names {uid}-{copy}.{suffix} of members (M,), each of a ``row`` with its UID and ``copy``."""
    keys = [f"{uid}-{number}.".encode() for uid, number in zip(uids, copy.tolist(), strict=True)]
    suffixes = [*(suffix.encode(errors="surrogateescape") for suffix in table.suffixes), b"cls"]
    return [keys[i] + suffixes[code] for i, code in zip(row.tolist(), suffix.tolist(), strict=True)]


def _write(source: int, file: int, offset: int, content: Content, buffer: np.ndarray) -> bool:
    """Write ``content`` at byte ``offset`` of ``file``, a ``buffer`` (N, 512) at a time, so that it stays in the cache
    of the processor and the kernel gets large pieces; whether the source had all of it.
    """
    window, view = buffer.size, memoryview(buffer).cast("B")
    for start in range(0, content.length, window):
        stop = min(start + window, content.length)
        runs = slice(np.searchsorted(content.end, start, "right"), np.searchsorted(content.begin, stop))
        begin, end = np.maximum(content.begin[runs], start), np.minimum(content.end[runs], stop)
        at = content.source[runs] + begin - content.begin[runs]
        for a, b, place in zip((begin - start).tolist(), (end - start).tolist(), at.tolist(), strict=True):
            if os.preadv(source, [view[a:b]], place) != b - a:
                return False
        new = slice(*np.searchsorted(content.places, [start, stop]))
        buffer[(content.places[new] - start) // BLOCK] = content.blocks[new]
        write_at(file, offset + start, view[: stop - start])
    return True


def write_at(file: int, offset: int, data: memoryview | bytes) -> None:
    """Write all of ``data`` at byte ``offset`` of an open file."""
    while data:
        written = os.pwrite(file, data, offset)
        offset, data = offset + written, data[written:]


def end_shard(path: str, size: int) -> None:
    """Write the end of a tar after its ``size`` bytes."""
    with _opened(path, os.O_WRONLY) as file:
        write_at(file, size, END)
