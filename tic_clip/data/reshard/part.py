"""Write one part of the pool: the one loop, used alike by this machine, a job array and a Ray cluster.

Workers index pool shards ahead, in order; this process appends their samples to the splits. ``{OUT}/.reshard/{part}/``
holds the journal. What the journal lacks is done again, and gives the same bytes.
"""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tic_clip import TicError, storage
from tic_clip.cli import progress_bar
from tic_clip.data import folder, uids
from tic_clip.data.reshard.index import Index, IndexJob, index_shard
from tic_clip.data.reshard.writer import OutputSplit, SplitWriter
from tic_clip.data.split import STATS
from tic_clip.data.tar import BLOCK, END
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_dir, is_remote, list_files, to_path

JOURNAL, ENTRIES = "journal.json", "entries-{:08d}.bin"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block of the pool, ``tars``, and the ``splits`` to be made of it; ``work`` is the folder of its journal."""

    tars: tuple[str, ...]
    splits: tuple[OutputSplit, ...]
    work: str
    shard_size: int
    num_workers: int = 1
    skip_bad_shards: bool = False
    dry_run: bool = False
    timeout: float = 0.0  # seconds to wait for a lost process to give up its locks


class ShardCounts(msgspec.Struct, kw_only=True):
    """What a pool shard holds, as ``Index`` has it, and of each split: the ``samples`` that it takes, their ``rows``
    (with copies), and the samples whose UID the pool has had before (``repeated``).
    """

    read: int
    usable: int
    dropped: dict[str, int]
    stats: int | None
    fault: str | None
    samples: list[int]
    rows: list[int]
    repeated: list[int]


class Journal(msgspec.Struct, kw_only=True):
    """Split -> what it depends on; the counts of the first pool shards; of each split, output shard -> bytes."""

    arguments: dict[str, dict[str, Any]] = {}
    shards: list[ShardCounts] = []
    written: list[dict[int, int]] = []


def read_journal(work: str) -> Journal | None:
    """Return the journal in a folder, None if there is none, an empty one if it is damaged or of another version."""
    try:
        return msgspec.json.decode(storage.read_bytes(to_path(work) / JOURNAL), type=Journal)
    except storage.NotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Journal()


def remove_work(work: str) -> None:
    """Remove the journal, and all else that is beside the output while a part is made."""
    for file, _ in list_files(work) if is_dir(work) else []:
        storage.remove(file)
    if not is_remote(work):
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            Path(work).parent.rmdir()  # unless another part is under way


class JournalWriter:
    """Saves a journal now and then, and which entries of the lists each pool shard has taken: a restart must know them
    to drop the same repeated UIDs. Files of entries hold some pool shards each, split after split.
    """

    def __init__(self, work: str | None, journal: Journal) -> None:
        self.work, self.journal, self.entries = work, journal, []
        self.num_saved = len(journal.shards)
        self.begun = self.next_save = time.monotonic()

    def add(self, counts: ShardCounts, entries: list[np.ndarray]) -> None:
        """Add a pool shard. Saving takes a twentieth of the time; a kill loses a fiftieth of the work."""
        self.journal.shards.append(counts)
        self.entries += entries
        if (before := time.monotonic()) >= self.next_save:
            self.save()
            after = time.monotonic()
            self.next_save = after + max(20 * (after - before), (after - self.begun) / 50)

    def save(self) -> None:
        """Save all that is known."""
        if self.work is None:
            return
        if self.entries:
            with storage.atomic_open(to_path(self.work) / ENTRIES.format(self.num_saved), sync=False) as file:
                file.write(np.concatenate(self.entries).astype("<u8").tobytes())
            self.entries, self.num_saved = [], len(self.journal.shards)
        with storage.atomic_open(to_path(self.work) / JOURNAL, sync=False) as file:
            file.write(msgspec.json.encode(self.journal))


def read_entries(work: str, journal: Journal) -> list[np.ndarray]:
    """Return of each split the entries that the journal's pool shards have taken; cut off shards that no file has."""
    number, found = 0, [[np.empty(0, np.int64)] for _ in journal.written]
    for file, _ in list_files(work, "entries-*.bin") if journal.shards else []:
        entries = np.frombuffer(storage.read_bytes(file), "<u8").astype(np.int64)
        for shard in range(int(to_path(file).stem.rpartition("-")[2]), len(journal.shards)):
            ends = np.cumsum(journal.shards[shard].rows)
            if shard > number or ends[-1] > len(entries):
                break
            *pieces, entries = np.split(entries, ends)
            if shard == number:
                number += 1
                for split, piece in zip(found, pieces, strict=True):
                    split.append(piece)
    del journal.shards[number:]
    return [np.concatenate(pieces) for pieces in found]


def open_journal(part: Part, place: Path) -> tuple[Journal, list[np.ndarray]]:
    """Return what an earlier run of the same part did, up to the first pool shard that is needed again, and of each
    split the entries taken until there; nothing if a shard that could not be read then can be read now.
    """
    arguments = {split.name: {key: split.arguments[key] for key in folder.COMPARED} for split in part.splits}
    journal = None if part.dry_run else read_journal(part.work)
    if (
        journal is None
        or list(journal.arguments.items()) != list(arguments.items())
        or _is_mended(part, journal, place)
    ):
        for file, _ in list_files(part.work) if is_dir(part.work) and not part.dry_run else []:
            storage.remove(file)
        journal = Journal(arguments=arguments, shards=[], written=[{} for _ in part.splits])
    pairs = zip(part.splits, journal.written, strict=True)
    journal.written = [_existing(split.path, written) for split, written in pairs]
    ends = np.cumsum([counts.rows for counts in journal.shards], axis=0).reshape(-1, len(part.splits))
    needed = (ends > part.shard_size * np.array(list(map(len, journal.written)))).any(axis=1)
    del journal.shards[int(np.append(needed, True).argmax()) :]
    return journal, read_entries(part.work, journal)


def _is_mended(part: Part, journal: Journal, place: Path) -> bool:
    """Return whether a pool shard that could not be read then can be read now."""
    bad = (number for number, counts in enumerate(journal.shards) if counts.fault)
    return any(index_shard(_job(part, number, place)).fault is None for number in bad)


def _existing(path: str, written: dict[int, int]) -> dict[int, int]:
    """Return the first of the output shards ``written``, until one is missing or not all there."""
    sizes = {to_path(file).name: size for file, size in list_files(path)} if written and is_dir(path) else {}
    existing = {}
    while (size := written.get(len(existing))) is not None:
        names = [form.format(len(existing)) for form in (folder.SHARD_FORMAT, STATS)]
        if sizes.get(names[0]) != size + len(END) or not sizes.get(names[1]):
            break
        existing[len(existing)] = size
    return existing


@contextmanager
def working_folder(part: Part) -> Iterator[Path]:
    """Yield an empty folder on this machine for unfinished shards; beside a local output, which is locked meanwhile.

    Raises:
        TicError: another process is at work there.
    """
    if part.dry_run or is_remote(part.work):
        with storage.temporary_folder("tic-clip-reshard-") as place:
            yield place
        return
    work = Path(part.work)
    with ExitStack() as stack:
        for path in (work, *(Path(split.path) for split in part.splits)):
            label = work.parent.parent if path == work else path
            stack.enter_context(storage.lock_folder(path, part.timeout, label))
        place = work / "unfinished"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield place


def run_parts(parts: list[Part]) -> list[dict[str, dict[str, Any]]]:
    """Write parts one after the other with the same workers; return of each: split -> its ``meta.json``."""
    paths = (path for part in parts for path in (part.tars[0], *(split.path for split in part.splits)))
    fork = not any(map(is_remote, paths)) and threading.active_count() == 1
    total = sum(len(part.tars) for part in parts)
    with make_pool(parts[0].num_workers, fork=fork) as pool, progress_bar("reshard", total, "shard") as bar:
        return [write_part(part, pool, bar.update) for part in parts]


def write_part(part: Part, pool: Executor, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
    """Write all splits of a part, or resume where an earlier run ended; return the ``meta.json`` of each, which is
    written last, and not while shards of the pool are bad (unless these are to be left out).

    Raises:
        TicError, OSError: something can't be read or written; what is done stays done.
    """
    with working_folder(part) as place:
        journal, taken = open_journal(part, place)
        saver = JournalWriter(None if part.dry_run else part.work, journal)
        saver.save()  # before anything that an earlier one tells of is removed
        for split, written in [] if part.dry_run else zip(part.splits, journal.written, strict=True):
            names = {form.format(number) for number in written for form in (folder.SHARD_FORMAT, STATS)}
            folder.start(split.path, keep=names)
        try:
            _write_splits(part, saver, taken, place, pool, advance)
        finally:
            saver.save()
        metas = {split.name: _meta(part, journal, i) for i, split in enumerate(part.splits)}
        is_bad = any(counts.fault for counts in journal.shards)
        if not part.dry_run and (part.skip_bad_shards or not is_bad):
            for split in part.splits:
                _finish_split(part, split, metas[split.name])
            remove_work(part.work)
    return metas


def _write_splits(
    part: Part, saver: JournalWriter, taken: list[np.ndarray], place: Path, pool: Executor, advance: Callable
) -> None:
    """Write what the journal lacks: the loop."""
    first, ahead = len(saver.journal.shards), part.num_workers + (part.num_workers > 1)  # still in the page cache
    advance(first)
    jobs = (_job(part, number, place) for number in range(first, len(part.tars)))
    with ThreadPoolExecutor(part.num_workers) as threads:
        writers = [
            SplitWriter(split, part.shard_size, place / str(i), threads, saver.journal.written[i], part.dry_run)
            for i, split in enumerate(part.splits)
        ]
        for writer, entries in zip(writers, taken, strict=True):
            writer.skip(entries)
        for number, index in enumerate(map_in_pool(pool, index_shard, jobs, ahead), first):
            job = _job(part, number, place)
            rows = [writer.select(found) for writer, found in zip(writers, index.rows, strict=index.fault is None)]
            copies = [threads.submit(writers[i].append, job.path, index, rows[i]) for i in range(len(rows))]
            for copy in copies:  # copying releases the GIL
                copy.result()
            if is_remote(job.tar):
                Path(job.path).unlink(missing_ok=True)
            for writer in writers:
                writer.wait(ahead)
            saver.add(_count(index, rows, len(writers)), [found.entry for found in rows])
            advance(1)
        for writer in writers:
            writer.close()
        for writer in writers:
            writer.wait()


def _job(part: Part, number: int, place: Path) -> IndexJob:
    """Return the job for a pool shard, which is fetched into ``place`` if it lies in a cloud."""
    tar = part.tars[number]
    path = str(place / f"pool-{number:08d}.tar") if is_remote(tar) else tar
    subsets, classes = zip(*((split.subset, split.classes) for split in part.splits), strict=True)
    return IndexJob(tar=tar, path=path, subsets=subsets, classes=classes)


def _count(index: Index, rows: list, num_splits: int) -> ShardCounts:
    """Return the counts of a pool shard of which each split takes ``rows``."""
    samples = [found.num_samples for found in rows] or [0] * num_splits
    return ShardCounts(
        read=index.read,
        usable=index.usable,
        dropped=dict(sorted(index.dropped.items())),
        stats=index.stats if index.stats != index.read else None,
        fault=index.fault,
        samples=samples,
        rows=list(map(len, rows)) or [0] * num_splits,
        repeated=[found.num_samples - count for found, count in zip(index.rows, samples, strict=False)] or samples,
    )


def _meta(part: Part, journal: Journal, number: int) -> dict[str, Any]:
    """Return the ``meta.json`` of a split: what was read = what was kept + what was dropped, by reason."""
    shards, split = dict(zip(part.tars, journal.shards, strict=True)), part.splits[number]
    read, kept = (sum(counts) for counts in zip(*((c.read, c.samples[number]) for c in shards.values()), strict=True))
    dropped = sum((Counter(counts.dropped) for counts in shards.values()), Counter())
    dropped["duplicate uid in the pool"] = repeated = sum(counts.repeated[number] for counts in shards.values())
    dropped["not in the subset"] = sum(counts.usable for counts in shards.values()) - kept - repeated
    if read != kept + dropped.total():
        raise TicError(f"{split.path}: {read} samples read, but {kept} kept and {dropped.total()} dropped")
    rows = sum(counts.rows[number] for counts in shards.values())
    stats = {tar: f"{c.stats}, not {c.read}" for tar, c in shards.items() if c.stats is not None}
    return {
        "output_shard_count": -(-rows // part.shard_size),
        "output_count": rows,
        "output_bytes": sum(size + 2 * BLOCK for size in journal.written[number].values()),
        "output_shard_format": folder.SHARD_FORMAT,
        "subset_count": len(uids.open_uids(split.subset)),
        "processed_count": read,
        "kept_count": kept,
        "dropped": dict(sorted((+dropped).items())),
        "bad_shards": {tar: counts.fault for tar, counts in shards.items() if counts.fault},
        "wrong_stats": stats,
        "arguments": split.arguments,
    }


def _finish_split(part: Part, split: OutputSplit, meta: dict[str, Any]) -> None:
    """Write the tables of a split. Of several parts, the first alone holds the list."""
    full, rest = divmod(meta["output_count"], part.shard_size)
    counts = [part.shard_size] * full + [rest] * (rest > 0)
    sizes = {folder.SHARD_FORMAT.format(number): count for number, count in enumerate(counts)}
    folder.finish(split.path, meta, sizes, split.subset if split.arguments["part"] == 0 else None)
