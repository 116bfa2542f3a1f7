"""Evaluation splits as clip_benchmark reads them: ``test/{0,1,...}.tar``, links to the shards of all parts in order.

    python -m tic_clip.data.clip_benchmark data/tic/datacomp/yearly/eval/retrieval retrieval

Our own readers leave ``test/`` out, so that each shard counts once.
"""

import os
import runpy
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from tic_clip import TicError
from tic_clip.cli import Parser, run_main
from tic_clip.data.evalsets import package_file
from tic_clip.data.split import CLIP_BENCHMARK_DIR, SIZES, EmptySplitError, sizes_if_known
from tic_clip.evaldata import CLASSNAMES, TEMPLATES
from tic_clip.storage import is_remote, write_text

PARTS = f"{'[0-9]' * 5}/"
"""The folders that reshard makes of a split with --parts."""


def imagenet_texts() -> dict[str, list[str]]:
    """OpenCLIP's names of ImageNet's classes and its prompt templates, as the lines of clip_benchmark's two files."""
    data = runpy.run_path(str(package_file("open_clip", "zero_shot_metadata.py")))
    templates = [template("{c}") for template in data["OPENAI_IMAGENET_TEMPLATES"]]
    return {CLASSNAMES: list(data["IMAGENET_CLASSNAMES"]), TEMPLATES: templates}


def convert(path: str, kind: str) -> Iterator[tuple[Path, int]]:
    """Make an evaluation split, or each split in a folder of them, readable for clip_benchmark.

    Adds ``dataset_type.txt``, for classes ``classnames.txt`` and ``zeroshot_classification_templates.txt`` (those of
    the folder above, or ImageNet's), links ``test/{0,1,...}.tar`` and, last, ``test/nshards.txt``; changes nothing that
    is there. Yields (split, number of shards); nothing is added to a split without a sample.

    Raises:
        TicError: there is no split, or one that is not finished, or a part of one, or something else is where a link
            must be, or it is of the other kind.
    """
    if is_remote(path):
        raise TicError(f"{path} is not local; clip_benchmark reads links, which a cloud does not have")
    folder = Path(path)
    inside = (
        one for one in sorted(folder.glob("*/")) if one.name != CLIP_BENCHMARK_DIR and not one.name.startswith(".")
    )
    splits = [folder] if _is_split(folder) else list(filter(_is_split, inside))
    if not splits:
        raise TicError(
            f"{path} holds no .tar file, and neither does a folder in it: run dataset_creation/reshard.py first"
        )
    for split in splits:
        yield split, _convert_split(split, kind)


def _is_split(folder: Path) -> bool:
    """Whether a folder holds shards, or a table of them, itself or in parts as reshard names them."""
    return any(any(folder.glob(f"{part}{name}")) for part in ("", PARTS) for name in ("*.tar", SIZES))


def _convert_split(split: Path, kind: str) -> int:
    if fnmatch(f"{split.name}/", PARTS):
        raise TicError(f"{split} is a part of a split; give the folder that all parts lie in")
    try:
        tars = list(sizes_if_known(split))
    except EmptySplitError:
        return 0
    _check_kind(Path(tars[0]), kind)
    if _line(split / "dataset_type.txt", kind) != kind:
        raise TicError(f"{split}/dataset_type.txt says it is not for {kind}; delete it if that is wrong")
    if kind == "classification":
        for name in (CLASSNAMES, TEMPLATES):
            _add_text(split, name)
    (split / CLIP_BENCHMARK_DIR).mkdir(exist_ok=True)
    for number, tar in enumerate(tars):
        _symlink(f"../{Path(tar).relative_to(split)}", split / f"{CLIP_BENCHMARK_DIR}/{number}.tar")
    for link in (split / CLIP_BENCHMARK_DIR).glob("[0-9]*.tar"):
        if link.is_symlink() and link.stem.isdecimal() and int(link.stem) >= len(tars):
            link.unlink()  # of a split that had more shards
    if _line(split / CLIP_BENCHMARK_DIR / "nshards.txt", str(len(tars))) != str(len(tars)):
        write_text(split / CLIP_BENCHMARK_DIR / "nshards.txt", f"{len(tars)}\n")
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
    parser.add_argument("kind", choices=("retrieval", "classification"), help="what it is for")
    args = parser.parse_args()
    for split, count in convert(args.dir, args.kind):
        print(f"{split}: {count} shards for clip_benchmark in test/" if count else f"{split}: no sample, so no test/")


if __name__ == "__main__":
    run_main(main)
