"""Make the UID and class files of TiC-DataComp's splits from the published lists."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from tic_clip import TicError, lookup, package_file
from tic_clip.benchmarks import MONTHS, get_benchmark
from tic_clip.cli import progress
from tic_clip.data.folder import link_or_copy
from tic_clip.data.released import DOWNLOAD, TABLES, YEARS, month_list, read_table, table_path, year_list
from tic_clip.data.uids import (
    BLOCK,
    CLASS_ROW,
    UID,
    find_uids,
    fingerprint,
    open_uids,
    parse_uids,
    save_uids,
    unique_uids,
)
from tic_clip.storage import local_folder, read_json, write_json

INPUTS = "inputs.json"
"""Beside lists: the name of each -> SHA-256 of what it was made of."""


def write_eval_uids(lists: str | None, output_path: str) -> Iterator[str]:
    """Write ``uids/`` below ``output_path``, and yield a line for each file and one on missing training lists.

    A published month includes evaluation UIDs: they are removed for training, and those of the month's year are its
    evaluation sets.
    """
    lists, folder = local_folder(lists or f"{output_path}/released"), local_folder(output_path) / "uids"
    eval_uids: dict[tuple[str, str], np.ndarray] = {}  # (task, year) -> sorted and distinct UIDs
    for task in TABLES:
        for year, rows in read_table(lists, task).items():
            uids = parse_uids(chain.from_iterable(rows.values()) if isinstance(rows, dict) else rows)
            eval_uids[task, year] = unique_uids(uids)
            if year in get_benchmark("datacomp").periods:
                save_uids(folder / f"yearly/eval/{task}/{year}.npy", eval_uids[task, year])
                yield f"uids/yearly/eval/{task}/{year}: {len(eval_uids[task, year])} UIDs"
    for year in YEARS:
        source, target = year_list(lists, year), folder / f"yearly/train/{year}.npy"
        if source.exists():
            same = target.exists() and (target.samefile(source) or fingerprint(target) == fingerprint(source))
            if not same:
                link_or_copy(source, target)
            yield f"uids/yearly/train/{year}: {len(open_uids(source))} UIDs{', already there' if same else ''}"
    months = [month for month in MONTHS if month_list(lists, month).exists()]
    tables = hashlib.sha256(b"\0".join(table_path(lists, task).read_bytes() for task in TABLES)).hexdigest()
    all_uids = unique_uids(np.concatenate([np.empty(0, UID), *eval_uids.values()]))
    for month in progress(months, "monthly lists", len(months), " months"):
        yield from _write_month(month_list(lists, month), folder / "monthly", eval_uids, all_uids, tables)
    paths = [year_list(lists, year) for year in YEARS] + [month_list(lists, month) for month in MONTHS]
    if missing := sum(not path.exists() for path in paths):
        command = f"{DOWNLOAD} {lists} --lists yearly monthly"
        yield f"missing training lists: {missing} of {len(paths)}; to download them: {command}"


def _write_month(
    source: Path, folder: Path, eval_uids: dict[tuple[str, str], np.ndarray], all_uids: np.ndarray, tables: str
) -> Iterator[str]:
    """Write a month's lists unless they are up to date; ``eval_uids``: (task, year) -> UIDs."""
    rows, month, inputs = open_uids(source), source.stem, {"list": fingerprint(source), "tables": tables}
    removed = all_uids[find_uids(rows, all_uids)[1] > 0]
    for task in TABLES:
        own = eval_uids.get((task, month[:4]), removed[:0])
        own = own[find_uids(removed, own)[1] > 0]
        path = folder / f"eval/{task}/{month}.npy"
        path.unlink(missing_ok=True)
        if len(own):
            save_uids(path, own)
        yield f"uids/monthly/eval/{task}/{month}: {len(own)} UIDs{'' if len(own) else ', so no file'}"
    count, note = _write_once(folder / f"train/{month}.npy", inputs, partial(_select, rows, all_uids, is_listed=False))
    yield f"uids/monthly/train/{month}: {count} UIDs, {len(rows) - count} evaluation UIDs removed{note}"


def _write_once(path: Path, inputs: dict[str, str], make: Callable[[], np.ndarray]) -> tuple[int, str]:
    """Write a list unless it was made from the same inputs; return its UIDs and a note."""
    journal = path.parent / INPUTS
    done = read_json(journal) if journal.exists() else {}
    if done.get(path.name) == inputs and path.exists():
        return len(open_uids(path)), ", already there"
    rows = make()
    save_uids(path, rows)
    write_json(journal, done | {path.name: inputs})
    return len(rows), ""


def _select(rows: np.ndarray, listed: np.ndarray, *, is_listed: bool) -> np.ndarray:
    """Return the rows that are in the sorted ``listed``, or those that are not."""
    blocks = (np.array(rows[start : start + BLOCK]) for start in range(0, len(rows), BLOCK))
    return np.concatenate([rows[:0], *(block[(find_uids(listed, block)[1] > 0) == is_listed] for block in blocks)])


def filter_lists(uids: str, filter_uids: str, output_path: str, filter: str = "basic") -> Iterator[str]:
    """Write the lists below ``uids``, those of training without what ``filter_uids`` lacks; yield a line for each.

    ``filter`` names their folder, train or train_bestpool; the other lists are linked.
    """
    source, target = local_folder(uids), local_folder(output_path)
    train = lookup(get_benchmark("datacomp").filters, "filter", filter)
    selected, digest = open_uids(filter_uids), fingerprint(filter_uids)
    if not (lists := sorted(source.rglob("*.npy"))):
        raise TicError(f"{source} holds no list of UIDs: run generate_eval_uids.py first")
    if source == target or source in target.parents:
        raise TicError(f"{target} lies in {source}: give another output folder")
    for path in progress(lists, "filter lists", len(lists), " lists"):
        name = str(path.relative_to(source))
        if "/train/" not in f"/{name}":
            link_or_copy(path, target / name)
            continue
        name = name.replace("train/", f"{train}/")
        inputs, rows = {"list": fingerprint(path), "filter": digest}, open_uids(path)
        count, note = _write_once(target / name, inputs, partial(_select, rows, selected, is_listed=True))
        yield f"{name}: {count} of {len(rows)} UIDs{note}"


def imagenet_synsets() -> list[str]:
    """Return ImageNet's 1,000 synsets such as n01440764, sorted; a class id is a position in this list."""
    return package_file("timm", "data/_info/imagenet_synsets.txt").read_text().split()


def class_rows(uids_of: dict[str, Iterable[str]]) -> np.ndarray:
    """Return the class of each UID of a year as sorted rows of ``CLASS_ROW``: the lowest where it has several."""
    synsets = imagenet_synsets()
    if unknown := set(uids_of) - set(synsets):
        raise TicError(f"{min(unknown)} is not one of ImageNet's {len(synsets)} synsets")
    listed = [parse_uids(uids_of.get(synset, ())) for synset in synsets]
    uids, first = np.unique(np.concatenate(listed), return_index=True)
    rows = np.empty(len(uids), CLASS_ROW)
    rows["f0"], rows["f1"] = uids["f0"], uids["f1"]
    rows["class_id"] = np.repeat(np.arange(len(synsets)), list(map(len, listed)))[first]
    return rows


def write_classes(lists: str | None, output_path: str) -> Iterator[str]:
    """Write ``classes/`` below ``output_path``: of each year, and each month with DataCompNet UIDs in ``uids/``."""
    lists, folder = local_folder(lists or f"{output_path}/released"), local_folder(output_path)
    for year, uids_of in read_table(lists, "datacompnet").items():
        rows, files = class_rows(uids_of), {}
        if year in get_benchmark("datacomp").periods:
            files[f"yearly/eval/datacompnet/{year}"] = rows
        for path in sorted((folder / "uids/monthly/eval/datacompnet").glob(f"{year}*.npy")):
            files[f"monthly/eval/datacompnet/{path.stem}"] = rows[find_uids(open_uids(path), rows)[1] > 0]
        for name, subset in files.items():
            save_uids(folder / f"classes/{name}.npy", subset)
            yield f"classes/{name}: {len(subset)} UIDs"
