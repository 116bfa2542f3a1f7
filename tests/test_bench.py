"""The quick programs in bench/ run, on inputs so small that their figures say nothing."""

import subprocess

import pytest
from conftest import ROOT, call_script
from forked import Script

LAUNCH = subprocess.run


@pytest.fixture
def run(monkeypatch):
    """Run a program: its lines. Its processes are forked, but those of OpenCLIP as its wheel has it."""

    def fork(command, **options):
        if not str(command[1]).startswith(str(ROOT / "bench")) or "stock" in command:
            return LAUNCH(command, **options)
        return Script(*command[1:]).wait()

    def run(name, *arguments):
        monkeypatch.setattr(subprocess, "run", fork)
        done = call_script(f"bench/{name}", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def cells(rows, count=2):
    return [row.strip("| ").split(" | ")[:count] for row in rows]


def test_reshard(run, tmp_path):
    size = ["--num-shards", 2, "--per-shard", 30, "--image-bytes", 2000, "--rounds", 1, "--uids", 1000, "-j", 1]
    printed = run("reshard.py", "--dir", tmp_path, *size)
    rows = cells(line for line in printed if line.startswith(("| warm", "| clean", "| full")))
    contenders = ["cp -r", "ours, nine subsets", "ours, one subset"]
    states = ("warm", "clean", "full")[: len(rows) // 3]  # a small page cache needs a cgroup, and root
    assert rows == [[state, name] for state in states for name in contenders]
    assert len(rows) >= 6
    assert any("largest RssAnon, one subset of 1,000 UIDs: " in line for line in printed)
    assert {path.name for path in tmp_path.iterdir()} == {"pool", "uids", "large"}


def test_plan(run):
    first, second = run("plan.py", "--num-shards", 1000)
    assert first == "10,000,000 samples in 1,000 shards"
    assert second.startswith("training, one loader worker: slices ")


def test_ranks():
    rows = cells(Script(ROOT / "bench/ranks.py", "--num-shards", 900, "--ranks", 1).wait().stdout.splitlines(), 5)
    assert [row[0] for row in rows[2:4]] == ["9", "102"]
    ours, theirs = zip(*[map(int, row[3:]) for row in rows[7:]], strict=True)
    assert 1 <= ours[0] <= 8  # one source: a worker's buffer
    assert 9 <= ours[1] <= 18  # nine
    assert all(1 <= count <= 8 for count in theirs)


def test_loader(run, tmp_path):
    size = ["--num-shards", 1, "--per-shard", 70, "--batches", 10, "--workers", 0, "--rounds", 1]
    heads, _, *rows = cells(run("loader.py", "--dir", tmp_path, *size), 6)
    assert heads == ["workers", "contender", "samples/s (range)", "/ stock", "/ limit", "first batch"]
    assert [row[:2] for row in rows[:3]] == [["0", name] for name in ("torchvision", "pil", "stock")]


def test_train(run):
    size = ["--iterations", 4, "--batch", 8, "--images", 16, "--rounds", 1, "--peak", 1]
    heads, _, row = cells(run("train.py", *size, "--contenders", "ours, 4 passes"), 7)
    assert [row[i] for i in (0, 4, 5)] == ["ours, 4 passes", "–", "–"]
    assert heads[3] == "MFU"
    assert float(row[3].rstrip("%")) < 100


def test_recall(run):
    rows = run("recall.py", "--n", 300, "--large", 400, "--rounds", 1)
    assert cells(rows[2:]) == [["300", "ours"], ["300", "clip_benchmark"], ["400", "ours"]]


def test_create_tars(run, tmp_path):
    rows = run("create_tars.py", "--dir", tmp_path, "--images", 30, "--image-bytes", 2000, "--rounds", 1, "-j", 1)
    assert cells(rows[2:]) == [[state, name] for state in ("warm", "cold") for name in ("tar cf", "ours")]
    assert {path.name for path in tmp_path.iterdir()} == {"images", "lists"}
