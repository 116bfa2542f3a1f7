"""What is asked for: the pool, the lists, the splits, the parts; and what became of it."""

import atexit
import hashlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup, storage
from tic_clip.cli import progress
from tic_clip.data import uids
from tic_clip.data.folder import load_finished, start
from tic_clip.data.reshard.part import OutputSplit, Part, read_journal, remove_work, run_parts
from tic_clip.data.split import SUBSET, list_shards, read_meta
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
        coverage = f"{100 * split.num_samples / split.wanted:.1f} % of {split.wanted:,}" if split.wanted else "-"
        size = f"{split.num_bytes / 1e9:,.2f} GB" if split.num_bytes >= 1e8 else f"{split.num_bytes / 1e6:,.2f} MB"
        size = size if split.num_bytes or not split.num_samples else "-"
        notes = [
            *([f"without {split.num_bad} bad pool shards"] if split.num_bad else []),
            *([f"{split.wrong_stats} pool shards with another count in their stats"] if split.wrong_stats else []),
            *(["already there"] if split.reused else []),
        ]
        counts = f"{split.num_samples:,}", f"{split.num_shards:,}"
        rows.append((split.path, *counts, size, coverage, ", ".join(notes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:5], widths[1:5]), row[5]]).rstrip() for row in rows
    )


def find_subsets(path: object) -> dict[str, str]:
    """Return the UID lists that ``path`` names: itself under the empty name, or each ``.npy`` below it under its own.

    The ``sample_ids.npy`` of splits are left out.

    Raises:
        TicError: there is none.
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

    Args:
        pool: folder of ``*.tar`` shards (or of folders of them) with a ``json`` (that has ``uid``) in each sample.
        output_dir: the split itself for one list, or the folder of the splits for a folder of lists.
        subsets: a ``.npy`` of sorted UIDs, or a folder of them; a UID that is there n times gives n copies.
        classes: ``.npy`` of ``uids.CLASS_ROW``; a sample listed there gets a ``cls`` member with its class id. Or a
            folder of them, with the names of the lists that they are for.
        num_workers: processes (of each part, with Ray).
        shard_size: the most samples in a shard.
        parts: blocks of the pool; above 1, ``{split}/{part:05d}/`` is a split of its own. A UID that is twice in the
            pool is found out within a part only.
        part: make this one only, counted from 0.
        engine: ``local``, or ``ray`` for parts on a Ray cluster.
        ray_address: that of a cluster, or ``auto``; by default one is started on this machine.
        skip_bad_shards: leave out pool shards whose bytes are damaged, and list them in ``meta.json``.
        overwrite: replace splits that were made with other arguments.
        dry_run: read and count, write nothing.

    Raises:
        TicError: no pool, no list, damaged shards, or splits that were made with other arguments.
        OSError: something can't be read or written.
    """
    on_ray = lookup(ENGINES, "engine", engine)
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    if not (pool and output_dir and subsets):
        raise TicError("the path of the pool, the output or the subsets is empty")
    shards, files, root = list_shards(pool), find_subsets(subsets), to_path(output_dir)
    _check_output(pool, output_dir, shards, [str(root / name) for name in files])
    settings = {
        "shard_size": shard_size,
        "num_workers": num_workers,
        "skip_bad_shards": skip_bad_shards,
        "dry_run": dry_run,
        "timeout": 60.0 if on_ray else 0.0,
    }
    with storage.temporary_folder("tic-clip-lists-") as folder:
        splits = _splits(pool, root, files, _class_files(files, classes), folder, on_ray)
        numbers = range(max(parts, 1)) if part is None else [part]
        wanted = [_part(root, shards, splits, parts, number, settings) for number in numbers]
        _remove_other_parts(root, splits, parts, overwrite, dry_run)
        finished = [_load_finished(each, overwrite) for each in wanted]
        made = _write(wanted, finished, on_ray, ray_address)
    return _summarize(root, files, finished, made, skip_bad_shards)


def _write(
    wanted: list[Part], finished: list[dict[str, Any]], on_ray: bool, address: str | None
) -> list[dict[str, dict[str, Any]]]:
    """Write what is not finished of the parts; return of each: split -> its ``meta.json``."""
    pending = [
        replace(part, splits=tuple(split for split in part.splits if split.name not in metas))
        for part, metas in zip(wanted, finished, strict=True)
    ]
    pending = [part for part in pending if part.splits]
    if not pending:
        return []
    if not on_ray:
        return run_parts(pending)
    made = map_on_ray(run_part, pending, num_cpus=pending[0].num_workers, address=address)
    return list(progress(made, "reshard", len(pending), "part"))


def _check_output(pool: str, output_dir: str, shards: list[tuple[str, int]], paths: list[str]) -> None:
    """Refuse an output inside the pool, or one that holds the pool.

    Raises:
        TicError: so it is, or ``output_dir`` is not a folder.
    """
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
    """Return the file of class ids of each list, or None.

    Raises:
        TicError: ``classes`` is missing, or a folder that has a file for none of the lists.
    """
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
    pool: str, root: Path, files: dict[str, str], tables: dict[str, str | None], folder: Path, on_ray: bool
) -> list[OutputSplit]:
    """Return each split and what it depends on, its inputs by content. Lists in a cloud are fetched into ``folder``;
    Ray's machines fetch them themselves.
    """
    splits = []
    for name, file in files.items():
        subset, classes = local_copy(file, folder), tables[name] and local_copy(tables[name], folder)
        arguments = {
            "input_dir": pool,
            "subset_file": file,
            "subset": uids.fingerprint(subset),
            "cls_file": tables[name],
            "classes": classes and uids.fingerprint(classes, uids.CLASS_ROW),
        }
        here = (file, tables[name]) if on_ray else (str(subset), classes and str(classes))
        path = str(root / name)
        splits.append(OutputSplit(name=name, path=path, subset=here[0], classes=here[1], arguments=arguments))
    return splits


def _part(
    root: Path, shards: list[tuple[str, int]], splits: list[OutputSplit], parts: int, number: int, settings: dict
) -> Part:
    """Return one part of the pool: the parts are blocks in its order, whose sizes differ by one at most.

    Raises:
        TicError: there are more parts than shards, or no such part.
    """
    if not 1 <= parts <= len(shards):
        raise TicError(f"{parts} parts of {len(shards)} pool shards: --parts must be between 1 and {len(shards)}")
    if not 0 <= number < parts:
        raise TicError(f"there is no part {number}: the parts are 0 to {parts - 1}")
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
    """Remove what was made, or begun, with another number of parts.

    Raises:
        TicError: there is some, and no ``overwrite``.
    """
    stale, work = [], root / ".reshard"
    for split in splits:
        for path in [split.path, *(list_folders(split.path) if is_dir(split.path) else [])]:
            with suppress(TicError):
                made = ((read_meta(path) or {}).get("arguments") or {}).get("parts", parts)
                if made != parts and (path == split.path or made > 1):  # else it is another split, of one part
                    stale.append(path)
    journals = {path: read_journal(path) for path in (list_folders(work) if is_dir(work) else [])}
    begun = [(path, *entry) for path, journal in journals.items() if journal for entry in journal.arguments.items()]
    begun = [entry for entry in begun if entry[2]["parts"] != parts]
    stale += [_part_path(str(root / name), made["parts"], made["part"]) for _, name, made in begun]
    if stale and not overwrite:
        raise TicError(f"{stale[0]} was made with another number of parts; give --overwrite to replace it")
    for path in [] if dry_run else stale:
        start(path)
        if not is_remote(path):
            with suppress(OSError):
                Path(path).rmdir()  # unless something else is in it
    for path in [] if dry_run else {path for path, *_ in begun}:
        remove_work(path)


def _load_finished(part: Part, overwrite: bool) -> dict[str, dict[str, Any]]:
    """Return the ``meta.json`` of the splits of a part that are finished, by name.

    Raises:
        TicError: without ``overwrite``, something else is there.
    """
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
        with suppress(TicError), storage.lock_folder(Path(part.work)):  # killed at the very end, or others work there
            remove_work(part.work)
    return metas


def run_part(part: Part) -> dict[str, dict[str, Any]]:
    """Write a part on whatever machine of a cluster this is."""
    splits = []
    for split in part.splits:
        folder = _lists_folder() / split.arguments["subset"]
        classes = split.classes and str(local_copy(split.classes, folder))
        splits.append(replace(split, subset=str(local_copy(split.subset, folder)), classes=classes))
    return run_parts([replace(part, splits=tuple(splits))])[0]


@cache
def _lists_folder() -> Path:
    """Return a folder that lasts as long as this process: a worker of Ray fetches a list once for all its parts."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(storage.temporary_folder("tic-clip-lists-"))


def _summarize(
    root: Path, files: dict[str, str], finished: list[dict], made: list[dict], skip_bad_shards: bool
) -> list[SplitSummary]:
    """Return the summaries of the splits from the ``meta.json`` of their parts.

    Raises:
        TicError: pool shards can't be read, which must not be left out.
    """
    metas = {name: [found[name] for found in (*finished, *made) if name in found] for name in files}
    faults = [meta["bad_shards"].items() for parts in metas.values() for meta in parts]
    bad = [f"{tar}: {fault}" for tar, fault in dict(chain(*faults)).items()]
    if bad and not skip_bad_shards:
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        first = "; ".join(bad[:3])
        raise TicError(f"pool shards that can't be read: {len(bad)} ({first}{more}); --skip-bad-shards leaves them out")
    return [
        SplitSummary(
            name=name,
            path=str(root / name),
            wanted=parts[0]["subset_count"],
            num_samples=sum(meta["output_count"] for meta in parts),
            num_shards=sum(meta["output_shard_count"] for meta in parts),
            num_bytes=sum(meta["output_bytes"] for meta in parts),
            num_bad=sum(len(meta["bad_shards"]) for meta in parts),
            wrong_stats=sum(len(meta.get("wrong_stats", {})) for meta in parts),
            reused=not any(name in found for found in made),
        )
        for name, parts in metas.items()
    ]
