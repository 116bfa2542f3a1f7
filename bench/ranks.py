"""What 512 ranks with eight loader workers each do before and in a batch, simulated from tables of sizes alone.

    .venv/bin/python bench/ranks.py

First: the tables of a step that reads 4 billion samples in 400,000 shards, from nine and from 102 sources, as one rank
reads them, and the first batch's plan of one of its workers: seconds of a core, and memory; a worker's is what it does
not share with its rank. Then, from how many shards a global batch comes in the middle of a block: ours, and
webdataset's with OpenCLIP's defaults, as both loaders read and shuffle them (shards drawn with replacement, 5,000
samples in a worker's buffer). Medians of three batches.
"""

import itertools
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tic_clip.cli import Parser
from tic_clip.storage import write_json
from tic_clip.training.sampling import apportion, source_ranges

PER_SHARD, WORKERS = 10_000, 8
SIZES = [(1, 4096, 300), (8, 8192, 300), (512, 90_112, 100)]  # ranks, global batch, iterations of a block
BATCHES = 3
loader: Any = None  # main imports these two, which bring torch
webdataset: Any = None


def make_plan(folder: Path, num_sources: int, num_shards: int, batch_size: int, block: int) -> dict[str, Any]:
    """The plan of a step that reads a pass over sources of equal size; their tables are written."""
    each = num_shards // num_sources
    for i in range(num_sources):
        write_json(folder / f"{i}/sizes.json", {f"{shard:08d}.tar": PER_SHARD for shard in range(each)})
    iterations = max(1, each * num_sources * PER_SHARD // batch_size // block) * block
    shares = apportion([1] * num_sources, iterations * batch_size)
    sources = [
        {"name": str(i), "split": str(folder / str(i)), "used": each * PER_SHARD, "samples": share}
        for i, share in enumerate(shares)
    ]
    length = {"batch_size": batch_size, "iterations": iterations, "block": block}
    return {"step": "2022", "seed": 0, **length, "sources": sources}


def private_memory() -> int:
    """Bytes of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def plan_worker(dataset: Any, ranks: int, results: Any) -> None:
    """Put (seconds, bytes) of the plan of a worker's first batch."""
    memory, start = private_memory(), time.process_time()
    block = dataset.plan["iterations"] // dataset.plan["block"] // 2
    ranges = source_ranges(dataset.plan, block, ranks // 2, ranks, 5, WORKERS)
    pieces = [
        next(iter(next(iter(source.passes(positions)))))
        for source, positions in zip(dataset.sources, ranges, strict=True)
    ]
    paths = [source.shards[piece.shard] for source, piece in zip(dataset.sources, pieces, strict=True)]
    assert len(paths) == len(ranges)
    results.put((time.process_time() - start, private_memory() - memory))


def plan_rows(folder: Path, num_shards: int, sizes: list[tuple[int, int, int]]) -> Iterator[str]:
    """The lines of the first table."""
    yield "| sources | a rank reads the tables | memory | a worker plans its first batch | memory |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    ranks, batch_size, block = sizes[-1]
    for num_sources in (9, 102):
        plan = make_plan(folder / str(num_sources), num_sources, num_shards, batch_size, block)
        memory, start = private_memory(), time.process_time()
        dataset = loader.ExactDataset(plan, ranks // 2, ranks, ())
        seconds, memory = time.process_time() - start, private_memory() - memory
        context = get_context("fork")
        results = context.SimpleQueue()
        worker = context.Process(target=plan_worker, args=(dataset, ranks, results))
        worker.start()
        took, own = results.get()
        worker.join()
        yield f"| {num_sources} | {seconds:.2f} s | {memory / 1e6:.0f} MB | {took:.2f} s | {own / 1e6:.0f} MB |"


def our_batch(plan: dict[str, Any], sources: list[Any], ranks: int, batch: int) -> Iterator[str]:
    """The shard of each sample of a global batch of block 0, as our loader reads them."""
    for rank in range(ranks):
        ranges = source_ranges(plan, 0, rank, ranks, batch % WORKERS, WORKERS)
        items = loader.read_samples(sources, ranges, (), defaultdict(Counter))
        size = plan["batch_size"] // ranks
        start = batch // WORKERS * size
        yield from itertools.islice(items, start, start + size)


def their_batch(plan: dict[str, Any], sources: list[Any], ranks: int, batch: int) -> Iterator[str]:
    """The shard of each sample of a global batch, as OpenCLIP's loader reads them with webdataset."""
    shards = [shard for source in sources for shard in source.shards]
    for rank in range(ranks):
        rng = random.Random(f"{rank} {batch % WORKERS}")
        drawn = (rng.choice(shards) for _ in itertools.count())
        samples = itertools.chain.from_iterable(itertools.repeat(shard, PER_SHARD) for shard in drawn)
        buffered = webdataset.shuffle(loader.SHUFFLE_SIZE, loader.SHUFFLE_INITIAL, rng=rng)(samples)
        size = plan["batch_size"] // ranks
        start = batch // WORKERS * size
        yield from itertools.islice(buffered, start, start + size)


def mixing_rows(folder: Path, num_shards: int, sizes: list[tuple[int, int, int]]) -> Iterator[str]:
    """The lines of the second table."""
    loader.read_slice = lambda path, piece, *_: itertools.repeat(path, piece.stop - piece.start)
    loader.decode = lambda path: path
    yield "| ranks × workers | global batch | sources | ours: shards of a batch | webdataset |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for ranks, batch_size, block in sizes:
        for num_sources in (1, 9):
            plan = make_plan(folder / f"{ranks} {num_sources}", num_sources, num_shards, batch_size, block)
            sources = loader.ExactDataset(plan, 0, ranks, ()).sources
            middle = range(block // 2, block // 2 + BATCHES)
            found = [
                statistics.median(len(set(read(plan, sources, ranks, batch))) for batch in middle)
                for read in (our_batch, their_batch)
            ]
            yield f"| {ranks} × {WORKERS} | {batch_size:,} | {num_sources} | {found[0]:.0f} | {found[1]:.0f} |"


def main() -> None:
    """Print both tables."""
    parser = Parser(__doc__)
    parser.add_argument("--num-shards", type=int, default=400_000, help="of 10,000 samples (default: 400,000)")
    parser.add_argument("--ranks", type=int, default=512, help="leave out what has more ranks (default: 512)")
    args = parser.parse_args()
    global loader, webdataset
    import webdataset

    from tic_clip.training import loader

    sizes = [size for size in SIZES if size[0] <= args.ranks]
    with tempfile.TemporaryDirectory() as folder:
        plans = plan_rows(Path(folder, "plans"), args.num_shards, sizes)
        for row in itertools.chain(plans, [""], mixing_rows(Path(folder), args.num_shards // 10, sizes)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
