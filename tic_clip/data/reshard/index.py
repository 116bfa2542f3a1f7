"""Read a pool shard's headers and JSON once, and look its UIDs up in every list."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.split import read_stats
from tic_clip.data.tar import IMAGES, Buffer, Table, open_shard, read_table
from tic_clip.storage import download, is_remote

LONGEST_SUFFIX = 56
"""Bytes of a suffix that a tar's 100 for a name have room for after "{uid}-{copy}."."""

ROW = np.dtype([("sample", "<i8"), ("entry", "<i8"), ("copy", "<i8"), ("class_id", "<i4")])
"""What a split takes of a shard, for each entry of its list: the sample, the number of its copy, its class or -1."""


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """A pool shard, the local file ``path`` that it is read from (and fetched to before, if it lies in a cloud), and
    the local files of the UIDs and of the class ids (or None) of each split.
    """

    tar: str
    path: str
    subsets: tuple[str, ...]
    classes: tuple[str | None, ...]


class ShardCounts(msgspec.Struct, kw_only=True):
    """What a shard holds: samples ``read`` = ``usable`` + ``dropped`` by reason; ``stats``: the pool's own count if it
    is another one; ``fault``: why the shard can't be read. Of each split: the ``samples`` that it takes, their ``rows``
    (with copies), the samples whose UID the pool had before (``repeated``), and the bytes of the ``entries``.
    """

    read: int = 0
    usable: int = 0
    dropped: dict[str, int] = {}
    stats: int | None = None
    fault: str | None = None
    samples: list[int] = []
    rows: list[int] = []
    repeated: list[int] = []
    entries: list[bytes] = []


@dataclass(kw_only=True)
class Index:
    """The ``table`` and ``uids`` (N,) of the samples that some split takes; ``rows``: (R,) of ``ROW`` of each split."""

    counts: ShardCounts
    rows: list[np.ndarray]
    table: Table | None = None
    uids: np.ndarray | None = None


def index_shard(job: IndexJob) -> Index:
    """Index a pool shard; what is wrong with its bytes is ``fault``.

    Raises:
        TicError, OSError: the machine, the disk or the cloud failed: that says nothing about the shard.
    """
    if is_remote(job.tar):
        download(job.tar, Path(job.path))
    dropped = Counter()
    try:
        with open_shard(job.path) as shard:
            table = read_table(shard)
            usable, found = _read_uids(shard, table, dropped)
    except OSError:  # also a missing file: the pool's disk may be away
        raise
    except TicError as error:
        fault = str(error).removeprefix(f"{job.path}: ")
        return Index(counts=ShardCounts(fault=fault), rows=[np.empty(0, ROW)] * len(job.subsets))
    order = np.lexsort((found["f1"], found["f0"]))
    first, count = np.empty((2, len(job.subsets), len(found)), np.int64)
    for split, path in enumerate(job.subsets):
        first[split, order], count[split, order] = uids.find_uids(uids.open_uids(path), found[order])
    taken = np.flatnonzero(count.any(axis=0))
    entries = zip(first[:, taken], count[:, taken], job.classes, strict=True)
    read, stats, dropped = len(table.keys), _read_stats(job.tar), dict(sorted(dropped.items()))
    return Index(
        counts=ShardCounts(read=read, usable=len(usable), dropped=dropped, stats=stats if stats != read else None),
        rows=[_rows(found[taken], *entry) for entry in entries],
        table=table.take(usable[taken]),
        uids=found[taken],
    )


def _read_stats(tar: str) -> int | None:
    """Return what a local shard's own ``_stats.json`` counts; in a cloud it would cost a request a shard."""
    try:
        return None if is_remote(tar) else read_stats(tar)
    except (TicError, OSError):
        return None


def _read_uids(shard: Buffer, table: Table, dropped: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the samples that can be used (U,), their UIDs (U,)); the others are counted in ``dropped``."""
    good = np.ones(len(table.keys), bool)
    for reason, unusable in _unusable(table):
        if (good & unusable).any():
            dropped[reason] += int((good & unusable).sum())
        good &= ~unusable
    json_member = table.find("json")[good]
    usable, texts = [], []
    places = (np.flatnonzero(good), table.offset[json_member], table.size[json_member])
    for sample, offset, size in zip(*map(np.ndarray.tolist, places), strict=True):
        try:
            text = uids.read_uid(shard[offset : offset + size])
        except ValueError:
            dropped["invalid json"] += 1
            continue
        if text is None:
            dropped["no valid uid"] += 1
            continue
        usable.append(sample)
        texts.append(text)
    return np.array(usable, np.int64), uids.parse_uids(texts)


def _unusable(table: Table) -> list[tuple[str, np.ndarray]]:
    """Return (reason, (N,) bool, the samples that can't be used for it), judged by their members alone."""
    size = np.append(table.size, -1)  # of the member -1, which is none
    members = {suffix: table.find(suffix) for suffix in ("json", "txt", *IMAGES)}
    is_long = [len(suffix.encode(errors="surrogateescape")) > LONGEST_SUFFIX for suffix in table.suffixes]
    long_members = np.flatnonzero(np.array(is_long, bool)[table.suffix])
    first = {key: number for number, key in reversed(list(enumerate(table.keys)))}
    flawed = [(reason, [i for i in table.flawed if table.flawed[i] == reason]) for reason in {*table.flawed.values()}]
    return [
        *((reason, _mask(table, samples)) for reason, samples in flawed),
        ("duplicate key", ~_mask(table, list(first.values()))),
        ("no json", members["json"] < 0),
        ("no image", np.all([members[suffix] < 0 for suffix in IMAGES], axis=0)),
        ("no text", members["txt"] < 0),
        ("empty member", np.any([size[member] == 0 for member in members.values()], axis=0)),
        ("name too long", _mask(table, np.searchsorted(table.start, long_members, "right") - 1)),
    ]


def _mask(table: Table, samples: list[int] | np.ndarray) -> np.ndarray:
    """Return (N,) bool, True at ``samples``."""
    return np.isin(np.arange(len(table.keys)), samples)


def _rows(found: np.ndarray, first: np.ndarray, count: np.ndarray, classes: str | None) -> np.ndarray:
    """Return one split's rows of the samples with the UIDs ``found`` (N,), of which its list has ``count`` (N,) entries
    from ``first`` (N,) on; ``classes`` is its file of class ids.
    """
    rows = np.empty(count.sum(), ROW)
    rows["sample"] = sample = np.repeat(np.arange(len(count)), count)
    rows["copy"] = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    rows["entry"] = first[sample] + rows["copy"]
    rows["class_id"] = -1
    if classes is not None:
        listed = uids.open_uids(classes, uids.CLASS_ROW)
        at, listings = uids.find_uids(listed, found[sample])
        rows["class_id"][listings > 0] = listed["class_id"][at[listings > 0]]
    return rows
