"""Cutting a pool into nine yearly splits, against `cp -r` of the pool and DataComp's resharder, in one run.

    .venv/bin/python bench/reshard.py                            # makes the pool, prints a table of ratios
    .venv/bin/python bench/reshard.py --datacomp datacomp --peer-python PYTHON      # DataComp's resharder as well
    .venv/bin/python bench/reshard.py --uids 100000000           # and the memory with a subset file of that many UIDs
    .venv/bin/python bench/reshard.py --before CHECKOUT          # an older checkout, with a .venv, as well

Each round runs every contender once, in turn, so that a slow moment of the machine hits them all; the table holds
medians and the range. "warm": the pool is in the page cache; "clean": its pages are dropped before each run
(POSIX_FADV_DONTNEED, no root needed); "full": as clean, with --cache-mb of page cache in all (a memory cgroup; root),
as if the pool were larger than the memory. Writes of the run before are waited for. CPU is user + system of the process
and its children. Memory is measured in a run of its own: the largest RssAnon (what is not page cache) of any process.
DataComp's resharder makes one year a run, so its nine years are nine runs. It needs an environment of its own: Python
with numpy<2, webdataset 0.2.31, img2dataset, pysimdjson, opencv-python-headless, pyarrow<20.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tic_clip.cli import Parser
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import UID, format_uids, save_uids
from tic_clip.storage import write_json

ROOT = Path(__file__).parents[1]
YEARS = range(2014, 2023)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The pool: shards, samples of each, and the mean bytes of an image."""

    num_shards: int
    per_shard: int
    image_bytes: int


def pool_uids(size: Size, shard: int) -> np.ndarray:
    """(per_shard,) the UIDs of a shard: 128 random bits each."""
    return random_uids(np.random.default_rng(shard), size.per_shard)


def random_uids(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) UIDs of 128 random bits."""
    return rng.integers(0, 1 << 64, (count, 2), np.uint64).view(UID).ravel()


def pool_samples(size: Size, shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of the samples of a shard: random bytes for an image, and a JSON like the pool's."""
    rng = np.random.default_rng(1000 + shard)
    for i, uid in enumerate(format_uids(pool_uids(size, shard))):
        caption = f"a picture of the thing with the number {i}"
        about = {"key": f"{shard:05d}{i:04d}", "status": "success", "width": 256, "height": 192, "sha256": uid * 2}
        record = {"uid": uid, "caption": caption, "url": f"https://example.com/{uid}.jpg", **about}
        image = rng.bytes(int(size.image_bytes * rng.uniform(0.5, 1.5)))
        yield about["key"], {"jpg": image, "json": json.dumps(record).encode(), "txt": caption.encode()}


def make_inputs(folder: Path, size: Size) -> None:
    """``folder/pool`` and ``folder/uids/{year}.npy``, which share the pool's samples among the years."""
    for shard in range(size.num_shards):
        stats = folder / f"pool/{shard:08d}_stats.json"
        if not stats.exists():
            write_shard(folder / f"pool/{shard:08d}.tar", pool_samples(size, shard))
            write_json(stats, {"successes": size.per_shard})
    uids = np.concatenate([pool_uids(size, shard) for shard in range(size.num_shards)])
    year = np.random.default_rng(0).integers(0, len(YEARS), len(uids))
    for i, name in enumerate(YEARS):
        save_uids(folder / f"uids/{name}.npy", uids[year == i])


def make_large_subset(folder: Path, count: int) -> Path:
    """A sorted subset file of ``count`` UIDs, 2014's of the pool among them."""
    path = folder / f"large/{count}.npy"
    if not path.exists():
        rng = np.random.default_rng(10**9)  # no shard's
        wanted = np.load(folder / "uids/2014.npy")
        rows = np.empty(count - len(wanted), UID)
        rows["f0"] = np.sort(rng.integers(0, 1 << 64, len(rows), np.uint64))
        rows["f1"] = rng.integers(0, 1 << 64, len(rows), np.uint64)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.insert(rows, np.searchsorted(rows["f0"], wanted["f0"]), wanted))
    return path


def fresh(path: Path) -> str:
    """``path`` as an empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return str(path)


def copy_pool(folder: Path) -> list[list[str]]:
    """The commands of `cp -r`."""
    return [["cp", "-r", f"{folder}/pool", fresh(folder / "out") + "/pool"]]


def ours(folder: Path, num_workers: int, subsets: str, root: Path | None = None) -> list[list[str]]:
    """The command that makes all splits of ``subsets``, of this checkout or of the one in ``root``."""
    python = str(root / ".venv/bin/python") if root else sys.executable
    script = str((root or ROOT) / "dataset_creation/reshard.py")
    out = fresh(folder / "out")
    return [[python, script, "-i", f"{folder}/pool", "-o", out, "-s", subsets, "-j", str(num_workers)]]


def datacomp(folder: Path, num_workers: int, checkout: Path, python: str) -> list[list[str]]:
    """The commands of DataComp's resharder: one for each year."""
    script, pool = str(checkout / "resharder.py"), f"{folder}/pool"
    flags = ["-j", str(num_workers), "-q"]
    outputs = {year: fresh(folder / f"out/{year}") for year in YEARS}
    return [
        [python, script, *flags, "-i", pool, "-o", output, "-s", f"{folder}/uids/{year}.npy"]
        for year, output in outputs.items()
    ]


def measure(commands: list[list[str]], group: Path | None = None) -> tuple[float, float]:
    """(seconds, CPU seconds) of the commands, one after the other; in the memory cgroup ``group``, if given."""

    def join() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=join)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def small_cache(megabytes: int) -> Iterator[Path | None]:
    """Yield a cgroup of so much memory, page cache included; None where there can't be one."""
    found = [root for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if root.is_dir()]
    group = found[0] / f"tic-clip-bench-{os.getpid()}"
    try:
        group.mkdir()
        limits = [name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()]
        (group / limits[0]).write_text(str(megabytes << 20))
    except (OSError, IndexError) as error:
        print(f"no small page cache on this machine ({error})", file=sys.stderr)
        group = None
    yield group
    if group:
        group.rmdir()


def largest_anonymous(command: list[str]) -> float:
    """The largest RssAnon of any process of a command, in MB, looked at every 20 ms."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    largest = 0
    while running.poll() is None:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getpgid(int(status.parent.name)) == running.pid:
                    lines = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
                    largest = max(largest, *(int(line.split()[1]) for line in lines))
            except (OSError, TypeError):
                continue  # it has ended
        time.sleep(0.02)
    assert running.returncode == 0, command
    return largest / 1000


def settle(folder: Path, *, warm: bool) -> None:
    """Wait for writes, and have the pool in the page cache or out of it."""
    os.sync()
    for tar in (folder / "pool").glob("*.tar"):
        with open(tar, "rb") as file:
            if not warm:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def main() -> None:
    """Make the inputs, run the rounds, print the table."""
    parser = Parser(__doc__)
    parser.add_argument("--dir", type=Path, default=ROOT / "data/bench", help="of the pool, kept (default: data/bench)")
    parser.add_argument("--num-shards", type=int, default=20, help="shards of the pool (default: 20)")
    parser.add_argument("--per-shard", type=int, default=5000, help="samples of a shard (default: 5000)")
    parser.add_argument("--image-bytes", type=int, default=27_000, help="of an image, in the mean (default: 27000)")
    parser.add_argument("-j", "--num-workers", type=int, default=2, help="our processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: 5)")
    parser.add_argument("--datacomp", type=Path, help="a checkout of DataComp: its resharder takes part")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that runs it (default: this one)")
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds of it, warm, of nine runs (default: 2)")
    parser.add_argument("--uids", type=int, help="measure the memory with a subset file of that many UIDs")
    parser.add_argument("--before", type=Path, help="an older checkout, with a .venv of its own, that takes part")
    parser.add_argument("--cache-mb", type=int, default=1024, help="the page cache when it is full (default: 1024)")
    parser.add_argument("--states", nargs="+", default=["warm", "clean", "full"], help="(default: warm clean full)")
    args = parser.parse_args()
    folder, jobs = args.dir.resolve(), args.num_workers
    make_inputs(folder, Size(num_shards=args.num_shards, per_shard=args.per_shard, image_bytes=args.image_bytes))
    contenders = {
        "cp -r": partial(copy_pool, folder),
        "ours, nine subsets": partial(ours, folder, jobs, f"{folder}/uids"),
        "ours, one subset": partial(ours, folder, jobs, f"{folder}/uids/2014.npy"),
    }
    if args.before:
        contenders["before, nine subsets"] = partial(ours, folder, jobs, f"{folder}/uids", args.before.resolve())
    peer = "DataComp's resharder, nine runs"
    if args.datacomp:
        contenders[peer] = partial(datacomp, folder, jobs, args.datacomp.resolve(), args.peer_python)
    found = {}
    with small_cache(args.cache_mb) as group:
        for state in args.states if group else [state for state in args.states if state != "full"]:
            for number in range(args.rounds):
                for name, commands in contenders.items():
                    if name == peer and (state != "warm" or number >= args.peer_rounds):
                        continue
                    prepared = commands()
                    settle(folder, warm=state == "warm")
                    result = measure(prepared, group if state == "full" else None)
                    found.setdefault((state, name), []).append(result)
    report(found, args.num_shards * args.per_shard, jobs)
    print(f"\nlargest RssAnon, nine subsets: {largest_anonymous(ours(folder, jobs, f'{folder}/uids')[0]):.0f} MB")
    if args.uids:
        large = largest_anonymous(ours(folder, jobs, str(make_large_subset(folder, args.uids)))[0])
        print(f"largest RssAnon, one subset of {args.uids:,} UIDs: {large:.0f} MB")
    shutil.rmtree(folder / "out")


def report(found: dict[tuple[str, str], list[tuple[float, float]]], num_samples: int, jobs: int) -> None:
    """Print the table in Markdown."""
    print(f"| cache | contender (-j {jobs}) | seconds: median (range) | ratio to cp -r | CPU µs a sample |")
    print("| --- | --- | ---: | ---: | ---: |")
    for (state, name), runs in found.items():
        seconds, cpu = zip(*runs, strict=True)
        ratio = statistics.median(seconds) / statistics.median(run[0] for run in found[state, "cp -r"])
        cost = 1e6 * statistics.median(cpu) / num_samples
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
        print(f"| {state} | {name} | {spread} | {ratio:.2f} | {cost:.0f} |")


if __name__ == "__main__":
    main()
