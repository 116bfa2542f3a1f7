"""Make evaluation splits readable for clip_benchmark: ``test/{0,1,...}.tar`` link to the shards of all parts."""

import os
import runpy
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from tic_clip import TicError, package_file
from tic_clip.data.split import CLIP_BENCHMARK_DIR, SIZES, sizes_if_known
from tic_clip.data.tar import open_shard, samples
from tic_clip.storage import local_folder, write_text

CLASSNAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
PARTS = "[0-9]" * 5  # the folders that reshard makes of a split with --parts


def imagenet_texts() -> dict[str, list[str]]:
    """Return OpenCLIP's ImageNet class names and prompt templates in clip_benchmark's format."""
    data = runpy.run_path(str(package_file("open_clip", "zero_shot_metadata.py")))
    templates = [template("{c}") for template in data["OPENAI_IMAGENET_TEMPLATES"]]
    return {CLASSNAMES: list(data["IMAGENET_CLASSNAMES"]), TEMPLATES: templates}


def convert(path: str, kind: str) -> Iterator[tuple[Path, int]]:
    """Make a split, or each split in a folder of them, readable for clip_benchmark; yield (split, number of shards).

    ``test/nshards.txt`` comes last; existing files stay. Nothing is added to a split without a sample.
    """
    folder = local_folder(path)
    inside = [entry for entry in sorted(folder.glob("[!.]*/")) if entry.name != CLIP_BENCHMARK_DIR]
    splits = [folder] if _is_split(folder) else list(filter(_is_split, inside))
    if not splits:
        raise TicError(f"{path} holds no .tar file, nor does a folder in it: run dataset_creation/reshard.py first")
    for split in splits:
        yield split, _convert_split(split, kind)


def _is_split(folder: Path) -> bool:
    """Return whether a folder holds shards or a ``sizes.json``, itself or in parts."""
    return any(any(folder.glob(f"{part}{name}")) for part in ("", f"{PARTS}/") for name in ("*.tar", SIZES))


def _convert_split(split: Path, kind: str) -> int:
    if fnmatch(split.name, PARTS):
        raise TicError(f"{split} is a part of a split; give the folder that holds all parts")
    tars = list(sizes_if_known(split))
    if not tars:
        return 0
    suffix = {"retrieval": "txt", "classification": "cls"}[kind]
    with open_shard(tars[0]) as shard:
        sample = next(iter(samples(shard)), None)
        if sample is None or suffix not in sample.members:
            raise TicError(f"{tars[0]} is not for {kind}: its first sample has no {suffix}")
    written = split / "dataset_type.txt"
    if not written.exists():
        write_text(written, f"{kind}\n")
    if written.read_text().strip() != kind:
        raise TicError(f"{written} says it is not for {kind}; delete it if that is wrong")
    for name in (CLASSNAMES, TEMPLATES) if kind == "classification" else ():
        if (split.parent / name).is_file() and not (split / name).exists():
            _symlink(f"../{name}", split / name)
        elif not (split / name).exists():
            write_text(split / name, "\n".join(imagenet_texts()[name]) + "\n")
    links = {f"{number}.tar": f"../{Path(tar).relative_to(split)}" for number, tar in enumerate(tars)}
    test = split / CLIP_BENCHMARK_DIR
    test.mkdir(exist_ok=True)
    for name, target in links.items():
        _symlink(target, test / name)
    for link in test.glob("[0-9]*.tar"):
        if link.is_symlink() and link.name not in links:
            link.unlink()  # of a split that had more shards
    nshards = test / "nshards.txt"
    if not nshards.exists() or nshards.read_text().strip() != str(len(tars)):
        write_text(nshards, f"{len(tars)}\n")
    return len(tars)


def _symlink(target: str, link: Path) -> None:
    """Make ``link`` a relative link to ``target``, replacing another link; an OSError if a file is there."""
    if link.is_symlink() and os.readlink(link) != target:
        link.unlink()
    if not link.is_symlink():
        link.symlink_to(target)
