"""Samples a second of the exact stream, against OpenCLIP's own loader that samples with replacement, in one run.

    .venv/bin/python bench/loader.py                     # makes the shards, prints a table of ratios

Both read the same shards through the same transform (OpenCLIP's for training, 224 pixels) and tokenizer, as OpenCLIP's
training loop would. Each round runs both with each number of loader workers, in turn, each in a process of its own; the
table holds medians and ranges. The rate is that of the second half of the batches: while its shuffle buffer grows, in
the first 4,000 samples of a worker, the peer reads two for each that it gives. Ours is read in blocks of ten batches,
shorter than any scale's. "first batch" is the time from asking for it until it is there, starting the workers and
filling the buffers included. The peer is OpenCLIP as its wheel has it, but for one thing: today's webdataset ends
each shard with an empty dict, which its grouping of files can't bear.
"""

import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from train import add_stock

from tic_clip.cli import Parser
from tic_clip.data.tar import write_shard
from tic_clip.storage import write_json

CONTENDERS = ("ours", "stock")
BATCH, BLOCK = 64, 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """The split: shards, and samples of each."""

    num_shards: int
    per_shard: int


def make_images(size: Size, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of a shard: smooth JPEGs of 256 pixels, about 23 KB each, and captions."""
    from PIL import Image

    rng = np.random.default_rng(shard)
    for i in range(size.per_shard):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        caption = f"a picture of the thing with the number {i} in shard {shard}"
        yield f"{shard:016x}{i:016x}-0", {"jpg": file.getvalue(), "txt": caption.encode()}


def make_split(folder: Path, size: Size) -> None:
    """A split, unless it is there."""
    if not (folder / "sizes.json").exists():
        table = {}
        for shard in range(size.num_shards):
            name = f"{shard:08d}.tar"
            table[name] = write_shard(folder / name, make_images(size, shard))
        write_json(folder / "sizes.json", table)


def make_plan(folder: Path, size: Size, batches: int) -> None:
    """``folder/plan.json``: what our loader reads."""
    count = size.num_shards * size.per_shard
    source = {"name": "split", "split": str(folder), "size": count, "used": count, "samples": batches * BATCH}
    steps = {"iterations": batches, "checkpoints": 1, "block": BLOCK, "batch_size": BATCH}
    write_json(folder / "plan.json", {"step": "bench", "seed": 0, "sources": [source], **steps})


def loader(contender: str, folder: Path, batches: int, workers: int) -> Any:
    """OpenCLIP's ``DataInfo`` of a contender."""
    if contender == "stock":
        add_stock(folder)
    import open_clip
    from open_clip.transform import image_transform
    from training import data

    shards = sorted(map(str, folder.glob("*.tar")))
    args = SimpleNamespace(
        train_data=str(folder / "plan.json") if contender == "ours" else "::".join(shards),
        train_num_samples=batches * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        rank=0,
        seed=0,
    )
    transform, tokenizer = image_transform(224, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    if contender == "ours":
        return data.get_dataset_fn("plan.json", "exact")(args, transform, True, 0, tokenizer)
    assert "/stock/src" in data.__file__
    group = data.group_by_keys_nothrow
    data.group_by_keys_nothrow = lambda files, **options: group((file for file in files if file), **options)
    return data.get_wds_dataset(args, transform, True, 0, tokenizer=tokenizer)


def measure(contender: str, folder: Path, batches: int, workers: int) -> dict[str, float]:
    """Seconds to the first batch, and samples a second in the second half of the batches."""
    info = loader(contender, folder, batches, workers)
    start, times = time.perf_counter(), []
    for block in range(batches // BLOCK if contender == "ours" else 1):
        info.set_epoch(block)
        for images, texts in info.dataloader:
            assert images.shape == (BATCH, 3, 224, 224)
            assert texts.shape == (BATCH, 77)
            times.append(time.perf_counter())
    assert len(times) == batches
    half = times[batches // 2 - 1 :]
    return {"first": times[0] - start, "rate": (len(half) - 1) * BATCH / (half[-1] - half[0])}


def table(found: dict[tuple[int, str], list[dict[str, float]]], numbers: list[int]) -> Iterator[str]:
    """The lines of the table."""
    yield "| workers | ours: samples/s (range) | stock: samples/s (range) | ours / stock | first batch: ours | stock |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    for workers in numbers:
        rates = [sorted(run["rate"] for run in found[workers, name]) for name in CONTENDERS]
        cells = [f"{statistics.median(rate):.0f} ({rate[0]:.0f}–{rate[-1]:.0f})" for rate in rates]
        ratio = statistics.median(rates[0]) / statistics.median(rates[1])
        firsts = [statistics.median(run["first"] for run in found[workers, name]) for name in CONTENDERS]
        yield f"| {workers} | {' | '.join(cells)} | {ratio:.2f} | {firsts[0]:.2f} s | {firsts[1]:.2f} s |"


def main() -> None:
    """Measure, or be one of those that are measured."""
    parser = Parser(__doc__)
    parser.add_argument("--dir", type=Path, help="where the shards are made and kept (default: a temporary folder)")
    parser.add_argument("--num-shards", type=int, default=6, help="shards of the split (default: 6)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples of a shard (default: 1000)")
    parser.add_argument("--batches", type=int, default=120, help=f"of {BATCH} samples; n × {BLOCK} (default: 120)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4], help="loader workers (default: 0 1 4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one and print JSON")
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.dir, args.batches, args.workers[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = args.dir or Path(temporary), Size(num_shards=args.num_shards, per_shard=args.per_shard)
        make_split(folder, size)
        make_plan(folder, size, args.batches)
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for workers in args.workers:
                for name in CONTENDERS:
                    command = [sys.executable, __file__, "--dir", folder, "--contender", name]
                    command += ["--workers", workers, "--batches", args.batches]
                    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
                    found.setdefault((workers, name), []).append(json.loads(done.stdout.splitlines()[-1]))
    print("\n".join(table(found, args.workers)))


if __name__ == "__main__":
    main()
