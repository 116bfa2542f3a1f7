"""Cut a pool of tar shards into splits: index (which sample is where) -> plan (which goes where) -> copy (move bytes).

One pass over the pool serves any number of subsets. The plan is pure and depends on the pool and the subsets alone, so
the bytes written are the same whatever the number of processes. ``meta.json`` is written last: a split that has one is
whole.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tic_clip import TicError, uids
from tic_clip.cli import progress
from tic_clip.reshard import copy, engine, index, plan
from tic_clip.shards import SIZES, STATS, list_tars
from tic_clip.storage import atomic_open, read_json, to_path, write_json

SHARD_FORMAT = "{:08d}.tar"


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one subset became. ``wanted`` counts the UIDs asked for, ``num_samples`` those found in the pool."""

    name: str
    path: str
    wanted: int
    num_samples: int
    num_shards: int
    reused: bool = False


def find_subsets(path: object) -> dict[str, str]:
    """The subset files that ``path`` names: itself under the empty name, or each ``.npy`` below it under its own.

    Raises:
        TicError: there is none.
    """
    path = to_path(path)
    if not path.is_dir():
        uids.open_uids(path)
        return {"": str(path)}
    files = {str(file.relative_to(path).with_suffix("")): str(file) for file in sorted(path.rglob("*.npy"))}
    if not files:
        raise TicError(f"{path} holds no .npy file of UIDs")
    return files


def reshard(
    pool: str,
    output: str,
    subsets: str,
    *,
    classes: str | None = None,
    num_workers: int = 1,
    shard_size: int = 10_000,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[Split]:
    """Write the samples of ``pool`` that are in each subset as splits under ``output``; returns one ``Split`` each.

    Args:
        pool: folder of ``*.tar`` shards with a ``json`` member (that has ``uid``) in each sample.
        output: the split itself for one subset file, or the folder of the splits for a folder of subsets.
        subsets: a ``.npy`` of sorted UIDs, or a folder of them; a UID that is there n times gives n copies.
        classes: ``.npy`` of ``uids.CLASSES``; a sample listed there gets a ``cls`` member with its class id.
        num_workers: processes.
        shard_size: the most samples in a shard.
        overwrite: replace splits that were made with other arguments.
        dry_run: plan and count, write nothing.

    Raises:
        TicError: no pool, no subset, a file that can't be read, a split made with other arguments, or one in the pool.
    """
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    tars, files = list_tars(pool), find_subsets(subsets)
    paths = {name: to_path(output) / name for name in files}
    if any(path.resolve() == to_path(pool).resolve() for path in paths.values()):
        raise TicError(f"{pool} is the pool; give another output folder")
    if to_path(output).exists() and not to_path(output).is_dir():
        raise TicError(f"{output} is no folder")
    inputs = {"input_dir": pool, "cls_file": classes, "shard_size": shard_size, "pool": _pool_fingerprint(tars)}
    inputs["classes"] = uids.fingerprint(classes, uids.CLASSES) if classes is not None else None
    arguments = {
        name: {**inputs, "subset_file": file, "subset": uids.fingerprint(file)} for name, file in files.items()
    }
    done = {name: _finished(path, arguments[name], overwrite) for name, path in paths.items()}
    todo = {name: file for name, file in files.items() if done[name] is None}
    counters, shards = _plan(tars, todo, shard_size, num_workers)
    splits = {name: _split(name, paths[name], todo[name], shards[name]) for name in todo}
    if not dry_run:
        for name in todo:
            _clear(paths[name])
        _copy(splits, shards, classes, num_workers)
        for name, file in todo.items():
            _finish(splits[name], shards[name], file, {**counters, "arguments": arguments[name]})
    return [splits[name] if name in todo else _reused(name, paths[name], done[name]) for name in files]


def _plan(
    tars: list[str], subsets: dict[str, str], shard_size: int, num_workers: int
) -> tuple[dict[str, Any], dict[str, list[plan.Shard]]]:
    """(counts of the pool's samples read and dropped, the output shards of each subset), in one pass over the pool."""
    if not subsets:
        return {}, {}
    jobs = [index.Job(path=tar, subsets=tuple(subsets.values())) for tar in tars]
    found = list(progress(engine.run(index.index_shard, jobs, num_workers), "index", len(jobs), "shard"))
    dropped = sum((shard.dropped for shard in found), Counter())
    counters = {"processed_count": sum(shard.num_read for shard in found), "dropped": dict(sorted(dropped.items()))}
    return counters, {
        name: list(plan.cut(tars, [shard.matches[i] for shard in found], shard_size)) for i, name in enumerate(subsets)
    }


def _copy(splits: dict[str, Split], shards: dict[str, list[plan.Shard]], classes: str | None, num_workers: int) -> None:
    """Write every output shard of every split."""
    jobs = [
        copy.Job(output=split.path, shard=shard, classes=classes)
        for name, split in splits.items()
        for shard in shards[name]
    ]
    for _ in progress(engine.run(copy.copy_shard, jobs, num_workers), "copy", len(jobs), "shard"):
        pass


def _split(name: str, path: Path, subset: str, shards: list[plan.Shard]) -> Split:
    return Split(
        name=name,
        path=str(path),
        wanted=len(uids.open_uids(subset)),
        num_samples=sum(shard.num_samples for shard in shards),
        num_shards=len(shards),
    )


COMPARED = {"pool": "pool", "subset": "UID file", "classes": "class file", "shard_size": "shard size"}
"""What a split depends on: the contents of its inputs, by fingerprint, not where they lie."""


def _pool_fingerprint(tars: list[str]) -> str:
    """The SHA-256 of the names and sizes in bytes of a pool's shards."""
    lines = (f"{path.name} {path.stat().st_size}\n" for path in map(to_path, tars))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _finished(path: Path, arguments: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The ``meta.json`` of a split that was finished from the same inputs and is whole, or None if it must be made."""
    if not (path / "meta.json").exists():
        if not overwrite and path.is_dir() and any(path.glob("*.tar")) and not (path / "started.json").exists():
            raise TicError(f"{path} has shards that reshard did not write; give another output folder or --overwrite")
        return None
    meta = read_json(path / "meta.json")
    before = meta.get("arguments", {}) if isinstance(meta, dict) else {}
    different = [what for key, what in COMPARED.items() if before.get(key) != arguments[key]]
    if different and not overwrite:
        raise TicError(f"{path} was made with another {' and '.join(different)}; give --overwrite to replace it")
    return meta if not different and _is_whole(path) else None


def _is_whole(path: Path) -> bool:
    """Whether a split's table and every shard in it are there."""
    return (path / SIZES).exists() and all((path / name).exists() for name in read_json(path / SIZES))


def _reused(name: str, path: Path, meta: dict[str, Any]) -> Split:
    return Split(
        name=name,
        path=str(path),
        wanted=meta["subset_count"],
        num_samples=meta["output_count"],
        num_shards=meta["output_shard_count"],
        reused=True,
    )


def _split_files(path: Path) -> Iterator[Path]:
    """The files of a split of ours (or DataComp's), so that nothing else is ever deleted."""
    for pattern in ("meta.json", SIZES, "sample_ids.npy", "[0-9]*.tar", "[0-9]*_stats.json", ".[0-9]*.tmp"):
        yield from path.glob(pattern)


def _clear(path: Path) -> None:
    """Mark the folder as one that reshard is filling, and remove what an unfinished or replaced split left in it."""
    write_json(path / "started.json", {})
    for file in list(_split_files(path)):
        file.unlink()


def _finish(split: Split, shards: list[plan.Shard], subset: str, counters: dict[str, Any]) -> None:
    """Write the tables beside a split's shards; ``meta.json`` last."""
    path = to_path(split.path)
    for shard in shards:
        write_json(path / STATS.format(shard.number), {"successes": shard.num_samples})
    write_json(path / SIZES, {SHARD_FORMAT.format(shard.number): shard.num_samples for shard in shards})
    with atomic_open(path / "sample_ids.npy") as file, open(subset, "rb") as source:
        shutil.copyfileobj(source, file, 1 << 24)
    meta = {
        "output_shard_count": split.num_shards,
        "output_count": split.num_samples,
        "output_shard_format": SHARD_FORMAT,
        "subset_count": split.wanted,
        **counters,
    }
    write_json(path / "meta.json", meta)
    (path / "started.json").unlink()
