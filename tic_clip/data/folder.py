"""The life of an output folder: shards, then ``sizes.json`` and ``sample_ids.npy``, and ``meta.json`` last.

A folder with ``meta.json`` is finished. reshard and pack share these functions.
"""

import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.data.split import META, SIZES, STARTED, SUBSET, read_sizes, stats_path
from tic_clip.storage import (
    atomic_open,
    is_dir,
    is_remote,
    list_files,
    read_json_object,
    remove,
    to_path,
    upload,
    write_json,
)

SHARD_FORMAT = "{:08d}.tar"

COMPARED = {
    "pool": "pool",
    "subset": "UID file",
    "classes": "class file",
    "shard_size": "shard size",
    "parts": "number of parts",
    "part": "part",
}
"""The arguments that reshard's bytes depend on, and what a message calls them; inputs count by content (SHA-256)."""


def load_finished(
    folder: object,
    arguments: Mapping[str, Any],
    *,
    overwrite: bool = False,
    compared: Mapping[str, str] = COMPARED,
    unfinished: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a folder that was finished with the same arguments and is complete, else None.

    ``compared``: the arguments that the output depends on -> their names in messages. ``unfinished``: the arguments of
    an interrupted run, if the caller knows that the shards there are such a run's.

    Raises:
        TicError: without ``overwrite``, the folder was made with other arguments, or holds shards of something else.
    """
    path = to_path(folder)
    try:
        meta = read_json_object(path / META)
    except FileNotFoundError:
        meta = None
    except TicError:
        if not overwrite:
            raise
        return None
    made = unfinished if meta is None else meta.get("arguments", {})
    if made is None:
        if not overwrite and is_dir(path) and list_files(path, "*.tar"):
            raise TicError(f"{path} has shards of something else; give another output folder or --overwrite")
        return None
    differences = _differences(made, arguments, compared)
    if differences and not overwrite:
        raise TicError(f"{path} was made with other arguments: {differences}; give --overwrite to replace it")
    return meta if meta is not None and not differences and _is_complete(path, meta) else None


def _differences(made: Mapping[str, Any], arguments: Mapping[str, Any], compared: Mapping[str, str]) -> str:
    """Return "shard size 2, now 3; …" for the arguments that differ; of a SHA-256 8 digits."""
    pairs = ((name, made.get(key), arguments.get(key)) for key, name in compared.items())
    return "; ".join(f"{name} {str(old)[:8]}, now {str(new)[:8]}" for name, old, new in pairs if old != new)


def _is_complete(path: Path, meta: Mapping[str, Any]) -> bool:
    """Return whether the tables, the stats and all bytes of the shards that ``meta.json`` counts are there."""
    existing = {to_path(file).name: size for file, size in list_files(path)}
    try:
        shards = read_json_object(path / SIZES).keys()
    except TicError:
        return False
    needed = {*map(stats_path, shards), *([] if meta["arguments"].get("part") else [SUBSET])}
    tars = {name: size for name, size in existing.items() if name.endswith(".tar")}
    return tars.keys() == shards and existing.keys() >= needed and sum(tars.values()) == meta.get("output_bytes")


def start(folder: object, keep: Collection[str] = frozenset()) -> None:
    """Make the folder, and remove ``meta.json``, tables, shards and stats in it, but not files called ``keep`` or else
    (so that ``--overwrite`` of the wrong folder does no harm).
    """
    path = to_path(folder)
    for name in META, SIZES, SUBSET, STARTED:  # STARTED was written by earlier versions
        remove(path / name)
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)
        for file in path.glob(".*.tmp"):  # what a killed process was writing
            remove(file)
    for pattern in "[0-9]*.tar", "[0-9]*_stats.json":
        for file, _ in list_files(path, pattern) if is_dir(path) else []:
            if to_path(file).name not in keep:
                remove(file)


def finish(
    folder: object, meta: Mapping[str, Any], sizes: Mapping[str, int], subset: np.ndarray | str | Path | None
) -> None:
    """Write ``sizes.json`` (shard -> samples), ``sample_ids.npy`` and, last, ``meta.json``.

    ``subset`` is the sorted ``UID`` array (N,), or a local file of it; None for a part whose list lies in part 0.
    """
    path = to_path(folder)
    write_json(path / SIZES, dict(sizes), sync=False)
    read_sizes.cache_clear()
    if isinstance(subset, np.ndarray):
        with atomic_open(path / SUBSET, sync=False) as file:
            np.save(file, subset)
    elif subset is not None:
        link_or_copy(subset, path / SUBSET)
    write_json(path / META, meta, sync=False)


def link_or_copy(source: object, target: object) -> None:
    """Make ``target`` the same as the local file ``source``: a hard link where the disk has them, else a copy."""
    source = Path(str(source)).resolve()  # a hub's cache keeps symbolic links, and a hard link of one would dangle
    if not is_remote(target):
        remove(target)
        with suppress(OSError):  # another disk, or one without hard links
            os.link(source, target)
            return
    upload(source, target)
