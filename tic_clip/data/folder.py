"""Start, finish, reuse and summarise an output folder of shards; ``meta.json`` is written last."""

import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError, storage
from tic_clip.data.split import META, SIZES, SUBSET, read_meta, read_sizes, stats_path
from tic_clip.storage import is_dir, is_remote, list_files, remove, to_path

SHARD_FORMAT = "{:08d}.tar"

COMPARED = ("pool", "subset", "classes", "shard_size", "parts", "part")
"""The arguments that reshard's bytes depend on; inputs count by content (SHA-256)."""


def load_finished(
    folder: object,
    arguments: Mapping[str, Any],
    *,
    overwrite: bool = False,
    compared: Iterable[str] = COMPARED,
    unfinished: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a folder that was finished with the same arguments and is complete, else None.

    ``unfinished``: the arguments of an interrupted run, if the shards there are such a run's. Others are a TicError.
    """
    path = to_path(folder)
    try:
        meta = read_meta(str(path))
    except TicError:  # the machine went down before it was on the disk
        meta = {"arguments": {}}
    made = meta.get("arguments", {}) if meta else unfinished
    if made is None:
        if not overwrite and is_dir(path) and list_files(path, "*.tar"):
            raise TicError(f"{path} has shards of something else; give another output folder or --overwrite")
        return None
    pairs = ((key.replace("_", " "), made.get(key), arguments.get(key)) for key in compared)
    differences = "; ".join(f"{name} {str(old)[:8]}, now {str(new)[:8]}" for name, old, new in pairs if old != new)
    if differences and not overwrite:
        raise TicError(f"{path} was made with other arguments: {differences}; give --overwrite to replace it")
    return meta if meta and not differences and _is_complete(path, meta) else None


def _is_complete(path: Path, meta: Mapping[str, Any]) -> bool:
    """Return whether all tables, stats and shards that ``meta.json`` counts are there, with all their bytes."""
    sizes = {to_path(file).name: size for file, size in list_files(path)}
    tars = {name: size for name, size in sizes.items() if name.endswith(".tar")}
    needed = [SIZES, *map(stats_path, tars), *([] if meta["arguments"].get("part") else [SUBSET])]
    is_counted = (len(tars), sum(tars.values())) == (meta.get("output_shard_count"), meta.get("output_bytes"))
    return is_counted and all(map(sizes.get, needed))


def start(folder: object, keep: Collection[str] = frozenset()) -> None:
    """Create the folder, or remove its tables, shards and stats except ``keep``; leave other files alone."""
    path = to_path(folder)
    for name in META, SIZES, SUBSET:
        remove(path / name)
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        for file in path.glob(".*.tmp"):  # what a killed process was writing
            remove(file)
    for file, _ in list_files(path, "[0-9]*") if is_dir(path) else []:
        if file.endswith((".tar", "_stats.json")) and to_path(file).name not in keep:
            remove(file)


def finish(folder: object, meta: Mapping[str, Any], sizes: Mapping[str, int], subset: object) -> None:
    """Write the tables and, last, ``meta.json``. ``subset``: the UIDs, a local file of them, or None."""
    path = to_path(folder)
    storage.write_json(path / SIZES, dict(sizes), sync=False)
    read_sizes.cache_clear()
    if isinstance(subset, np.ndarray):
        with storage.atomic_open(path / SUBSET, sync=False) as file:
            np.save(file, subset)
    elif subset is not None:
        link_or_copy(subset, path / SUBSET)
    storage.write_json(path / META, meta, sync=False)


def link_or_copy(source: object, target: object) -> None:
    """Hard-link ``target`` to the local file ``source``, or copy it where that is not possible."""
    source = Path(str(source)).resolve()  # a hub's cache keeps symbolic links, and a hard link of one would dangle
    if not is_remote(target):
        Path(str(target)).parent.mkdir(parents=True, exist_ok=True)
        remove(target)
        with suppress(OSError):  # another disk, or one without hard links
            os.link(source, target)
            return
    storage.upload(source, target)


@dataclass(frozen=True)
class SplitSummary:
    """Summary of a split over its parts; ``num_bad`` and ``wrong_stats`` count pool shards, ``wanted`` UIDs."""

    name: str
    path: str
    wanted: int
    num_samples: int
    num_shards: int
    num_bytes: int
    num_bad: int = 0
    wrong_stats: int = 0
    reused: bool = False
    note: str = ""


def summarize(name: str, path: str, parts: list[Mapping[str, Any]], reused: bool) -> SplitSummary:
    """Return the summary of a split from the ``meta.json`` of its parts."""
    samples, shards, size = (sum(meta[f"output_{key}"] for meta in parts) for key in ("count", "shard_count", "bytes"))
    bad, wrong = (sum(len(meta.get(key, ())) for meta in parts) for key in ("bad_shards", "wrong_stats"))
    return SplitSummary(name, path, parts[0]["subset_count"], samples, shards, size, bad, wrong, reused)


def table(splits: list[SplitSummary]) -> str:
    """Return the splits as lines of text, with samples and coverage of their UIDs."""
    width = max(len(split.path) for split in splits)
    lines = [f"{'split':{width}}  {'samples':>13}  {'shards':>9}  {'size':>15}  coverage"]
    for split in splits:
        size = f"{split.num_bytes / 1e6:,.2f} MB" if split.num_bytes else "-"
        coverage = f"{100 * split.num_samples / split.wanted:.1f} % of {split.wanted:,}" if split.wanted else "-"
        coverage += f"  without {split.num_bad} bad pool shards" * (split.num_bad > 0)
        coverage += f"  {split.wrong_stats} pool shards with another count in their stats" * (split.wrong_stats > 0)
        coverage += "  already there" * split.reused + f"  {split.note}" * bool(split.note)
        lines.append(f"{split.path:{width}}  {split.num_samples:13,}  {split.num_shards:9,}  {size:>15}  {coverage}")
    return "\n".join(lines)
