"""Packing images and their lists into shards, against GNU tar of the same files, in one run.

    .venv/bin/python bench/create_tars.py                        # makes the images, prints a table of images a second

Each round runs both contenders once, in turn; the table holds medians and the range. "warm": the images are in the page
cache; "cold": their pages are dropped before each run (POSIX_FADV_DONTNEED, no root needed; directories stay cached).
Writes of the run before are waited for. CPU is user + system of the process and its children.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from reshard import fresh, measure

from tic_clip.benchmarks import get_benchmark
from tic_clip.data.uids import make_uid

ROOT = Path(__file__).parents[1]
HEADER = ["key", "image", "caption", "date"]


def keys(number: int) -> Iterator[str]:
    """The keys of so many images."""
    return (hashlib.md5(b"%d" % i).hexdigest() for i in range(number))


def path_of(key: str) -> str:
    """Where an image lies: 256 folders of 16, as many images in each as a folder of the whole has."""
    return f"{key[:2]}/{key[2]}/{key}.jpg"


def make_inputs(folder: Path, number: int, image_bytes: int) -> None:
    """``folder/images`` and ``folder/lists``, as create_splits.py writes them: a quarter of the images in each step."""
    rng = np.random.default_rng(0)
    block = rng.bytes(2 * image_bytes)
    for key in keys(number):
        path = folder / "images" / path_of(key)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff\xd8\xff" + key.encode() + block[: int(image_bytes * rng.uniform(0.5, 1.5))])
    steps, files = [step.name for step in get_benchmark("yfcc15m").steps], {}
    (folder / "lists").mkdir(exist_ok=True)
    for kind in ("train", "test"):
        for step in steps:
            rows = islice(keys(number), steps.index(step), None, len(steps)) if kind == "train" else ()
            rows = sorted(rows, key=lambda key: make_uid(f"yfcc15m/{key}"))
            path = folder / f"lists/{kind}_batch_{step}.csv"
            with open(path, "w", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow(HEADER)
                table.writerows((key, path_of(key), "A title. A text. a,tag", "2007-06-01T12:00:00Z") for key in rows)
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {"benchmark": "yfcc15m", "dataset": "yfcc15m", "files": files}
    (folder / "lists/manifest.json").write_text(json.dumps(manifest))


def commands(folder: Path, jobs: int) -> dict[str, list[str]]:
    """The contenders; their output is an empty folder."""
    out = fresh(folder / "out")
    script = str(ROOT / "dataset_creation/create_tars.py")
    ours = ["--csv-path", f"{folder}/lists", "--image-path", f"{folder}/images", "--output-path", out, "-j", str(jobs)]
    return {
        "tar cf": ["tar", "cf", f"{out}/all.tar", "-C", str(folder), "images"],
        "ours": [sys.executable, script, *ours],
    }


def settle(folder: Path, number: int, cold: bool) -> None:
    """Wait for writes, and have the images in the page cache or out of it."""
    os.sync()
    for key in keys(number):
        with open(folder / "images" / path_of(key), "rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                file.read()


def main() -> None:
    """Make the inputs, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "data/bench_images"
    parser.add_argument(
        "--dir", type=Path, default=default, help="folder of the images, kept (default: data/bench_images)"
    )
    parser.add_argument("--images", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--image-bytes", type=int, default=27_000, help="mean bytes of one (default: 27000)")
    parser.add_argument("-j", "--num-workers", type=int, default=2, help="our processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: 5)")
    args = parser.parse_args()
    folder, found = args.dir.resolve(), {}
    make_inputs(folder, args.images, args.image_bytes)
    for state in "warm", "cold":
        for _ in range(args.rounds):
            for name in ("tar cf", "ours"):
                settle(folder, args.images, state == "cold")
                found.setdefault((state, name), []).append(measure([commands(folder, args.num_workers)[name]]))
    print(
        f"| cache | contender (-j {args.num_workers}) | seconds: median (range) | images/s to tar | CPU µs an image |"
    )
    print("| --- | --- | ---: | ---: | ---: |")
    for (state, name), runs in found.items():
        seconds, cpu = zip(*runs, strict=True)
        middle = statistics.median(seconds)
        ratio = statistics.median(run[0] for run in found[state, "tar cf"]) / middle
        spread = f"{middle:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
        print(f"| {state} | {name} | {spread} | {ratio:.2f} | {1e6 * statistics.median(cpu) / args.images:.0f} |")
    shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
