"""The shards of a pool or a split: where they lie and how many samples they hold.

A split is ``split/*.tar``, or in parts ``split/part/*.tar``; beside the tars lie ``{:08d}_stats.json`` and
``sizes.json`` (shard -> samples), and ``meta.json`` where reshard has made them. All of it local or in a cloud.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data.tar import open_shard, samples
from tic_clip.parallel import map_ordered
from tic_clip.storage import (
    NotFoundError,
    list_files,
    list_folders,
    read_bytes,
    read_json,
    read_json_object,
    to_path,
    write_json,
)

SIZES, META, STARTED, SUBSET = "sizes.json", "meta.json", "started.json", "sample_ids.npy"
STATS = "{:08d}_stats.json"
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
CLIP_BENCHMARK_DIR = "test"
"""The folder of a split where clip_benchmark looks for it : links to its shards, never a part."""
HOW_TO_MAKE = "dataset_creation/reshard.py makes splits, DataComp's download_upstream.py a pool"


class EmptySplitError(TicError):
    """A split that holds no sample."""


# --- Where the shards are ---


def list_shards(path: object) -> list[tuple[str, int]]:
    """(path, size in bytes) of the tars of a pool or a split, sorted by path: flat, or else in parts, or else in the
    parts of several splits; ``test/`` is none.

    Raises:
        TicError: there is no such folder, or no tar in it.
    """
    for pattern in "*.tar", "*/*.tar", "*/*/*.tar":
        try:
            found = list_files(path, pattern)
        except NotFoundError as error:
            raise NotFoundError(f"{error}: {HOW_TO_MAKE}") from None
        if pattern != "*.tar":
            found = [entry for entry in found if entry[0].split("/")[-2] != CLIP_BENCHMARK_DIR]
        if found:
            return found
    raise TicError(f"{path} holds no .tar file: {HOW_TO_MAKE}")


def list_tars(path: object) -> list[str]:
    """The paths of ``list_shards``."""
    return [shard for shard, _ in list_shards(path)]


@cache
def read_sizes(folder: str) -> dict[str, int]:
    """The table of a folder of shards: file name -> samples. It is read once; ``write_sizes`` makes it be read again.

    Raises:
        TicError: it has none, or the table is not one of counts; the message names the folder.
    """
    path = f"{folder or '.'}/{SIZES}"
    try:
        sizes = json.loads(read_bytes(path))
    except NotFoundError:
        raise NotFoundError(missing_sizes_message(folder)) from None
    except ValueError as error:
        raise error if isinstance(error, TicError) else TicError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise TicError(f"{path} is not a JSON object of shard name -> number of samples")
    return sizes


def missing_sizes_message(folder: object) -> str:
    """What to say of a folder of shards that no table counts."""
    script = "dataset_creation/tic-datacomp/add_sizes.py"
    return f"{folder} has no {SIZES}: finish reshard.py, or count shards from elsewhere with {script} --url {folder}"


def write_sizes(folder: str, sizes: dict[str, int]) -> None:
    """Write the table of a folder of shards, sorted by name."""
    write_json(f"{folder}/{SIZES}", dict(sorted(sizes.items())))
    read_sizes.cache_clear()


def _sizes_or_none(folder: str) -> dict[str, int] | None:
    try:
        return read_sizes(folder)
    except NotFoundError:
        return None


def split_folders(split: object) -> list[str]:
    """The folders that hold a split's shards: itself, or its parts (``split/part/*.tar``), sorted.

    Raises:
        TicError: neither it nor a folder in it has a ``sizes.json``, or a part is missing or not finished.
    """
    folder = str(to_path(split))
    if _sizes_or_none(folder) is not None:
        return [folder]
    try:
        folders = [part for part in list_folders(folder) if os.path.basename(part) != CLIP_BENCHMARK_DIR]
    except NotFoundError:
        raise NotFoundError(f"{split} is missing: {HOW_TO_MAKE}") from None
    tables = dict(zip(folders, map_ordered(_sizes_or_none, folders, 16), strict=True))
    parts = [part for part, table in tables.items() if table is not None]
    if not parts:
        raise TicError(missing_sizes_message(split))
    _check_parts(split, parts)
    for part in folders:
        if tables[part] is None and list_files(part, "*.tar"):
            raise TicError(f"{part} has shards but no {SIZES}: finish reshard first, or run add_sizes.py")
    return parts


def _check_parts(split: object, parts: list[str]) -> None:
    """Check that all parts are there which ``meta.json`` tells of; parts without one come from elsewhere.

    Raises:
        TicError: some are not, or they come from runs of reshard with different numbers of parts.
    """
    known = [part for part in map_ordered(_part_of, parts, 16) if part]
    wanted = {total for _, total in known}
    if len(wanted) > 1:
        raise TicError(f"{split} has parts of a split in {min(wanted)} and of one in {max(wanted)}: make it again")
    there = len({number for number, _ in known})
    if wanted and there < max(wanted):
        raise TicError(f"{split} has {there} of {max(wanted)} parts: finish reshard first")


def _part_of(folder: str) -> tuple[int, int] | None:
    """(number of this part, number of parts) as reshard's ``meta.json`` has them, or None."""
    meta = read_meta(folder)
    arguments = meta.get("arguments") if meta else None
    numbers = [arguments.get(name) if isinstance(arguments, dict) else None for name in ("part", "parts")]
    return tuple(numbers) if all(type(number) is int for number in numbers) else None


def read_meta(folder: str) -> dict[str, Any] | None:
    """The ``meta.json`` that reshard writes last into a folder of shards, or None."""
    try:
        return read_json_object(f"{folder}/{META}")
    except FileNotFoundError:
        return None


def split_sizes(split: object) -> dict[str, int]:
    """Every shard of a split, in order: path -> samples; shards without a sample are left out.

    Raises:
        Empty: the split has none.
        TicError: the split is missing or not finished.
    """
    sizes = {
        f"{folder}/{name}": count
        for folder in split_folders(split)
        for name, count in sorted(read_sizes(folder).items())
        if count
    }
    if not sizes:
        raise EmptySplitError(f"{split} holds no sample")
    return sizes


def sizes_if_known(split: object) -> dict[str, int] | dict[str, None]:
    """``split_sizes``, or every shard with None for its samples where no table counts them (data from elsewhere).

    Raises:
        TicError: as ``split_sizes`` and ``list_tars``.
    """
    in_parts = not list_files(split, "*.tar") and list_files(split, f"*/{SIZES}")
    has_table = in_parts or list_files(split, SIZES)
    return split_sizes(split) if has_table else dict.fromkeys(list_tars(split))


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """(samples, shards) of a list of shard paths or URLs that may lie in several folders, each with its own table.

    OpenCLIP's ``__len__`` file (one number for the whole folder) counts where there is no ``sizes.json``.

    Raises:
        TicError: a folder has no table, or its table lacks a shard; the message names it.
    """
    shards = list(shards)
    names_in = defaultdict(list)
    for shard in shards:
        folder, name = os.path.split(shard)
        names_in[folder].append(name)
    tables = map_ordered(_sizes_or_none, names_in, 16)
    return sum(_count(*entry) for entry in zip(names_in, names_in.values(), tables, strict=True)), len(shards)


def _count(folder: str, names: list[str], sizes: dict[str, int] | None) -> int:
    """The samples of some shards of a folder."""
    if sizes is None:
        return _read_len(folder)
    for name in names:
        if name not in sizes:
            raise TicError(f"{folder}/{SIZES} has no entry for {name}")
    return sum(sizes[name] for name in names)


def _read_len(folder: str) -> int:
    """The number in OpenCLIP's ``__len__`` file."""
    try:
        text = read_bytes(f"{folder or '.'}/__len__").decode(errors="replace").strip()
    except FileNotFoundError:
        raise TicError(missing_sizes_message(folder)) from None
    if not (text.isascii() and text.isdecimal()):
        raise TicError(f"{folder}/__len__ holds no number")
    return int(text)


# --- How many samples they hold ---


def count_samples(path: str) -> int:
    """Return the samples of a shard; only its headers are read.

    Raises:
        TicError: it is missing or damaged; the message names it.
    """
    with open_shard(path) as shard:
        return sum(1 for _ in samples(shard))


def stats_path(tar: str) -> str:
    """Where the stats of a shard lie."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def generate_stats(folder: str, num_workers: int = 1, overwrite: bool = False) -> tuple[int, int]:
    """Write {"successes": samples} beside each shard of a pool or split; returns the shards (in all, counted now).

    Args:
        folder: the pool or the split, in either layout.
        num_workers: processes.
        overwrite: count shards again that have stats.

    Raises:
        TicError: shards are damaged; all others have their stats then.
    """
    tars = list_tars(folder)
    depth = tars[0].count("/") - str(to_path(folder)).rstrip("/").count("/") - 1
    there = {path for path, _ in list_files(folder, "*/" * depth + "*_stats.json")}
    todo = [tar for tar in tars if overwrite or stats_path(tar) not in there]
    results = progress(map_ordered(_write_stats, todo, num_workers, use_processes=True), "count", len(todo), "shard")
    faults = [fault for fault in results if fault]
    if faults:
        raise TicError(faults[0] + (f" (and {len(faults) - 1} more damaged shards)" if len(faults) > 1 else ""))
    return len(tars), len(todo)


def _write_stats(tar: str) -> str | None:
    """Count a shard's samples and write its stats; returns what is wrong with it, or None."""
    try:
        write_json(stats_path(tar), {"successes": count_samples(tar)}, sync=False)
    except TicError as error:
        return str(error)
    return None


def read_stats(tar: str) -> int:
    """The samples of a shard, as its stats have it.

    Raises:
        TicError: it has none, or they hold no count.
    """
    try:
        stats = read_json(stats_path(tar))
    except FileNotFoundError:
        script = "dataset_creation/tic-datacomp/generate_stats.py"
        raise TicError(f"{tar} has no stats: run {script} --url {os.path.dirname(tar)} first") from None
    count = stats.get("successes") if isinstance(stats, dict) else None
    if type(count) is not int or count < 0:
        raise TicError(f"{stats_path(tar)} holds no count of successes: run generate_stats.py --overwrite")
    return count


def add_sizes(folder: str, num_workers: int = 1) -> dict[str, int]:
    """Write ``sizes.json`` from the stats into each folder of shards of a pool or split; returns folder -> samples.

    Raises:
        TicError: a shard has no stats; the message names it.
    """
    tars, tables = list_tars(folder), defaultdict(dict)
    counts = progress(map_ordered(read_stats, tars, num_workers), "read stats", len(tars), "shard")
    for tar, count in zip(tars, counts, strict=True):
        tables[os.path.dirname(tar)][os.path.basename(tar)] = count
    for part, sizes in tables.items():
        write_sizes(part, sizes)
    return {part: sum(sizes.values()) for part, sizes in tables.items()}
