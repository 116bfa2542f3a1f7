"""Read a pool shard's headers and JSON once, and look its UIDs up in every list."""

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.split import read_stats
from tic_clip.data.tar import IMAGES, Buffer, Table, open_shard, read_table
from tic_clip.storage import is_remote, local_copy

LONGEST_SUFFIX = 56  # bytes that a tar's 100 for a name leave after "{uid}-{copy}."

ROW = np.dtype([("sample", "<i8"), ("entry", "<i8"), ("copy", "<i8"), ("class_id", "<i4")])
"""What a split takes of a shard, for each entry of its list: the usable sample, its copy, its class or -1."""


class ShardCounts(msgspec.Struct, kw_only=True):
    """What a shard holds: samples ``read`` = ``usable`` + ``dropped`` by reason; ``stats``: the pool's own count if it
    is another one; ``fault``: why the shard can't be read. Of each split: the samples that it takes, their rows (with
    copies), the samples whose UID the pool had before; and the bytes of the ``entries`` of its list.
    """

    read: int = 0
    usable: int = 0
    dropped: dict[str, int] = {}
    stats: int | None = None
    fault: str | None = None
    splits: list[tuple[int, int, int]] = []
    entries: list[bytes] = []


class Index(NamedTuple):
    """A shard's ``table``, its usable ``samples`` (U,), their ``uids`` (U,), and each split's ``rows`` of them (R,)."""

    counts: ShardCounts
    rows: list[np.ndarray]
    table: Table | None = None
    samples: np.ndarray | None = None
    uids: np.ndarray | None = None


def index_shard(files: list[tuple[str, str | None]], place: Path, tar: str) -> Index:
    """Index a pool shard; what is wrong with its bytes is ``fault``. One in a cloud is fetched into ``place``.

    ``files``: the local files of the UIDs, and of the class ids or None, of each split. An error that is raised is the
    machine's or the cloud's, and says nothing about the shard.
    """
    path, dropped = local_copy(tar, place), Counter()
    try:
        with open_shard(path) as shard:
            table = read_table(shard)
            texts = {sample: uid for sample, uid, _ in usable_uids(shard, table, dropped)}
    except OSError:  # also a missing file: the pool's disk may be away
        raise
    except TicError as error:
        return Index(ShardCounts(fault=str(error).removeprefix(f"{path}: ")), [np.empty(0, ROW)] * len(files))
    samples, found = np.array(list(texts), np.int64), uids.parse_uids(texts.values())
    counts = ShardCounts(read=len(table.keys), usable=len(found), dropped=dict(+dropped))
    with suppress(TicError, OSError):
        if not is_remote(tar) and read_stats(tar) != counts.read:  # in a cloud it would cost a request
            counts.stats = read_stats(tar)
    order = np.lexsort((found["f1"], found["f0"]))
    first, count = np.empty((2, len(files), len(found)), np.int64)
    for split, (subset, _) in enumerate(files):
        first[split, order], count[split, order] = uids.find_uids(uids.open_uids(subset), found[order])
    rows = [_rows(found, first[i], count[i], classes) for i, (_, classes) in enumerate(files)]
    return Index(counts, rows, table, samples, found)


def usable_uids(shard: Buffer, table: Table, dropped: Counter[str]) -> Iterator[tuple[int, str, bytes]]:
    """Yield (number, UID, JSON) of the samples that can be used; count the others by reason."""
    usable = np.ones(len(table.keys), bool)
    usable[list(table.flawed)] = False
    dropped.update(table.flawed.values())
    for reason, unusable in _unusable(table):
        dropped[reason] += int((usable & unusable).sum())
        usable &= ~unusable
    json_member = table.find("json")[usable]
    places = (np.flatnonzero(usable), table.offset[json_member], table.size[json_member])
    for sample, offset, size in zip(*map(np.ndarray.tolist, places), strict=True):
        data = shard[offset : offset + size]
        try:
            uid = uids.read_uid(data)
        except ValueError:
            dropped["invalid json"] += 1
            continue
        if uid is None:
            dropped["no valid uid"] += 1
        else:
            yield sample, uid, data


def _unusable(table: Table) -> list[tuple[str, np.ndarray]]:
    """Return (reason, (N,) bool, the samples that can't be used for it), judged by their members alone."""
    samples, size = np.arange(len(table.keys)), np.append(table.size, -1)  # of the member -1, which is none
    members = {suffix: table.find(suffix) for suffix in ("json", "txt", *IMAGES)}
    is_long = [len(suffix.encode(errors="surrogateescape")) > LONGEST_SUFFIX for suffix in table.suffixes]
    long_members = np.flatnonzero(np.array(is_long, bool)[table.suffix])
    first = dict(zip(reversed(table.keys), reversed(samples.tolist()), strict=True))
    return [
        ("duplicate key", np.isin(samples, list(first.values()), invert=True)),
        ("no json", members["json"] < 0),
        ("no image", np.all([members[suffix] < 0 for suffix in IMAGES], axis=0)),
        ("no text", members["txt"] < 0),
        ("empty member", np.any([size[member] == 0 for member in members.values()], axis=0)),
        ("name too long", np.isin(samples, np.searchsorted(table.start, long_members, "right") - 1)),
    ]


def _rows(found: np.ndarray, first: np.ndarray, count: np.ndarray, classes: str | None) -> np.ndarray:
    """Return one split's rows: its list has ``count`` (N,) entries of ``found`` (N,), from ``first`` (N,) on."""
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
