"""Samples a second of our loader, with both image backends, against OpenCLIP's own, in one run.

    .venv/bin/python bench/loader.py                     # makes the shards, prints the tables

All read the same shards through OpenCLIP's transform for training (224 pixels; with torchvision, what stands for it)
and tokenizer, as OpenCLIP's training loop would; normalising, which with torchvision is the device's work, is left out
there (torch's device "meta" computes nothing). Each round runs all with each number of loader workers, in turn, each in
a process of its own with one thread; the table holds medians and ranges. The rate is that of the second half of the
batches: while its shuffle buffer grows, in the first 4,000 samples of a worker, the peer reads two for each that it
gives. Ours is read in blocks of ten batches, shorter than any scale's. "first batch" is the time from asking for it
until it is there, starting the workers and filling the buffers included. The peer is OpenCLIP as its wheel has it, but
for one thing: today's webdataset ends each shard with an empty dict, which its grouping of files can't bear.

"limit" is what one core decodes and resizes, and does nothing else: torchvision's decode_jpeg, and its resizing of the
whole image as bytes.
"""

import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
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

CONTENDERS = ("torchvision", "pil", "stock")
BATCH, BLOCK, PIXELS = 64, 10, 224


@dataclass(frozen=True)
class Size:
    """The split: shards, samples of each, and pixels of an image."""

    num_shards: int
    per_shard: int
    width: int
    height: int


def make_images(size: Size, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of a shard: smooth JPEGs, and captions."""
    from PIL import Image

    rng = np.random.default_rng(shard)
    for i in range(size.per_shard):
        coarse = Image.fromarray(rng.integers(0, 255, (size.height // 10, size.width // 10, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((size.width, size.height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
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


def make_plan(folder: Path, size: Size, batches: int, backend: str) -> None:
    """``folder/plan.json``: what our loader reads."""
    count = size.num_shards * size.per_shard
    source = {"name": "split", "split": str(folder), "size": count, "used": count, "samples": batches * BATCH}
    steps = {"iterations": batches, "checkpoints": 1, "block": BLOCK, "batch_size": BATCH}
    facts = {"step": "bench", "seed": 0, "image_backend": backend}
    write_json(folder / f"{backend}/plan.json", {**facts, "sources": [source], **steps})


def loader(contender: str, folder: Path, batches: int, workers: int) -> Any:
    """OpenCLIP's ``DataInfo`` of a contender."""
    if contender == "stock":
        add_stock(folder)
    import open_clip
    from open_clip.transform import image_transform
    from training import data

    shards = sorted(map(str, folder.glob("*.tar")))
    args = SimpleNamespace(
        train_data="::".join(shards) if contender == "stock" else str(folder / contender / "plan.json"),
        train_num_samples=batches * BATCH,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=workers,
        world_size=1,
        rank=0,
        seed=0,
        device="meta",
    )
    transform, tokenizer = image_transform(PIXELS, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    if contender != "stock":
        return data.get_dataset_fn("plan.json", "exact")(args, transform, True, 0, tokenizer)
    assert "/stock/src" in data.__file__
    group = data.group_by_keys_nothrow
    data.group_by_keys_nothrow = lambda files, **options: group((file for file in files if file), **options)
    return data.get_wds_dataset(args, transform, True, 0, tokenizer=tokenizer)


def measure(contender: str, folder: Path, batches: int, workers: int) -> dict[str, float]:
    """Seconds to the first batch, and samples a second in the second half of the batches."""
    import torch

    torch.set_num_threads(1)
    if contender == "limit":
        return {"rate": decode_and_resize(folder)}
    info = loader(contender, folder, batches, workers)
    start, times = time.perf_counter(), []
    for block in range(1 if contender == "stock" else batches // BLOCK):
        info.set_epoch(block)
        for images, texts in info.dataloader:
            assert images.shape == (BATCH, 3, PIXELS, PIXELS)
            assert texts.shape == (BATCH, 77)
            times.append(time.perf_counter())
    assert len(times) == batches
    half = times[batches // 2 - 1 :]
    return {"first": times[0] - start, "rate": (len(half) - 1) * BATCH / (half[-1] - half[0])}


def decode_and_resize(folder: Path) -> float:
    """Return the images a second that torchvision decodes and resizes, with the bytes at hand."""
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import ImageReadMode, decode_jpeg

    with tarfile.open(next(folder.glob("*.tar"))) as tar:
        images = [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")][:500]
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in images]
    start = time.perf_counter()
    for data in tensors:
        interpolate(decode_jpeg(data, ImageReadMode.RGB)[None], (PIXELS, PIXELS), mode="bicubic", antialias=True)
    return len(tensors) / (time.perf_counter() - start)


def table(found: dict[tuple[int, str], list[dict[str, float]]], numbers: list[int]) -> Iterator[str]:
    """The lines of the table."""
    yield "| workers | contender | samples/s (range) | / stock | / limit | first batch |"
    yield "| ---: | --- | ---: | ---: | ---: | ---: |"
    limits = sorted(run["rate"] for run in found[0, "limit"])
    limit = statistics.median(limits)
    for workers in numbers:
        stock = statistics.median(run["rate"] for run in found[workers, "stock"])
        for name in CONTENDERS:
            rates = sorted(run["rate"] for run in found[workers, name])
            rate, first = statistics.median(rates), statistics.median(run["first"] for run in found[workers, name])
            cells = [f"{rate:.0f} ({rates[0]:.0f}–{rates[-1]:.0f})", f"{rate / stock:.2f}", f"{rate / limit:.2f}"]
            yield f"| {workers} | {name} | {' | '.join(cells)} | {first:.2f} s |"
    yield f"| | limit, one core | {limit:.0f} ({limits[0]:.0f}–{limits[-1]:.0f}) | | | |"


def main() -> None:
    """Measure, or be one of those that are measured."""
    parser = Parser(__doc__)
    parser.add_argument("--dir", type=Path, help="where the shards are made and kept (default: a temporary folder)")
    parser.add_argument("--num-shards", type=int, default=6, help="shards of the split (default: 6)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples of a shard (default: 1000)")
    parser.add_argument("--width", type=int, default=512, help="pixels of an image (default: 512)")
    parser.add_argument("--height", type=int, default=384, help="pixels of an image (default: 384)")
    parser.add_argument("--batches", type=int, default=120, help=f"of {BATCH} samples; n × {BLOCK} (default: 120)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 4], help="loader workers (default: 0 1 4)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--contender", choices=(*CONTENDERS, "limit"), help="measure this one and print JSON")
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args.contender, args.dir, args.batches, args.workers[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = args.dir or Path(temporary), Size(args.num_shards, args.per_shard, args.width, args.height)
        make_split(folder, size)
        for backend in CONTENDERS[:2]:
            make_plan(folder, size, args.batches, backend)
        found: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for workers, name in [(0, "limit"), *itertools.product(args.workers, CONTENDERS)]:
                command = [sys.executable, __file__, "--dir", folder, "--contender", name]
                command += ["--workers", workers, "--batches", args.batches]
                done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
                found.setdefault((workers, name), []).append(json.loads(done.stdout.splitlines()[-1]))
    print("\n".join(table(found, args.workers)))


if __name__ == "__main__":
    main()
