"""Pack lists of dated images (CSV) and a folder of images into shards in the format of every other split.

Shard n has the rows from n * ``shard_size`` on, without those whose images are missing. Memory holds 16 bytes per row
and 36 per image in an archive.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.cli import flag, progress
from tic_clip.data import clip_benchmark, folder
from tic_clip.data import images as image_files
from tic_clip.data.folder import SHARD_FORMAT, SplitSummary
from tic_clip.data.images import ZIP_MEMBER, UnusableImage
from tic_clip.data.lists import FOLDERS, MANIFEST, SPLITS, file_digest, list_name, list_names, read_rows
from tic_clip.data.reshard import reshard
from tic_clip.data.split import STATS
from tic_clip.data.tar import open_shard, samples, write_shard
from tic_clip.data.uids import CLASS_ROW, UID, find_uids, make_uid, parse_uids, save_uids
from tic_clip.parallel import make_pool, map_in_pool, map_ordered
from tic_clip.runs import find_benchmark, keep_benchmark
from tic_clip.storage import local_folder, lock_folder, read_json, remove, temporary_folder, write_json, write_text

TEMPLATES = ("a photo of {c}.", "{c}")
JOURNAL = ".pack.json"  # the arguments of the run that is filling a folder
COMPARED = ("list", "shard_size")  # what a split depends on, also in the stats of each shard


class Output(NamedTuple):
    """A split and its list: the first byte of each shard's rows, and the UIDs (N,)."""

    name: str
    path: str
    dataset: str
    starts: list[int]
    uids: np.ndarray
    arguments: dict[str, Any]


class Images(NamedTuple):
    """Where images are: archives and the .npy of their members, under their paths if ``is_exact``, else their keys.

    ``seen``: a .npy of the digests of the training images, which test sets must not have.
    """

    archives: list[str]
    index: str
    is_exact: bool
    seen: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How to pack: flags of create_tars.py."""

    num_workers: int = flag("processes", 1, short="-j")
    shard_size: int = flag("rows of a list per shard", 10_000)
    max_per_class: int = flag("most images per class and period", 50)
    templates: Sequence[str] = TEMPLATES
    overwrite: bool = flag("make all splits again, with new images", False)

    def __post_init__(self) -> None:
        if (least := min(self.shard_size, self.max_per_class)) < 1:
            raise TicError(f"--shard-size and --max-per-class must be at least 1, not {least}")
        for template in self.templates:
            if re.findall(r"{[^}]*}?|}", template) != ["{c}"]:
                raise TicError(f"--template {template!r} must have {{c}} once, for the name of a class")


def create_tars(
    csv_path: str, image_path: str, output_path: str, options: PackOptions
) -> tuple[list[SplitSummary], Counter[str]]:
    """Write ``train/{step}/``, ``eval/retrieval/{step}/`` and, of lists with labels, ``eval/labels/{step}/``.

    Returns the splits, and the number of dropped rows by reason.
    """
    manifest = _read_manifest(csv_path, image_path)
    benchmark = find_benchmark(csv_path, manifest["benchmark"])
    root = local_folder(output_path) / benchmark.root
    arguments = {"image_path": image_path, "shard_size": options.shard_size}
    with ExitStack() as stack:
        pool = stack.enter_context(make_pool(options.num_workers, fork=True))  # before anything starts a thread

        def run(function: Callable, jobs: list, description: str, unit: str) -> Iterator:
            results = map_in_pool(pool, function, jobs, 4 * options.num_workers)
            return progress(results, description, len(jobs), unit)

        scan = partial(scan_list, csv_path, str(root), manifest, arguments)
        outputs = list(run(scan, list(list_names(benchmark).values()), "read", "list"))
        metas = {output.path: None if options.overwrite else _load_finished(output) for output in outputs}
        todo = [output for output in outputs if metas[output.path] is None]
        shards = {output.path: _begin(output, options.overwrite, stack) for output in todo}
        if todo:
            is_own, archives = bool(benchmark.text), image_files.find_archives(image_path, str(root))
            index = partial(image_files.index_archive, manifest["dataset"], archives, is_own)
            tables = run(index, list(range(len(archives))), "read", "archive")
            _pack(Images(archives, _save_sorted(tables, ZIP_MEMBER, stack), is_own), outputs, shards, stack, run)
        metas |= {output.path: _finish(output, shards[output.path]) for output in todo}
        keep_benchmark(root, benchmark)
    splits = [folder.summarize(o.name, o.path, [metas[o.path]], o.path not in shards) for o in outputs]
    if manifest.get("classes"):
        splits += write_label_splits(root, benchmark.periods, list(manifest["classes"]), options)
    return splits, sum((Counter(meta["dropped"]) for meta in metas.values()), Counter())


def _read_manifest(csv_path: str, image_path: str) -> dict[str, Any]:
    """Return the manifest of the lists; raise a TicError if it or the folder of images is missing."""
    if not Path(image_path).is_dir():
        raise TicError(f"{image_path} is not a folder of images")
    manifest = read_json(f"{csv_path}/{MANIFEST}") if (Path(csv_path) / MANIFEST).exists() else {}
    if not {"benchmark", "dataset", "files"} <= manifest.keys():
        raise TicError(f"{csv_path} has no {MANIFEST} of lists: run create_splits.py first")
    return manifest


def _pack(images: Images, outputs: list[Output], shards: dict[str, dict], stack: ExitStack, run: Callable) -> None:
    """Make the missing ``shards`` of each output's path, the test sets last."""
    for split in SPLITS:
        todo = [output for output in outputs if output.path in shards and output.name.startswith(split)]
        pairs = [(output, number) for output in todo for number in range(len(output.starts))]
        jobs = [(output._replace(uids=None), number) for output, number in pairs if number not in shards[output.path]]
        if images.is_exact and split == "test" and jobs:
            folders = [Path(output.path) for output in outputs if output.name.startswith("train")]
            tars = [str(tar) for folder in folders for tar in folder.glob("*.tar")]
            images = images._replace(seen=_save_sorted(run(read_digests, tars, "compare", "shard"), UID, stack))
        made = run(partial(make_shard, images), jobs, "pack", "shard")
        for (output, number), stats in zip(jobs, made, strict=True):
            shards[output.path][number] = stats
    found = any(stats["successes"] for made in shards.values() for stats in made.values())
    if len(shards) == len(outputs) and not found:
        folder = outputs[0].arguments["image_path"]
        image = next((row[1] for output in outputs for _, row in read_rows(output.arguments["csv"])), "(none)")
        raise TicError(f"{folder} has none of the images of the lists, such as {image}, as a file or in a zip or tar")


def scan_list(csv_path: str, root: str, manifest: dict, arguments: dict, name: tuple[str, str]) -> Output:
    """Read the list of a (split, step); raise a TicError if it has changed since create_splits.py."""
    split, step = name
    file_name = list_name(split, step)
    path, data, starts = f"{csv_path}/{file_name}", bytearray(), []
    digest = file_digest(path)
    if digest != manifest.get("files", {}).get(file_name):
        raise TicError(f"{path} is not as create_splits.py made it; run that again with --overwrite")
    for number, (first, (key, *_)) in enumerate(read_rows(path)):
        if number % arguments["shard_size"] == 0:
            starts.append(first)
        data += bytes.fromhex(make_uid(f"{manifest['dataset']}/{key}"))
    uids = np.frombuffer(data, ">u8,>u8").astype(UID)
    arguments = {"csv": path, "list": digest, **arguments}
    return Output(file_name, f"{root}/{FOLDERS[split]}/{step}", manifest["dataset"], starts, uids, arguments)


def _load_finished(output: Output) -> dict[str, Any] | None:
    """Return the ``meta.json`` of a split that was finished from the same list, or None."""
    journal = Path(output.path) / JOURNAL
    unfinished = read_json(journal) if journal.exists() else None
    return folder.load_finished(output.path, output.arguments, compared=COMPARED, unfinished=unfinished)


def _begin(output: Output, overwrite: bool, stack: ExitStack) -> dict[int, dict[str, Any]]:
    """Lock a split's folder until ``stack`` ends, clear it, and return the stats of the shards to keep."""
    done = {}
    stack.enter_context(lock_folder(Path(output.path)))
    for number in range(0 if overwrite else len(output.starts)):
        with suppress(TicError, FileNotFoundError):  # also of a machine that went off: the shard is made again
            stats = read_json(f"{output.path}/{STATS.format(number)}")
            same = all(stats.get(name) == output.arguments[name] for name in COMPARED)
            if same and os.path.getsize(f"{output.path}/{SHARD_FORMAT.format(number)}") == stats.get("bytes"):
                done[number] = stats
    write_json(f"{output.path}/{JOURNAL}", output.arguments)  # before any shard goes or comes
    folder.start(output.path, {form.format(number) for number in done for form in (SHARD_FORMAT, STATS)})
    return done


def _save_sorted(tables: Iterable[np.ndarray], dtype: np.dtype, stack: ExitStack) -> str:
    """Write the rows of tables to a .npy that lasts until ``stack`` ends, stably sorted by UID."""
    rows = np.concatenate([np.empty(0, dtype), *tables])
    path = f"{stack.enter_context(temporary_folder('tic-pack-'))}/index.npy"
    np.save(path, rows[np.lexsort((rows["f1"], rows["f0"]))])
    return path


def read_digests(tar: str) -> np.ndarray:
    """Return the first 128 bits of the SHA-256 of each image of a packed shard, as ``UID``."""
    return parse_uids(record["sha256"][:32] for record in read_records(tar))


def make_shard(images: Images, job: tuple[Output, int]) -> dict[str, Any]:
    """Write a shard and its stats, unless it has no sample; return the stats: samples, bytes, dropped by reason."""
    (output, number), dropped = job, Counter()
    path = f"{output.path}/{SHARD_FORMAT.format(number)}"
    count = write_shard(path, _samples(images, output, number, dropped), sync=False)
    stats = {name: output.arguments[name] for name in COMPARED}
    stats |= {"successes": count, "dropped": dict(sorted(dropped.items())), "bytes": os.path.getsize(path)}
    if not count:
        os.unlink(path)
        return {**stats, "bytes": 0}
    write_json(f"{output.path}/{STATS.format(number)}", stats, sync=False)
    return stats


def _samples(
    images: Images, output: Output, number: int, dropped: Counter[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a shard for ``write_shard``; count unusable ones by reason."""
    folder, csv, shard_size = (output.arguments[name] for name in ("image_path", "csv", "shard_size"))
    rows = [row for _, row in islice(read_rows(csv, output.starts[number]), shard_size)]
    index = np.load(images.index, mmap_mode="r")
    seen = np.load(images.seen, mmap_mode="r") if images.seen else index[:0]
    names = [row[0] for row in rows]
    if images.is_exact:
        names = [image_files.strip_suffix(os.path.normpath(row[1]).lstrip("/")) for row in rows]
    members, counts = find_uids(index, parse_uids(make_uid(f"{output.dataset}/{name}") for name in names))
    for (key, image, caption, date, *label), member, in_archive in zip(rows, members, counts, strict=True):
        data = image_files.read_file(folder, image, is_exact=images.is_exact)
        try:
            if data is None and in_archive:
                data = image_files.read_member(images.archives[index[member]["zip"]], index[member])
            if data is None:
                raise UnusableImage("no image file")
            suffix, sha256 = image_files.detect_format(data), hashlib.sha256(data).hexdigest()
            if find_uids(seen, parse_uids([sha256[:32]]))[1][0]:
                raise UnusableImage("test image that is also in train")
        except UnusableImage as reason:
            dropped[str(reason)] += 1
            continue
        uid = make_uid(f"{output.dataset}/{key}")
        record = {"uid": uid, "caption": caption, "key": key, "date": date, "dataset": output.dataset, "sha256": sha256}
        record |= {"label": label[0]} if label else {}
        yield f"{uid}-0", {suffix: data, "json": json.dumps(record).encode(), "txt": caption.encode()}


def _finish(output: Output, stats: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Write the tables of a split with the ``stats`` of its shards; return ``meta.json``."""
    counts = [stats[number]["successes"] for number in range(len(stats))]
    if any(counts) and 0 in counts[:-1]:  # a number would be missing
        reason = f"{output.path}: none of the images of shard {counts.index(0)} can be used"
        raise TicError(f"{reason}; if these are the images, give a larger --shard-size and --overwrite")
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
    folder.finish(output.path, meta, sizes, output.uids)
    remove(f"{output.path}/{JOURNAL}")
    if output.name.startswith("test") and sizes:
        list(clip_benchmark.convert(output.path, "retrieval"))
    return meta


def read_records(tar: str) -> list[dict[str, Any]]:
    """Return the JSON of the samples of a shard, in order."""
    with open_shard(tar) as shard:
        return [msgspec.json.decode(sample.read(shard, "json")) for sample in samples(shard)]


def write_label_splits(
    root: Path, periods: Sequence[str], classes: list[str], options: PackOptions
) -> list[SplitSummary]:
    """Write ``eval/labels/{period}/`` with the first images of each class, by UID, of ``eval/retrieval/{period}/``.

    reshard makes them from ``uids/eval/labels/`` and ``classes.npy``.
    """
    ids, uids, rows, notes = {name: i for i, name in enumerate(classes)}, root / "uids/eval/labels", [], {}
    for period in periods:
        tars = sorted(map(str, (root / "eval/retrieval" / period).glob("*.tar")))
        chosen, counts = [], Counter()
        for record in (record for found in map_ordered(read_records, tars, options.num_workers) for record in found):
            counts[record["label"]] += 1
            if record["label"] and counts[record["label"]] <= options.max_per_class:
                chosen.append((record["uid"], ids[record["label"]]))
        found = parse_uids(uid for uid, _ in chosen)
        save_uids(uids / f"{period}.npy", found)
        rows += [(*uid, class_id) for uid, (_, class_id) in zip(found.tolist(), chosen, strict=True)]
        notes[period] = f"{len({class_id for _, class_id in chosen}):,} of {len(classes):,} classes"
    save_uids(root / "classes.npy", np.array(rows, CLASS_ROW))
    out = root / "eval/labels"
    write_text(out / clip_benchmark.CLASSNAMES, "\n".join(classes) + "\n")
    write_text(out / clip_benchmark.TEMPLATES, "\n".join(options.templates) + "\n")
    flags = {"classes": str(root / "classes.npy"), "num_workers": options.num_workers, "overwrite": True}
    splits = reshard(str(root / "eval/retrieval"), str(out), str(uids), **flags)
    list(clip_benchmark.convert(str(out), "classification"))
    return [replace(split, note=notes[split.name]) for split in splits]
