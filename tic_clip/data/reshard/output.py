"""A split's folder: what is there already, its beginning (``started.json``) and its end (``meta.json``, the last)."""

import os
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.data import uids
from tic_clip.data.reshard.journal import Journal
from tic_clip.data.reshard.part import COMPARED, SHARD_FORMAT, Part, Target
from tic_clip.data.reshard.plan import shard_counts
from tic_clip.data.split import META, SIZES, STARTED, STATS, SUBSET, read_sizes
from tic_clip.data.tar import BLOCK
from tic_clip.storage import (
    atomic_open,
    exists,
    is_dir,
    is_remote,
    list_files,
    list_folders,
    read_json_object,
    remove,
    to_path,
    upload,
    write_json,
)


def finished(
    target: Target, overwrite: bool, skip_bad_shards: bool, compared: dict[str, str] = COMPARED
) -> dict[str, Any] | None:
    """The ``meta.json`` of a split that was finished from the same inputs and is whole, or None if it must be made.

    ``compared`` names the arguments that a split depends on, and says what they are.

    Raises:
        TicError: without ``overwrite``, something else is there; the message says what differs.
    """
    path = to_path(target.path)
    for name in META, STARTED:
        if not exists(path / name):
            continue
        try:
            found = read_json_object(path / name)
        except TicError:
            if overwrite:
                continue
            raise
        before = found.get("arguments", {})
        different = [what for key, what in compared.items() if before.get(key) != target.arguments[key]]
        if name == STARTED and not before:
            return None
        if name == STARTED and different == ["pool"] and found.get("bad_shards"):
            return None  # those that could not be read have been repaired
        if different and not overwrite:
            made = "made" if name == META else "begun"
            raise TicError(f"{path} was {made} with another {' and '.join(different)}; give --overwrite to replace it")
        if name == META and found.get("bad_shards") and not (skip_bad_shards or overwrite):
            raise TicError(
                f"{path} was made without {len(found['bad_shards'])} pool shards that could not be read; "
                "--skip-bad-shards leaves it so, --overwrite makes it again"
            )
        again = name == STARTED or different or (found.get("bad_shards") and not skip_bad_shards)
        return found if not again and _is_whole(path, found) else None
    if not overwrite and is_dir(path) and list_files(path, "*.tar"):
        raise TicError(f"{path} has shards of something else; give another output folder or --overwrite")
    return None


def _is_whole(path: Path, meta: dict[str, Any]) -> bool:
    """Whether a split's table and all bytes of its shards are there."""
    there = {to_path(file).name: size for file, size in list_files(path)}
    try:
        tars = read_json_object(path / SIZES).keys()
    except TicError:
        return False
    stats = {f"{name.removesuffix('.tar')}_stats.json" for name in tars}
    return (
        {name for name in there if name.endswith(".tar")} == tars
        and there.keys() >= stats | {SUBSET}
        and sum(there[name] for name in tars) == meta.get("output_bytes")
    )


def _arguments(folder: object) -> dict[str, Any]:
    """The arguments that a split or a part was made or begun with; empty if neither."""
    for name in META, STARTED:
        if exists(to_path(folder) / name):
            with suppress(TicError):
                return read_json_object(to_path(folder) / name).get("arguments", {})
    return {}


def check_layout(split: str, parts: int, overwrite: bool, dry_run: bool) -> None:
    """See that a split's folder holds no shards of another number of parts; ``overwrite`` removes them.

    Raises:
        TicError: it does.
    """
    if not is_dir(split):
        return
    made = {folder: _arguments(folder) for folder in list_folders(split)}
    others = [folder for folder, arguments in made.items() if arguments.get("parts", 1) not in (1, parts)]
    flat = [split] if parts > 1 and _arguments(split) else []
    if (others or flat) and not overwrite:
        raise TicError(f"{split} was made with another number of parts; give --overwrite to replace it")
    stale = flat + [folder for folder in others if parts == 1 or made[folder]["part"] >= parts]
    for folder in [] if dry_run else stale:
        _clear(folder)
        if folder != split and not is_remote(folder):
            with suppress(OSError):
                Path(folder).rmdir()  # unless something else is in it


def part_path(split: str, parts: int, part: int) -> str:
    """Where a part of a split lies: the split itself if it is the only one."""
    return split if parts == 1 else str(to_path(split) / f"{part:05d}")


def _remove_shards(folder: object, keep: set[str]) -> None:
    """Remove a split's shards and stats, those called ``keep`` aside, and what a killed process was just writing."""
    for pattern in "[0-9]*.tar", "[0-9]*_stats.json":
        for file, _ in list_files(folder, pattern):
            if to_path(file).name not in keep:
                remove(file)
    if not is_remote(folder):
        for file in Path(folder).glob(".*.tmp"):
            remove(file)


def _clear(folder: object) -> None:
    """Remove the files of a split of ours (or DataComp's), and nothing else."""
    _remove_shards(folder, set())
    for name in SIZES, SUBSET, STARTED, META:
        remove(to_path(folder) / name)


def begin(target: Target, written: set[int]) -> None:
    """Mark a folder as one that reshard is filling, and remove what is there but the output shards ``written``."""
    path = to_path(target.path)
    write_json(path / STARTED, {"arguments": target.arguments if written else {}}, sync=False)
    for name in META, SIZES, SUBSET:
        remove(path / name)
    _remove_shards(path, {form.format(number) for number in written for form in (SHARD_FORMAT, STATS)})
    if not written:  # what a killed removal leaves must not be taken for shards made with these arguments
        write_json(path / STARTED, {"arguments": target.arguments}, sync=False)


def leave(target: Target, bad: dict[str, str]) -> None:
    """Note in a folder that shards of its pool could not be read: it stays begun until they can, or are left out."""
    write_json(to_path(target.path) / STARTED, {"arguments": target.arguments, "bad_shards": bad}, sync=False)


def count(part: Part, journal: Journal, split: int) -> dict[str, Any]:
    """The ``meta.json`` of one of a part's splits: what was read = what was kept + what was dropped, by reason.

    Raises:
        TicError: the numbers do not add up.
    """
    shards = list(filter(None, journal.shards))
    read, kept = sum(counts.read for counts in shards), sum(counts.samples[split] for counts in shards)
    dropped = sum((Counter(counts.dropped) for counts in shards), Counter())
    dropped["not in the subset"] += sum(counts.usable for counts in shards) - kept
    rows = sum(counts.rows[split] for counts in shards)
    if read != kept + dropped.total():
        raise TicError(
            f"{part.targets[split].path}: {read} samples read, but {kept} kept and {dropped.total()} dropped"
        )
    return {
        "output_shard_count": len(shard_counts(rows, part.shard_size)),
        "output_count": rows,
        "output_bytes": sum(size + 2 * BLOCK for size in journal.written[split].values()),
        "output_shard_format": SHARD_FORMAT,
        "subset_count": len(uids.open_uids(part.targets[split].subset)),
        "processed_count": read,
        "kept_count": kept,
        "dropped": dict(sorted((+dropped).items())),
        "noted": dict(sorted(sum((Counter(counts.noted) for counts in shards), Counter()).items())),
        "bad_shards": bad_shards(part, journal),
        "arguments": part.targets[split].arguments,
    }


def bad_shards(part: Part, journal: Journal) -> dict[str, str]:
    """The pool shards that could not be read: path -> why."""
    found = zip(part.tars, journal.shards, strict=True)
    return {tar: counts.fault for tar, counts in found if counts is not None and counts.fault}


def finish(target: Target, meta: dict[str, Any], shard_size: int) -> None:
    """Write the tables beside a split's shards; ``meta.json`` last."""
    path = to_path(target.path)
    counts = shard_counts(meta["output_count"], shard_size)
    write_json(path / SIZES, {SHARD_FORMAT.format(i): count for i, count in enumerate(counts)}, sync=False)
    read_sizes.cache_clear()
    _link(Path(target.subset), path / SUBSET)
    write_json(path / META, meta, sync=False)
    remove(path / STARTED)


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, without a copy where that can be had."""
    if is_remote(target):
        upload(source, target)
        return
    remove(target)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        with open(source, "rb") as original, atomic_open(target, sync=False) as file:
            shutil.copyfileobj(original, file, 1 << 24)
