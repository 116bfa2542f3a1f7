"""The classes of a table with a column of labels, as splits for classification."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tic_clip import TicError
from tic_clip.data import clip_benchmark
from tic_clip.data.folder import SplitSummary
from tic_clip.data.reshard import reshard
from tic_clip.data.tar import open_shard, samples
from tic_clip.data.uids import CLASS_ROW, parse_uids, save_uids
from tic_clip.parallel import map_ordered
from tic_clip.storage import write_text

TEMPLATES = ("a photo of {c}.", "{c}")


def check_templates(templates: Sequence[str]) -> None:
    """Raise a TicError if a template of prompts has another field than {c}, the name of a class, or not that."""
    for template in templates:
        if re.findall(r"{[^}]*}?|}", template) != ["{c}"]:
            raise TicError(f"--template {template!r} must have {{c}} once, for the name of a class")


def read_records(tar: str) -> list[dict[str, Any]]:
    """Return the JSON of the samples of a shard of ours, in its order."""
    with open_shard(tar) as shard:
        return [msgspec.json.decode(sample.read(shard, "json")) for sample in samples(shard)]


def write_label_splits(
    root: Path, periods: Sequence[str], classes: list[str], max_per_class: int, templates: Sequence[str], workers: int
) -> list[SplitSummary]:
    """Write ``eval/labels/{period}/`` of the images of ``eval/retrieval/``: the first of each class, by their UIDs.

    Their UIDs are in ``uids/eval/labels/{period}.npy``, the classes in ``classes.npy``: what reshard reads. Splits of
    other classes or images, as before a year was added, are replaced.
    """
    ids, uids, rows, notes = {name: i for i, name in enumerate(classes)}, root / "uids/eval/labels", [], {}
    for period in periods:
        tars = sorted(map(str, (root / "eval/retrieval" / period).glob("*.tar")))
        chosen, counts = [], Counter()
        for record in (record for found in map_ordered(read_records, tars, workers) for record in found):
            counts[record["label"]] += 1
            if record["label"] and counts[record["label"]] <= max_per_class:
                chosen.append((record["uid"], ids[record["label"]]))
        found = parse_uids(uid for uid, _ in chosen)
        save_uids(uids / f"{period}.npy", found)
        rows += [(*uid, class_id) for uid, (_, class_id) in zip(found.tolist(), chosen, strict=True)]
        notes[period] = f"{len({class_id for _, class_id in chosen}):,} of {len(classes):,} classes"
    save_uids(root / "classes.npy", np.array(rows, CLASS_ROW))
    out = root / "eval/labels"
    write_text(out / clip_benchmark.CLASSNAMES, "\n".join(classes) + "\n")
    write_text(out / clip_benchmark.TEMPLATES, "\n".join(templates) + "\n")
    flags = {"classes": str(root / "classes.npy"), "num_workers": workers, "overwrite": True}
    splits = reshard(str(root / "eval/retrieval"), str(out), str(uids), **flags)
    list(clip_benchmark.convert(str(out), "classification"))
    return [replace(split, note=notes[split.name]) for split in splits]
