"""Which sample is where: a pool shard's headers and JSON are read once and its UIDs are looked up in every subset."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.tar import BLOCK, IMAGES, Buffer, Table, open_shard, read_table

LONGEST_SUFFIX = 56
"""Bytes of a suffix that a tar's 100 for a name have room for after "{uid}-{copy}."."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pool shard in the local file ``path``, and the local files of subsets and of class ids (or None) for each."""

    path: str
    subsets: tuple[str, ...]
    classes: tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one split takes of a shard, a row each copy (R,): the ``sample``, the number of the ``copy``, the class id
    as ``label`` or -1, and its ``size`` in a tar, in bytes.
    """

    sample: np.ndarray
    copy: np.ndarray
    label: np.ndarray
    size: np.ndarray

    @property
    def num_samples(self) -> int:
        """Samples without their further copies."""
        return int((self.copy == 0).sum())


@dataclass(kw_only=True)
class Index:
    """What a shard holds: samples ``read`` = ``usable`` + ``dropped`` by reason, and what was ``noted`` besides.

    ``table`` and ``uids`` (N,) are of the N samples that some split takes, ``rows`` say which split takes which.
    ``fault`` says why the shard can't be read; then it has no sample.
    """

    read: int = 0
    usable: int = 0
    dropped: Counter = field(default_factory=Counter)
    noted: Counter = field(default_factory=Counter)
    fault: str | None = None
    table: Table | None = None
    uids: np.ndarray | None = None
    rows: list[Rows] = field(default_factory=list)


def _repeated(keys: list[str]) -> np.ndarray:
    """(N,) bool: the keys that were there before."""
    repeated, seen = np.zeros(len(keys), bool), set()
    if len(set(keys)) < len(keys):
        for i, key in enumerate(keys):
            repeated[i] = key in seen
            seen.add(key)
    return repeated


def _faulty(table: Table) -> list[tuple[str, np.ndarray]]:
    """(why a sample can't be used, judged by its members alone; (N,) bool, for which samples that is so)."""
    size = np.append(table.size, -1)  # of the member -1: of none
    found = {suffix: table.find(suffix) for suffix in ("json", "txt", *IMAGES)}
    long = np.array([len(suffix.encode(errors="surrogateescape")) > LONGEST_SUFFIX for suffix in table.suffixes], bool)
    with_long = np.searchsorted(table.start, np.flatnonzero(long[table.suffix]), "right") - 1
    return [
        ("duplicate key", _repeated(table.keys)),
        ("no json", found["json"] < 0),
        ("no image", np.all([found[suffix] < 0 for suffix in IMAGES], axis=0)),
        ("no text", found["txt"] < 0),
        ("empty member", np.any([size[member] == 0 for member in found.values()], axis=0)),
        ("name too long", np.isin(np.arange(len(table.keys)), with_long)),
    ]


def _usable(shard: Buffer, table: Table, index: Index) -> tuple[np.ndarray, list[str]]:
    """(the samples that can be used, their UIDs); the others are counted."""
    good = np.ones(len(table.keys), bool)
    for reason, faulty in _faulty(table):
        index.dropped[reason] += int((good & faulty).sum())
        good &= ~faulty
    member = table.find("json")[good]
    usable, texts = [], []
    places = zip(np.flatnonzero(good).tolist(), table.offset[member].tolist(), table.size[member].tolist(), strict=True)
    for sample, offset, size in places:
        try:
            uid = uids.read_uid(shard[offset : offset + size])
        except ValueError:
            index.dropped["invalid json"] += 1
            continue
        if uid is None:
            index.dropped["no valid uid"] += 1
            continue
        usable.append(sample)
        texts.append(uid)
    return np.array(usable, np.int64), texts


def _rows(index: Index, repeats: np.ndarray, classes: str | None) -> Rows:
    """One split's rows, from how often it has each sample of the table (N,)."""
    table = index.table
    sample = np.repeat(np.arange(len(repeats)), repeats)
    copy = np.arange(len(sample)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    label = np.full(len(sample), -1, np.int32)
    blocks = BLOCK + -(-table.size // BLOCK) * BLOCK
    size = np.diff(np.append(0, np.cumsum(blocks))[table.start])[sample]
    if classes is not None:
        listed = uids.open_uids(classes, uids.CLASS_ROW)
        first, found = uids.find_uids(listed, index.uids[sample])
        label[found > 0] = listed["class_id"][first[found > 0]]
        own = table.find("cls")[sample]  # the class that the pool has, which the listed one replaces
        size = size + np.where(label >= 0, 2 * BLOCK - np.where(own >= 0, np.append(blocks, 0)[own], 0), 0)
    return Rows(sample=sample, copy=copy, label=label, size=size)


def index_shard(job: Job) -> Index:
    """Read the headers and JSON of one pool shard and look its UIDs up in every subset."""
    index = Index()
    try:
        with open_shard(job.path) as shard:
            table = read_table(shard)
            usable, texts = _usable(shard, table, index)
    except (TicError, OSError) as error:
        return Index(fault=str(error).removeprefix(f"{job.path}: "))
    index.read, index.usable, index.dropped = len(table.keys), len(usable), +index.dropped
    keys = uids.parse_uids(texts)
    order = np.lexsort((keys["f1"], keys["f0"]))
    repeats = np.empty((len(job.subsets), len(keys)), np.int64)
    for split, path in enumerate(job.subsets):
        repeats[split, order] = uids.find_uids(uids.open_uids(path), keys[order])[1]
    wanted = np.flatnonzero(repeats.any(axis=0))
    index.table, index.uids = table.take(usable[wanted]), keys[wanted]
    index.rows = [_rows(index, repeat[wanted], classes) for repeat, classes in zip(repeats, job.classes, strict=True)]
    return index
