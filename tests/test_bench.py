"""The quick programs in bench/ run, on inputs so small that their figures say nothing."""

import subprocess

import pytest
from conftest import ROOT, call_script
from forked import Script

LAUNCH = subprocess.run


def fork(command, **options):
    """Run a contender that is a process of its own; OpenCLIP as its wheel has it must import anew."""
    if str(command[1]).startswith(str(ROOT / "bench")) and "stock" not in command:
        return Script(*command[1:]).wait()
    return LAUNCH(command, **options)


def rows(printed):
    """The lines of tables without their heads."""
    lines = [line.removeprefix("| ") for line in printed.splitlines() if line[:1] == "|"]
    heads = {i + j for i, line in enumerate(lines) if "---" in line for j in (-1, 0)}
    return [line for i, line in enumerate(lines) if i not in heads]


def several(*groups):
    return [f"{first} | {second}" for first, *rest in groups for second in rest]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("plan.py --num-shards 1000", []),
        (
            "loader.py --dir DIR --num-shards 1 --per-shard 70 --batches 10 --workers 0 --rounds 1",
            [*several(("0", "torchvision", "pil", "stock")), "| limit, one core"],
        ),
        (
            "train.py --iterations 4 --batch 8 --images 16 --rounds 1 --peak 1 --contenders ours,_4_passes",
            ["ours, 4 passes | "],
        ),
        (
            "recall.py --n 300 --large 400 --rounds 1",
            several(("300", "ours", "clip_benchmark"), ("400", "ours")),
        ),
        (
            "create_tars.py --dir DIR --images 30 --image-bytes 2000 --rounds 1 -j 1",
            several(("warm", "tar cf", "ours"), ("cold", "tar cf", "ours")),
        ),
        (
            "reshard.py --dir DIR --num-shards 2 --per-shard 30 --image-bytes 2000 --rounds 1 --uids 1000 -j 1",
            several(*((state, "cp -r", "ours, nine subsets", "ours, one subset") for state in ("warm", "clean"))),
        ),  # and those of "full", which needs a cgroup, and root
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_program_prints_its_table(command, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", fork)
    name, *arguments = command.split()
    arguments = [word.replace("DIR", str(tmp_path)).replace("_", " ") for word in arguments]
    done = call_script(f"bench/{name}", *arguments)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert [row[: len(start)] for row, start in zip(found, expected, strict=False)] == expected
    assert done.stdout.count("\n") >= 2


def test_ranks():
    """A batch comes from few shards, of each source, as with webdataset."""
    done = Script(ROOT / "bench/ranks.py", "--num-shards", 900, "--ranks", 1).wait()
    plans, mixed = rows(done.stdout)[:2], [row.strip("| ").split(" | ") for row in rows(done.stdout)[2:]]
    assert [row.split()[0] for row in plans] == ["9", "102"]
    ours, theirs = zip(*[map(int, row[3:]) for row in mixed], strict=True)
    assert 1 <= ours[0] <= 8  # one source: a worker's buffer
    assert 9 <= ours[1] <= 18  # nine
    assert all(1 <= count <= 8 for count in theirs)
