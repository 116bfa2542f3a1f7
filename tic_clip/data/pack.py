"""Lists of dated images (CSV) and a folder of images to shards in the format of every other split.

The lists are in the order of UIDs, which are hashes: shuffled, and the same on every machine. Shard n has the rows from
n * ``shard_size`` on, fewer where images are missing. Memory holds 16 bytes a row, and 36 an image in a zip archive.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import progress
from tic_clip.data import clip_benchmark, folder
from tic_clip.data.folder import SHARD_FORMAT
from tic_clip.data.images import ZIP_MEMBER, UnusableImage, detect_format, find_zips, index_zip, read_file, read_zipped
from tic_clip.data.pairs import MANIFEST, NO_CAPTION, file_digest, list_name, read_rows
from tic_clip.data.reshard import Split
from tic_clip.data.split import STATS
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import UID, find_uids, make_uid, parse_uids
from tic_clip.parallel import make_pool, map_in_pool
from tic_clip.storage import is_remote, lock_folder, read_json_object, remove, temporary_folder, write_json

FOLDERS = {"train": "train", "test": "eval/retrieval"}
"""The lists of a step, and where the splits made of them lie below the benchmark's folder."""

COMPARED = {"list": "list", "shard_size": "shard size"}
"""What a split depends on; the stats of its shards repeat it, so that no other run's shards are taken for its own."""

JOURNAL = ".pack.json"
"""The arguments of the run that is filling a folder."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Where images are: files in ``folder``, or members of ``zips`` by ``index``, a sorted .npy of ``ZIP_MEMBER``."""

    folder: str
    dataset: str
    zips: list[str]
    index: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """A split and the list that it is made of: the first byte of each shard's rows, and the UIDs (N,).

    ``unsorted`` says which row is not in the order of the UIDs, as in lists of earlier versions.
    """

    name: str
    path: str
    starts: list[int]
    uids: np.ndarray
    unsorted: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard to write: the rows of the list in ``arguments`` from byte ``start`` on."""

    path: str
    number: int
    start: int
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The splits that were made, or were there, and the rows that are in none of them, by reason."""

    splits: list[Split]
    dropped: Counter[str]


def create_tars(
    csv_path: str,
    image_path: str,
    output_path: str,
    *,
    num_workers: int = 1,
    shard_size: int = 10_000,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Packed:
    """Write ``train/{step}/`` and ``eval/retrieval/{step}/`` of the lists' benchmark below ``output_path``.

    Args:
        csv_path: the folder of lists that create_splits.py wrote.
        image_path: the images, in any layout of ``tic_clip.data.images``; nothing there is changed.
        output_path: the folder of all data, ``data_dir`` of the other commands.
        num_workers: processes; the bytes do not depend on it.
        shard_size: rows of a list that a shard is made of.
        overwrite: make all splits again, whatever is there.
        dry_run: read all images, write nothing.

    Raises:
        TicError: lists or images are missing or damaged, a split was made with other arguments, or another process is
            writing it.
    """
    if shard_size < 1 or num_workers < 1:
        raise TicError("the shard size and the number of workers must be at least 1")
    manifest = _read_manifest(csv_path, image_path)
    root, steps = _output_root(output_path, image_path, manifest), get_benchmark(manifest["benchmark"]).steps
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(num_workers, fork=True))  # before anything starts a thread
        work = stack.enter_context(temporary_folder("tic-pack-"))

        def run(function: Callable, jobs: list, description: str, unit: str) -> Iterator:
            return progress(map_in_pool(pool, function, jobs, 4 * num_workers), description, len(jobs), unit)

        scan = partial(scan_list, str(Path(csv_path)), str(Path(image_path)), root, manifest, shard_size)
        outputs = list(run(scan, [(split, step.name) for step in steps for split in FOLDERS], "read", "list"))
        found = [None if overwrite else _load_finished(output) for output in outputs]
        todo = [output for output, meta in zip(outputs, found, strict=True) if meta is None]
        if unsorted := next((output.unsorted for output in todo if output.unsorted), None):
            raise TicError(unsorted)
        images = _find_images(str(Path(image_path)), manifest["dataset"], work, run) if todo else None
        made = {output.path: {} if dry_run else _begin(output, overwrite, stack) for output in todo}
        _make_shards(todo, made, partial(make_shard, images, write=not dry_run), run)
        if len(todo) == len(outputs) and not any(
            stats["successes"] for done in made.values() for stats in done.values()
        ):
            image = next((row[1] for output in outputs for _, row in read_rows(output.arguments["csv"])), "(none)")
            raise TicError(f"{image_path} has none of the images of the lists, such as {image}, as a file or in a zip")
        metas = [
            meta or _finish(output, made[output.path], dry_run) for output, meta in zip(outputs, found, strict=True)
        ]
    return Packed(
        splits=[_summarize(output, meta, output not in todo) for output, meta in zip(outputs, metas, strict=True)],
        dropped=sum((Counter(meta["dropped"]) for meta in metas), Counter()),
    )


def _make_shards(outputs: list[Output], made: dict[str, dict[int, Any]], make: Callable, run: Callable) -> None:
    """Make the shards of which ``made`` has no stats, and add them there."""
    jobs = [
        Job(path=output.path, number=number, start=first, arguments=output.arguments)
        for output in outputs
        for number, first in enumerate(output.starts)
        if number not in made[output.path]
    ]
    for job, stats in zip(jobs, run(make, jobs, "pack", "shard"), strict=True):
        made[job.path][job.number] = stats


def _summarize(output: Output, meta: dict[str, Any], reused: bool) -> Split:
    return Split(
        name=output.name,
        path=output.path,
        wanted=len(output.uids),
        num_samples=meta["output_count"],
        num_shards=meta["output_shard_count"],
        num_bytes=meta["output_bytes"],
        reused=reused,
    )


def _read_manifest(csv_path: str, image_path: str) -> dict[str, Any]:
    """Return ``manifest.json`` of the lists.

    Raises:
        TicError: there is none, it is of something else, or a folder is missing.
    """
    for path, content in ((csv_path, "lists: run create_splits.py first"), (image_path, "images")):
        if is_remote(path):
            raise TicError(f"{path} is not local; lists and images are read from a local disk")
        if not Path(path).is_dir():
            raise TicError(f"{path} is not a folder of {content}")
    path = Path(csv_path) / MANIFEST
    if not path.exists():
        raise TicError(f"{csv_path} has no {MANIFEST}: run create_splits.py first")
    manifest = read_json_object(path)
    kinds = {"benchmark": str, "dataset": str, "files": dict}
    if not all(isinstance({"files": {}, **manifest}.get(name), kind) for name, kind in kinds.items()):
        raise TicError(f"{path} is not what create_splits.py writes")
    return manifest


def _output_root(output_path: str, image_path: str, manifest: dict[str, Any]) -> str:
    """Return the benchmark's folder; raise TicError if splits would lie among the images, or images in a split."""
    if is_remote(output_path):
        raise TicError(f"{output_path} is not local; write to a local folder and copy it there")
    root, images = Path(output_path) / get_benchmark(manifest["benchmark"]).root, Path(image_path).resolve()
    if root.resolve().is_relative_to(images) or images.is_relative_to(root.resolve()):
        raise TicError(f"{output_path} and the images in {image_path} are in one another; give another output")
    return str(root)


# --- The lists ---


def scan_list(
    csv_path: str, image_path: str, root: str, manifest: dict[str, Any], shard_size: int, name: tuple[str, str]
) -> Output:
    """Read the list of a (split, step).

    Raises:
        TicError: it is missing, damaged, or not as create_splits.py made it.
    """
    split, step = name
    path, words, starts, last, unsorted = f"{csv_path}/{list_name(split, step)}", bytearray(), [], "", ""
    digest = file_digest(path)
    if digest != manifest.get("files", {}).get(list_name(split, step), digest):
        raise TicError(f"{path} is not as create_splits.py made it; run that again with --overwrite")
    for number, (first, (key, *_)) in enumerate(read_rows(path)):
        uid = make_uid(f"{manifest['dataset']}/{key}")
        if uid <= last and not unsorted:
            unsorted = f"{path} is not sorted by UID (the row of {key}); run create_splits.py with --overwrite"
        if number % shard_size == 0:
            starts.append(first)
        words += bytes.fromhex(uid)
        last = uid
    uids = np.empty(len(words) // 16, dtype=UID)
    uids["f0"], uids["f1"] = np.frombuffer(words, dtype=">u8").reshape(-1, 2).T
    return Output(
        name=list_name(split, step),
        path=f"{root}/{FOLDERS[split]}/{step}",
        starts=starts,
        uids=uids,
        unsorted=unsorted,
        arguments={"csv": path, "image_path": image_path, "list": digest, "shard_size": shard_size},
    )


# --- The shards ---


def _load_finished(output: Output) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a split that was finished from the same list, or None if it must be made."""
    try:
        unfinished = read_json_object(f"{output.path}/{JOURNAL}")
    except TicError:
        unfinished = None
    return folder.load_finished(output.path, output.arguments, compared=COMPARED, unfinished=unfinished)


def _begin(output: Output, overwrite: bool, stack: ExitStack) -> dict[int, dict[str, Any]]:
    """Lock a split's folder until ``stack`` ends, and clear it; return the stats of the shards that can stay."""
    stack.enter_context(lock_folder(Path(output.path)))
    done = {}
    for number in range(0 if overwrite else len(output.starts)):
        with suppress(TicError, FileNotFoundError):  # also of a machine that went off: the shard is made again
            stats = read_json_object(f"{output.path}/{STATS.format(number)}")
            same = all(stats.get(name) == output.arguments[name] for name in COMPARED)
            if same and os.path.getsize(f"{output.path}/{SHARD_FORMAT.format(number)}") == stats.get("bytes"):
                done[number] = stats
    write_json(f"{output.path}/{JOURNAL}", output.arguments)  # before any shard goes or comes
    folder.start(output.path, {form.format(number) for number in done for form in (SHARD_FORMAT, STATS)})
    return done


def _find_images(image_path: str, dataset: str, work: Path, run: Callable) -> Images:
    """Search the folder for zip archives, and write their index to the folder ``work``."""
    zips = find_zips(image_path)
    tables = list(run(partial(index_zip, dataset, zips), list(range(len(zips))), "read", "zip"))
    index = np.concatenate([np.empty(0, dtype=ZIP_MEMBER), *tables])
    np.save(f"{work}/index.npy", index[np.lexsort((index["f1"], index["f0"]))])  # stable: the first zip goes first
    return Images(folder=image_path, dataset=dataset, zips=zips, index=f"{work}/index.npy")


def make_shard(images: Images, job: Job, *, write: bool = True) -> dict[str, Any]:
    """Write a shard and then its stats, unless it has no sample; return these: samples, bytes, and what was dropped."""
    dropped: Counter[str] = Counter()
    samples = _samples(images, job, dropped)
    first = next(samples, None)
    samples = chain([first], samples) if first else samples
    stats = {name: job.arguments[name] for name in COMPARED}
    if not write or not first:
        return {"successes": sum(1 for _ in samples), "dropped": dict(dropped), "bytes": 0}
    path = f"{job.path}/{SHARD_FORMAT.format(job.number)}"
    count = write_shard(path, samples, sync=False)
    stats |= {"successes": count, "dropped": dict(sorted(dropped.items())), "bytes": os.path.getsize(path)}
    write_json(f"{job.path}/{STATS.format(job.number)}", stats, sync=False)
    return stats


def _samples(images: Images, job: Job, dropped: Counter[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a shard as ``write_shard`` takes them; count those that can't be used."""
    rows = [row for _, row in islice(read_rows(job.arguments["csv"], job.start), job.arguments["shard_size"])]
    uids = [make_uid(f"{images.dataset}/{key}") for key, *_ in rows]
    index = np.load(images.index, mmap_mode="r")
    members, counts = find_uids(index, parse_uids(uids))
    for (key, image, caption, date), uid, member, in_zip in zip(rows, uids, members, counts, strict=True):
        if not caption.strip():
            dropped[NO_CAPTION] += 1
            continue
        try:
            data = read_file(images.folder, image)
            if data is None and in_zip:
                data = read_zipped(images.zips[index[member]["zip"]], index[member])
            if data is None:
                raise UnusableImage("no image file")
            suffix = detect_format(data)
        except UnusableImage as reason:
            dropped[str(reason)] += 1
            continue
        sha256 = hashlib.sha256(data).hexdigest()
        record = {"uid": uid, "caption": caption, "key": key, "date": date, "dataset": images.dataset, "sha256": sha256}
        yield f"{uid}-0", {suffix: data, "json": json.dumps(record).encode(), "txt": caption.encode()}


def _finish(output: Output, stats: dict[int, dict[str, Any]], dry_run: bool) -> dict[str, Any]:
    """Write the tables of a split with the ``stats`` of its shards; return ``meta.json``.

    Raises:
        TicError: a shard other than the last one is empty, so that numbers would be missing.
    """
    counts = [stats[number]["successes"] for number in range(len(stats))]
    if any(counts) and 0 in counts[:-1]:
        raise TicError(
            f"{output.path}: none of the images of shard {counts.index(0)} can be used; are these the images? "
            "If they are, a larger --shard-size with --overwrite leaves no shard empty"
        )
    dropped = sum((Counter(entry["dropped"]) for entry in stats.values()), Counter())
    if len(output.uids) != sum(counts) + dropped.total():
        raise TicError(f"{output.path}: {len(output.uids)} rows, but {sum(counts)} kept, {dropped.total()} dropped")
    sizes = {SHARD_FORMAT.format(number): count for number, count in enumerate(counts) if count}
    meta = {
        "output_shard_count": len(sizes),
        "output_count": sum(counts),
        "output_bytes": sum(entry["bytes"] for entry in stats.values()),
        "output_shard_format": SHARD_FORMAT,
        "subset_count": len(output.uids),
        "processed_count": len(output.uids),
        "kept_count": sum(counts),
        "dropped": dict(sorted(dropped.items())),
        "arguments": output.arguments,
    }
    if not dry_run:
        folder.finish(output.path, meta, sizes, output.uids)
        remove(f"{output.path}/{JOURNAL}")
        if output.name.startswith("test") and sizes:
            list(clip_benchmark.convert(output.path, "retrieval"))
    return meta
