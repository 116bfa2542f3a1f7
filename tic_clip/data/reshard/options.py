"""Reshard a pool: check the inputs, make the parts, run them, summarise the splits."""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.folder import SplitSummary, load_finished, start, summarize
from tic_clip.data.reshard.part import Options, Part, read_journal, remove_work, run_part
from tic_clip.data.reshard.writer import OutputSplit
from tic_clip.data.split import META, SUBSET, list_shards, pool_digest
from tic_clip.parallel import map_on_ray
from tic_clip.storage import exists, is_dir, list_files, list_folders, local_copy, temporary_folder, to_path

LISTS = "generate_eval_uids.py and generate_datacompnet_uid2classid.py in dataset_creation/tic-datacomp/ make lists"


def find_subsets(path: object) -> dict[str, str]:
    """Return the ``.npy`` that ``path`` is, under an empty name, or each one below it but the ``sample_ids.npy``."""
    if not is_dir(path):
        if not exists(path):
            raise TicError(f"{path} is missing: {LISTS}")
        return {"": str(path)}
    root = str(to_path(path)).rstrip("/")
    files = [file for file, _ in list_files(path, "**/*.npy") if to_path(file).name != SUBSET]
    if not files:
        raise TicError(f"{path} holds no .npy file of UIDs: {LISTS}")
    return {file[len(root) + 1 : -len(".npy")]: file for file in files}


def reshard(
    pool: str, output_dir: str, subsets: str, *, classes: str | None = None, **flags: Any
) -> list[SplitSummary]:
    """Write the samples of ``pool`` that are in each UID list as splits under ``output_dir``; return a summary of each.

    ``subsets`` is a ``.npy`` of sorted UIDs (n times the same give n copies), ``classes`` one of ``CLASS_ROW``
    (its samples get a ``cls`` member), or a folder of such files; ``flags`` are ``Options``.
    """
    options = Options(**flags)
    parts, part = options.parts, options.part
    if not (pool and output_dir and subsets):
        raise TicError("the path of the pool, the output or the subsets is empty")
    if min(options.shard_size, options.num_workers) < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    shards, files, root = list(list_shards(pool).items()), find_subsets(subsets), to_path(output_dir)
    if not 0 <= (part or 0) < parts <= len(shards):
        raise TicError(f"part {part} of {parts}: --parts must be between 1 and {len(shards)}, --part below --parts")
    _check_output(pool, shards, [str(root / name) for name in files])
    finished, pending = [], []
    with temporary_folder("tic-clip-lists-") as lists:
        inputs = _describe_inputs(pool, files, classes, lists)
        _remove_other_parts(root, files, options)
        for number in range(parts) if part is None else [part]:
            wanted = _make_part(root, shards, inputs, number, options)
            metas = _load_finished(wanted)
            left = tuple(split for split in wanted.splits if split.name not in metas)
            finished.append(metas)
            pending += [replace(wanted, splits=left)] if left else []
        if options.engine == "ray" and pending:
            results = map_on_ray(run_part, pending, num_cpus=options.num_workers, address=options.ray_address)
            made = list(progress(results, "reshard", len(pending), "part"))
        else:
            made = [run_part(each, lists) for each in pending]
    if not options.skip_bad_shards:
        _check_bad_shards([*finished, *made])
    metas = {name: [part[name] for part in (*finished, *made) if name in part] for name in files}
    resharded = {name for part in made for name in part}
    return [summarize(name, str(root / name), metas[name], name not in resharded) for name in files]


def _check_output(pool: str, shards: list[tuple[str, int]], splits: list[str]) -> None:
    """Raise a ``TicError`` if a split would lie in the pool, or hold it."""
    folders = [f"{Path(path).resolve()}/" for path in {pool, *(os.path.dirname(tar) for tar, _ in shards)}]
    for split in splits:
        output = f"{Path(split).resolve()}/"  # of a URL too, for the comparison alone
        if any(output.startswith(folder) or folder.startswith(output) for folder in folders):
            raise TicError(f"{split} lies in the pool or holds it; give another output folder")


def _describe_inputs(pool: str, files: dict[str, str], classes: str | None, lists: Path) -> dict[str, dict[str, Any]]:
    """Return the arguments that determine each split: paths and SHA-256 of their content."""
    tables = find_subsets(classes) if classes is not None else {}
    if tables and "" not in tables and tables.keys().isdisjoint(files):
        raise TicError(f"{classes} has a {{name}}.npy for none of the subsets")
    inputs = {}
    for name, file in files.items():
        table = tables.get(name, tables.get(""))
        inputs[name] = {
            "input_dir": pool,
            "subset_file": file,
            "subset": uids.fingerprint(local_copy(file, lists)),
            "cls_file": table,
            "classes": table and uids.fingerprint(local_copy(table, lists), uids.CLASS_ROW),
        }
    return inputs


def _make_part(
    root: Path, shards: list[tuple[str, int]], inputs: dict[str, dict], number: int, options: Options
) -> Part:
    """Return one part of the pool: a block of shards in order; sizes differ by at most one."""
    parts = options.parts
    block = shards[len(shards) * number // parts : len(shards) * (number + 1) // parts]
    shared = {"pool": pool_digest(block), "shard_size": options.shard_size, "parts": parts, "part": number}
    paths = {name: _part_folders(str(root / name), parts)[number] for name in inputs}
    splits = tuple(OutputSplit(name, path, {**shared, **inputs[name]}) for name, path in paths.items())
    tars = tuple(tar for tar, _ in block)
    return Part(tars=tars, splits=splits, work=str(root / ".reshard" / f"{number:05d}"), options=options)


def _part_folders(split: str, parts: int) -> list[str]:
    """Return the folders of a split's parts; a single part is the split itself."""
    return [split] if parts == 1 else [f"{split}/{number:05d}" for number in range(parts)]


def _remove_other_parts(root: Path, names: Iterable[str], options: Options) -> None:
    """Remove what is where no part goes, or raise a ``TicError``; where one does, that is ``load_finished``'s to do."""
    for split in filter(is_dir, [str(root / name) for name in names]):
        numbered = [path for path in list_folders(split) if re.fullmatch(r".*/\d{5}", path)]
        for folder in {split, *numbered}.difference(_part_folders(split, options.parts)):
            is_used = any(file.endswith((".tar", META)) for file, _ in list_files(folder))
            if is_used and not options.overwrite:
                raise TicError(f"{folder} holds another number of parts; give --overwrite to replace it")
            if is_used and not options.dry_run:
                start(folder)
                remove_work(str(root / ".reshard" / to_path(folder).name))


def _load_finished(part: Part) -> dict[str, dict[str, Any]]:
    """Return the ``meta.json`` of the splits of a part that are finished, by name."""
    journal, overwrite, metas = read_journal(part.work), part.options.overwrite, {}
    for split in part.splits:
        begun = journal.arguments.get(split.name)
        meta = load_finished(split.path, split.arguments, overwrite=overwrite, unfinished=begun)
        if meta and not (overwrite and meta["bad_shards"] and not part.options.skip_bad_shards):
            metas[split.name] = meta
    return metas


def _check_bad_shards(made: list[dict[str, dict[str, Any]]]) -> None:
    """Raise a ``TicError`` if there were pool shards that can't be read."""
    faults = {tar: fault for metas in made for meta in metas.values() for tar, fault in meta["bad_shards"].items()}
    if faults:
        first = "; ".join(f"{tar}: {fault}" for tar, fault in islice(faults.items(), 3))
        advice = "repair them and give --overwrite, or leave them out with --skip-bad-shards"
        raise TicError(f"pool shards that can't be read: {len(faults)} ({first}); {advice}")
