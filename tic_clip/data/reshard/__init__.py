"""Cut a pool of tar shards into splits: index (which sample is where) -> plan (which goes where) -> copy (move bytes).

One pass over the pool serves any number of subsets. The plan depends on the pool and the subsets alone, so the bytes
written are the same whatever the number of processes or machines, and after an interruption. The pool is cut into
parts; a part is made by itself, on any machine, and ``meta.json`` is written last: one that has it is whole.
"""

import hashlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.reshard import output
from tic_clip.data.reshard.part import Part, Target, clean, fill, open_journal, workplace
from tic_clip.data.reshard.plan import block
from tic_clip.data.split import list_shards
from tic_clip.parallel import make_pool, map_on_ray
from tic_clip.storage import exists, is_dir, is_remote, list_files, list_folders, local_copy, to_path

ENGINES = {"local": False, "ray": True}
CLASS_LISTS = "TiC-DataCompNet's are made by dataset_creation/tic-datacomp/generate_datacompnet_uid2classid.py"
LISTS = "TiC-DataComp's UID lists are made by dataset_creation/tic-datacomp/generate_eval_uids.py"


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one subset became. ``wanted`` counts the UIDs asked for, ``num_samples`` those found in the pool; over all
    parts that were asked for. ``num_bad`` pool shards could not be read. ``reused``: all of it was there already.
    """

    name: str
    path: str
    wanted: int
    num_samples: int
    num_shards: int
    num_bytes: int
    num_bad: int = 0
    reused: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a part came to: each split's ``meta.json`` by name, and the pool shards that could not be read."""

    metas: dict[str, dict[str, Any]]
    bad_shards: dict[str, str]


def table(splits: list[Split]) -> str:
    """The splits as lines of text: what each holds, and the coverage of its UIDs."""
    rows = [
        (
            split.path,
            f"{split.num_samples:,}",
            f"{split.num_shards:,}",
            _size(split.num_bytes) if split.num_bytes or not split.num_samples else "-",
            f"{100 * split.num_samples / split.wanted:.1f} % of {split.wanted:,}" if split.wanted else "-",
            _note(split),
        )
        for split in splits
    ]
    rows.insert(0, ("split", "samples", "shards", "size", "coverage", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:5]), row[5]]).rstrip() for row in rows
    )


def _size(num_bytes: int) -> str:
    """A number of bytes in GB, or in MB if it is small."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"


def _note(split: Split) -> str:
    """What the table says of a split beside its numbers."""
    notes = [f"without {split.num_bad} bad pool shards"] if split.num_bad else []
    return ", ".join([*notes, *(["already there"] if split.reused else [])])


def find_subsets(path: object) -> dict[str, str]:
    """The subset files that ``path`` names: itself under the empty name, or each ``.npy`` below it under its own.

    Raises:
        TicError: there is none.
    """
    if not is_dir(path):
        if not exists(path):
            raise TicError(f"{path} is missing: {LISTS}")
        return {"": str(path)}
    root = str(to_path(path)).rstrip("/")
    files = {file[len(root) + 1 : -len(".npy")]: file for file, _ in list_files(path, "**/*.npy")}
    if not files:
        raise TicError(f"{path} holds no .npy file of UIDs: {LISTS}")
    return files


def reshard(
    pool: str,
    output_dir: str,
    subsets: str,
    *,
    classes: str | None = None,
    num_workers: int = 1,
    shard_size: int = 10_000,
    parts: int = 1,
    part: int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    skip_bad_shards: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[Split]:
    """Write the samples of ``pool`` that are in each subset as splits under ``output_dir``; returns one ``Split`` each.

    Args:
        pool: folder of ``*.tar`` shards (or of folders of them) with a ``json`` (that has ``uid``) in each sample.
        output_dir: the split itself for one subset file, or the folder of the splits for a folder of subsets.
        subsets: a ``.npy`` of sorted UIDs, or a folder of them; a UID that is there n times gives n copies.
        classes: ``.npy`` of ``uids.CLASSES``; a sample listed there gets a ``cls`` member with its class id. Or a
            folder of them, with the names of the subsets that they are for.
        num_workers: processes (of each part, with Ray).
        shard_size: the most samples in a shard.
        parts: blocks of the pool; above 1, ``{split}/{part:05d}/`` is a split of its own.
        part: make this one only, counted from 0.
        engine: ``local``, or ``ray`` for parts on a Ray cluster.
        ray_address: that of a cluster, or ``auto``; by default one is started on this machine.
        skip_bad_shards: leave out pool shards that can't be read, and list them in ``meta.json``.
        overwrite: replace splits that were made with other arguments.
        dry_run: read and count, write nothing.

    Raises:
        TicError: no pool, no subset, shards that can't be read, or splits that were made with other arguments.
    """
    on_cluster = lookup(ENGINES, "engine", engine)
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    if not (pool and output_dir and subsets):
        raise TicError("the path of the pool, the output or the subsets is empty")
    settings = {
        "shard_size": shard_size,
        "num_workers": num_workers,
        "skip_bad_shards": skip_bad_shards,
        "dry_run": dry_run,
        "patience": 60.0 if on_cluster else 0.0,
    }
    shards, files = list_shards(pool), find_subsets(subsets)
    paths = {name: str(to_path(output_dir) / name) for name in files}
    _check_paths(pool, output_dir, shards, paths)
    numbers = range(max(parts, 1)) if part is None else [part]
    with _cache(*files.values(), classes) as folder:
        targets = _targets(pool, files, paths, classes, Path(folder))
        all_made = [_part(shards, targets, output_dir, parts, number, settings) for number in numbers]
        for target in targets:
            output.check_layout(target.path, parts, overwrite, dry_run)
        if overwrite and not dry_run:
            _clean_others(output_dir, parts)
        metas: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
        todo = []
        for made in all_made:
            found = {target.name: output.finished(target, overwrite, skip_bad_shards) for target in made.targets}
            for name, meta in found.items():
                metas[name] += [meta] if meta else []
            left = tuple(target for target in made.targets if not found[target.name])
            if left:
                todo.append(replace(made, targets=left))
            elif not dry_run and exists(made.work):  # killed at the very end, or others are at work there
                with suppress(TicError), workplace(made):
                    clean(made.work)
        outcomes = list(_run_on_ray(todo, ray_address) if on_cluster else _run_here(todo, Path(folder)))
    bad = {tar: fault for outcome in outcomes for tar, fault in outcome.bad_shards.items()}
    if bad and not skip_bad_shards:
        raise TicError(_message(bad))
    for name, meta in (item for outcome in outcomes for item in outcome.metas.items()):
        metas[name].append(meta)
    new = {target.name for made in todo for target in made.targets}
    return [_split(name, paths[name], metas[name], name not in new) for name in files]


def _cache(*files: str | None) -> AbstractContextManager[str]:
    """A folder for the copies of files of UIDs and classes that lie in a cloud, if any does."""
    if any(file is not None and is_remote(file) for file in files):
        return tempfile.TemporaryDirectory(prefix="tic-clip-subsets-")
    return nullcontext("")


def _check_paths(pool: str, output_dir: str, shards: list[tuple[str, int]], paths: dict[str, str]) -> None:
    """See that no split lies where the pool's shards are, or where the next run would take it for a part of the pool.

    Raises:
        TicError: one does, or ``output_dir`` is no folder.
    """
    if exists(output_dir) and not is_dir(output_dir):
        raise TicError(f"{output_dir} is no folder")
    root = _resolved(pool)
    folders = {_resolved(folder) for folder in {tar.rpartition("/")[0] for tar, _ in shards}}
    for path in map(_resolved, paths.values()):
        if any(f"{folder}/".startswith(f"{path}/") for folder in folders):
            raise TicError(f"{path} holds shards of the pool; give another output folder")
        if f"{path}/".startswith(f"{root}/") and folders != {root}:
            raise TicError(f"{path} lies among the folders of the pool; give another output folder")


def _resolved(path: str) -> str:
    """A path as the one name that it has; a URL without a slash at its end."""
    return path.rstrip("/") if is_remote(path) else str(Path(path).resolve())


def _clean_others(output_dir: str, parts: int) -> None:
    """Remove what an unfinished run with more parts left beside the output."""
    work = to_path(output_dir) / ".reshard"
    for folder in list_folders(work) if is_dir(work) else []:
        if int(to_path(folder).name) >= parts:
            clean(folder)


def _targets(
    pool: str, files: dict[str, str], paths: dict[str, str], classes: str | None, folder: Path
) -> list[Target]:
    """Each split and what it depends on, its inputs by fingerprint."""
    tables = _class_files(files, classes)
    return [
        Target(
            name=name,
            path=paths[name],
            subset=file,
            classes=tables[name],
            arguments={
                "input_dir": pool,
                "subset_file": file,
                "subset": uids.fingerprint(local_copy(file, folder)),
                "cls_file": tables[name],
                "classes": tables[name] and uids.fingerprint(local_copy(tables[name], folder), uids.CLASS_ROW),
            },
        )
        for name, file in files.items()
    ]


def _class_files(files: dict[str, str], classes: str | None) -> dict[str, str | None]:
    """The file of class ids of each subset, or None.

    Raises:
        TicError: ``classes`` is missing, or a folder that has a file for none of the subsets.
    """
    if classes is not None and not exists(classes):
        raise TicError(f"{classes} is missing: {CLASS_LISTS}")
    if classes is None or not is_dir(classes):
        return dict.fromkeys(files, classes)
    there = {name: str(to_path(classes) / f"{name}.npy") for name in files if name}
    there = {name: file for name, file in there.items() if exists(file)}
    if not there:
        raise TicError(f"{classes} has a {{name}}.npy for none of the subsets")
    return {name: there.get(name) for name in files}


def _part(
    shards: list[tuple[str, int]], targets: list[Target], output_dir: str, parts: int, number: int, settings: dict
) -> Part:
    """One part of the pool, with what each of its splits depends on."""
    tars = [shards[i] for i in block(len(shards), parts, number)]
    shared = {"pool": _fingerprint(tars), "shard_size": settings["shard_size"], "parts": parts, "part": number}
    return Part(
        tars=tuple(tar for tar, _ in tars),
        targets=tuple(
            replace(
                target,
                path=output.part_path(target.path, parts, number),
                arguments={**shared, **target.arguments},
            )
            for target in targets
        ),
        work=str(to_path(output_dir) / ".reshard" / f"{number:05d}"),
        **settings,
    )


def _fingerprint(tars: list[tuple[str, int]]) -> str:
    """The SHA-256 of the names and sizes in bytes of pool shards."""
    lines = (f"{to_path(path).name} {size}\n" for path, size in tars)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _run_here(todo: list[Part], folder: Path) -> Iterator[Outcome]:
    """Make the parts one after the other."""
    outcomes: list[Outcome] = []
    if not todo:
        return
    places = (place for part in todo for place in (part.tars[0], *(target.path for target in part.targets)))
    fork = not any(map(is_remote, places)) and threading.active_count() == 1
    with make_pool(todo[0].num_workers, fork=fork) as executor:
        steps = (step for part in todo for step in make_part(part, executor, folder, outcomes))
        for _ in progress(steps, "reshard", sum(len(part.tars) for part in todo), "shard"):
            pass
    yield from outcomes


def _run_on_ray(todo: list[Part], address: str | None) -> Iterator[Outcome]:
    """Make the parts on a cluster."""
    if not todo:
        return
    found = map_on_ray(make_part_alone, todo, num_cpus=todo[0].num_workers, address=address)
    yield from progress(found, "reshard", len(todo), "part")


def make_part_alone(part: Part) -> Outcome:
    """Make a part with processes of its own, on whatever machine this is."""
    outcomes: list[Outcome] = []
    files = (file for target in part.targets for file in (target.subset, target.classes))
    with _cache(*files) as folder, make_pool(part.num_workers) as executor:
        for _ in make_part(part, executor, Path(folder), outcomes):
            pass
    return outcomes[0]


def make_part(part: Part, executor: Executor, folder: Path, outcomes: list[Outcome]) -> Iterator[None]:
    """Make all splits of a part, yield once a pool shard, and append what came out to ``outcomes``.

    Files of UIDs and classes that lie in a cloud are fetched into ``folder``.
    """
    part = replace(part, targets=tuple(_local(target, folder) for target in part.targets))
    with workplace(part) as place:
        journal = open_journal(part, place)
        if not part.dry_run:
            journal.save(now=True)  # before what an earlier one tells of is removed
            for target, written in zip(part.targets, journal.written, strict=True):
                output.begin(target, set(written))
        yield from fill(part, journal, place, executor)
        metas = {target.name: output.count(part, journal, i) for i, target in enumerate(part.targets)}
        bad = output.bad_shards(part, journal)
        outcomes.append(Outcome(metas=metas, bad_shards=bad))
        if part.dry_run:
            return
        if bad and not part.skip_bad_shards:
            for target in part.targets:
                output.leave(target, bad)
            return
        for target in part.targets:
            output.finish(target, metas[target.name], part.shard_size)
        clean(part.work)


def _local(target: Target, folder: Path) -> Target:
    """A target whose files lie on this machine."""
    classes = target.classes and str(local_copy(target.classes, folder))
    return replace(target, subset=str(local_copy(target.subset, folder)), classes=classes)


def _message(bad: dict[str, str]) -> str:
    """One line for pool shards that can't be read."""
    first = "; ".join(f"{tar}: {fault}" for tar, fault in list(bad.items())[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"pool shards that can't be read: {len(bad)} ({first}{more}); --skip-bad-shards leaves them out"


def _split(name: str, path: str, metas: list[dict[str, Any]], reused: bool) -> Split:
    return Split(
        name=name,
        path=path,
        wanted=metas[0]["subset_count"],
        num_samples=sum(meta["output_count"] for meta in metas),
        num_shards=sum(meta["output_shard_count"] for meta in metas),
        num_bytes=sum(meta["output_bytes"] for meta in metas),
        num_bad=sum(len(meta["bad_shards"]) for meta in metas),
        reused=reused,
    )
