"""Read a pool shard's headers and JSON once, and look its UIDs up in every list."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.split import stats_path
from tic_clip.data.tar import IMAGES, Buffer, Table, open_shard, read_table
from tic_clip.storage import download, is_remote, read_json_object

LONGEST_SUFFIX = 56
"""Bytes of a suffix that a tar's 100 for a name have room for after "{uid}-{copy}."."""


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """A pool shard, the local file ``path`` that it is read from (and fetched to before, if it lies in a cloud), and
    the local files of the UIDs and of the class ids (or None) of each split.
    """

    tar: str
    path: str
    subsets: tuple[str, ...]
    classes: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one split takes of a shard, a row for each entry of its list (R,): the ``sample``, the ``entry``, the
    number of the ``copy``, and the ``class_id`` or -1.
    """

    sample: np.ndarray
    entry: np.ndarray
    copy: np.ndarray
    class_id: np.ndarray

    def __len__(self) -> int:
        """Return R."""
        return len(self.sample)

    @property
    def num_samples(self) -> int:
        """Return the number of samples without their further copies."""
        return int((self.copy == 0).sum())

    def take(self, chosen: np.ndarray) -> "Rows":
        """Return the rows at the positions, or under the mask, or in the slice ``chosen``."""
        return Rows(
            sample=self.sample[chosen],
            entry=self.entry[chosen],
            copy=self.copy[chosen],
            class_id=self.class_id[chosen],
        )


@dataclass(kw_only=True)
class Index:
    """What a shard holds: samples ``read`` = ``usable`` + ``dropped`` by reason; ``stats``: the pool's own count.

    ``table`` and ``uids`` (N,) are of the N samples that some split takes, ``rows`` say which split takes which.
    ``fault`` says why the shard can't be read; then it has no sample.
    """

    read: int = 0
    usable: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    stats: int | None = None
    fault: str | None = None
    table: Table | None = None
    uids: np.ndarray | None = None
    rows: list[Rows] = field(default_factory=list)


def index_shard(job: IndexJob) -> Index:
    """Index a pool shard; what is wrong with its bytes is ``fault``.

    Raises:
        TicError, OSError: the machine, the disk or the cloud failed: that says nothing about the shard.
    """
    if is_remote(job.tar):
        download(job.tar, Path(job.path))
    try:
        with open_shard(job.path) as shard:
            table = read_table(shard)
            index = Index(read=len(table.keys))
            usable, found = _read_uids(shard, table, index.dropped)
    except OSError:  # also a missing file: the pool's disk may be away
        raise
    except TicError as error:
        return Index(fault=str(error).removeprefix(f"{job.path}: "))
    index.usable, index.stats = len(usable), _stats(job.tar)
    order = np.lexsort((found["f1"], found["f0"]))
    first, count = np.empty((2, len(job.subsets), len(found)), np.int64)
    for split, path in enumerate(job.subsets):
        first[split, order], count[split, order] = uids.find_uids(uids.open_uids(path), found[order])
    taken = np.flatnonzero(count.any(axis=0))
    index.table, index.uids = table.take(usable[taken]), found[taken]
    index.rows = [
        _rows(index.uids, *entry) for entry in zip(first[:, taken], count[:, taken], job.classes, strict=True)
    ]
    return index


def _stats(tar: str) -> int | None:
    """Return what a local shard's own ``_stats.json`` counts; in a cloud it would cost a request a shard."""
    if is_remote(tar):
        return None
    try:
        return read_json_object(stats_path(tar)).get("successes")
    except (TicError, OSError):
        return None


def _read_uids(shard: Buffer, table: Table, dropped: Counter[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (the samples that can be used (U,), their UIDs (U,)); the others are counted in ``dropped``."""
    good = np.ones(len(table.keys), bool)
    for reason, samples in _unusable(table):
        dropped[reason] += int((good & samples).sum())
        good &= ~samples
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
    for reason, count in list(dropped.items()):
        if not count:
            del dropped[reason]
    return np.array(usable, np.int64), uids.parse_uids(texts)


def _unusable(table: Table) -> list[tuple[str, np.ndarray]]:
    """Return (reason, (N,) bool, the samples that can't be used for it), judged by their members alone."""
    size = np.append(table.size, -1)  # of the member -1, which is none
    members = {suffix: table.find(suffix) for suffix in ("json", "txt", *IMAGES)}
    is_long = [len(suffix.encode(errors="surrogateescape")) > LONGEST_SUFFIX for suffix in table.suffixes]
    long_members = np.flatnonzero(np.array(is_long, bool)[table.suffix])
    flawed = table.flawed
    return [
        *(
            (reason, _mask(table, [i for i in flawed if flawed[i] == reason]))
            for reason in sorted(set(flawed.values()))
        ),
        ("duplicate key", _repeated(table.keys)),
        ("no json", members["json"] < 0),
        ("no image", np.all([members[suffix] < 0 for suffix in IMAGES], axis=0)),
        ("no text", members["txt"] < 0),
        ("empty member", np.any([size[member] == 0 for member in members.values()], axis=0)),
        ("name too long", _mask(table, np.searchsorted(table.start, long_members, "right") - 1)),
    ]


def _mask(table: Table, samples: object) -> np.ndarray:
    """Return (N,) bool, True at ``samples``."""
    mask = np.zeros(len(table.keys), bool)
    mask[np.asarray(samples, np.int64)] = True
    return mask


def _repeated(keys: list[str]) -> np.ndarray:
    """Return (N,) bool: the keys that were there before."""
    repeated, seen = np.zeros(len(keys), bool), set()
    if len(set(keys)) < len(keys):
        for i, key in enumerate(keys):
            repeated[i] = key in seen
            seen.add(key)
    return repeated


def _rows(found: np.ndarray, first: np.ndarray, count: np.ndarray, classes: str | None) -> Rows:
    """Return one split's rows of the samples with the UIDs ``found`` (N,), of which its list has ``count`` (N,) entries
    from ``first`` (N,) on; ``classes`` is its file of class ids.
    """
    sample = np.repeat(np.arange(len(count)), count)
    copy = np.arange(len(sample)) - np.repeat(np.cumsum(count) - count, count)
    class_id = np.full(len(sample), -1, np.int32)
    if classes is not None:
        listed = uids.open_uids(classes, uids.CLASS_ROW)
        at, listings = uids.find_uids(listed, found[sample])
        class_id[listings > 0] = listed["class_id"][at[listings > 0]]
    return Rows(sample=sample, entry=first[sample] + copy, copy=copy, class_id=class_id)
