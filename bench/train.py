"""Seconds of a training iteration, samples/s and MFU, ours against stock OpenCLIP with the same batch, in one run.

    .venv/bin/python bench/train.py
    .venv/bin/python bench/train.py --model ViT-B-32 --batch 512 --workers 12 --image 256 --iterations 200   # on a GPU

Contenders, each in a process of its own, in turn, round after round: "stock", OpenCLIP as its wheel has it, and
"patched", the one in open_clip/ with no flag of ours, both on OpenCLIP's synthetic data, on a GPU with --precision amp;
"patched, shards" on shards of noise through the patched OpenCLIP's loader (stock's fails with today's webdataset);
"ours", scripts/train.py on the same shards with its plan, exact sampling, log and default precision, and "ours, …" with
the settings that it names. An iteration is the time between the first backward passes of two updates; the table holds
the median over the iterations after the first ten (on a GPU the mean, between two waits for the GPU), and over rounds
the median and the range. MFU is 6 FLOP for each MAC of a forward pass, over the card's peak in bfloat16 (of a card that
is not in the table, --peak). "wait" is the share of a logged iteration of ours that waited for data. "first batch" is
from the start of the process, all imports included, to the first backward pass.
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
CONTENDERS: dict[str, tuple[str, ...]] = {
    **{"stock": (), "patched": (), "patched, shards": (), "ours": ()},
    "ours, amp": ("--precision=amp",),
    "ours, 4 passes": ("--accum_freq=4",),
    "ours, --torchcompile": ("--openclip_flags=--torchcompile",),
}
"""Name -> its own flags of scripts/train.py."""
PEAKS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165}
"""A part of a card's name -> its TFLOP/s in bfloat16, dense, by the maker's data sheet (the SXM version)."""
SHARDS = 16
SKIPPED = 10  # iterations before those that are measured
SPLIT = "tic/emoji/yearly/train/2014"


def write_samples(split: Path, count: int, width: int) -> None:
    """Write a split of ``count`` samples in ``SHARDS`` shards: square JPEGs of coarse noise, ``width`` pixels wide."""
    from PIL import Image

    from tic_clip.data.tar import write_shard
    from tic_clip.storage import write_json

    rng, content = np.random.default_rng(0), []
    for i in range(count):
        file = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).resize((width, width))
        noise.save(file, "JPEG", quality=90)
        content.append((f"{i:032x}-0", {"jpg": file.getvalue(), "txt": f"image {i}".encode()}))
    shards = {f"{i:08d}.tar": content[i::SHARDS] for i in range(SHARDS)}
    write_json(split / "sizes.json", {name: write_shard(split / name, samples) for name, samples in shards.items()})


def add_stock(folder: Path) -> None:
    """Let this process import OpenCLIP as it was before the patch, from ``folder/stock``."""
    git = ["git", "-C", str(ROOT / "open_clip"), "checkout-index", "--all", "--force"]
    subprocess.run([*git, f"--prefix={folder.absolute()}/stock/"], check=True)
    sys.path.insert(0, str(folder.absolute() / "stock/src"))


def our_flags(contender: str, folder: Path, out: str, args: argparse.Namespace) -> list[object]:
    """The flags of scripts/train.py, and a scale without a checkpoint before the end."""
    scale = {"batch_size": args.batch, "samples_per_step": args.iterations * args.batch, "model": args.model}
    scale |= {"warmup": 10, "checkpoints": 1, "resume_every": args.iterations, "log_every": 10, "workers": args.workers}
    (folder / "scale.yaml").write_text(json.dumps({**scale, "grad_checkpointing": False}))
    flags = ["--benchmark", "emoji", "--method", "cumulative", "--scale", folder / "scale.yaml", "--step", "2014"]
    return [*flags, "--data_dir", folder, "--output_dir", out, *CONTENDERS[contender]]


def read_wait(out: str, batch: int) -> float | None:
    """The median share of a logged iteration that waited for data; None where the log does not have it."""
    lines = [json.loads(line) for line in (Path(out) / "2014/train.log.jsonl").read_text().splitlines()]
    shares = [line["data_wait"] * line["samples_per_second"] / batch for line in lines if "data_wait" in line]
    return statistics.median(shares[1:] or shares) if shares else None


def measure(contender: str, folder: Path, launched: float, args: argparse.Namespace) -> dict[str, float | None]:
    """Seconds from ``launched`` (of time.time) to the first backward pass and of an iteration; the share of waiting."""
    if contender == "stock":
        add_stock(folder)
    import open_clip
    import torch
    from training import main, train

    from tic_clip.models import MODEL_CONFIGS

    times: list[float] = []
    passes = 4 if "4 passes" in contender else 1
    backward, cuda, skipped = train.backward, torch.cuda.is_available(), min(SKIPPED, args.iterations - 2)

    def timed(loss: object, scaler: object) -> None:
        if cuda and len(times) in (passes * skipped, passes * (args.iterations - 1)):
            torch.cuda.synchronize()
        times.append(time.time())
        backward(loss, scaler)

    assert ("/stock/src" in main.__file__) == (contender == "stock")
    train.backward = timed
    out = str(folder / f"{contender}{launched}")
    if contender.startswith("ours"):
        sys.argv = ["train.py", *map(str, our_flags(contender, folder, out, args))]
        sys.path.insert(0, str(ROOT / "scripts"))
        with suppress(SystemExit):
            runpy.run_path(str(ROOT / "scripts/train.py"), run_name="__main__")
        assert (Path(out) / "2014/done.json").exists()
        wait = read_wait(out, args.batch)
    else:
        wait = None
        open_clip.add_model_config(MODEL_CONFIGS)
        flags = ["--model", args.model, "--workers", args.workers, "--batch-size", args.batch, "--epochs", 1]
        flags += ["--train-num-samples", args.iterations * args.batch]
        flags += ["--precision", "amp" if cuda else "fp32", "--logs", out]
        shards = f"{folder}/{SPLIT}/{{{0:08d}..{SHARDS - 1:08d}}}.tar"
        data = ["--train-data", shards, "--dataset-type", "webdataset", "--dataset-resampled"]
        main.main([str(word) for word in flags + (data if "shards" in contender else ["--dataset-type", "synthetic"])])
    steps = np.diff(times[::passes])[skipped:]
    return {
        "first": times[0] - launched,
        "iteration": float(np.mean(steps) if cuda else np.median(steps)),
        "wait": wait,
    }


def flops_of(model: str, peak: float | None) -> float | None:
    """The share of the card's peak that is one sample of ``model`` a second; None without a card that is known."""
    import torch

    from tic_clip.models import macs_per_sample

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = peak or next((value for part, value in PEAKS.items() if part in name), None)
    return 6 * macs_per_sample(model) / (1e12 * peak) if peak else None


def table(found: dict[str, list[dict[str, float]]], batch: int, share: float | None) -> Iterator[str]:
    """The lines of the table; ``share`` of the card's peak is one sample a second."""
    heads = ("contender", "ms an iteration: median (range)", "samples/s", "MFU", "stock / contender", "wait")
    yield f"| {' | '.join(heads)} | first batch (range) |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, runs in found.items():
        each, first = (sorted(run[key] for run in runs) for key in ("iteration", "first"))
        middle = statistics.median(each)
        stock = statistics.median(run["iteration"] for run in found["stock"]) / middle if "stock" in found else None
        waits = [run["wait"] for run in runs if run["wait"] is not None]
        cells = [
            f"{1e3 * middle:.1f} ({1e3 * each[0]:.1f}–{1e3 * each[-1]:.1f})",
            f"{batch / middle:,.0f}",
            "–" if share is None else f"{share * batch / middle:.1%}",
            "–" if stock is None else f"{stock:.3f}",
            f"{statistics.median(waits):.1%}" if waits else "–",
            f"{statistics.median(first):.1f} s ({first[0]:.1f}–{first[-1]:.1f})",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, or be one of those that are measured."""
    parser = Parser(__doc__)
    parser.add_argument("--iterations", type=int, default=60, help="of a run (default: 60)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: 5)")
    parser.add_argument("--model", default="ViT-Tiny-8-48", help="OpenCLIP's name of it (default: ViT-Tiny-8-48)")
    parser.add_argument("--batch", type=int, default=64, help="samples of an iteration (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data (default: 0)")
    parser.add_argument("--image", type=int, default=64, help="width of the JPEGs in pixels (default: 64)")
    parser.add_argument("--images", type=int, default=600, help="JPEGs in the shards (default: 600)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS)[:4], help="(default: the first 4)"
    )
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card in bfloat16 (default: by its name)")
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one and print JSON")
    parser.add_argument("--launched", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.dir, args.launched, args)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    with tempfile.TemporaryDirectory() as folder:
        write_samples(Path(folder, SPLIT), args.images, args.image)
        options = [
            word for name in ("iterations", "model", "batch", "workers") for word in (f"--{name}", vars(args)[name])
        ]
        for _ in range(args.rounds):
            for name in args.contenders:
                command = [sys.executable, __file__, "--contender", name, "--dir", folder]
                command += [*options, "--launched", time.time()]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {found[name][-1]}", file=sys.stderr)  # also of a run that is cut off
    print("\n".join(table(found, args.batch, flops_of(args.model, args.peak))))


if __name__ == "__main__":
    main()
