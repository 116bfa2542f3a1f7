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
    """Return (path, size in bytes) of the tars of a pool or a split, sorted by path, without clip_benchmark's links.

    Raises:
        TicError: there is no such folder or no tar in it; tars lie both in a folder and below it, or end in .TAR.
    """
    try:
        shards = list_files(path, "**/*.[tT][aA][rR]")
    except NotFoundError as error:
        raise NotFoundError(f"{error}: {HOW_TO_MAKE}") from None
    shards = [(tar if "/" in tar else f"./{tar}", size) for tar, size in shards]
    root = os.path.dirname(f"{to_path(path)}/")
    links = {folder for folder in {os.path.dirname(tar) for tar, _ in shards} - {root} if _holds_links(folder)}
    shards = [(tar, size) for tar, size in shards if os.path.dirname(tar) not in links]
    if not shards:
        raise TicError(f"{path} holds no .tar file: {HOW_TO_MAKE}")
    first = shards[0][0]
    for tar, _ in shards:
        if not tar.endswith(".tar"):
            raise TicError(f"{tar} would not be read: rename it to end in .tar")
        if tar.count("/") != first.count("/"):
            raise TicError(
                f"{tar} and {first} do not lie equally deep below {path}: move the tars that are not its shards"
            )
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
    """Return the table of a folder of shards, file name -> samples; it is kept until ``write_sizes`` is called.

    Raises:
        TicError: it has none, or the table is not one of counts; the message names the folder.
    """
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


def _sizes_or_none(folder: str) -> dict[str, int] | None:
    try:
        return read_sizes(folder)
    except NotFoundError:
        return None


def _check_parts(split: object, parts: list[str]) -> None:
    """Check that all parts are there; parts whose ``meta.json`` counts none come from elsewhere.

    Raises:
        TicError: some are not, or they come from runs of reshard with different numbers of parts.
    """
    numbers, totals = set(), set()
    for meta in map_ordered(read_meta, parts, 16):
        arguments = (meta or {}).get("arguments")
        if isinstance(arguments, dict) and {type(arguments.get(name)) for name in ("part", "parts")} == {int}:
            numbers.add(arguments["part"])
            totals.add(arguments["parts"])
    if len(totals) > 1:
        raise TicError(f"{split} has parts of a split in {min(totals)} and of one in {max(totals)}: make it again")
    if totals and len(numbers) < max(totals):
        raise TicError(f"{split} has {len(numbers)} of {max(totals)} parts: finish reshard first")


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
    """Return ``split_sizes``, or every shard with None for its samples where there is no table (data from elsewhere).

    Raises:
        TicError: as ``split_sizes`` and ``list_tars``.
    """
    has_parts = not list_files(split, "*.tar") and list_files(split, f"*/{SIZES}")
    return split_sizes(split) if has_parts or list_files(split, SIZES) else dict.fromkeys(list_tars(split))


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """Return (samples, shards) of a list of shard paths or URLs that may lie in several folders, each with its table.

    OpenCLIP's ``__len__`` file (one number for the whole folder) counts where there is no ``sizes.json``.

    Raises:
        TicError: a folder has no table, or its table lacks a shard; the message names it.
    """
    shards = list(shards)
    folders = list(dict.fromkeys(map(os.path.dirname, shards)))
    tables = dict(zip(folders, map_ordered(_sizes_or_len, folders, 16), strict=True))
    total = sum(table for table in tables.values() if isinstance(table, int))
    for folder, name in map(os.path.split, shards):
        table = tables[folder]
        if isinstance(table, dict) and name not in table:
            raise TicError(f"{folder}/{SIZES} has no entry for {name}")
        total += table[name] if isinstance(table, dict) else 0
    return total, len(shards)


def _sizes_or_len(folder: str) -> dict[str, int] | int:
    """Return a folder's ``sizes.json``, or the number in OpenCLIP's ``__len__`` file."""
    try:
        return read_sizes(folder)
    except NotFoundError as error:
        try:
            return int(read_bytes(f"{folder or '.'}/__len__"))
        except NotFoundError:
            raise error from None
        except ValueError:
            raise TicError(f"{folder}/__len__ is not a number") from None


def count_samples(path: str) -> int:
    """Return the samples of a shard; a remote one is downloaded.

    Raises:
        TicError: it is missing or damaged; the message names it.
    """
    with open_shard(path) as shard:
        return len(read_table(shard).keys)


def stats_path(tar: str) -> str:
    """Return the path of a shard's stats."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def read_stats(tar: str) -> int:
    """Return the samples of a shard as its stats have it.

    Raises:
        TicError: it has none, or they hold no count.
    """
    try:
        stats = read_json(stats_path(tar))
    except NotFoundError:
        raise TicError(
            f"{tar} has no stats: run {SCRIPTS}/generate_stats.py --url {os.path.dirname(tar)} first"
        ) from None
    count = stats.get("successes") if isinstance(stats, dict) else None
    if type(count) is not int or count < 0:
        raise TicError(f"{stats_path(tar)} holds no count of successes: run generate_stats.py --overwrite")
    return count


def generate_stats(url: str, num_proc: int = 1, overwrite: bool = False) -> tuple[int, int]:
    """Write {"successes": samples} beside each shard of a pool or split; return the shards (in all, counted now).

    Args:
        url: the pool or the split, in either layout.
        num_proc: processes.
        overwrite: count shards again that have stats; what else their stats say is kept.

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
        count = count_samples(tar)
    except TicError as error:
        return str(error)
    try:
        stats = read_json_object(stats_path(tar))
    except TicError:
        stats = {}
    write_json(stats_path(tar), {**stats, "successes": count}, sync=False)
    return None


def add_sizes(url: str, num_proc: int = 1) -> dict[str, int]:
    """Write ``sizes.json`` from the stats into each folder of shards of a pool or split; return folder -> samples.

    Raises:
        TicError: a shard has no stats; the message names it.
    """
    tars, tables = list_tars(url), defaultdict(dict)
    counts = progress(map_ordered(read_stats, tars, num_proc), "read stats", len(tars), "shard")
    for tar, count in zip(tars, counts, strict=True):
        tables[os.path.dirname(tar)][os.path.basename(tar)] = count
    for folder, sizes in tables.items():
        write_sizes(folder, sizes)
    return {folder: sum(sizes.values()) for folder, sizes in tables.items()}
