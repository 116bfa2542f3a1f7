"""The shards of a pool or a split: where they lie and how many samples they hold.

A split is ``split/*.tar``, or in parts ``split/part/*.tar``; beside the tars lie ``{:08d}_stats.json`` and
``sizes.json`` (shard -> samples), and ``meta.json`` where reshard has made them. All of it local or in a cloud.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any

import msgspec

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data.tar import open_shard, read_table
from tic_clip.parallel import map_ordered
from tic_clip.storage import (
    NotFoundError,
    exists,
    is_remote,
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
CLIP_BENCHMARK_DIR = "test"
"""The folder of a split where clip_benchmark looks for shards: links to the split's own, or copies of them."""
HOW_TO_MAKE = "dataset_creation/reshard.py makes splits, DataComp's download_upstream.py a pool"
SCRIPTS = "dataset_creation/tic-datacomp"


class EmptySplitError(TicError):
    """A split that holds no sample."""


# --- Where the shards are ---


def list_shards(path: object) -> list[tuple[str, int]]:
    """Return (path, size in bytes) of the tars of a pool or a split, sorted, without clip_benchmark's links.

    Raises:
        TicError: there is no such folder or no tar in it; tars lie both in a folder and below it, or end in .TAR.
    """
    try:
        shards = list_files(path, "**/*.[tT][aA][rR]")
    except NotFoundError as error:
        raise NotFoundError(f"{error}: {HOW_TO_MAKE}") from None
    shards = [(tar if "/" in tar else f"./{tar}", size) for tar, size in shards]
    root = os.path.dirname(f"{to_path(path)}/")
    links = set(filter(_holds_links, {os.path.dirname(tar) for tar, _ in shards} - {root}))
    shards = [(tar, size) for tar, size in shards if os.path.dirname(tar) not in links]
    if not shards:
        raise TicError(f"{path} holds no .tar file: {HOW_TO_MAKE}")
    first = shards[0][0]
    for tar, _ in shards:
        if not tar.endswith(".tar"):
            raise TicError(f"{tar} would not be read: rename it to end in .tar")
        if tar.count("/") != first.count("/"):
            raise TicError(f"{tar} and {first} do not lie equally deep below {path}: move what is not a shard of it")
    return shards


def _holds_links(folder: str) -> bool:
    """Return whether a folder is clip_benchmark's ``test/``."""
    if os.path.basename(folder) != CLIP_BENCHMARK_DIR:
        return False
    if not is_remote(folder):
        tars = [tar for tar, _ in list_files(folder, "*.tar")]
        if all(os.path.islink(tar) and os.readlink(tar).startswith("../") for tar in tars):
            return True
    return exists(f"{folder}/nshards.txt")


def list_tars(path: object) -> list[str]:
    """Return the paths of ``list_shards``."""
    return [shard for shard, _ in list_shards(path)]


@cache
def read_sizes(folder: str) -> dict[str, int]:
    """Return the table of a folder of shards, name -> samples, cached; raise a TicError if there is no valid one."""
    path = f"{folder or '.'}/{SIZES}"
    try:
        return msgspec.json.decode(read_bytes(path), type=dict[str, Annotated[int, msgspec.Meta(ge=0)]])
    except NotFoundError:
        raise NotFoundError(missing_sizes_message(folder)) from None
    except msgspec.ValidationError:
        raise TicError(f"{path} is not a JSON object of shard name -> number of samples") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None


def missing_sizes_message(folder: object) -> str:
    """Return the error message for a folder of shards without a ``sizes.json``."""
    command = f"{SCRIPTS}/add_sizes.py --url {folder}"
    return f"{folder} has no {SIZES}: finish reshard.py, or count shards from elsewhere with {command}"


def write_sizes(folder: str, sizes: dict[str, int]) -> None:
    """Write the table of a folder of shards, sorted by name."""
    write_json(f"{folder}/{SIZES}", dict(sorted(sizes.items())))
    read_sizes.cache_clear()


def read_meta(folder: str) -> dict[str, Any] | None:
    """Return the ``meta.json`` that reshard writes last into a folder of shards, or None."""
    try:
        return read_json_object(f"{folder}/{META}")
    except NotFoundError:
        return None


def split_folders(split: object) -> list[str]:
    """Return the folders that hold a split's shards: itself, or its parts (``split/part/*.tar``), sorted.

    Raises:
        TicError: neither it nor a folder in it has a ``sizes.json``, or a part is missing or not finished.
    """
    folder = str(to_path(split))
    if _has_sizes(folder):
        return [folder]
    try:
        folders = [part for part in list_folders(folder) if os.path.basename(part) != CLIP_BENCHMARK_DIR]
    except NotFoundError:
        raise NotFoundError(f"{split} is missing: {HOW_TO_MAKE}") from None
    has_sizes = dict(zip(folders, map_ordered(_has_sizes, folders, 16), strict=True))
    parts = [part for part in folders if has_sizes[part]]
    if not parts:
        raise TicError(missing_sizes_message(split))
    arguments = [(meta or {}).get("arguments") or {} for meta in map_ordered(read_meta, parts, 16)]
    numbers, totals = ({each.get(name) for each in arguments} - {None} for name in ("part", "parts"))
    if len(totals) > 1:
        raise TicError(f"{split} has parts of a split in {min(totals)} and of one in {max(totals)}: make it again")
    if totals and len(numbers) < max(totals):
        raise TicError(f"{split} has {len(numbers)} of {max(totals)} parts: finish reshard first")
    for part in folders:
        if not has_sizes[part] and list_files(part, "*.tar"):
            raise TicError(f"{part} has shards but no {SIZES}: finish reshard first, or run add_sizes.py")
    return parts


def _has_sizes(folder: str) -> bool:
    try:
        return read_sizes(folder) is not None
    except NotFoundError:
        return False


# --- How many samples they hold ---


def split_sizes(split: object) -> dict[str, int]:
    """Return path -> samples of every shard of a split, in order, without shards that hold none.

    Raises:
        EmptySplitError: the split has no sample.
        TicError: the split is missing or not finished.
    """
    tables = {folder: read_sizes(folder) for folder in split_folders(split)}
    sizes = {f"{folder}/{name}": n for folder, table in tables.items() for name, n in sorted(table.items()) if n}
    if not sizes:
        raise EmptySplitError(f"{split} holds no sample")
    return sizes


def sizes_if_known(split: object) -> dict[str, int] | dict[str, None]:
    """Return ``split_sizes``, or every shard with None for its samples where there is no table."""
    has_parts = not list_files(split, "*.tar") and list_files(split, f"*/{SIZES}")
    return split_sizes(split) if has_parts or list_files(split, SIZES) else dict.fromkeys(list_tars(split))


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """Return (samples, shards) of a list of shard paths or URLs that may lie in several folders, each with its table.

    Raises:
        TicError: a folder has no table, or its table lacks a shard; the message names it.
    """
    shards = list(map(os.path.split, shards))
    folders = list(dict.fromkeys(folder for folder, _ in shards))
    tables = dict(zip(folders, map_ordered(read_sizes, folders, 16), strict=True))
    for folder, name in shards:
        if name not in tables[folder]:
            raise TicError(f"{folder}/{SIZES} has no entry for {name}")
    return sum(tables[folder][name] for folder, name in shards), len(shards)


def stats_path(tar: str) -> str:
    """Return the path of the stats of a shard."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def read_stats(tar: str) -> int:
    """Return the samples of a shard as its stats have it; raise a TicError if they have no count."""
    try:
        stats = read_json(stats_path(tar))
    except NotFoundError:
        command = f"{SCRIPTS}/generate_stats.py --url {os.path.dirname(tar)}"
        raise TicError(f"{tar} has no stats: run {command} first") from None
    count = stats.get("successes") if isinstance(stats, dict) else None
    if type(count) is not int or count < 0:
        raise TicError(f"{stats_path(tar)} holds no count of successes: run generate_stats.py --overwrite")
    return count


def generate_stats(url: str, num_proc: int = 1, overwrite: bool = False) -> tuple[int, int]:
    """Write {"successes": samples} beside each shard of a pool or split; return the shards (in all, counted now).

    With ``overwrite``, shards that have stats are counted again, and what else these say is kept.

    Raises:
        TicError: shards are damaged; all others have their stats then.
    """
    tars = list_tars(url)
    folders = dict.fromkeys(map(os.path.dirname, tars))
    existing = {f"{folder}/{os.path.basename(path)}" for folder in folders for path, _ in list_files(folder, "*.json")}
    todo = [tar for tar in tars if overwrite or stats_path(tar) not in existing]
    results = progress(map_ordered(_write_stats, todo, num_proc, use_processes=True), "count", len(todo), "shard")
    faults = [fault for fault in results if fault]
    if faults:
        raise TicError(faults[0] + (f" (and {len(faults) - 1} more damaged shards)" if len(faults) > 1 else ""))
    return len(tars), len(todo)


def _write_stats(tar: str) -> str | None:
    """Count a shard's samples and write its stats; return what is wrong with it, or None."""
    try:
        with open_shard(tar) as shard:
            count = len(read_table(shard).keys)
    except TicError as error:
        return str(error)
    try:
        stats = read_json_object(stats_path(tar))
    except TicError:
        stats = {}
    write_json(stats_path(tar), {**stats, "successes": count}, sync=False)
    return None


def add_sizes(url: str, num_proc: int = 1) -> dict[str, int]:
    """Write ``sizes.json`` from the stats into each folder of shards of a pool or split; return folder -> samples."""
    tars, tables = list_tars(url), defaultdict(dict)
    counts = progress(map_ordered(read_stats, tars, num_proc), "read stats", len(tars), "shard")
    for tar, count in zip(tars, counts, strict=True):
        tables[os.path.dirname(tar)][os.path.basename(tar)] = count
    for folder, sizes in tables.items():
        write_sizes(folder, sizes)
    return {folder: sum(sizes.values()) for folder, sizes in tables.items()}
