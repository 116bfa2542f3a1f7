"""Pack lists of dated images (CSV) and a folder of images into shards in the format of every other split.

The lists are in the order of UIDs, which are hashes: shuffled, and the same on every machine. Shard n has the rows from
n * ``shard_size`` on, fewer where images are missing. Memory holds 16 bytes a row, and 36 an image in a zip archive.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import progress
from tic_clip.data import clip_benchmark, folder
from tic_clip.data.folder import SHARD_FORMAT
from tic_clip.data.images import ZIP_MEMBER, UnusableImage, detect_format, find_zips, index_zip, read_file, read_zipped
from tic_clip.data.pairs import MANIFEST, NO_CAPTION, file_digest, list_name, read_rows
from tic_clip.data.reshard import SplitSummary
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


class Output(NamedTuple):
    """A split and the list that it is made of: the first byte of each shard's rows, and the UIDs (N,)."""

    name: str
    path: str
    starts: list[int]
    uids: np.ndarray
    is_sorted: bool
    arguments: dict[str, Any]


class Job(NamedTuple):
    """A shard to write: the rows of the list in ``arguments`` from byte ``start`` on."""

    path: str
    number: int
    start: int
    arguments: dict[str, Any]


class Images(NamedTuple):
    """Where images are: files in ``folder``, or members of ``zips`` by ``index``, a sorted .npy of ``ZIP_MEMBER``."""

    folder: str
    dataset: str
    zips: list[str]
    index: str


def create_tars(
    csv_path: str,
    image_path: str,
    output_path: str,
    *,
    num_workers: int = 1,
    shard_size: int = 10_000,
    overwrite: bool = False,
    dry_run: bool = False,
) -> tuple[list[SplitSummary], Counter[str]]:
    """Write ``train/{step}/`` and ``eval/retrieval/{step}/`` of the lists' benchmark below ``output_path``.

    Returns the splits, and the rows that are in none of them, by reason. The bytes do not depend on ``num_workers``;
    ``dry_run`` reads all images and writes nothing. Raises a ``TicError`` if lists or images are missing or damaged, a
    split was made with other arguments, or another process is writing it.
    """
    if shard_size < 1:
        raise TicError("the shard size must be at least 1")
    if is_remote(output_path):
        raise TicError(f"{output_path} is not local; write to a local folder and copy it there")
    csv_path, image_path = str(Path(csv_path)), str(Path(image_path))
    manifest = _read_manifest(csv_path, image_path)
    benchmark = get_benchmark(manifest["benchmark"])
    names = [(split, step.name) for step in benchmark.steps for split in FOLDERS]
    arguments = {"image_path": image_path, "shard_size": shard_size}
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(num_workers, fork=True))  # before anything starts a thread
        work = stack.enter_context(temporary_folder("tic-pack-"))

        def run(function: Callable, jobs: list, description: str, unit: str) -> Iterator:
            return progress(map_in_pool(pool, function, jobs, 4 * num_workers), description, len(jobs), unit)

        scan = partial(scan_list, csv_path, f"{Path(output_path) / benchmark.root}", manifest, arguments)
        outputs = list(run(scan, names, "read", "list"))
        finished = {output.path: None if overwrite else _load_finished(output) for output in outputs}
        todo = [output for output in outputs if finished[output.path] is None]
        if unsorted := next((output for output in todo if not output.is_sorted), None):
            csv = unsorted.arguments["csv"]
            raise TicError(f"{csv} is not sorted by UID, or has a key twice; run create_splits.py with --overwrite")
        images = _find_images(image_path, manifest["dataset"], work, run) if todo else None
        made = {output.path: {} if dry_run else _begin(output, overwrite, stack) for output in todo}
        _make_shards(todo, made, partial(make_shard, images, dry_run), run)
        found = any(stats["successes"] for shards in made.values() for stats in shards.values())
        if len(todo) == len(outputs) and not found:
            image = next((row[1] for output in outputs for _, row in read_rows(output.arguments["csv"])), "(none)")
            raise TicError(f"{image_path} has none of the images of the lists, such as {image}, as a file or in a zip")
        metas = {**finished, **{output.path: _finish(output, made[output.path], dry_run) for output in todo}}
    splits = [_summarize(output, metas[output.path], output.path not in made) for output in outputs]
    return splits, sum((Counter(meta["dropped"]) for meta in metas.values()), Counter())


def _make_shards(outputs: list[Output], made: dict[str, dict[int, Any]], make: Callable, run: Callable) -> None:
    """Make the shards of which ``made`` has no stats, and add them there."""
    jobs = [
        Job(output.path, number, start, output.arguments)
        for output in outputs
        for number, start in enumerate(output.starts)
        if number not in made[output.path]
    ]
    for job, stats in zip(jobs, run(make, jobs, "pack", "shard"), strict=True):
        made[job.path][job.number] = stats


def _summarize(output: Output, meta: dict[str, Any], reused: bool) -> SplitSummary:
    count, shards, size = (meta[f"output_{name}"] for name in ("count", "shard_count", "bytes"))
    counts = {"wanted": len(output.uids), "num_samples": count, "num_shards": shards, "num_bytes": size}
    return SplitSummary(name=output.name, path=output.path, **counts, reused=reused)


def _read_manifest(csv_path: str, image_path: str) -> dict[str, Any]:
    """Return ``manifest.json`` of the lists; TicError if it is of something else, or a folder is missing."""
    for path, content in ((csv_path, "lists: run create_splits.py first"), (image_path, "images")):
        if not Path(path).is_dir():
            raise TicError(f"{path} is not a folder of {content}")
    path = Path(csv_path) / MANIFEST
    if not path.exists():
        raise TicError(f"{csv_path} has no {MANIFEST}: run create_splits.py first")
    manifest = read_json_object(path)
    if not manifest.keys() >= {"benchmark", "dataset"}:
        raise TicError(f"{path} is not what create_splits.py writes")
    return manifest


def scan_list(
    csv_path: str, root: str, manifest: dict[str, Any], arguments: dict[str, Any], name: tuple[str, str]
) -> Output:
    """Read the list of a (split, step); TicError if it is not as create_splits.py made it."""
    split, step = name
    path, words, starts, last, is_sorted = f"{csv_path}/{list_name(split, step)}", bytearray(), [], b"", True
    digest = file_digest(path)
    if digest != manifest.get("files", {}).get(list_name(split, step), digest):
        raise TicError(f"{path} is not as create_splits.py made it; run that again with --overwrite")
    for number, (first, (key, *_)) in enumerate(read_rows(path)):
        uid = bytes.fromhex(make_uid(f"{manifest['dataset']}/{key}"))
        if number % arguments["shard_size"] == 0:
            starts.append(first)
        is_sorted = is_sorted and last < uid
        words += uid
        last = uid
    uids = np.empty(len(words) // 16, dtype=UID)
    uids["f0"], uids["f1"] = np.frombuffer(words, dtype=">u8").reshape(-1, 2).T
    arguments = {"csv": path, "list": digest, **arguments}
    return Output(list_name(split, step), f"{root}/{FOLDERS[split]}/{step}", starts, uids, is_sorted, arguments)


def _load_finished(output: Output) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a split that was finished from the same list, or None if it must be made."""
    unfinished = None
    with suppress(TicError):
        unfinished = read_json_object(f"{output.path}/{JOURNAL}")
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
    return Images(image_path, dataset, zips, f"{work}/index.npy")


def make_shard(images: Images, dry_run: bool, job: Job) -> dict[str, Any]:
    """Write a shard and then its stats, unless it has no sample; return these: samples, bytes, and what was dropped."""
    dropped: Counter[str] = Counter()
    samples = _samples(images, job, dropped)
    first = next(samples, None)
    if dry_run or not first:
        return {"successes": sum(1 for _ in samples) + bool(first), "dropped": dict(dropped), "bytes": 0}
    path = f"{job.path}/{SHARD_FORMAT.format(job.number)}"
    count = write_shard(path, chain([first], samples), sync=False)
    stats = {name: job.arguments[name] for name in COMPARED}
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

    Raises a ``TicError`` if a shard other than the last one is empty, so that numbers would be missing.
    """
    counts = [stats[number]["successes"] for number in range(len(stats))]
    if any(counts) and 0 in counts[:-1]:
        raise TicError(
            f"{output.path}: none of the images of shard {counts.index(0)} can be used; are these the images? "
            "If they are, a larger --shard-size with --overwrite leaves no shard empty"
        )
    sizes = {SHARD_FORMAT.format(number): count for number, count in enumerate(counts) if count}
    meta = {
        "output_shard_count": len(sizes),
        "output_count": sum(counts),
        "output_bytes": sum(entry["bytes"] for entry in stats.values()),
        "output_shard_format": SHARD_FORMAT,
        "subset_count": len(output.uids),
        "processed_count": len(output.uids),
        "kept_count": sum(counts),
        "dropped": dict(sorted(sum((Counter(entry["dropped"]) for entry in stats.values()), Counter()).items())),
        "arguments": output.arguments,
    }
    if not dry_run:
        folder.finish(output.path, meta, sizes, output.uids)
        remove(f"{output.path}/{JOURNAL}")
        if output.name.startswith("test") and sizes:
            list(clip_benchmark.convert(output.path, "retrieval"))
    return meta
