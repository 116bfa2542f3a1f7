"""Which sample is where: a pool shard's headers and JSON are read once and its UIDs are looked up in every subset."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np

from tic_clip import TicError, uids
from tic_clip.tarshard import BLOCK, IMAGES, Buffer, Sample, open_shard, samples


class _Record(msgspec.Struct):
    """What is taken from a sample's JSON."""

    uid: str


_DECODER = msgspec.json.Decoder(_Record)
_CLS_BYTES = 2 * BLOCK  # a header, and a class id in one block


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pool shard in the local file ``path``, and the local files of subsets and of class ids (or None) for each."""

    path: str
    subsets: tuple[str, ...]
    classes: tuple[str | None, ...]


@dataclass(kw_only=True)
class Ranges:
    """The members of H samples of a shard, in its order.

    ``uids`` (H,) and ``start`` (H + 1,): sample h has the members start[h] to start[h + 1], each with a ``suffix``
    (its position in ``suffixes``), an ``offset`` and a ``size`` in bytes: all (M,).
    """

    uids: np.ndarray
    start: np.ndarray
    suffixes: list[str]
    suffix: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def bytes_per_sample(self) -> np.ndarray:
        """(H,) bytes that each sample takes in a tar."""
        blocks = BLOCK + -(-self.size // BLOCK) * BLOCK
        total = np.concatenate([[0], np.cumsum(blocks)])
        return total[self.start[1:]] - total[self.start[:-1]]

    def of_suffix(self, name: str) -> np.ndarray:
        """(M,) bool: the members with a suffix."""
        return self.suffix == (self.suffixes.index(name) if name in self.suffixes else -1)


@dataclass(kw_only=True)
class Rows:
    """What one split takes of a shard, a row each copy (R,): the sample's position in ``Ranges``, the number of the
    copy, the class id or -1, and the bytes in the output.
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
    """What a shard holds: samples ``read`` = ``usable`` + ``dropped`` by reason, what was ``noted`` besides, and each
    split's rows.

    ``fault`` says why the shard can't be read, and then it has no sample.
    """

    read: int = 0
    usable: int = 0
    dropped: Counter = field(default_factory=Counter)
    noted: Counter = field(default_factory=Counter)
    fault: str | None = None
    ranges: Ranges | None = None
    rows: list[Rows] = field(default_factory=list)


def read_uid(data: bytes) -> str | None:
    """The value of "uid" in a sample's JSON, None if it has none that is a string.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return _DECODER.decode(data).uid  # checks all of it, as fast as a regular expression
    except msgspec.DecodeError:  # stricter than Python: NaN and lone surrogates are met in the wild
        record = json.loads(data)
    text = record.get("uid") if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def fault_of(sample: Sample) -> str | None:
    """Why a sample can't be used, judged by its members alone, or None."""
    images = [suffix for suffix in IMAGES if suffix in sample.members]
    for what, found in (("json", "json" in sample.members), ("image", images), ("text", "txt" in sample.members)):
        if not found:
            return f"no {what}"
    needed = ("json", "txt", *images)
    return "empty member" if any(sample.members[suffix][1] == 0 for suffix in needed) else None


def _usable(shard: Buffer, index: Index) -> Iterator[tuple[Sample, str]]:
    """Yield (sample, UID) of those that can be used, and count the others."""
    keys = set()
    for sample in samples(shard, index.noted):
        index.read += 1
        reason, uid = "duplicate key" if sample.key in keys else fault_of(sample), None
        keys.add(sample.key)
        if reason is None:
            try:
                uid = read_uid(sample.read(shard, "json"))
            except ValueError:
                reason = "invalid json"
        if reason is None and not uids.is_uid(uid):
            reason = "no valid uid"
        if reason:
            index.dropped[reason] += 1
            continue
        index.noted["upper-case uid"] += not uid.islower() and uid.lower() != uid
        yield sample, uid


def _ranges(found: list[Sample], keys: np.ndarray) -> Ranges:
    """The members of samples as arrays."""
    suffixes = list(dict.fromkeys(suffix for sample in found for suffix in sample.members))
    code = {suffix: i for i, suffix in enumerate(suffixes)}
    places = np.array([place for sample in found for place in sample.members.values()], np.int64).reshape(-1, 2)
    return Ranges(
        uids=keys,
        start=np.cumsum([0, *(len(sample.members) for sample in found)]),
        suffixes=suffixes,
        suffix=np.array([code[suffix] for sample in found for suffix in sample.members], np.int16),
        offset=places[:, 0],
        size=places[:, 1],
    )


def _rows(ranges: Ranges, sizes: np.ndarray, repeats: np.ndarray, classes: str | None) -> Rows:
    """One split's rows, from how often it has each sample (H,)."""
    sample = np.repeat(np.arange(len(repeats)), repeats)
    copy = np.arange(len(sample)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    label, size = np.full(len(sample), -1, np.int32), sizes[sample]
    if classes is not None:
        table = uids.open_uids(classes, uids.CLASSES)
        first, listed = uids.find(table, ranges.uids[sample])
        label[listed > 0] = table["class_id"][first[listed > 0]]
        size = size + np.where(label >= 0, _CLS_BYTES - _own_class_bytes(ranges)[sample], 0)
    return Rows(sample=sample, copy=copy, label=label, size=size)


def _own_class_bytes(ranges: Ranges) -> np.ndarray:
    """(H,) bytes of the class that a sample of the pool brings along, which a listed class replaces."""
    size = np.where(ranges.of_suffix("cls"), BLOCK + -(-ranges.size // BLOCK) * BLOCK, 0)
    total = np.concatenate([[0], np.cumsum(size)])
    return total[ranges.start[1:]] - total[ranges.start[:-1]]


def index_shard(job: Job) -> Index:
    """Read the headers and JSON of one pool shard and look its UIDs up in every subset."""
    index = Index()
    try:
        with open_shard(job.path) as shard:
            usable = list(_usable(shard, index))
    except TicError as error:
        return Index(fault=str(error).removeprefix(f"{job.path}: "))
    index.usable = len(usable)
    keys = uids.parse_uids(uid for _, uid in usable)
    repeats = [uids.find(uids.open_uids(path), keys)[1] for path in job.subsets]
    wanted = np.flatnonzero(np.any(repeats, axis=0)) if repeats else np.arange(0)
    index.ranges = _ranges([usable[i][0] for i in wanted], keys[wanted])
    sizes = index.ranges.bytes_per_sample()
    index.rows = [
        _rows(index.ranges, sizes, repeat[wanted], classes)
        for repeat, classes in zip(repeats, job.classes, strict=True)
    ]
    index.noted += Counter()  # without what was counted 0 times
    return index
