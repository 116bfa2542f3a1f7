"""Seconds of a training iteration, patched against stock OpenCLIP, and from launch to the first batch, in one run.

    .venv/bin/python bench/train.py

Contenders, each in a process of its own, in turn, round after round: "stock", OpenCLIP as its wheel has it; "patched",
the one in open_clip/, with no flag of ours; "a step of ours", scripts/train.py with its plan, exact sampling and log.
The first two train ViT-Tiny-8-48 on OpenCLIP's synthetic data, the third on shards of noise. An iteration is the time
between two backward passes; the table holds the median over the iterations after the first ten, and over rounds the
median and the range. "first batch" is from the start of the process, all imports included, to the first backward pass.
"""

import argparse
import io
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from tic_clip.cli import Parser

ROOT = Path(__file__).parents[1]
CONTENDERS = ("stock", "patched", "a step of ours")
BATCH = 64


def make_split(folder: Path, count: int) -> None:
    """The first training split of TiC-Emoji, of noise."""
    from PIL import Image

    from tic_clip.data.tar import write_shard
    from tic_clip.storage import write_json

    rng, split = np.random.default_rng(0), folder / "tic/emoji/yearly/train/2014"
    content = []
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
        content.append((f"{i:032x}-0", {"png": file.getvalue(), "txt": f"picture {i}".encode()}))
    write_json(split / "sizes.json", {"00000000.tar": write_shard(split / "00000000.tar", content)})


def add_stock(folder: Path) -> None:
    """Let this process import OpenCLIP as it was before the patch, from ``folder/stock``."""
    git = [
        "git",
        "-C",
        str(ROOT / "open_clip"),
        "checkout-index",
        "--all",
        "--force",
        f"--prefix={folder.absolute()}/stock/",
    ]
    subprocess.run(git, check=True)
    sys.path.insert(0, str(folder.absolute() / "stock/src"))


def measure(contender: str, folder: Path, iterations: int, launched: float) -> dict[str, float]:
    """Seconds from ``launched`` (of time.time) to the first backward pass, and of an iteration."""
    if contender == "stock":
        add_stock(folder)
    import open_clip
    from training import main, train

    from tic_clip.macs import MODEL_CONFIGS

    times = []
    backward = train.backward

    def timed(loss: object, scaler: object) -> None:
        times.append(time.time())
        backward(loss, scaler)

    assert ("/stock/src" in main.__file__) == (contender == "stock")
    train.backward = timed
    out = str(folder / f"{contender}{launched}")
    if contender == "a step of ours":
        flags = ["--benchmark", "emoji", "--method", "cumulative", "--scale", "tic_tiny", "--step", "2014"]
        flags += ["--samples_per_step", str(iterations * BATCH), "--data_dir", str(folder), "--output_dir", out]
        sys.argv = ["train.py", *flags]
        with suppress(SystemExit):
            runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
        assert (Path(out) / "2014/done.json").exists()
    else:
        open_clip.add_model_config(MODEL_CONFIGS)
        flags = ["--model", "ViT-Tiny-8-48", "--dataset-type", "synthetic", "--train-num-samples", iterations * BATCH]
        flags += ["--batch-size", BATCH, "--epochs", 1, "--precision", "fp32", "--workers", 0, "--logs", out]
        main.main([str(word) for word in flags])
    steps = np.diff(times)[10:] if len(times) > 11 else np.diff(times)
    return {"first": times[0] - launched, "iteration": float(np.median(steps))}


def table(found: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| contender | ms an iteration: median (range) | stock / contender | first batch: median (range) |"
    yield "| --- | ---: | ---: | ---: |"
    stock = statistics.median(run["iteration"] for run in found["stock"])
    for name, runs in found.items():
        each, first = (sorted(run[key] for run in runs) for key in ("iteration", "first"))
        middle = statistics.median(each)
        yield (
            f"| {name} | {1e3 * middle:.1f} ({1e3 * each[0]:.1f}–{1e3 * each[-1]:.1f}) | {stock / middle:.3f} "
            f"| {statistics.median(first):.1f} s ({first[0]:.1f}–{first[-1]:.1f}) |"
        )


def main() -> None:
    """Measure, or be one of those that are measured."""
    parser = Parser(__doc__)
    parser.add_argument("--iterations", type=int, default=60, help="of a run (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: 5)")
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one and print JSON")
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.dir, args.iterations, args.launched)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        make_split(Path(folder), 600)
        for _ in range(args.rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--contender", name, "--dir", folder]
                command += ["--iterations", args.iterations, "--launched", time.time()]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
