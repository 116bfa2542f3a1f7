"""Move bytes: an output shard is written from byte ranges of pool shards, under new keys, and renamed when whole."""

from dataclasses import dataclass
from typing import IO

from tic_clip import uids
from tic_clip.reshard.plan import Piece, Shard
from tic_clip.storage import atomic_open, to_path
from tic_clip.tarshard import END, open_shard, samples, write_member


@dataclass(frozen=True, kw_only=True)
class Job:
    """One output shard to be written into the split ``output``; ``classes`` is the file of class ids, if any."""

    output: str
    shard: Shard
    classes: str | None


def class_ids(path: str | None, keys: object) -> list[int | None]:
    """The class of each UID in ``keys``, or None where the file lists none (or there is no file)."""
    if path is None:
        return [None] * len(keys)
    table = uids.open_uids(path, uids.CLASSES)
    first, repeats = uids.find(table, keys)
    return [int(table["class_id"][i]) if n else None for i, n in zip(first, repeats, strict=True)]


def copy_piece(file: IO[bytes], piece: Piece, classes: str | None) -> None:
    """Append the samples of one pool shard to an open output shard."""
    labels = class_ids(classes, piece.uids)
    with open_shard(piece.source) as shard:
        found = list(samples(shard))
        for position, uid, copy, label in zip(piece.samples, piece.uids, piece.copies, labels, strict=True):
            key = f"{uids.format_uid(uid)}-{copy}"
            for suffix in found[position].members:
                if suffix == "cls" and label is not None:
                    continue  # the table's class replaces the pool's
                write_member(file, f"{key}.{suffix}", found[position].read(shard, suffix))
            if label is not None:
                write_member(file, f"{key}.cls", b"%d" % label)


def copy_shard(job: Job) -> int:
    """Write one output shard; returns its number of samples."""
    with atomic_open(to_path(job.output) / f"{job.shard.number:08d}.tar") as file:
        for piece in job.shard.pieces:
            copy_piece(file, piece, job.classes)
        file.write(END)
    return job.shard.num_samples
