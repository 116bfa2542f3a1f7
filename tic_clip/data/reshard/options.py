"""What is asked for: the pool, the lists, the splits, the parts; and what became of it."""

import hashlib
import re
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup, storage
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.folder import load_finished, start
from tic_clip.data.reshard.part import OutputSplit, Part, read_journal, remove_work, run_part, run_parts
from tic_clip.data.split import META, SUBSET, list_shards
from tic_clip.parallel import map_on_ray
from tic_clip.storage import exists, is_dir, is_remote, list_files, list_folders, local_copy, to_path

ENGINES = {"local": False, "ray": True}
CLASS_LISTS = "TiC-DataCompNet's are made by dataset_creation/tic-datacomp/generate_datacompnet_uid2classid.py"
LISTS = "TiC-DataComp's UID lists are made by dataset_creation/tic-datacomp/generate_eval_uids.py"


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What became of one list, over all parts that were asked for. ``wanted`` counts its UIDs, ``num_samples`` the
    samples written; ``num_bad`` pool shards could not be read, ``wrong_stats`` hold another number of samples than
    their ``_stats.json`` says. ``reused``: all of it was there already.
    """

    name: str
    path: str
    wanted: int
    num_samples: int
    num_shards: int
    num_bytes: int
    num_bad: int = 0
    wrong_stats: int = 0
    reused: bool = False


def table(splits: list[SplitSummary]) -> str:
    """Return the splits as lines of text: what each holds, and the coverage of its UIDs."""
    rows = [("split", "samples", "shards", "size", "coverage", "")]
    for split in splits:
        notes = {
            f"without {split.num_bad} bad pool shards": split.num_bad,
            f"{split.wrong_stats} pool shards with another count in their stats": split.wrong_stats,
            "already there": split.reused,
        }
        coverage = f"{100 * split.num_samples / split.wanted:.1f} % of {split.wanted:,}" if split.wanted else "-"
        size = f"{split.num_bytes / 1e6:,.2f} MB" if split.num_bytes else "-"
        note = ", ".join(filter(notes.get, notes))
        rows.append((split.path, f"{split.num_samples:,}", f"{split.num_shards:,}", size, coverage, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([path.ljust(widths[0]), *map(str.rjust, counts, widths[1:5]), note] for path, *counts, note in rows)
    return "\n".join(map(str.rstrip, map("  ".join, cells)))


def find_subsets(path: object) -> dict[str, str]:
    """Return the UID lists that ``path`` names: itself under the empty name, or each ``.npy`` below it under its own,
    but for the ``sample_ids.npy`` of splits.
    """
    if not is_dir(path):
        if not exists(path):
            raise TicError(f"{path} is missing: {LISTS}")
        return {"": str(path)}
    root = str(to_path(path)).rstrip("/")
    files = {file[len(root) + 1 : -len(".npy")]: file for file, _ in list_files(path, "**/*.npy")}
    files = {name: file for name, file in files.items() if to_path(file).name != SUBSET}
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
) -> list[SplitSummary]:
    """Write the samples of ``pool`` that are in each UID list as splits under ``output_dir``; return a summary of each.

    The arguments are the flags of dataset_creation/reshard.py. ``subsets`` is a ``.npy`` of sorted UIDs, of which one
    that is there n times gives n copies; ``classes`` a ``.npy`` of ``CLASS_ROW``, whose samples get a ``cls`` member;
    either may be a folder of such files with the same names. With ``parts``, ``{split}/{part:05d}/`` is a split of its
    own; ``part`` (from 0) makes this one only.

    Raises:
        TicError: no pool, no list, damaged shards, or splits that were made with other arguments.
    """
    on_ray = lookup(ENGINES, "engine", engine)
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    if not (pool and output_dir and subsets):
        raise TicError("the path of the pool, the output or the subsets is empty")
    shards, files, root = list_shards(pool), find_subsets(subsets), to_path(output_dir)
    _check_parts(len(shards), parts, part)
    _check_output(pool, output_dir, shards, [str(root / name) for name in files])
    settings = {
        "shard_size": shard_size,
        "num_workers": num_workers,
        "skip_bad_shards": skip_bad_shards,
        "dry_run": dry_run,
        "timeout": 60.0 if on_ray else 0.0,
    }
    with storage.temporary_folder("tic-clip-lists-") as lists:
        splits = _splits(pool, root, files, _class_files(files, classes), lists)
        numbers = range(parts) if part is None else [part]
        wanted = [_part(root, shards, splits, parts, number, settings) for number in numbers]
        _remove_other_parts(root, splits, parts, overwrite, dry_run)
        finished = [_load_finished(each, overwrite) for each in wanted]
        made = _write(wanted, finished, lists, on_ray, ray_address)
    _check_bad_shards([*finished, *made], skip_bad_shards)
    return [_summarize(name, str(root / name), finished, made) for name in files]


def _check_parts(num_shards: int, parts: int, part: int | None) -> None:
    if not 1 <= parts <= num_shards:
        raise TicError(f"{parts} parts of {num_shards} pool shards: --parts must be between 1 and {num_shards}")
    if part is not None and not 0 <= part < parts:
        raise TicError(f"there is no part {part}: the parts are 0 to {parts - 1}")


def _write(wanted: list[Part], finished: list[dict], lists: Path, on_ray: bool, address: str | None) -> list[dict]:
    """Write what is not ``finished`` of the parts; return of each: split -> its ``meta.json``."""
    pending = [
        replace(part, splits=tuple(split for split in part.splits if split.name not in metas))
        for part, metas in zip(wanted, finished, strict=True)
    ]
    pending = [part for part in pending if part.splits]
    if not pending or not on_ray:
        return run_parts(pending, lists) if pending else []
    made = map_on_ray(run_part, pending, num_cpus=pending[0].num_workers, address=address)
    return list(progress(made, "reshard", len(pending), "part"))


def _check_output(pool: str, output_dir: str, shards: list[tuple[str, int]], paths: list[str]) -> None:
    """Raise a ``TicError`` for an output inside the pool, or one that holds the pool, or that is not a folder."""
    if exists(output_dir) and not is_dir(output_dir):
        raise TicError(f"{output_dir} is not a folder")
    root = _resolve(pool)
    folders = {_resolve(folder) for folder in {tar.rpartition("/")[0] for tar, _ in shards}}
    for path in map(_resolve, paths):
        if any(f"{folder}/".startswith(f"{path}/") for folder in folders):
            raise TicError(f"{path} holds shards of the pool; give another output folder")
        if f"{path}/".startswith(f"{root}/") and folders != {root}:
            raise TicError(f"{path} lies among the folders of the pool; give another output folder")


def _resolve(path: str) -> str:
    """Return a path as the one name that it has; a URL without a slash at its end."""
    return path.rstrip("/") if is_remote(path) else str(Path(path).resolve())


def _class_files(files: dict[str, str], classes: str | None) -> dict[str, str | None]:
    """Return the file of class ids of each list, or None."""
    if classes is not None and not exists(classes):
        raise TicError(f"{classes} is missing: {CLASS_LISTS}")
    if classes is None or not is_dir(classes):
        return dict.fromkeys(files, classes)
    tables = {name: str(to_path(classes) / f"{name}.npy") for name in files if name}
    tables = {name: file for name, file in tables.items() if exists(file)}
    if not tables:
        raise TicError(f"{classes} has a {{name}}.npy for none of the subsets")
    return {name: tables.get(name) for name in files}


def _splits(
    pool: str, root: Path, files: dict[str, str], tables: dict[str, str | None], lists: Path
) -> list[OutputSplit]:
    """Return each split and what it depends on, its inputs by content."""
    splits = []
    for name, file in files.items():
        classes = tables[name]
        arguments = {
            "input_dir": pool,
            "subset_file": file,
            "subset": uids.fingerprint(local_copy(file, lists)),
            "cls_file": classes,
            "classes": classes and uids.fingerprint(local_copy(classes, lists), uids.CLASS_ROW),
        }
        split = OutputSplit(name=name, path=str(root / name), subset=file, classes=classes, arguments=arguments)
        splits.append(split)
    return splits


def _part(
    root: Path, shards: list[tuple[str, int]], splits: list[OutputSplit], parts: int, number: int, settings: dict
) -> Part:
    """Return one part of the pool: the parts are blocks in its order, whose sizes differ by one at most."""
    tars = shards[len(shards) * number // parts : len(shards) * (number + 1) // parts]
    lines = (f"{to_path(path).name} {size}\n" for path, size in tars)
    shared = {
        "pool": hashlib.sha256("".join(lines).encode()).hexdigest(),
        "shard_size": settings["shard_size"],
        "parts": parts,
        "part": number,
    }
    return Part(
        tars=tuple(tar for tar, _ in tars),
        splits=tuple(
            replace(split, path=_part_path(split.path, parts, number), arguments={**shared, **split.arguments})
            for split in splits
        ),
        work=str(root / ".reshard" / f"{number:05d}"),
        **settings,
    )


def _part_path(split: str, parts: int, number: int) -> str:
    """Return where a part of a split lies: the split itself if it is the only one."""
    return split if parts == 1 else str(to_path(split) / f"{number:05d}")


def _remove_other_parts(root: Path, splits: list[OutputSplit], parts: int, overwrite: bool, dry_run: bool) -> None:
    """Remove what is where no part goes, or raise a ``TicError``; where one does, that is ``load_finished``'s to do."""
    wanted = {_part_path(split.path, parts, number) for split in splits for number in range(parts)}
    for split in splits:
        parts_there = filter(re.compile(r".*/\d{5}").fullmatch, list_folders(split.path) if is_dir(split.path) else [])
        for folder in {split.path, *parts_there} - wanted:
            files = list_files(folder) if is_dir(folder) else []
            if not any(name.endswith((".tar", META)) for name, _ in files):
                continue
            if not overwrite:
                raise TicError(f"{folder} holds another number of parts; give --overwrite to replace it")
            if not dry_run:
                start(folder)
                with suppress(OSError):
                    Path(folder).rmdir()  # unless something else is in it, or it is in a cloud
    for work in list_folders(root / ".reshard") if overwrite and not dry_run and is_dir(root / ".reshard") else []:
        if int(to_path(work).name) >= parts:
            remove_work(work)


def _load_finished(part: Part, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Return the ``meta.json`` of the splits of a part that are finished, by name."""
    journal, metas = read_journal(part.work), {}
    for split in part.splits:
        begun = journal and journal.arguments.get(split.name)
        if journal and not journal.arguments:  # damaged: what is there counts as begun with the same arguments
            begun = split.arguments
        if begun and any(counts.fault for counts in journal.shards):
            begun = {**begun, "pool": split.arguments["pool"]}  # a bad shard that was repaired has another size
        meta = load_finished(split.path, split.arguments, overwrite=overwrite, unfinished=begun)
        bad = len(meta["bad_shards"]) if meta and not part.skip_bad_shards else 0
        if bad and not overwrite:
            raise TicError(
                f"{split.path} was made without {bad} pool shards that could not be read; "
                "--skip-bad-shards leaves it so, --overwrite makes it again"
            )
        if meta and not bad:
            metas[split.name] = meta
    if len(metas) == len(part.splits) and exists(part.work) and not part.dry_run:
        is_here = not is_remote(part.work)
        with suppress(TicError), storage.lock_folder(Path(part.work)) if is_here else nullcontext():
            remove_work(part.work)  # killed at the very end; if others work there, their lock is an error
    return metas


def _check_bad_shards(made: list[dict[str, dict[str, Any]]], skip_bad_shards: bool) -> None:
    """Raise a ``TicError`` if pool shards can't be read, which must not be left out."""
    faults = {tar: fault for metas in made for meta in metas.values() for tar, fault in meta["bad_shards"].items()}
    if faults and not skip_bad_shards:
        first = "; ".join(f"{tar}: {fault}" for tar, fault in islice(faults.items(), 3))
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        count = f"pool shards that can't be read: {len(faults)}"
        raise TicError(f"{count} ({first}{more}); --skip-bad-shards leaves them out")


def _summarize(name: str, path: str, finished: list[dict], made: list[dict]) -> SplitSummary:
    """Return the summary of a split from the ``meta.json`` of its parts."""
    parts = [metas[name] for metas in (*finished, *made) if name in metas]
    return SplitSummary(
        name=name,
        path=path,
        wanted=parts[0]["subset_count"],
        num_samples=sum(meta["output_count"] for meta in parts),
        num_shards=sum(meta["output_shard_count"] for meta in parts),
        num_bytes=sum(meta["output_bytes"] for meta in parts),
        num_bad=sum(len(meta["bad_shards"]) for meta in parts),
        wrong_stats=sum(len(meta.get("wrong_stats", {})) for meta in parts),
        reused=not any(name in metas for metas in made),
    )
