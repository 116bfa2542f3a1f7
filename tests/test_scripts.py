"""Every script: its errors, the plans that DRY_RUN=1 prints."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tic_clip.benchmarks import get_benchmark
from tic_clip.storage import write_json
from tic_clip.training.methods import METHODS

ROOT = Path(__file__).parent.parent
BASH_SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


def name(path):
    return str(path.relative_to(ROOT))


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


def fake_splits(data_dir, benchmark, sizes, folder="train"):
    """Tables without shards, all that a plan reads: the size of each split in the order of time, or of all."""
    root = data_dir / get_benchmark(benchmark).root / folder
    splits = [split for step in get_benchmark(benchmark).steps for split in step.splits]
    for split, size in zip(splits, [sizes] * len(splits) if isinstance(sizes, int) else sizes, strict=True):
        write_json(root / split / "sizes.json", {"00000000.tar": size})


def dry_run(script, **settings):
    environment = {**os.environ, "DRY_RUN": "1", **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(["bash", f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Tables of TiC-DataComp, each split of another size, and of TiC-Emoji as it is."""
    folder = tmp_path_factory.mktemp("data")
    fake_splits(folder, "datacomp", MILLIONS)
    fake_splits(folder, "datacomp", [size // 2 for size in MILLIONS], "train_bestpool")
    fake_splits(folder, "datacomp_monthly", range(100_000, 202_000, 1_000))
    fake_splits(folder, "emoji", EMOJI)
    fake_splits(folder, "yfcc15m", [3_000_000, 4_000_000, 4_500_000, 3_500_000])
    fake_splits(folder, "yfcc15m_2011", [9_000_000, 2_500_000, 2_000_000, 1_500_000])
    fake_splits(folder, "redcaps", [5_000_000, 2_000_000, 2_500_000, 2_500_000])
    return emoji_folders(folder)


def emoji_folders(folder):
    """What emoji_data.sh copies from and to."""
    (folder / "eval_files/emojinet").mkdir(parents=True)
    (folder / "eval_files/emojinet/classnames.txt").touch()
    (folder / "tic/emoji/yearly/eval/emojinet").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The bash scripts, beside a setup.sh that does nothing and a python that prints how train.py is called.

    There are two steps, a and b.
    """
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "setup.sh").touch()
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    show = r'printf "%s\t" "$WORLD_SIZE" "$LAUNCH" "$OMP_NUM_THREADS" "$@" && echo'
    cases = f'"-m tic_clip.benchmarks") echo a b ;; "-m tic_clip.launch" | scripts/train.py*) {show} ;;'
    python.write_text(f'#!/bin/sh\ncase "$1 $2" in {cases} esac\n')
    python.chmod(0o755)
    return folder


def calls(checkout, command, **settings):
    """What bash hands to train.py: (WORLD_SIZE, LAUNCH, OMP_NUM_THREADS, words) of each call."""
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(["bash", *command], cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for call in done.stdout.splitlines():
        world_size, launch, threads, *words = call.split("\t")[:-1]
        yield world_size, launch, threads, words


@pytest.fixture
def planned(checkout, data_dir, monkeypatch, capsys):
    """As ``dry_run``, but train.py runs in this process: importing OpenCLIP once is most of what 35 dry runs take."""

    def run(script, **settings):
        given = {"DATA_DIR": data_dir, "NPROC": 8, **settings}
        for world_size, launch, _, words in calls(checkout, [f"scripts/{script}"], **given):
            monkeypatch.setenv("WORLD_SIZE", world_size)
            monkeypatch.setenv("LAUNCH", launch)
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.chdir(ROOT)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(words[0], run_name="__main__")
            assert not ended.value.code
        return capsys.readouterr().out.replace(str(data_dir), "/data")

    return run


# --- Stored plans: tests/plans/{name}.txt is what DRY_RUN=1 prints. After a change that is meant, renew and read them:
#     TIC_RENEW_PLANS=1 bash scripts/run_tests.sh tests/test_scripts.py && git diff tests/plans

MILLIONS = [million * 1_000_000 for million in range(1, 10)]  # 2014 … 2022: steps of 6, 4, 5, 6, 7, 8 and 9 M
EMOJI = [702, 620, 612, 316, 314, 265, 343]
WITHOUT_A_SCRIPT = ("cumulative-exp", "cumulative-equal", "restart", "patching", "lwf")
FIXED = sorted(path.stem for path in ROOT.glob("scripts/run_*_b*_*.sh"))
PACKED = sorted(path.stem for path in ROOT.glob("scripts/run_[yr]*_*.sh"))
PLANS = {
    **{name: (f"{name}.sh", {"OUTPUT_DIR": "/runs"}) for name in FIXED},
    **{f"run_datacomp_{method}": ("run_datacomp.sh", {"METHOD": method}) for method in WITHOUT_A_SCRIPT},
    **{
        f"run_datacomp_{method}_exact": ("run_datacomp.sh", {"METHOD": method, "RESAMPLED": "0"})
        for method in ("cumulative-exp", "cumulative-equal")
    },
    "run_datacomp_debug": ("run_datacomp.sh", {"METHOD": "cumulative", "SCALE": "tic_debug", "FILTER": "bestpool"}),
    **{f"run_emoji_cumulative_{method}": ("run_emoji_cumulative.sh", {"METHOD": method}) for method in METHODS},
    **{name: (f"{name}.sh", {"OUTPUT_DIR": "/runs"}) for name in PACKED},
    "run_yfcc15m_sequential_2011": ("run_yfcc15m_sequential.sh", {"BENCHMARK": "yfcc15m_2011"}),
    **{f"run_{dataset}": (f"run_{dataset}.sh", {"METHOD": "cumulative-exp"}) for dataset in ("yfcc15m", "redcaps")},
    "run_medium_basic_sequential_monthly": ("run_medium_basic_sequential.sh", {"BENCHMARK": "datacomp_monthly"}),
}


def stored(name):
    return ROOT / f"tests/plans/{name}.txt"


def paragraphs(text):
    """The plans of the steps: a line with the step's name, and indented ones."""
    return re.findall(r"^\S.*\n(?: .*\n)*", text, re.MULTILINE)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_the_stored_one(planned, name):
    script, settings = PLANS[name]
    steps = paragraphs(planned(script, **settings))
    text = "".join(steps if len(steps) < 100 else [*steps[:3], steps[-1]])
    if os.environ.get("TIC_RENEW_PLANS"):
        stored(name).parent.mkdir(exist_ok=True)
        stored(name).write_text(text)
    assert text == stored(name).read_text()


def test_each_plan_is_of_a_script_and_each_run_has_one():
    assert {path.stem for path in ROOT.glob("tests/plans/*")} == set(PLANS)
    runs = {path.name for path in ROOT.glob("scripts/run_*.sh")} - {"run_tests.sh", "run_emoji_all.sh"}
    assert {script for script, _ in PLANS.values()} == runs
    assert (len(FIXED), len(PACKED)) == (18, 6)


def test_the_whole_command_prints_the_stored_plan(data_dir):
    text = dry_run("run_medium_basic_cumulative.sh", DATA_DIR=data_dir, OUTPUT_DIR="/runs", NPROC=8)
    assert text.replace(str(data_dir), "/data") == stored("run_medium_basic_cumulative").read_text()


def test_all_methods_of_emoji_are_the_single_ones_one_by_one(planned):
    order = re.search(r"\{METHODS:-(.*)\}", (ROOT / "scripts/run_emoji_all.sh").read_text())[1].split()
    assert sorted(order) == sorted(METHODS)
    assert planned("run_emoji_all.sh") == "".join(stored(f"run_emoji_cumulative_{m}").read_text() for m in order)


# --- What the stored plans must say, worked out by hand.

# scale: (samples per step, iterations, batch, warm-up of a model from random weights)
TABLE = {
    "medium": (18_432_000, 4_500, 4_096, 500),
    "large": (184_320_000, 22_500, 8_192, 500),
    "xlarge": (1_847_296_000, 20_500, 90_112, 10_000),
}
MACS = 41.09e9 / 2  # of ViT-B-16, a sample: OpenCLIP's docs/model_profile.csv has 41.09 GFLOPs
YEARS = [str(year) for year in range(2014, 2023)]


@dataclass
class Plan:
    """A step's paragraph."""

    text: str

    def find(self, pattern):
        return re.search(pattern, self.text)

    @property
    def head(self):
        """step, method, scale, model, start, sampling."""
        return self.find(r"(\S+): (\S+) at (\S+), (\S+) from (.*), (\S+) sampling\n").groups()

    @property
    def numbers(self):
        """samples, iterations, batch, warm-up, samples seen."""
        found = self.find(
            r"  (\S+) samples = (\S+) × (\S+), 5 ch.*, warm-up (\d+), fresh .*; (\S+) samples seen after it\n"
        )
        return tuple(number(text) for text in found.groups())

    @property
    def sources(self):
        """name: (samples, used, size)."""
        found = re.findall(r"  (\S+): \S+%, (\S+) samples of (?:(\S+) of )?(\S+) \(", self.text)
        return {name: (number(samples), number(used or size), number(size)) for name, samples, used, size in found}

    @property
    def macs(self):
        return tuple(map(float, self.find(r"\n  (\S+) MACs, (\S+) after it\n").groups()))


def number(text):
    return int(text.replace(",", ""))


def plans(name):
    return [Plan(text) for text in paragraphs(stored(name).read_text())]


def close(found, wanted, tolerance=0.005):
    return abs(found / wanted - 1) < tolerance


@pytest.mark.parametrize("name", FIXED)
def test_the_stored_plans_of_the_scripts_are_what_the_table_says(name):
    _, scale, selection, method = name.split("_")
    c, iterations, batch, warmup = TABLE[scale]
    assert c == iterations * batch
    assert len(plans(name)) == 7
    million = 1_000_000 if selection == "basic" else 500_000
    for t, plan in enumerate(plans(name)):
        times, seen = {"oracle": (t + 1, (t + 1) * (t + 2) // 2)}.get(method, (1, t + 1))
        fresh = method == "oracle" or t == 0
        step, before = (["2014-2016", *YEARS[3:]][i] for i in (t, max(t - 1, 0)))
        start = "random weights" if fresh else f"/runs/{name[4:]}/{before}/checkpoints/epoch_5.pt"
        assert plan.head == (step, method, f"tic_{scale}", "ViT-B-16", start, "resampled")
        assert plan.numbers == (times * c, times * iterations, batch, warmup if fresh else 0, seen * c)
        assert close(plan.macs[0], times * c * MACS)
        assert close(plan.macs[1], seen * c * MACS)
        names = [step] if method == "sequential" and t else YEARS[: t + 3]
        assert list(plan.sources) == names
        sizes = [(YEARS.index(name) + 1) * million for name in names]
        assert [source[1:] for source in plan.sources.values()] == [(size, size) for size in sizes]
        samples = [source[0] for source in plan.sources.values()]
        assert sum(samples) == times * c
        assert all(abs(share - times * c * size / sum(sizes)) < 1 for share, size in zip(samples, sizes, strict=True))
        assert plan.find("-m tic_clip.launch --nproc-per-node 8 --standalone scripts/train.py --benchmark datacomp ")
        flags = f"--output_dir /runs/{name[4:]} --filter {selection} --dataset_resampled --step {step}"
        assert plan.text.endswith(f" {flags}\n")


@pytest.mark.parametrize("name", PACKED)
def test_the_stored_plans_of_yfcc15m_and_redcaps_are_what_their_tables_say(name):
    _, dataset, method = name.split("_")
    c, steps, sizes = {
        "yfcc15m": (30_720_000, ("2004-2008", "2009-2010", "2011-2012", "2013-2014"), (3.0, 4.0, 4.5, 3.5)),
        "redcaps": (24_576_000, ("2011-2017", "2018", "2019", "2020"), (5.0, 2.0, 2.5, 2.5)),
    }[dataset]
    assert len(plans(name)) == 4
    for t, plan in enumerate(plans(name)):
        times, seen = {"oracle": (t + 1, (t + 1) * (t + 2) // 2)}.get(method, (1, t + 1))
        fresh = method == "oracle" or t == 0
        start = "random weights" if fresh else f"/runs/{dataset}/{method}/{steps[t - 1]}/checkpoints/epoch_5.pt"
        assert plan.head == (steps[t], method, f"tic_{dataset}", "ViT-B-16", start, "exact")
        assert plan.numbers == (times * c, times * c // 1024, 1024, 2_000 if fresh else 0, seen * c)
        first = t if method == "sequential" else 0
        assert list(plan.sources) == list(steps[first : t + 1])
        assert [size for _, _, size in plan.sources.values()] == [1e6 * size for size in sizes[first : t + 1]]
        assert sum(samples for samples, _, _ in plan.sources.values()) == times * c


# Samples of each step so far that are used, in units of 1 M: D new ones, and D old ones.
BUFFERS = {
    "cumulative-exp": [
        [6],
        [4, 4],
        [2.5, 2.5, 5],
        [1.5, 1.5, 3, 6],
        [0.875, 0.875, 1.75, 3.5, 7],
        [0.5, 0.5, 1, 2, 4, 8],
        [0.28125, 0.28125, 0.5625, 1.125, 2.25, 4.5, 9],
    ],
    "cumulative-equal": [
        [6],
        [4, 4],
        [2.5, 2.5, 5],
        [2, 2, 2, 6],
        [1.75, 1.75, 1.75, 1.75, 7],
        [1.6, 1.6, 1.6, 1.6, 1.6, 8],
        [1.5, 1.5, 1.5, 1.5, 1.5, 1.5, 9],
    ],
}


@pytest.mark.parametrize("sampling", ["resampled", "exact"])
@pytest.mark.parametrize("method", BUFFERS)
def test_the_stored_plans_with_a_buffer_have_the_shares_worked_out_by_hand(method, sampling):
    name = f"run_datacomp_{method}" + "_exact" * (sampling == "exact")
    for t, (plan, steps) in enumerate(zip(plans(name), BUFFERS[method], strict=True)):
        assert plan.head[5] == sampling
        wanted = [steps[0] / 6, steps[0] / 3, steps[0] / 2, *steps[1:]]  # 2014-2016 is 1, 2 and 3 M
        assert list(plan.sources) == YEARS[: t + 3]
        for (samples, used, size), millions in zip(plan.sources.values(), wanted, strict=True):
            assert abs(used - millions * 1e6) < 1 if sampling == "exact" else used == size  # whole shards are drawn
            assert abs(samples - 18_432_000 * millions / sum(wanted)) < 4
        assert plan.numbers[::3] == (18_432_000, 0 if t else 500)


def test_the_stored_plans_of_the_other_methods_start_and_spend_as_they_should():
    for t, plan in enumerate(plans("run_datacomp_restart")):
        assert (plan.head[4], plan.numbers[3]) == ("random weights", 500)
        assert list(plan.sources) == YEARS[: t + 3]
    c = 18_432_000
    for t, plan in enumerate(plans("run_datacomp_lwf")):
        assert ("distilled from results/medium_basic_lwf/" in plan.text) == (t > 0)
        assert close(plan.macs[0], c * MACS * (4 / 3 if t else 1))
        assert close(plan.macs[1], c * MACS * (1 + t * 4 / 3))
    held_out = []
    for t, plan in enumerate(plans("run_datacomp_patching")):
        assert plan.head[5] == "exact"
        assert plan.head[4].endswith("checkpoints/patched.pt" if t else "random weights")
        assert all(used == size - 2_000 for _, used, size in plan.sources.values())
        on = " on " + ", ".join(f"2,000 of {year}" for year in held_out) if t else ""
        assert f"patched with coefficient chosen{on}\n" in plan.text
        held_out += list(plan.sources)
    assert [plan.numbers[:4] for plan in plans("run_datacomp_debug")] == [(1_024_000, 1_000, 1_024, 500)] + [
        (1_024_000, 1_000, 1_024, 0)
    ] * 6


def test_the_stored_plan_of_the_months_is_of_102_steps():
    *first, last = plans("run_medium_basic_sequential_monthly")
    assert [plan.head[0] for plan in (*first, last)] == ["201403", "201404", "201407", "202306"]
    assert last.numbers == (18_432_000, 4_500, 4_096, 0, 102 * 18_432_000)
    assert last.head[4] == "results/medium_basic_sequential_monthly/202305/checkpoints/epoch_5.pt"


def test_what_the_environment_says_goes_before_what_a_file_says_but_for_what_its_name_says(checkout, tmp_path):
    def words(script, **settings):
        [call] = calls(checkout, [f"scripts/{script}"], **settings)
        return " ".join(call[3])

    named = words("run_large_bestpool_oracle.sh", METHOD="lwf", SCALE="tic_debug", FILTER="basic", POLICY="released")
    assert "--method oracle --scale tic_large " in named
    assert named.endswith("--filter bestpool --policy released --dataset_resampled --step all --dry_run")
    assert "--dataset_resampled" not in words("run_medium_basic_cumulative.sh", RESAMPLED=0)
    assert "--dataset_resampled" not in words("run_datacomp.sh", METHOD="patching")
    assert "--dataset_resampled" in words("run_datacomp.sh", METHOD="patching", RESAMPLED=1, COEFFICIENT=0.5)
    assert "--remote s3://b/x/large_basic_oracle " in words("run_large_basic_oracle.sh", REMOTE="s3://b/x/")
    assert "--remote r/lwf " in words("run_emoji_all.sh", REMOTE="r", METHODS="lwf", DATA_DIR=emoji_folders(tmp_path))


def test_an_unknown_first_step_ends_the_run_before_anything_is_trained_or_evaluated(tmp_path):
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "OUTPUT_DIR": str(tmp_path / "out"), "FIRST_STEP": "1999"}
    done = subprocess.run(
        ["bash", "scripts/run_medium_basic_oracle.sh"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    assert "error: unknown step '1999' of datacomp" in done.stderr.replace("tic_clip.TicError", "error")
    assert "evaluate" not in done.stderr
    assert "finished" not in done.stderr


def test_no_method_is_one_line(checkout):
    done = subprocess.run(["bash", "scripts/run_datacomp.sh"], cwd=checkout, capture_output=True, text=True, env={})
    assert done.returncode == 1
    assert re.fullmatch(r"error: METHOD is not set: .*\n", done.stderr)


# --- Several machines and Slurm.


def test_each_machine_has_its_own_launch(checkout):
    several = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "NPROC": 8, "OMP_NUM_THREADS": 3}
    [(world_size, launch, threads, _)] = calls(checkout, ["scripts/run_medium_basic_oracle.sh"], **several)
    assert (world_size, threads) == ("16", "3")
    assert launch == (
        ".venv/bin/python -m tic_clip.launch --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr a "
        "--master-port 29500"
    )


def test_each_step_of_several_machines_is_checked_and_has_a_port_of_its_own(checkout):
    """A machine that is done with a step before rank 0 would else join the rendezvous that is over, and hang."""
    several = {"DRY_RUN": 0, "NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 7000}
    all_steps, *found = calls(checkout, ["scripts/run_medium_basic_oracle.sh"], **several)
    assert " ".join(all_steps[3]).endswith("--step all --check")  # all of them are planned before the first is trained
    assert [call[0] for call in found] == ["2", "", "2", ""]
    for (*_, check), (_, launch, _, words), step, port in zip(
        found[::2], found[1::2], "ab", ("7000", "7001"), strict=True
    ):
        assert check[-3:] == ["--step", step, "--check"]
        assert launch.split()[-2:] == ["--master-port", port]
        assert [".venv/bin/python", *words] == [*launch.split(), *check[:-1]]


@pytest.fixture
def slurm(checkout, tmp_path):
    """A Slurm of four nodes on this machine: (a job's script, its environment). What scontrol is told goes to $TOLD."""
    shutil.copy(ROOT / "scripts/slurm.sh", tmp_path / "slurm_script")  # as slurmd does
    fakes = {
        "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" node-{7..10}; else echo "$*" >> "$TOLD"; fi',
        "srun": 'while [[ $1 = --* ]]; do shift; done; [ -z "${HANG:-}" ] || { touch "$HANG"; exec sleep 60; }\n'
        'for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_NODEID=$i "$@" || exit; done',
    }
    for name, body in fakes.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return str(tmp_path / "slurm_script"), {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "node-[7-10]",
        "SLURM_NNODES": "4",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_a_slurm_job_starts_the_script_on_every_node(checkout, slurm):
    script, environment = slurm
    found = list(calls(checkout, [script, "scripts/run_large_basic_cumulative.sh"], **environment))
    assert [call[0] for call in found] == ["32"] * 4
    assert [call[1].split("tic_clip.launch ")[1] for call in found] == [
        f"--nproc-per-node 8 --nnodes 4 --node-rank {i} --master-addr node-7 --master-port 24567" for i in range(4)
    ]
    [call] = calls(checkout, [script, "scripts/run_large_basic_oracle.sh"], **{**environment, "SLURM_NNODES": "1"})
    assert call[1].endswith("--nproc-per-node 8 --standalone")


def test_a_slurm_job_requeues_itself_before_its_time_is_over(slurm, tmp_path):
    script, environment = slurm
    command = ["bash", script, "scripts/run_large_basic_cumulative.sh"]
    begun = tmp_path / "begun"
    job = subprocess.Popen(command, env={**environment, "HANG": str(begun)}, start_new_session=True)
    try:
        until = time.monotonic() + 10
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(10) != 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    assert Path(environment["TOLD"]).read_text() == "requeue 1234567\n"


@pytest.mark.parametrize("arguments", [[], ["scripts/run_nothing.sh"], ["scripts/run_tests.sh", "tests"]])
def test_a_slurm_job_without_a_script_is_one_line(slurm, arguments):
    script, environment = slurm
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(r"error: no script in '.*': give one run_\*\.sh, .*\n", done.stderr)


def test_the_page_on_clusters_names_scripts_and_settings_that_exist():
    text = (ROOT / "docs/cluster.md").read_text()
    shell = "".join(path.read_text() for path in ROOT.glob("scripts/*.sh"))
    named = re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:sh|py)", text)
    assert len(named) > 5
    assert all((ROOT / script).is_file() for script in named)
    settings = re.findall(r"\b([A-Z][A-Z_]+)=", text)
    assert {"NODE_RANK", "REMOTE", "BENCHMARK"} <= set(settings)
    assert [name for name in settings if not re.search(rf"\b{name}\b", shell)] == []


@pytest.mark.parametrize("setting", ["NPROC=0", "NPROC=abc", "NNODES=-1", "NODE_RANK=1", "NODE_RANK=-1"])
def test_a_number_of_processes_that_cannot_be_is_one_line(checkout, setting):
    name, value = setting.split("=")
    environment = {"PATH": os.environ["PATH"], name: value}
    done = subprocess.run(
        ["bash", "scripts/run_medium_basic_cumulative.sh"],
        cwd=checkout,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    wanted = "a number from 0 to 0" if name == "NODE_RANK" else "a whole number from 1"
    assert done.stderr == f"error: {name} is {value}, not {wanted}\n"


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
    (error,) = errors
    assert error.startswith(f"error: {tmp_path}/tic/datacomp/yearly/train/2014 is missing: run dataset_creation/")
    assert not (tmp_path / "out").exists()


def released(tmp_path, *models):
    """Empty checkpoints of released models, and the tables of TiC-DataComp's evaluation sets."""
    for model in models:
        (tmp_path / f"models/TiC-CLIP-{model}/checkpoints").mkdir(parents=True)
        for year in (2016, 2022):
            (tmp_path / f"models/TiC-CLIP-{model}/checkpoints/{year}.pt").touch()
    root = tmp_path / "data/tic/datacomp/yearly/eval"
    for period in get_benchmark("datacomp").periods:
        for task in ("retrieval", "datacompnet"):
            write_json(root / task / period / "sizes.json", {"00000000.tar": 3})
    for text in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (root / "datacompnet" / text).write_text("{c}")
    return {"MODELS_DIR": tmp_path / "models", "DATA_DIR": tmp_path / "data", "OUT": tmp_path / "out"}


def test_what_released_models_lack_is_printed(tmp_path):
    lines = dry_run("evaluate_released.sh", **released(tmp_path, "basic-oracle", "bestpool-cumulative")).splitlines()
    lines = [line for line in lines if not line.startswith("setup: ")]
    heads = [line for line in lines if not line.startswith("  ")]
    folder = tmp_path / "models/TiC-CLIP-{}/checkpoints"
    assert heads == [
        f"{model} {step}: ViT-B-16 {str(folder).format(model)}/{year}.pt"
        for model in ("basic-oracle", "bestpool-cumulative")
        for step, year in (("2014-2016", 2016), ("2022", 2022))
    ]
    assert len(lines) == len(heads) * (1 + 18)
    assert lines[1].split()[0] == "tic/datacomp/retrieval/yearly/2014"
    assert not (tmp_path / "out").exists()


def test_released_models_that_are_not_there_are_one_line(tmp_path):
    environment = {**os.environ, "MODELS_DIR": str(tmp_path)}
    command = ["bash", "scripts/evaluate_released.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    said = f"error: {tmp_path} has no TiC-CLIP-*/: run: bash scripts/fetch_models.sh {tmp_path}"
    assert done.stderr.splitlines()[-1] == said


def test_the_settings_of_an_evaluation_are_flags(checkout, tmp_path):
    """The loop's and that of released models, with a python that prints how it is called."""
    shown = shutil.copytree(checkout, tmp_path / "checkout", symlinks=True)
    (shown / ".venv/bin/python").write_text('#!/bin/sh\ncase "$1" in *evaluate.py|*report.py) echo "$@" ;; esac\n')
    (shown / "models/TiC-CLIP-basic-oracle").mkdir(parents=True)
    settings = {"IMAGENET_VAL": "/val", "TASKLIST": "list.yml", "PRECISION": "amp", "SKIP_BAD": "1"}
    environment = {"PATH": os.environ["PATH"], "DATA_DIR": "d", "OUTPUT_DIR": "o", "MODELS_DIR": "models", **settings}
    printed = {}
    for script in ("run_medium_basic_oracle.sh", "evaluate_released.sh"):
        command = ["bash", f"scripts/{script}"]
        done = subprocess.run(command, cwd=shown, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed[script] = done.stdout.splitlines()
    checked, evaluated, reported = printed["run_medium_basic_oracle.sh"]
    what = "--data_dir d --imagenet_val /val --tasklist list.yml --precision amp --skip_bad"
    assert checked == f"scripts/evaluate.py --check --benchmark datacomp {what}"
    assert evaluated == f"scripts/evaluate.py --train_output_dir o/medium_basic_oracle {what}"
    assert reported == "scripts/report.py o/medium_basic_oracle --out o/medium_basic_oracle"
    evaluated, reported = printed["evaluate_released.sh"]
    own = "--released models/TiC-CLIP-basic-oracle --output_dir results/released/TiC-CLIP-basic-oracle"
    assert (
        evaluated
        == f"scripts/evaluate.py {own} --data_dir d --tasklist list.yml --imagenet_val /val --precision amp --skip_bad"
    )
    assert reported == "scripts/report.py results/released/TiC-CLIP-basic-oracle --out results/released"


# --- TiC-YFCC15M and TiC-RedCaps: from their sources, which may be away


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOURCE": "nowhere"}, "error: SOURCE is nowhere, which is not there (as seen from /"),
        ({"BENCHMARK": "yfcc15m_2011"}, "error: BENCHMARK is yfcc15m_2011, which is none of redcaps"),
        ({}, "error: there is neither sources/redcaps (SOURCE) to make the data of, nor data/tic/redcaps (DATA_DIR)"),
    ],
)
def test_without_a_source_or_data(checkout, settings, message):
    environment = {"PATH": os.environ["PATH"], **settings}
    command = ["bash", "scripts/run_redcaps_cumulative.sh"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
