"""The shards of a pool or a split, and how many samples they hold.

A split is ``split/*.tar``, or in parts ``split/part/*.tar``; beside the tars lie ``{:08d}_stats.json`` and
``sizes.json`` (shard -> samples), and ``meta.json`` if reshard made them. All of it may be local or in a cloud.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

import msgspec

from tic_clip import TicError, storage
from tic_clip.cache import GB
from tic_clip.cli import progress
from tic_clip.data.tar import open_shard, read_table
from tic_clip.parallel import map_ordered
from tic_clip.storage import NotFoundError

SIZES, META, SUBSET = "sizes.json", "meta.json", "sample_ids.npy"
STATS = "{:08d}_stats.json"
CLIP_BENCHMARK_DIR = "test"  # where clip_benchmark looks for shards: links to the split's own, or copies of them
HOW_TO_MAKE = "dataset_creation/reshard.py makes splits, DataComp's download_upstream.py a pool"
SCRIPTS = "dataset_creation/tic-datacomp"
ADD_SIZES = f"{SCRIPTS}/add_sizes.py --url {{0}}"
NO_SIZES = f"{{0}} has no {SIZES}: finish reshard.py, or count shards from elsewhere with {ADD_SIZES}"

Count = Annotated[int, msgspec.Meta(ge=0)]
Stats = msgspec.defstruct("Stats", [("successes", Count)])


def list_shards(path: object) -> dict[str, int]:
    """Return path -> bytes of the tars of a pool or a split, sorted; raise a TicError if some would not be read."""
    try:
        files = storage.list_files(path, "**/*.[tT][aA][rR]")
    except NotFoundError as error:
        raise NotFoundError(f"{error}: {HOW_TO_MAKE}") from None
    root = os.path.dirname(f"{storage.to_path(path)}/")
    shards = {tar if "/" in tar else f"./{tar}": size for tar, size in files}
    links = set(filter(_holds_links, set(map(os.path.dirname, shards)) - {root}))
    shards = {tar: size for tar, size in shards.items() if os.path.dirname(tar) not in links}
    if not shards:
        raise TicError(f"{path} holds no .tar file: {HOW_TO_MAKE}")
    first = next(iter(shards))
    for tar in shards:
        if not tar.endswith(".tar"):
            raise TicError(f"{tar} would not be read: rename it to end in .tar")
        if tar.count("/") != first.count("/"):
            raise TicError(f"{tar} and {first} do not lie equally deep below {path}: move what is not a shard of it")
    return shards


def pool_digest(shards: Iterable[tuple[str, int]]) -> str:
    """Return the SHA-256 of the names and bytes of a pool's shards."""
    return hashlib.sha256("".join(f"{os.path.basename(tar)} {size}\n" for tar, size in shards).encode()).hexdigest()


def _holds_links(folder: str) -> bool:
    """Return whether a folder is clip_benchmark's ``test/``."""
    if os.path.basename(folder) != CLIP_BENCHMARK_DIR:
        return False
    tars = [] if storage.is_remote(folder) else [tar for tar, _ in storage.list_files(folder, "*.tar")]
    are_links = tars and all(os.path.islink(tar) and os.readlink(tar).startswith("../") for tar in tars)
    return are_links or storage.exists(f"{folder}/nshards.txt")


@cache
def read_sizes(folder: str) -> dict[str, int]:
    """Return the sizes.json of a folder of shards, cached; raise a TicError if there is no valid one."""
    try:
        return msgspec.json.decode(storage.read_bytes(f"{folder}/{SIZES}"), type=dict[str, Count])
    except NotFoundError:
        raise NotFoundError(NO_SIZES.format(folder)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TicError(f"{folder}/{SIZES} is not a JSON object of shard name -> number of samples: {error}") from None


def read_meta(folder: str) -> dict[str, Any]:
    """Return the ``meta.json`` of a folder of shards, or {}."""
    with suppress(NotFoundError):
        return storage.read_json(f"{folder}/{META}")
    return {}


def split_folders(split: object) -> list[str]:
    """Return the folders of a split's shards: itself or its parts, sorted; raise a TicError if it is unfinished."""
    folder = str(storage.to_path(split))
    if _has_sizes(folder):
        return [folder]
    try:
        folders = [part for part in storage.list_folders(folder) if os.path.basename(part) != CLIP_BENCHMARK_DIR]
    except NotFoundError:
        raise NotFoundError(f"{split} is missing: {HOW_TO_MAKE}") from None
    has_sizes = dict(zip(folders, map_ordered(_has_sizes, folders, 16), strict=True))
    parts = [part for part in folders if has_sizes[part]]
    if not parts:
        raise TicError(NO_SIZES.format(split))
    arguments = [meta.get("arguments") or {} for meta in map_ordered(read_meta, parts, 16)]
    numbers, totals = ({each.get(name) for each in arguments} - {None} for name in ("part", "parts"))
    if len(totals) > 1 or (totals and len(numbers) < max(totals)):
        total = " or ".join(map(str, sorted(totals)))
        raise TicError(f"{split} has {len(numbers)} of {total} parts: finish reshard first")
    for part in folders:
        if not has_sizes[part] and storage.list_files(part, "*.tar"):
            raise TicError(f"{part} has shards but no {SIZES}: finish reshard first, or run add_sizes.py")
    return parts


def _has_sizes(folder: str) -> bool:
    with suppress(NotFoundError):
        return read_sizes(folder) is not None
    return False


def split_sizes(split: object, *, allow_empty: bool = False) -> dict[str, int]:
    """Return path -> samples of the shards that have any, in order; raise a TicError if the split must not be empty."""
    tables = {folder: read_sizes(folder) for folder in split_folders(split)}
    sizes = {f"{folder}/{name}": n for folder, table in tables.items() for name, n in sorted(table.items()) if n}
    if not sizes and not allow_empty:
        raise TicError(f"{split} holds no sample")
    return sizes


@cache
def list_fingerprint(split: str) -> str | None:
    """Return the SHA-256 of the UID list of a resharded split, cached; None for other data."""
    return (read_meta(split_folders(split)[0]).get("arguments") or {}).get("subset")


def check_cache(splits: Iterable[str], most_gb: float | None) -> None:
    """Raise a TicError if a split in a cloud has a shard larger than the cache of ``most_gb`` GB."""
    for split in filter(storage.is_remote, splits if most_gb else ()):
        shard, size = largest_shard(split)
        if size > most_gb * GB:
            raise TicError(f"--cache_gb {most_gb:g} is less than a shard: {shard} has {size / GB:.3g} GB")


@cache
def largest_shard(split: str) -> tuple[str, int]:
    """Return the largest shard of a split and its size in bytes, cached."""
    return max(list_shards(split).items(), key=lambda item: item[1])


def sizes_if_known(split: object) -> dict[str, int] | dict[str, None]:
    """Return ``split_sizes``, or shard -> None if there is no table."""
    has_parts = not storage.list_files(split, "*.tar") and storage.list_files(split, f"*/{SIZES}")
    if has_parts or storage.list_files(split, SIZES):
        return split_sizes(split, allow_empty=True)
    return dict.fromkeys(list_shards(split))


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """Return (samples, shards) of a list of shard paths or URLs, from the tables of their folders."""
    counts = []
    for shard in shards:
        folder, name = os.path.dirname(shard) or ".", os.path.basename(shard)
        if name not in read_sizes(folder):
            raise TicError(f"{folder}/{SIZES} has no entry for {name}")
        counts.append(read_sizes(folder)[name])
    return sum(counts), len(counts)


def stats_path(tar: str) -> str:
    """Return the path of the stats of a shard."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def read_stats(tar: str) -> int:
    """Return the samples of a shard from its stats; raise a TicError if they have no count."""
    try:
        return msgspec.json.decode(storage.read_bytes(stats_path(tar)), type=Stats).successes
    except NotFoundError:
        command = f"{SCRIPTS}/generate_stats.py --url {os.path.dirname(tar)}"
        raise TicError(f"{tar} has no stats: run {command} first") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise TicError(f"{stats_path(tar)} holds no count of successes: run generate_stats.py --overwrite") from None


def generate_stats(url: str, num_proc: int = 1, overwrite: bool = False) -> tuple[int, int]:
    """Write the stats of each shard of a pool or split; return the number of shards (in all, counted now)."""
    tars = list_shards(url)
    existing = {path for path, _ in storage.list_files(url, "**/*.json")}
    todo = [tar for tar in tars if overwrite or stats_path(tar).removeprefix("./") not in existing]
    results = progress(map_ordered(_write_stats, todo, num_proc, use_processes=True), "count", len(todo), "shard")
    if faults := list(filter(None, results)):
        raise TicError(faults[0] + f" (and {len(faults) - 1} more damaged shards)" * (len(faults) > 1))
    return len(tars), len(todo)


def _write_stats(tar: str) -> str | None:
    """Count a shard's samples and write its stats; return a fault or None."""
    try:
        with open_shard(tar) as shard:
            count = len(read_table(shard).keys)
    except TicError as error:
        return str(error)
    stats = {}
    with suppress(TicError):
        stats = storage.read_json(stats_path(tar))
    storage.write_json(stats_path(tar), {**stats, "successes": count}, sync=False)


def add_sizes(url: str, num_proc: int = 1) -> dict[str, int]:
    """Write ``sizes.json`` from the stats into each folder of shards of a pool or split; return folder -> samples."""
    tars, tables = list_shards(url), defaultdict(dict)
    counts = progress(map_ordered(read_stats, tars, num_proc), "read stats", len(tars), "shard")
    for tar, count in zip(tars, counts, strict=True):
        tables[os.path.dirname(tar)][os.path.basename(tar)] = count
    for folder, sizes in tables.items():
        storage.write_json(f"{folder}/{SIZES}", sizes)
    read_sizes.cache_clear()
    return {folder: sum(sizes.values()) for folder, sizes in tables.items()}
