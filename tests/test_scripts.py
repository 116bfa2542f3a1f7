"""Every script: its errors, the plans that DRY_RUN=1 prints."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tic_clip.benchmarks import get_benchmark
from tic_clip.storage import write_json
from tic_clip.training.config import add_flags

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

    parser = argparse.ArgumentParser()
    add_flags(parser)
    flags = [option for action in parser._actions for option in action.option_strings if option not in ("-h", "--help")]
    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    assert "--method" in flags
    assert "--logs-specs" in own
    assert [(flag, option) for flag in flags for option in own if option.startswith(flag)] == []


def dry_run(script, **settings):
    environment = {**os.environ, "DRY_RUN": "1", **{key: str(value) for key, value in settings.items()}}
    done = subprocess.run(["bash", f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Tables of TiC-DataComp without shards, all that a plan reads."""
    folder = tmp_path_factory.mktemp("data")
    for year in range(2014, 2023):
        write_json(folder / f"tic/datacomp/yearly/train/{year}/sizes.json", {"00000000.tar": 1_000_000})
    return folder


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


def test_a_dry_run_is_a_table_of_a_line_a_step(data_dir):
    """The whole command; tests/test_plans.py has the numbers."""
    text = dry_run("run_medium_basic_cumulative.sh", DATA_DIR=data_dir, OUTPUT_DIR="/runs", NPROC=8)
    head, columns, *steps = text.splitlines()
    assert head.startswith(
        "datacomp, basic, cumulative, tic_medium, ViT-B-16, resampled sampling, 5 checkpoints a step"
    )
    assert columns.startswith("step       samples     iterations × batch")
    assert [line.split()[0] for line in steps] == [step.name for step in get_benchmark("datacomp").steps]
    assert round(float(steps[0].split()[5]) / (18_432_000 * 41.09e9 / 2), 2) == 1  # GFLOPs of OpenCLIP's ViT-B-16


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


def test_processes_that_do_not_share_the_batch_are_one_line(data_dir, tmp_path):
    environment = {**os.environ, "DATA_DIR": str(data_dir), "OUTPUT_DIR": str(tmp_path / "out"), "NPROC": "3"}
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
