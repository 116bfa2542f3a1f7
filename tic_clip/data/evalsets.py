"""TiC-DataComp's evaluation sets: their UIDs and class ids, and the list of tasks.

Below an output folder, ``uids/{yearly|monthly}/{train|eval/{task}}/{period}.npy`` and
``classes/{yearly|monthly}/eval/datacompnet/{period}.npy`` are named as the splits that are cut with them.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, MONTHS, get_benchmark
from tic_clip.cli import progress
from tic_clip.data.released import FETCH, MONTHLY, TABLES, YEARLY, YEARS, local_folder, read_table, table_path
from tic_clip.data.uids import (
    CLASS_ROW,
    UID,
    find_uids,
    isin_sorted,
    open_uids,
    parse_uids,
    save_uids,
    sorted_blocks,
    unique_uids,
    write_blocks,
)
from tic_clip.metrics import MAIN_METRIC
from tic_clip.storage import atomic_open, read_json
from tic_clip.tasks import Task, tasks_of

CLASS_INFO = "dataset_class_info.json"
GROUPS = tuple(f"tic/datacomp/{task}/{cadence}" for cadence in ("yearly", "monthly") for task in TABLES)


# UIDs of the evaluation sets, and of the training sets without them.


@dataclass(frozen=True, kw_only=True)
class Written:
    """A UID or class file that is there now: its name below the output folder, its rows, and what there is to say."""

    name: str
    count: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.count} UIDs" + (f", {self.note}" if self.note else "")


def write_eval_uids(lists: str, output: str) -> Iterator[Written]:
    """Write ``uids/`` below ``output`` from the released lists; lists of training UIDs that are missing are left out.

    A monthly list includes evaluation UIDs: they are taken out of it for training, and those of its own year are its
    evaluation sets. 2023 has no evaluation of a year, so its months have one only if the tables know that year.

    Raises:
        TicError: a table is missing or damaged, a list is not sorted, or a folder is not local.
    """
    lists, folder = local_folder(lists), local_folder(output) / "uids"
    chosen = {task: {year: _uids_of(rows) for year, rows in read_table(lists, task).items()} for task in TABLES}
    for task, years in chosen.items():
        for year in get_benchmark("datacomp").periods:
            if year in years:
                uids, total = years[year]
                save_uids(folder / f"yearly/eval/{task}/{year}.npy", uids)
                note = f"{total - len(uids)} repeated" if total > len(uids) else ""
                yield Written(name=f"uids/yearly/eval/{task}/{year}", count=len(uids), note=note)
    yield from _link_years(lists, folder)
    sets = {task: {year: uids for year, (uids, _) in years.items()} for task, years in chosen.items()}
    everything = unique_uids(np.concatenate([uids for years in sets.values() for uids in years.values()]))
    tables = [table_path(lists, task) for task in TABLES]
    months = [month for month in MONTHS if _month_list(lists, month).exists()]
    for month in progress(months, "monthly lists", len(months), " months"):
        source, own = _month_list(lists, month), {task: sets[task].get(month[:4]) for task in sets}
        yield from _split_month(month, source, folder / "monthly", everything, own, tables)


def _uids_of(rows: Any) -> tuple[np.ndarray, int]:
    """(distinct UIDs, number of UIDs) of a year of either table."""
    uids = parse_uids(chain.from_iterable(rows.values()) if isinstance(rows, dict) else rows)
    return unique_uids(uids), len(uids)


def _month_list(lists: Path, month: str) -> Path:
    return lists / MONTHLY / month[:4] / f"{month}.npy"


def _is_newer(path: Path, sources: Iterable[Path]) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= max(source.stat().st_mtime_ns for source in sources)


def _link_years(lists: Path, folder: Path) -> Iterator[Written]:
    """Give the yearly training lists, which are without evaluation UIDs already, their places."""
    for year in YEARS:
        source, target = lists / YEARLY / f"{year}.npy", folder / f"yearly/train/{year}.npy"
        if source.exists():
            new = _link(source, target)
            note = "" if new else "already there"
            yield Written(name=f"uids/yearly/train/{year}", count=len(open_uids(target)), note=note)


def _link(source: Path, target: Path) -> bool:
    """Make ``target`` a hard link to ``source``, or a copy where that can't be; returns whether it was not yet."""
    if target.exists() and (target.samefile(source) or _is_newer(target, [source])):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:  # another disk, or one without links
        with open(source, "rb") as old, atomic_open(target) as new:
            shutil.copyfileobj(old, new, 1 << 20)
    return True


def _split_month(
    month: str,
    source: Path,
    folder: Path,
    everything: np.ndarray,
    own: dict[str, np.ndarray | None],
    tables: list[Path],
) -> Iterator[Written]:
    """Write a month's list without ``everything`` and, before that, what it has of its year's evaluation UIDs."""
    train, counts = folder / f"train/{month}.npy", {}
    if _is_newer(train, [source, *tables]):
        yield Written(name=f"uids/monthly/train/{month}", count=len(open_uids(train)), note="already there")
        return
    found = [np.empty(0, UID)]
    with atomic_open(train) as file:
        kept = write_blocks(file, _without(sorted_blocks(source), everything, found))
        members = unique_uids(np.concatenate(found))
        for task, chosen in own.items():
            counts[task] = _save_members(folder / f"eval/{task}/{month}.npy", members, chosen)
    for task, count in counts.items():
        note = "" if count else "no evaluation UIDs, so no file"
        yield Written(name=f"uids/monthly/eval/{task}/{month}", count=count, note=note)
    taken = sum(map(len, found))
    yield Written(name=f"uids/monthly/train/{month}", count=kept, note=f"{taken} evaluation UIDs taken out")


def _without(blocks: Iterable[np.ndarray], chosen: np.ndarray, found: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield sorted blocks without the UIDs in ``chosen``, which are appended to ``found``."""
    for block in blocks:
        inside = isin_sorted(block, chosen)
        found.append(block[inside])
        yield block[~inside]


def _save_members(path: Path, members: np.ndarray, chosen: np.ndarray | None) -> int:
    """Write those of ``members`` that are in ``chosen``; without any there is no file. Returns their number."""
    some = members[:0] if chosen is None else members[isin_sorted(members, chosen)]
    if len(some):
        save_uids(path, some)
    else:
        path.unlink(missing_ok=True)
    return len(some)


def missing_training_lists(lists: str) -> str | None:
    """What is not there of the training lists and the command that fetches it, as one line; None if all is there."""
    years = [year for year in YEARS if not (Path(lists) / YEARLY / f"{year}.npy").exists()]
    months = [month for month in MONTHS if not _month_list(Path(lists), month).exists()]
    parts = [f"{len(years)} of {len(YEARS)} yearly"] if years else []
    parts += [f"{len(months)} of {len(MONTHS)} monthly"] if months else []
    names = [name for name, lacking in (("yearly", years), ("monthly", months)) if lacking]
    if not parts:
        return None
    return f"training lists not there: {' and '.join(parts)}; to fetch them: {FETCH} {lists} --lists {' '.join(names)}"


# Class ids.


def imagenet_synsets(lists: Path | None = None) -> list[str]:
    """ImageNet's 1,000 synsets such as n01440764; a class id is a position in this sorted list.

    They are timm's; BREEDS' ``dataset_class_info.json`` (``[[class_id, synset, names], ...]``) must agree if it is in
    ``lists``.

    Raises:
        TicError: the two differ, or the installed timm has no such list.
    """
    synsets = package_file("timm", "data/_info/imagenet_synsets.txt").read_text().split()
    path = lists / CLASS_INFO if lists else None
    if path and path.exists():
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) > 1 for row in rows):
            raise TicError(f"{path} is no list of [class id, synset, names]")
        if sorted((row[0], row[1]) for row in rows) != list(enumerate(synsets)):
            raise TicError(f"{path} does not have ImageNet's 1,000 synsets in sorted order")
    return synsets


def package_file(package: str, name: str) -> Path:
    """A data file of an installed package, without importing the package.

    Raises:
        TicError: it is not there.
    """
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], name) if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise TicError(f"the installed package {package} has no {name}; run: bash setup.sh")
    return path


def class_rows(uids_of: dict[str, Iterable[str]], synsets: list[str]) -> tuple[np.ndarray, int]:
    """The class of each UID of a year: (rows of ``CLASSES`` sorted by UID, number of UIDs under several synsets).

    A UID under several synsets gets the lowest of their class ids.

    Raises:
        TicError: a synset is not in ``synsets``, or a UID is none.
    """
    ids = {synset: i for i, synset in enumerate(synsets)}
    unknown = next((synset for synset in uids_of if synset not in ids), None)
    if unknown is not None:
        raise TicError(f"{unknown} is none of ImageNet's {len(synsets)} synsets")
    parts = [np.empty(0, CLASS_ROW)]
    for synset, texts in uids_of.items():
        uids = unique_uids(parse_uids(texts))
        rows = np.empty(len(uids), CLASS_ROW)
        rows["f0"], rows["f1"], rows["class_id"] = uids["f0"], uids["f1"], ids[synset]
        parts.append(rows)
    rows = np.concatenate(parts)
    rows = rows[np.lexsort((rows["class_id"], rows["f1"], rows["f0"]))]
    again = np.zeros(len(rows), bool)
    again[1:] = (rows["f0"][1:] == rows["f0"][:-1]) & (rows["f1"][1:] == rows["f1"][:-1])
    return rows[~again], int((again[1:] & ~again[:-1]).sum())


def write_classes(lists: str, output: str) -> Iterator[Written]:
    """Write ``classes/`` below ``output``: of each year, and of each month that ``write_eval_uids`` found UIDs for.

    Raises:
        TicError: the table is missing or damaged, or has a synset that ImageNet lacks.
    """
    lists, folder = local_folder(lists), local_folder(output)
    table, synsets = read_table(lists, "datacompnet"), imagenet_synsets(lists)
    for year in progress(table, "classes", len(table), " years"):
        rows, several = class_rows(table[year], synsets)
        note = f"{several} UIDs under several synsets have the lowest class id" if several else ""
        if year in get_benchmark("datacomp").periods:
            yield _save_classes(folder, f"yearly/eval/datacompnet/{year}", rows, note)
        for path in sorted((folder / "uids/monthly/eval/datacompnet").glob(f"{year}*.npy")):
            inside = find_uids(open_uids(path), rows)[1] > 0
            yield _save_classes(folder, f"monthly/eval/datacompnet/{path.stem}", rows[inside], "")


def _save_classes(folder: Path, name: str, rows: np.ndarray, note: str) -> Written:
    save_uids(folder / "classes" / f"{name}.npy", rows)
    return Written(name=f"classes/{name}", count=len(rows), note=note)


# The list of tasks.


def tasklist(chosen: Iterable[str] = GROUPS, *, sample: bool = False) -> dict[str, dict]:
    """A ``tasklist.yml`` as DataComp has it: task key -> name, main metric and, for ImageNet's classes, their number.

    Args:
        chosen: groups such as ``tic/datacomp/retrieval/yearly``, or keys of single tasks, of any benchmark.
        sample: only the first of each group.

    Raises:
        TicError: there is no such group or task.
    """
    tasks = [task for benchmark in BENCHMARKS.values() for task in tasks_of(benchmark, "")]
    groups = dict.fromkeys(_group(task) for task in tasks)
    entries = {}
    for name in chosen:
        some = [task for task in tasks if name in (task.key, _group(task))]
        if not some:
            raise TicError(f"unknown evaluation task {name!r}; the groups are {', '.join(groups)}")
        entries.update({task.key: _entry(task) for task in some[: 1 if sample else None]})
    return entries


def _group(task: Task) -> str:
    return task.key.rpartition("/")[0]


def _entry(task: Task) -> dict:
    """What DataComp's evaluate.py reads of a task; ``size`` is left out, as it depends on how much the pool has."""
    entry = {"name": task.name, "main_metric": MAIN_METRIC[task.kind]}
    if task.kind == "retrieval":
        return {**entry, "tags": ["tic", "retrieval"]}
    known = {"num_classes": 1000, "random_score": 0.001} if "/datacompnet/" in task.key else {}
    return {**entry, **known, "tags": ["tic"]}
