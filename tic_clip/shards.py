"""A split's tables: ``sizes.json`` (shard -> samples), stats, and the two layouts (flat, and in parts)."""

import os
from collections import defaultdict
from collections.abc import Iterable
from functools import cache

from tic_clip import TicError
from tic_clip.storage import is_remote, read_json, to_path

SIZES = "sizes.json"
STATS = "{:08d}_stats.json"


def list_tars(path: object) -> list[str]:
    """The tars of a folder, sorted by name.

    Raises:
        TicError: there is no such folder, or no tar in it.
    """
    folder = to_path(path)
    if not folder.is_dir():
        raise TicError(f"{path} is missing or no folder")
    tars = sorted(str(file) for file in folder.glob("*.tar"))
    if not tars:
        raise TicError(f"{path} holds no .tar file")
    return tars


@cache
def read_sizes(folder: str) -> dict[str, int]:
    """The table of a folder of shards: file name -> samples.

    Raises:
        TicError: it has none, or the table is not one of counts; the message names the folder.
    """
    path = to_path(folder) / SIZES
    if not path.exists():
        raise TicError(f"{folder} has no {SIZES}: is the split there and finished?")
    sizes = read_json(path)
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in sizes.values()):
        raise TicError(f"{path} is no table of shard name -> number of samples")
    return sizes


def split_folders(split: object) -> list[str]:
    """The folders that hold a split's shards: itself, or its parts (``split/part/*.tar``), sorted.

    Raises:
        TicError: neither it nor a folder in it has a ``sizes.json``.
    """
    folder = to_path(split)
    if not folder.is_dir():
        raise TicError(f"{split} is missing: make this split first")
    if (folder / SIZES).exists():
        return [str(folder)]
    parts = sorted(str(part) for part in folder.iterdir() if part.is_dir() and (part / SIZES).exists())
    if not parts:
        raise TicError(f"{split} has no {SIZES}: is the split there and finished?")
    return parts


def split_sizes(split: object) -> dict[str, int]:
    """Every shard of a split, in order: path -> samples; shards without a sample are left out.

    Raises:
        TicError: the split is missing, unfinished or empty.
    """
    join = "{}/{}" if is_remote(split) else f"{{}}{os.sep}{{}}"
    sizes = {
        join.format(folder, name): count
        for folder in split_folders(split)
        for name, count in sorted(read_sizes(folder).items())
        if count
    }
    if not sizes:
        raise TicError(f"{split} holds no sample")
    return sizes


def dataset_size(shards: Iterable[str]) -> tuple[int, int]:
    """(samples, shards) of a list of shard paths or URLs that may lie in several folders, each with its own table.

    OpenCLIP's ``__len__`` file (one number for the whole folder) counts where there is no ``sizes.json``.

    Raises:
        TicError: a folder has no table, or its table lacks a shard; the message names it.
    """
    shards = list(shards)
    names_in, total = defaultdict(list), 0
    for shard in shards:
        folder, name = os.path.split(shard)
        names_in[folder].append(name)
    for folder, names in names_in.items():
        length = to_path(folder) / "__len__"
        if not (to_path(folder) / SIZES).exists() and length.exists():
            text = length.read_text()
            if not text.strip().isdecimal():
                raise TicError(f"{length} holds no number")
            total += int(text)
            continue
        sizes = read_sizes(folder)
        for name in names:
            if name not in sizes:
                raise TicError(f"{folder}/{SIZES} has no entry for {name}")
            total += sizes[name]
    return total, len(shards)
