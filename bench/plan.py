"""The plan of a pool of 12.8 billion samples in 1.28 million shards: time and memory, from synthetic counts.

    .venv/bin/python bench/plan.py

Training: what one loader worker of 64 ranks x 8 reads in a step over all samples.
"""

import resource
import time

import numpy as np

from tic_clip.cli import Parser
from tic_clip.training.sampling import slices, source_ranges

SHARD_SIZE = 10_000


def plan_worker(counts: np.ndarray) -> int:
    """Slices that one loader worker reads when a step takes every sample once."""
    sizes = np.full(int(counts.sum()) // SHARD_SIZE, SHARD_SIZE)
    batch_size, ranks, workers = 1408, 64, 8
    block = int(sizes.sum()) // (batch_size * ranks)
    plan = {"block": block, "batch_size": batch_size * ranks, "sources": [{"samples": block * batch_size * ranks}]}
    (positions,) = source_ranges(plan, 0, 37, ranks, 5, workers)
    return sum(1 for _ in slices(sizes, (0,), positions))


def main() -> None:
    """Make the counts, plan, print a line for each plan."""
    parser = Parser(__doc__)
    parser.add_argument("--num-shards", type=int, default=1_280_000, help="of 10,000 samples (default: 1,280,000)")
    num_shards = parser.parse_args().num_shards
    counts = np.random.default_rng(0).multinomial(SHARD_SIZE, np.ones(9) / 9, num_shards)
    plans = {
        "training, one loader worker: slices": plan_worker,
    }
    print(f"{counts.sum():,} samples in {num_shards:,} shards")
    for name, plan in plans.items():
        start = time.perf_counter()
        result = plan(counts)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name} {result:,}; {seconds:.1f} s, {peak:.2f} GB resident at most")


if __name__ == "__main__":
    main()
