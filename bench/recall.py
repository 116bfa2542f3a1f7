"""Seconds and memory of retrieval's recalls, against clip_benchmark's own, in one run.

    .venv/bin/python bench/recall.py                     # N = 10,000, both; N = 33,000, ours alone

Both get the same normalised features of N images and N captions (512 dimensions, random, captions near their images)
and compute recall@1, @5 and @10 in both directions: ours through ``tic_clip.metrics.retrieval``, which also gives an
interval and counts ties; the peer through the steps of ``clip_benchmark.metrics.zeroshot_retrieval.evaluate`` after it
has encoded, in batches of 64. Each round runs both in turn, each in a process of its own; the table holds medians and
ranges, and the most memory that a process had, features and packages included. The peer's N x N scores, positive pairs
and one-hot top-k do not fit this machine at a year of TiC-DataComp-Retrieval, N = 33,000.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from tic_clip.cli import Parser

KS = (1, 5, 10)


def features(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised (N, 512) features of images and captions; about half of the captions find their image."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, 512)).astype(np.float32)
    texts = images + 5.5 * rng.normal(size=images.shape).astype(np.float32)
    return tuple(part / np.linalg.norm(part, axis=1, keepdims=True) for part in (images, texts))


def ours(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Our recalls."""
    from tic_clip.metrics import retrieval

    return retrieval(images, texts)[0]


def peer(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """clip_benchmark's recalls, as its ``evaluate`` computes them from embeddings."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), torch.arange(len(scores))] = True
    recalls = {}
    for k in KS:
        for name, x, y in (("image", scores, positive), ("text", scores.T, positive.T)):
            hits = batchify(recall_at_k, x, y, 64, "cpu", k=k) > 0
            recalls[f"{name}_retrieval_recall@{k}"] = hits.float().mean().item()
    return recalls


CONTENDERS = {"ours": ours, "clip_benchmark": peer}


def measure(name: str, count: int) -> None:
    """Run one of them and print its figures as JSON."""
    data = features(count)
    CONTENDERS[name](*(part[:64] for part in data))  # what is imported does not count
    start = time.perf_counter()
    recalls = CONTENDERS[name](*data)
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "gigabytes": memory / 1e6, **recalls}))


def run(name: str, count: int) -> dict[str, float]:
    """The figures of one of them, from a process of its own."""
    command = [sys.executable, __file__, "--measure", name, "--n", str(count)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def row(name: str, count: int, found: list[dict[str, float]], ratio: str) -> str:
    """A line of the table."""
    seconds = [each["seconds"] for each in found]
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
    return f"| {count:,} | {name} | {spread} | {ratio} | {max(each['gigabytes'] for each in found):.2f} |"


def main() -> None:
    """Parse the flags, run, and print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="images, for both (default: 10,000)")
    parser.add_argument("--large", type=int, default=33_000, help="images, for ours alone (default: 33,000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.n)
        return
    found = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, each in found.items():
            each.append(run(name, args.n))
    large = [run("ours", args.large) for _ in range(args.rounds)]
    for name in (name for name in found["clip_benchmark"][0] if "recall" in name):
        values = [each[0][name] for each in found.values()]
        assert abs(values[0] - values[1]) < 1e-6, (name, values)
    medians = [statistics.median(each["seconds"] for each in part) for part in found.values()]
    print("| N | | seconds (range) | times as fast | GB |\n|---:|---|---:|---:|---:|")
    print(row("ours", args.n, found["ours"], f"{medians[1] / medians[0]:.1f}"))
    print(row("clip_benchmark", args.n, found["clip_benchmark"], "1.0"))
    print(row("ours", args.large, large, ""))


if __name__ == "__main__":
    main()
