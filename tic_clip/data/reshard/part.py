"""Write one part of the pool: the one loop, used alike by this machine, a job array and a Ray cluster.

Workers index pool shards ahead, in order; this process appends their samples to the splits. ``{OUT}/.reshard/{part}/``
holds the journal. What the journal lacks is done again, and gives the same bytes.
"""

import atexit
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tic_clip import storage
from tic_clip.cli import progress
from tic_clip.data import folder, uids
from tic_clip.data.reshard.index import Index, IndexJob, ShardCounts, index_shard
from tic_clip.data.reshard.writer import OutputSplit, SplitWriter
from tic_clip.data.split import STATS
from tic_clip.data.tar import BLOCK, END
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_dir, is_remote, list_files, local_copy, to_path

JOURNAL = "journal-{:08d}"


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


class Journal(msgspec.Struct, kw_only=True):
    """Split -> what it depends on; the counts of the pool shards from number ``first`` on; of each split, output shard
    -> bytes.
    """

    arguments: dict[str, dict[str, Any]] = {}
    first: int = 0
    shards: list[ShardCounts] = []
    written: list[dict[int, int]] = []


def read_journal(work: str) -> Journal | None:
    """Return what the files of a journal say, None if there are none, an empty journal if one is damaged."""
    journal = None
    for file, _ in list_files(work, "journal-*") if is_dir(work) else []:
        try:
            saved = msgspec.msgpack.decode(storage.read_bytes(file), type=Journal)
        except (msgspec.DecodeError, storage.NotFoundError):  # or another process has just finished
            return Journal()
        journal = journal or Journal(arguments=saved.arguments, written=[{} for _ in saved.written])
        if saved.first > len(journal.shards):
            break
        journal.shards[saved.first :] = saved.shards
        for known, new in zip(journal.written, saved.written, strict=False):
            known |= new
    return journal


def remove_work(work: str) -> None:
    """Remove the journal, newest first, and all else that is beside the output while a part is made."""
    for file, _ in reversed(list_files(work)) if is_dir(work) else []:
        storage.remove(file)
    if not is_remote(work):
        shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            Path(work).parent.rmdir()  # unless another part is under way


class JournalWriter:
    """Saves what is new in a journal now and then, in a further file; a later file overrules the ones before it."""

    def __init__(self, work: str | None, journal: Journal) -> None:
        self.work, self.journal, self.num_saved = work, journal, len(journal.shards)
        self.begun = self.next_save = time.monotonic()

    def add(self, counts: ShardCounts) -> None:
        """Add a pool shard. Saving takes a twentieth of the time; a kill loses a fiftieth of the work."""
        self.journal.shards.append(counts)
        if (before := time.monotonic()) >= self.next_save:
            self.save()
            after = time.monotonic()
            self.next_save = after + max(20 * (after - before), (after - self.begun) / 50)

    def save(self) -> None:
        """Save what is new, and which entries of the lists it has taken: a restart must drop the same repeated UIDs."""
        known, first = self.journal, self.num_saved
        new = Journal(arguments=known.arguments, first=first, shards=known.shards[first:], written=known.written)
        if self.work is not None:
            with storage.atomic_open(to_path(self.work) / JOURNAL.format(first), sync=False) as file:
                file.write(msgspec.msgpack.encode(new))
        for counts in new.shards:
            counts.entries = []
        self.num_saved = len(known.shards)


def open_journal(part: Part, place: Path) -> Journal:
    """Return what an earlier run of the same part did, up to the first pool shard that is needed again; nothing if a
    shard that could not be read then can be read now.
    """
    arguments = {split.name: {key: split.arguments[key] for key in folder.COMPARED} for split in part.splits}
    journal = None if part.dry_run else read_journal(part.work)
    is_same = journal is not None and list(journal.arguments.items()) == list(arguments.items())
    if not is_same or _is_mended(part, journal, place):
        for file, _ in reversed(list_files(part.work)) if is_dir(part.work) and not part.dry_run else []:
            storage.remove(file)
        return Journal(arguments=arguments, written=[{} for _ in part.splits])
    pairs = zip(part.splits, journal.written, strict=True)
    journal.written = [_existing(split.path, written) for split, written in pairs]
    ends = np.cumsum([counts.rows for counts in journal.shards], axis=0).reshape(-1, len(part.splits))
    needed = (ends > part.shard_size * np.array(list(map(len, journal.written)))).any(axis=1)
    del journal.shards[int(np.append(needed, True).argmax()) :]
    return journal


def _is_mended(part: Part, journal: Journal, place: Path) -> bool:
    """Return whether a pool shard that could not be read then can be read now."""
    bad = (number for number, counts in enumerate(journal.shards) if counts.fault)
    return any(index_shard(_job(part, number, place)).counts.fault is None for number in bad)


def _existing(path: str, written: dict[int, int]) -> dict[int, int]:
    """Return the first of the output shards ``written``, until one is missing or not all there."""
    sizes = {to_path(file).name: size for file, size in list_files(path)} if written and is_dir(path) else {}
    existing = {}
    while (size := written.get(len(existing))) is not None:
        shard, stats = _names(len(existing))
        if sizes.get(shard) != size + len(END) or not sizes.get(stats):
            break
        existing[len(existing)] = size
    return existing


def _names(number: int) -> list[str]:
    """Return the names of an output shard and its stats."""
    return [form.format(number) for form in (folder.SHARD_FORMAT, STATS)]


@contextmanager
def working_folder(part: Part) -> Iterator[Path]:
    """Yield an empty folder on this machine for unfinished shards; beside a local output, which is locked meanwhile."""
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


@cache
def _lists_folder(*fingerprints: str) -> Path:
    """Return a folder that lasts as long as this process: a worker of Ray fetches a list once for all its parts."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(storage.temporary_folder("tic-clip-lists-"))


def run_part(part: Part) -> dict[str, dict[str, Any]]:
    """Write a part on whatever machine of a Ray cluster this is."""
    return run_parts([part], _lists_folder(*(split.arguments["subset"] for split in part.splits)))[0]


def run_parts(parts: list[Part], lists: Path) -> list[dict[str, dict[str, Any]]]:
    """Write parts one after the other with the same workers; return of each: split -> its ``meta.json``."""
    paths = (path for part in parts for path in (part.tars[0], *(split.path for split in part.splits)))
    fork = not any(map(is_remote, paths)) and threading.active_count() == 1
    total = sum(len(part.tars) for part in parts)
    with make_pool(parts[0].num_workers, fork=fork) as pool, progress(None, "reshard", total, "shard") as bar:
        return [write_part(part, lists, pool, bar.update) for part in parts]


def write_part(part: Part, lists: Path, pool: Executor, advance: Callable[[int], object]) -> dict[str, dict[str, Any]]:
    """Write all splits of a part, or resume where an earlier run ended; return the ``meta.json`` of each, which is
    written last, and not while shards of the pool are bad (unless these are to be left out).
    """
    splits = part.splits
    files = [[file and str(local_copy(file, lists)) for file in (split.subset, split.classes)] for split in splits]
    local = [replace(split, subset=a, classes=b) for split, (a, b) in zip(splits, files, strict=True)]
    part = replace(part, splits=tuple(local))
    with working_folder(part) as place:
        journal = open_journal(part, place)
        saver = JournalWriter(None if part.dry_run else part.work, journal)
        saver.save()  # before anything that an earlier one tells of is removed
        for split, written in zip(part.splits, journal.written, strict=True):
            if not part.dry_run:
                folder.start(split.path, keep={name for number in written for name in _names(number)})
        try:
            _write_splits(part, saver, place, pool, advance)
        finally:
            saver.save()
        metas = {split.name: _meta(part, journal, i) for i, split in enumerate(part.splits)}
        is_bad = any(counts.fault for counts in journal.shards)
        if not part.dry_run and (part.skip_bad_shards or not is_bad):
            for split in part.splits:
                _finish_split(part, split, metas[split.name])
            remove_work(part.work)
    return metas


def _write_splits(part: Part, saver: JournalWriter, place: Path, pool: Executor, advance: Callable) -> None:
    """Write what the journal lacks: the loop."""
    shards, written = saver.journal.shards, saver.journal.written
    first, ahead = len(shards), part.num_workers + (part.num_workers > 1)  # still in the page cache
    advance(first)
    jobs = (_job(part, number, place) for number in range(first, len(part.tars)))
    with ThreadPoolExecutor(part.num_workers) as threads:
        writers = [
            SplitWriter(split, part.shard_size, place / str(i), threads, written[i], part.dry_run)
            for i, split in enumerate(part.splits)
        ]
        for i, writer in enumerate(writers):
            writer.skip(np.frombuffer(b"".join(counts.entries[i] for counts in shards), "<i8"))
        for counts in shards:
            counts.entries = []  # they are in the journal's files
        for number, index in enumerate(map_in_pool(pool, index_shard, jobs, ahead), first):
            job = _job(part, number, place)
            rows = [writer.select(found) for writer, found in zip(writers, index.rows, strict=True)]
            copies = [threads.submit(writers[i].append, job.path, index, rows[i]) for i in range(len(rows))]
            for copy in copies:  # copying releases the GIL
                copy.result()
            if is_remote(job.tar):
                Path(job.path).unlink(missing_ok=True)
            for writer in writers:
                writer.wait(ahead)
            saver.add(_count(index, rows))
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


def _count(index: Index, rows: list[np.ndarray]) -> ShardCounts:
    """Return the counts of a pool shard of which each split takes ``rows``."""
    found, taken = ([int((part["copy"] == 0).sum()) for part in parts] for parts in (index.rows, rows))
    index.counts.samples, index.counts.rows = taken, list(map(len, rows))
    index.counts.repeated = [before - after for before, after in zip(found, taken, strict=True)]
    index.counts.entries = [part["entry"].tobytes() for part in rows]
    return index.counts


def _meta(part: Part, journal: Journal, number: int) -> dict[str, Any]:
    """Return the ``meta.json`` of a split: what was read = what was kept + what was dropped, by reason."""
    shards, split = dict(zip(part.tars, journal.shards, strict=True)), part.splits[number]
    read, kept = (sum(counts) for counts in zip(*((c.read, c.samples[number]) for c in shards.values()), strict=True))
    dropped = sum((Counter(counts.dropped) for counts in shards.values()), Counter())
    dropped["duplicate uid in the pool"] = repeated = sum(counts.repeated[number] for counts in shards.values())
    dropped["not in the subset"] = sum(counts.usable for counts in shards.values()) - kept - repeated
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
