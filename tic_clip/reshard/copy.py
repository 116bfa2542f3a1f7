"""Move bytes: rows of a pool shard are written at known places of output shards, straight from the page cache."""

import os
from dataclasses import dataclass

import numpy as np

from tic_clip.reshard.index import Ranges, Rows
from tic_clip.reshard.plan import Piece
from tic_clip.tarshard import BLOCK, END, headers, open_shard, padded
from tic_clip.uids import format_uids

IOV_MAX = os.sysconf("SC_IOV_MAX")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The rows of one pool shard (local file ``path``) that go to the files ``targets``, a piece each."""

    path: str
    ranges: Ranges
    targets: list[tuple[str, Rows, Piece]]


def copy_shard(job: Job) -> None:
    """Write each piece of a pool shard into its output shard."""
    with open_shard(job.path) as shard, memoryview(shard) as view:
        for target, rows, piece in job.targets:
            file = os.open(target, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                write_at(file, piece.offset, _buffers(view, job.ranges, rows, slice(piece.first, piece.last)))
            finally:
                os.close(file)


def _members(ranges: Ranges, rows: Rows, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """(row, member) of everything that is written for some rows, in order; member -1 is the row's class id."""
    sample, label = rows.sample[part], rows.label[part]
    first, count = ranges.start[sample], np.diff(ranges.start)[sample]
    row = np.repeat(np.arange(len(sample)), count)
    member = np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)
    labelled = np.flatnonzero(label >= 0)
    if not len(labelled):
        return row, member
    keep = ~(ranges.of_suffix("cls")[member] & (label[row] >= 0))  # the listed class replaces the pool's
    row, member = np.append(row[keep], labelled), np.append(member[keep], np.full(len(labelled), -1))
    order = np.argsort(row, kind="stable")
    return row[order], member[order]


def _buffers(view: memoryview, ranges: Ranges, rows: Rows, part: slice) -> list[memoryview | bytes]:
    """What is written for some rows: header, data, header, data, …, all of whole blocks."""
    row, member = _members(ranges, rows, part)
    label = rows.label[part].astype("S11")
    size = np.where(member < 0, np.char.str_len(label)[row], ranges.size[member])
    suffix = np.where(member < 0, len(ranges.suffixes), ranges.suffix[member])
    heads = memoryview(headers(_names(ranges, rows, part, row, suffix), size)).cast("B")
    buffers, labels = [], label.tolist()
    places = zip(row.tolist(), member.tolist(), ranges.offset[member].tolist(), size.tolist(), strict=True)
    for i, (row_number, member_number, offset, length) in enumerate(places):
        buffers.append(heads[i * BLOCK : (i + 1) * BLOCK])
        if member_number < 0:
            buffers.append(labels[row_number].ljust(BLOCK, b"\0"))
        elif length:
            buffers.append(view[offset : offset + padded(length)])
    return buffers


def _names(ranges: Ranges, rows: Rows, part: slice, row: np.ndarray, suffix: np.ndarray) -> list[bytes]:
    """The names {uid}-{copy}.{suffix} of what is written for some rows."""
    texts = format_uids(ranges.uids[rows.sample[part]])
    keys = [f"{uid}-{copy}.".encode() for uid, copy in zip(texts, rows.copy[part].tolist(), strict=True)]
    suffixes = [*(suffix.encode(errors="surrogateescape") for suffix in ranges.suffixes), b"cls"]
    return [keys[i] + suffixes[code] for i, code in zip(row.tolist(), suffix.tolist(), strict=True)]


def write_at(file: int, offset: int, buffers: list[memoryview | bytes]) -> None:
    """Write ``buffers`` one after the other into the open ``file`` from byte ``offset`` on; the kernel gathers them."""
    for i in range(0, len(buffers), IOV_MAX):
        batch = buffers[i : i + IOV_MAX]
        while batch:
            written = os.pwritev(file, batch, offset)
            offset += written
            while batch and written >= len(batch[0]):
                written -= len(batch.pop(0))
            if written:  # a disk that is nearly full, or more than 2 GiB
                batch[0] = batch[0][written:]


def end_shard(path: str, size: int) -> None:
    """Write the end of a tar after its ``size`` bytes."""
    file = os.open(path, os.O_WRONLY)
    try:
        write_at(file, size, [END])
    finally:
        os.close(file)
