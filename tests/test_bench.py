"""The quick programs in bench/ run, on inputs so small that their figures say nothing."""

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def run(name, *arguments):
    done = subprocess.run([sys.executable, BENCH / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reshard(tmp_path):
    size = ["--num-shards", "2", "--per-shard", "30", "--image-bytes", "2000"]
    printed = run("reshard.py", "--dir", str(tmp_path), *size, "--rounds", "1", "--uids", "1000", "-j", "1")
    rows = [line.split(" | ")[:2] for line in printed.splitlines() if line.startswith(("| warm", "| clean", "| full"))]
    contenders = ["cp -r", "ours, nine subsets", "ours, one subset"]
    states = ("warm", "clean", "full")[: len(rows) // 3]  # a small page cache needs a cgroup, and root
    assert rows == [[f"| {state}", name] for state in states for name in contenders]
    assert len(rows) >= 6
    assert "largest RssAnon, one subset of 1,000 UIDs: " in printed
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "uids", "large"}


def test_plan():
    printed = run("plan.py", "--num-shards", "1000")
    assert printed.startswith("10,000,000 samples in 1,000 shards\ntraining, one loader worker: slices ")
    assert len(printed.splitlines()) == 2


def test_ranks():
    rows = [line.split(" | ") for line in run("ranks.py", "--num-shards", "900", "--ranks", "1").splitlines()]
    assert [row[0] for row in rows[2:4]] == ["| 9", "| 102"]
    ours, theirs = zip(*[map(int, (row[3], row[4].split()[0])) for row in rows[7:]], strict=True)
    assert 1 <= ours[0] <= 8  # one source: a worker's buffer
    assert 9 <= ours[1] <= 18  # nine
    assert all(1 <= count <= 8 for count in theirs)


def test_loader(tmp_path):
    size = ["--num-shards", "1", "--per-shard", "70", "--batches", "10", "--workers", "0", "--rounds", "1"]
    rows = run("loader.py", "--dir", str(tmp_path), *size).splitlines()
    assert rows[0] == "| workers | contender | samples/s (range) | / stock | / limit | first batch |"
    assert [row.split(" | ")[:2] for row in rows[2:5]] == [["| 0", name] for name in ("torchvision", "pil", "stock")]


def test_train():
    size = ["--iterations", "4", "--batch", "8", "--images", "16", "--rounds", "1", "--peak", "1"]
    heads, _, row = run("train.py", *size, "--contenders", "ours, 4 passes").splitlines()
    cells = dict(zip(heads.split(" | "), row.split(" | "), strict=True))
    assert (cells["| contender"], cells["stock / contender"], cells["wait"]) == ("| ours, 4 passes", "–", "–")
    assert float(cells["MFU"].rstrip("%")) < 100


def test_recall():
    rows = run("recall.py", "--n", "300", "--large", "400", "--rounds", "1").splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [
        ["| 300", "ours"],
        ["| 300", "clip_benchmark"],
        ["| 400", "ours"],
    ]


def test_create_tars(tmp_path):
    size = ["--images", "30", "--image-bytes", "2000", "--rounds", "1", "-j", "1"]
    rows = run("create_tars.py", "--dir", str(tmp_path), *size).splitlines()
    contenders = [["| warm", "tar cf"], ["| warm", "ours"], ["| cold", "tar cf"], ["| cold", "ours"]]
    assert [row.split(" | ")[:2] for row in rows[2:]] == contenders
    assert {path.name for path in tmp_path.iterdir()} == {"images", "lists"}
