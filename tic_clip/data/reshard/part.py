"""Write one part of the pool: the loop that a single machine, a job array and a Ray cluster run.

Workers index pool shards ahead, in order; this process appends their samples to the splits. After an interruption, what
is missing in the journal is done again and gives the same bytes.
"""

import atexit
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np

from tic_clip import storage
from tic_clip.cli import flag, progress
from tic_clip.data import folder, uids
from tic_clip.data.reshard.index import ShardCounts, index_shard
from tic_clip.data.reshard.writer import OutputSplit, SplitWriter, shard_names
from tic_clip.data.tar import END
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_dir, is_remote, list_files, local_copy, to_path

ENGINES = ("local", "ray")
LOST = 60.0  # seconds in which a lost process of a cluster gives up its locks


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to cut a pool: flags of reshard.py."""

    num_workers: int = flag("processes (with Ray, per part)", 1, short="-j")
    shard_size: int = flag("maximum samples per shard", 10_000)
    parts: int = flag("number of blocks to cut the pool into", 1)
    part: int | None = None
    engine: str = flag("where parts run", "local", choices=ENGINES)
    ray_address: str | None = None
    skip_bad_shards: bool = flag("leave out damaged pool shards", False)
    overwrite: bool = flag("replace splits made with other arguments", False)
    dry_run: bool = flag("count only, write nothing", False)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A block of the pool, ``tars``, and the ``splits`` to make from it; ``work`` is the folder of its journal."""

    tars: tuple[str, ...]
    splits: tuple[OutputSplit, ...]
    work: str
    options: Options


class Journal(msgspec.Struct, kw_only=True):
    """Of each split, the ``arguments`` that it depends on, and output shard -> bytes of those ``written``; the counts
    of the pool ``shards`` from number ``first`` on. Files of another ``run`` are older, and say nothing.
    """

    run: str = ""
    arguments: dict[str, dict[str, Any]] = {}
    first: int = 0
    shards: list[ShardCounts] = []
    written: list[dict[int, int]] = []


def read_journal(work: str) -> Journal:
    """Read the files of a journal; later ones override earlier ones."""
    journal = Journal()
    for file, _ in list_files(work, "journal-*") if is_dir(work) else []:
        with suppress(msgspec.DecodeError, storage.NotFoundError):  # a machine went down, or a process has just ended
            saved = msgspec.msgpack.decode(storage.read_bytes(file), type=Journal)
            if saved.first <= len(journal.shards) and journal.run in ("", saved.run):
                saved.shards = journal.shards[: saved.first] + saved.shards
                journal = saved
    return journal


def remove_work(work: str) -> None:
    """Remove the journal and the other temporary files of a part."""
    if is_remote(work):
        for file, _ in list_files(work) if is_dir(work) else []:
            storage.remove(file)
        return
    shutil.rmtree(work, ignore_errors=True)
    with suppress(OSError):
        Path(work).parent.rmdir()  # unless another part is under way


@contextmanager
def working_folder(part: Part) -> Iterator[Path]:
    """Yield an empty local folder for unfinished shards, beside a local output, which is locked meanwhile."""
    if part.options.dry_run or is_remote(part.work):
        with storage.temporary_folder("tic-clip-reshard-") as place:
            yield place
        return
    place = Path(part.work) / "unfinished"
    with ExitStack() as stack:
        for path in (*(split.path for split in part.splits), part.work):
            stack.enter_context(storage.lock_folder(Path(path), LOST * (part.options.engine == "ray")))
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place


@cache
def _lists_folder(*fingerprints: str) -> Path:
    """Return a folder that lasts as long as the process, so that a Ray worker downloads a list once."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(storage.temporary_folder("tic-clip-lists-"))


def run_part(part: Part, lists: Path | None = None) -> dict[str, dict[str, Any]]:
    """Write a part, or resume it; return the ``meta.json`` of each split, which is written last, and not while pool
    shards are bad. ``lists`` is where lists in a cloud are fetched to; by default a folder of this process, as on Ray.
    """
    lists = lists or _lists_folder(*(split.arguments["subset"] for split in part.splits))
    with working_folder(part) as place:
        writer = PartWriter(part, lists, place)
        writer.save()  # before anything that an earlier journal tells of is removed
        for split, written in zip(part.splits, writer.journal.written, strict=True):
            if not part.options.dry_run:
                folder.start(split.path, keep={name for number in written for name in shard_names(number)})
        try:
            writer.write()
        finally:
            writer.save()
        metas = {split.name: writer.meta(number) for number, split in enumerate(part.splits)}
        is_whole = part.options.skip_bad_shards or not any(shard.fault for shard in writer.journal.shards)
        if is_whole and not part.options.dry_run:
            for split, (subset, _) in zip(part.splits, writer.files, strict=True):
                meta, size = metas[split.name], part.options.shard_size
                starts = range(0, meta["output_count"], size)
                sizes = {shard_names(i)[0]: min(size, meta["output_count"] - start) for i, start in enumerate(starts)}
                folder.finish(split.path, meta, sizes, None if split.arguments["part"] else subset)  # the list, once
            remove_work(part.work)
    return metas


class PartWriter:
    """Write what the ``journal`` of a part lacks; ``files``: the local UID and class files of each split."""

    def __init__(self, part: Part, lists: Path, place: Path) -> None:
        self.part, self.place = part, place
        files = ((split.arguments["subset_file"], split.arguments["cls_file"]) for split in part.splits)
        self.files = [tuple(path and str(local_copy(path, lists)) for path in pair) for pair in files]
        self.index = partial(index_shard, self.files, place)
        self.journal = self._resume()
        self.num_saved = len(self.journal.shards)

    def _resume(self) -> Journal:
        """Return the journal of an earlier run of the part, up to the first pool shard that is needed again; an empty
        one if a shard that could not be read then can be read now.
        """
        part = self.part
        arguments = {split.name: {key: split.arguments[key] for key in folder.COMPARED} for split in part.splits}
        journal = Journal() if part.options.dry_run else read_journal(part.work)
        bad = (tar for tar, shard in zip(part.tars, journal.shards, strict=False) if shard.fault)
        is_same = journal.shards and journal.arguments == arguments
        if not is_same or any(self.index(tar).counts.fault is None for tar in bad):
            return Journal(run=uuid4().hex, arguments=arguments, written=[{} for _ in part.splits])
        journal.written = [_existing(split.path, journal.written[i]) for i, split in enumerate(part.splits)]
        complete = [part.options.shard_size * len(written) for written in journal.written]
        ends = np.cumsum([[rows for _, rows, _ in shard.splits] for shard in journal.shards], axis=0)
        del journal.shards[int(np.append((ends > complete).any(axis=1), True).argmax()) :]
        return journal

    def save(self) -> None:
        """Save what is new, and which entries of the lists it has taken: a restart must drop the same repeated UIDs."""
        first, shards = self.num_saved, self.journal.shards[self.num_saved :]
        if not self.part.options.dry_run:
            data = msgspec.msgpack.encode(msgspec.structs.replace(self.journal, first=first, shards=shards))
            with storage.atomic_open(f"{self.part.work}/journal-{first:08d}", sync=False) as file:
                file.write(data)
        for shard in shards:
            shard.entries = []
        self.num_saved += len(shards)

    def write(self) -> None:
        """Index the pool shards that are left, in order, and append their samples to all splits."""
        part, shards, finishing = self.part, self.journal.shards, []
        first, ahead = len(shards), part.options.num_workers + (part.options.num_workers > 1)  # still in the page cache
        paths = (part.tars[0], *(split.path for split in part.splits))
        fork = not any(map(is_remote, paths)) and threading.active_count() == 1
        with (
            make_pool(part.options.num_workers, fork=fork) as pool,
            ThreadPoolExecutor(part.options.num_workers) as threads,
            progress(None, "reshard", len(part.tars), "shard", first) as bar,
        ):
            begun, next_save, writers = time.monotonic(), 0.0, []
            for i, (split, (subset, _)) in enumerate(zip(part.splits, self.files, strict=True)):
                entries = np.frombuffer(b"".join(shard.entries.pop(0) for shard in shards), "<i8")
                work = None if part.options.dry_run else self.place / str(i)
                writers.append(SplitWriter(split, subset, entries, self.journal.written[i], work, threads))
            for index in map_in_pool(pool, self.index, part.tars[first:], ahead):
                tar = local_copy(part.tars[len(shards)], self.place)
                rows = list(map(SplitWriter.select, writers, index.rows, repeat(index.counts)))
                for futures in threads.map(SplitWriter.append, writers, repeat(tar), repeat(index), rows):
                    finishing += futures
                if tar.is_relative_to(self.place):
                    tar.unlink()
                while len(finishing) > ahead:
                    finishing.pop(0).result()
                shards.append(index.counts)
                if (now := time.monotonic()) >= next_save:
                    self.save()
                    next_save = now + (now - begun) / 50  # a kill loses a fiftieth of the work
                bar.update()
            for writer in writers:
                finishing += writer.finish()
            for future in finishing:
                future.result()

    def meta(self, number: int) -> dict[str, Any]:
        """Return the ``meta.json`` of a split: what was read = what was kept + what was dropped, by reason."""
        shards, written = self.journal.shards, self.journal.written[number]
        kept, rows, repeated = map(sum, zip(*(shard.splits[number] for shard in shards), strict=True))
        dropped = sum((Counter(shard.dropped) for shard in shards), Counter())
        dropped["duplicate uid in the pool"] = repeated
        dropped["not in the subset"] = sum(shard.usable for shard in shards) - kept - repeated
        tars = dict(zip(self.part.tars, shards, strict=True))
        return {
            "output_shard_count": -(-rows // self.part.options.shard_size),
            "output_count": rows,
            "output_bytes": sum(size + len(END) for size in written.values()),
            "output_shard_format": folder.SHARD_FORMAT,
            "subset_count": len(uids.open_uids(self.files[number][0])),
            "processed_count": sum(shard.read for shard in shards),
            "kept_count": kept,
            "dropped": dict(sorted((+dropped).items())),
            "bad_shards": {tar: shard.fault for tar, shard in tars.items() if shard.fault},
            "wrong_stats": {tar: f"{s.stats}, not {s.read}" for tar, s in tars.items() if s.stats is not None},
            "arguments": self.part.splits[number].arguments,
        }


def _existing(path: str, written: dict[int, int]) -> dict[int, int]:
    """Return the leading output shards in ``written`` that are complete."""
    sizes = {to_path(file).name: size for file, size in list_files(path)} if written and is_dir(path) else {}
    existing = {}
    for number in sorted(written):
        shard, stats = map(sizes.get, shard_names(number))
        if number != len(existing) or shard != written[number] + len(END) or not stats:
            break
        existing[number] = written[number]
    return existing
