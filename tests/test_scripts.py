"""Every script: its help, its errors, the plans that DRY_RUN=1 prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tic_clip.storage import write_json
from tic_clip.timeline import get_benchmark

ROOT = Path(__file__).parent.parent
PYTHON_SCRIPTS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("dataset_creation/**/*.py")])
BASH_SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", PYTHON_SCRIPTS, ids=name)
def test_help_shows_an_example_from_any_folder(script, tmp_path):
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert f"python {name(script)}" in done.stdout


@pytest.mark.parametrize("script", BASH_SCRIPTS, ids=name)
def test_bash_parses_it_and_it_stops_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if os.access(script, os.X_OK):
        assert "\nset -euo pipefail\n" in script.read_text()


def test_no_flag_of_a_script_under_torchrun_is_taken_for_one_of_its_own():
    """torchrun takes a prefix of its own flags, in the script's arguments too."""
    from torch.distributed.run import get_args_parser

    flags = re.findall(r'add_argument\("(--\w+)"', (ROOT / "scripts/train.py").read_text())
    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    assert "--method" in flags
    assert "--logs-specs" in own
    assert [(flag, option) for flag in flags for option in own if option.startswith(flag)] == []


def fake_splits(data_dir, benchmark, size):
    """Tables without shards, all that a plan reads."""
    for step in get_benchmark(benchmark).steps:
        for split in step.splits:
            folder = data_dir / get_benchmark(benchmark).root / "train" / split
            write_json(folder / "sizes.json", {"00000000.tar": size})


def dry_run(script, **settings):
    environment = {**os.environ, "DRY_RUN": "1", **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(["bash", f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What each step of a medium run says: (start, samples, samples seen after it).
MEDIUM = {
    "cumulative": [("last", 18_432_000, 18_432_000 * (t + 1)) for t in range(7)],
    "sequential": [("last", 18_432_000, 18_432_000 * (t + 1)) for t in range(7)],
    "oracle": [("random", 18_432_000 * (t + 1), 18_432_000 * (t + 1) * (t + 2) // 2) for t in range(7)],
}


@pytest.mark.parametrize("method", MEDIUM)
def test_the_medium_scripts_plan_what_the_table_says(method, tmp_path):
    fake_splits(tmp_path, "datacomp", 1_000_000)
    text = dry_run(f"run_medium_basic_{method}.sh", DATA_DIR=tmp_path, OUTPUT_DIR="/runs", NPROC=8)
    steps = get_benchmark("datacomp").steps
    lines = text.splitlines()
    for t, (step, (start, samples, seen)) in enumerate(zip(steps, MEDIUM[method], strict=True)):
        at = next(
            i for i, line in enumerate(lines) if line.startswith(f"{step.name}: {method} at tic_medium, ViT-B-16")
        )
        last = f"/runs/medium_basic_{method}/{steps[t - 1].name}/checkpoints/epoch_5.pt"
        wanted = "random weights" if start == "random" or t == 0 else last
        assert f"from {wanted}, resampled sampling" in lines[at]
        assert lines[at + 1].startswith(f"  {samples:,} samples = {samples // 4096:,} × 4,096, 5 checkpoints")
        assert lines[at + 1].endswith(f"{seen:,} samples seen after it")
        sources = [line.split(":")[0].strip() for line in lines[at + 2 :]][
            : 1 if method == "sequential" and t else t + 3
        ]
        assert sources == ([step.name] if method == "sequential" and t else [str(2014 + i) for i in range(t + 3)])
    launches = [line for line in lines if "torch.distributed.run" in line]
    assert len(launches) == 7
    assert all("--nproc-per-node 8 --standalone" in line and "--dataset_resampled" in line for line in launches)


def test_exact_sampling_is_a_switch_of_the_medium_scripts(tmp_path):
    fake_splits(tmp_path, "datacomp", 1_000_000)
    text = dry_run("run_medium_basic_cumulative.sh", DATA_DIR=tmp_path, RESAMPLED=0)
    assert "exact sampling" in text
    assert "--dataset_resampled" not in text


@pytest.mark.parametrize("setting", ["NPROC=0", "NPROC=abc", "NNODES=-1"])
def test_a_number_of_processes_that_cannot_be_is_one_line(tmp_path, setting):
    name, value = setting.split("=")
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out"), name: value}
    done = subprocess.run(
        ["bash", "scripts/run_medium_basic_cumulative.sh"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("setup: ")]
    assert errors == [f"error: {name} is {value}, not a whole number from 1"]


def test_processes_that_do_not_share_the_batch_are_one_line(tmp_path):
    fake_splits(tmp_path, "datacomp", 1_000_000)
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out"), "NPROC": "3"}
    done = subprocess.run(
        ["bash", "scripts/run_medium_basic_cumulative.sh"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: the batch of 4096 does not divide among 3 processes"
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_the_settings_of_a_loop_is_one_line(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/run_medium_basic_cumulative.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out"), "NPROC": "2"},
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("setup: ")]
    assert errors == [f"error: {tmp_path}/tic/datacomp/yearly/train/2014 is missing: make this split first"]
    assert not (tmp_path / "out").exists()
