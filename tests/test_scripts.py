"""The run scripts: their settings, what they plan and start, their errors."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, wait_for
from forked import Script

from tic_clip.benchmarks import get_benchmark
from tic_clip.storage import write_json
from tic_clip.training.config import Config
from tic_clip.training.methods import METHODS
from tic_clip.training.plan import make_plan


def test_bash_parses_each_script_which_stops_at_the_first_error():
    for script in (*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert not os.access(script, os.X_OK) or "\nset -euo pipefail\n" in script.read_text(), script


def test_no_flag_of_ours_is_taken_by_torchrun(monkeypatch):
    """torchrun takes a prefix of its own flags, in the script's arguments too."""
    from torch.distributed.run import get_args_parser

    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    assert "--logs-specs" in own
    monkeypatch.syspath_prepend(ROOT / "scripts")
    evaluation = runpy.run_path(str(ROOT / "scripts/evaluate.py"))["make_parser"]()
    names = [each.name for each in fields(Config)] + [action.dest for action in evaluation._actions]
    assert not [name for name in names for option in own if name != "help" and option.startswith(f"--{name}")]


# --- What a script hands to run.py, and what run.py makes of it


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The bash scripts, beside a setup.sh that does nothing and a python that prints its arguments and environment."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "setup.sh").touch()
    code = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))"
    write_program(folder / ".venv/bin/python", f"#!{sys.executable}\n{code}\n")
    return folder


def bash(checkout, *command, **settings):
    environment = {"PATH": os.environ["PATH"], **{name: str(value) for name, value in settings.items()}}
    return subprocess.run(["bash", *command], cwd=checkout, capture_output=True, text=True, env=environment)


def calls(checkout, *command, **settings):
    """Each call of python that a script makes: (its words, its environment)."""
    done = bash(checkout, *command, **settings)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def run(checkout, monkeypatch):
    """Run a script: bash as it is, run.py in this process."""

    def call(script, **settings):
        [(words, environment)] = calls(checkout, f"scripts/{script}", **settings)
        for name in os.environ.keys() - {"PATH", "HOME", "TMPDIR"}:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts/run.py"), run_name="__main__")
        return ended.value.code

    return call


CUMULATIVE, ORACLE = "run_medium_basic_cumulative.sh", "run_medium_basic_oracle.sh"


@pytest.fixture
def data_dir(tmp_path):
    """Tables without shards, all that a plan reads; each split is larger than the one before."""
    folders = {"datacomp": 1_000_000, "datacomp_monthly": 100_000, "yfcc15m": 3_000_000, "redcaps": 3_000_000}
    for name, unit in folders.items():
        for i, split in enumerate((split for step in get_benchmark(name).steps for split in step.splits), 1):
            write_json(tmp_path / get_benchmark(name).root / f"train/{split}/sizes.json", {"00000000.tar": i * unit})
    return tmp_path


@pytest.mark.parametrize(
    ("script", "settings", "steps", "row"),
    [
        (CUMULATIVE, {}, 7, ["2022", "18,432,000", "4,500", "resampled", "/medium_basic_cumulative:"]),
        (
            CUMULATIVE,
            {"NEXT_WARMUP": 9999, "KEEP_OPTIMIZER": 1},
            7,
            ["9,999 (longer than the step)", " with its optimizer ", "9 splits: 2014 2.2%, 2015 4.4%, …, 2022 20.0%"],
        ),
        (ORACLE, {}, 7, ["2022", "129,024,000", "31,500", "random weights"]),
        ("run_medium_basic_sequential.sh", {"BENCHMARK": "datacomp_monthly"}, 102, ["202306", "_sequential_monthly:"]),
        ("run_datacomp.sh", {"METHOD": "lwf", "SCALE": "tic_large"}, 7, ["2022", "184,320,000", "/large_basic_lwf:"]),
        ("run_datacomp.sh", {"METHOD": "patching"}, 7, ["2022", "exact", " 2021/checkpoints/patched.pt"]),
        ("run_yfcc15m.sh", {"METHOD": "cumulative"}, 4, ["2013-2014", "30,720,000", "exact", "/yfcc15m/cumulative:"]),
        ("run_redcaps.sh", {"METHOD": "cumulative", "OUT": "o"}, 4, ["2020", "24,576,000", "o: "]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_dry_run_prints_a_line_a_step(run, data_dir, capsys, script, settings, steps, row):
    assert not run(script, DRY_RUN="yes", DATA_DIR=data_dir, NPROC=8, **settings)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == steps
    assert [word for word in row if word not in f"{head} {lines[-1]}"] == []


def test_a_benchmark_and_a_scale_of_files(run, tmp_path, capsys):
    benchmark, scale = tmp_path / "benchmark.yaml", tmp_path / "small.yaml"
    benchmark.write_text("name: mine\nsteps: [2014-2016, 2017Q1]\n")
    scale.write_text("batch_size: 64\nsamples_per_step: 640\nwarmup: 3\nmodel: ViT-Tiny-8-48\n")
    for split in ("2014-2016", "2017Q1"):
        write_json(tmp_path / f"tic/mine/steps/train/{split}/sizes.json", {"00000000.tar": 1000})
    settings = {"BENCHMARK": benchmark, "SCALE": scale, "METHOD": "cumulative", "DATA_DIR": tmp_path}
    assert not run("run.sh", DRY_RUN=1, **settings)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert "/mine/cumulative: mine, all, cumulative, small, ViT-Tiny-8-48, exact sampling" in head
    assert [line.split()[:4] for line in lines] == [[step, "640", "10", "×"] for step in ("2014-2016", "2017Q1")]
    benchmark.unlink()
    assert run("run.sh", **settings).startswith(f"error: {benchmark}")


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        (CUMULATIVE, {"METHOD": "lwf"}, "METHOD is lwf, but run_medium"),
        ("run_emoji_cumulative.sh", {"BENCHMARK": "datacomp"}, "BENCHMARK is datacomp, but run_emoji"),
        ("run_redcaps.sh", {"BENCHMARK": "yfcc15m_2011"}, "BENCHMARK is yfcc15m_2011, but run_redcaps"),
        ("run_datacomp.sh", {}, "METHOD is not set: it must be one of oracle, "),
        (CUMULATIVE, {"METHODS": "lwf"}, "METHODS is set, and METHOD is cumulative for run_medium"),
        (CUMULATIVE, {"SEED": 1, "SEEDS": "1 2"}, "SEEDS is set, and SEED is 1 for run_medium"),
        (CUMULATIVE, {"SEEDS": "0 x"}, "argument SEED: 'x' is not a whole number from 0"),
        ("run_datacomp.sh", {"METHODS": " "}, "METHOD is not set"),
        ("run_datacomp.sh", {"METHODS": "lwf magic"}, "METHODS is magic: it must be one of oracle, "),
        ("run_datacomp.sh", {"METHOD": "lwf oracle"}, "METHOD is lwf oracle: it must be one of oracle, "),
        (CUMULATIVE, {"LR": "1e-3,1e-4"}, "LR has 2 numbers, datacomp has 7 steps"),
        (CUMULATIVE, {"SAMPLE_PER_STEP": 640}, "SAMPLE_PER_STEP: did you mean SAMPLES_PER_STEP?"),
        (CUMULATIVE, {"RESAMPLED": "maybe"}, "RESAMPLED: 'maybe' is not one of"),
        (CUMULATIVE, {"DRY_RUN": "2"}, "DRY_RUN: '2' is not one of"),
        (CUMULATIVE, {"MAX_KEPT": 0}, "MAX_KEPT: '0' is not a whole number from 1"),
        (CUMULATIVE, {"POLICY": "kept"}, "POLICY is gone: set NEXT_WARMUP"),
        (CUMULATIVE, {"BLOCK": 9, "RESUME_EVERY": 9}, "BLOCK is the old name of RESUME_EVERY"),
        (CUMULATIVE, {"NPROC": 3}, "the batch of 4096 does not divide among 3 processes"),
        (CUMULATIVE, {"EVALUATE": "often"}, "EVALUATE is often: it must be one of end, step"),
        (CUMULATIVE, {"NPROC": 0}, "NPROC is 0, not a whole number from 1"),
        (CUMULATIVE, {"NODE_RANK": 1}, "NODE_RANK is 1, not a number from 0 to 0"),
        (CUMULATIVE, {"NNODES": 2}, "MASTER_ADDR is not set: NNODES is 2"),
        (CUMULATIVE, {"PRECISION": "fp8"}, "argument PRECISION: 'fp8' is not fp32, amp or amp_bf16"),
        (CUMULATIVE, {"OPENCLIP_FLAGS": "--lr=1"}, "argument OPENCLIP_FLAGS: OpenCLIP's --lr is set by the plan"),
        (CUMULATIVE, {"DATA_DIR": "/no"}, "/no/tic/datacomp/yearly/train/2014 is missing"),
        ("run_datacomp.sh", {"METHOD": "oracle", "FILTER": "bestpool"}, "train_bestpool/2014 is missing: run dataset_"),
        (CUMULATIVE, {}, "/eval/retrieval/2014 is missing: run dataset_creation/tic-datacomp/build_tic_"),
        (CUMULATIVE, {"RANK": 0}, "this starts torchrun itself: set NPROC"),
        ("run_yfcc15m.sh", {"SOURCE": "/tmp", "METHOD": "cumulatve"}, "METHOD is cumulatve: it must be one of oracle"),
        ("run_redcaps.sh", {"METHOD": "oracle", "SOURCE": "nowhere"}, "SOURCE is nowhere, which does not exist"),
        ("run.sh", {"BENCHMARK": "emoji", "TABLE": "t.csv"}, "TABLE needs BENCHMARK=LISTS/benchmark.yaml, the "),
        ("run.sh", {"TABLE": "my/t.csv.gz", "DRY_RUN": 1}, "/lists/t/benchmark.yaml is missing: a dry run does"),
        ("run_redcaps.sh", {"METHOD": "oracle", "DATA_DIR": "/no"}, "neither sources/redcaps (SOURCE) to make the"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(run, data_dir, script, settings, message):
    code = run(script, **{"DATA_DIR": data_dir, "OUT": data_dir / "out", **settings})
    assert code.startswith("error: ")
    assert message in code
    assert "\n" not in code
    assert not (data_dir / "out").exists()


def test_old_names_are_taken_and_the_new_ones_said_and_other_variables_are_left_alone(run, data_dir, capsys):
    old = {"BUFFER": 0.5, "BLOCK": 50, "METHOD": "cumulative-equal"}
    others = dict.fromkeys(("MKL_NUM_THREADS", "OMP_NUM_THREADS", "MODELS", "RESULTS", "MODEL_DIR", "DATASET"), 4)
    assert not run("run_datacomp.sh", DRY_RUN=1, DATA_DIR=data_dir, **old, **others)
    lines = capsys.readouterr().err.splitlines()
    assert {"BUFFER is now called REPLAY", "BLOCK is now called RESUME_EVERY"} <= set(lines)


@pytest.fixture
def started(run, data_dir, monkeypatch, tmp_path):
    """What run.py starts: the words of each command but train.py's own checks, and its OMP_NUM_THREADS."""
    log = tmp_path / "log"
    python = write_program(tmp_path / "python", f'#!/bin/bash\necho "$* OMP_NUM_THREADS=$OMP_NUM_THREADS" >> {log}\n')

    def call(script, **settings):
        log.write_text("")
        monkeypatch.setattr(sys, "executable", python)
        code = run(script, **{"DATA_DIR": data_dir, **settings})
        return code, log.read_text().splitlines()

    return call


SECOND = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a"}


def test_a_machine_of_several_starts_torchrun_once_for_all_steps_of_each_run(started, tmp_path):
    several = {"MASTER_PORT": 7000, "NPROC": 8, "REMOTE": "s3://b/x/", "SEEDS": "0 1"}
    code, [training, evaluation, training_1, evaluation_1] = started(ORACLE, OUTPUT_DIR="/runs", **SECOND, **several)
    assert not code
    assert evaluation.startswith(
        f"-m torch.distributed.run --nproc-per-node 8 --standalone {ROOT}/scripts/evaluate.py "
        f"--train_output_dir /runs/medium_basic_oracle --data_dir {tmp_path} "
    )
    assert training.startswith(
        "-m torch.distributed.run --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr a --master-port 7000 "
        f"{ROOT}/scripts/train.py --benchmark=datacomp --method=oracle --scale=tic_medium "
    )
    assert training.endswith(" --output_dir /runs/medium_basic_oracle --step all OMP_NUM_THREADS=1")
    assert "--remote=s3://b/x/medium_basic_oracle " in training
    for command in training_1, evaluation_1:
        assert "output_dir /runs/medium_basic_oracle_seed1 " in command


def test_each_step_is_trained_and_evaluated_before_the_next_one(started, tmp_path):
    """What is done and was evaluated is not started again; the last step that is done may lack its results."""
    out = tmp_path / "out"
    names = {"benchmark": "datacomp", "method": "oracle", "scale": "tic_medium", "data_dir": str(tmp_path)}
    for step in ("2014-2016", "2017"):
        plan = make_plan(Config(step=step, output_dir=str(out), **names), 4)
        write_json(out / step / "plan.json", plan)
        write_json(out / step / "done.json", {"plan": plan, "checkpoint": "plan.json"})
    code, commands = started(ORACLE, RESAMPLED=0, EVALUATE="step", NPROC=2, OUT=out, **SECOND)
    assert not code
    called = [re.search(r"(\w+)\.py .*?(?:--step (\w+) |$)", command).groups() for command in commands]
    years = ("2017", "2018", "2019", "2020", "2021", "2022")
    assert called == [call for year in years for call in (("train", year), ("evaluate", None))]


def test_sources_are_split_and_packed_with_the_settings(started, tmp_path):
    (tmp_path / "source").mkdir()
    settings = {"SOURCE": tmp_path / "source", "TEST_SHARE": "0.2", "OVERWRITE": "true", "DATA_DIR": tmp_path / "new"}
    code, [splits, tars] = started("run_yfcc15m.sh", METHOD="oracle", BENCHMARK="yfcc15m_2011", **settings)
    assert "is missing" in code  # nothing has been packed
    creation = f"{ROOT}/dataset_creation"
    assert splits.startswith(f"{creation}/tic-yfcc15m/create_splits.py --csv-path {tmp_path}/source/yfcc15m.csv ")
    assert " --overwrite --benchmark yfcc15m_2011 " in splits
    assert " --test_share=0.2 " in splits
    assert tars.startswith(f"{creation}/create_tars.py --csv-path {tmp_path}/new/lists/yfcc15m_2011 --image-path ")
    assert " --overwrite " in tars


def test_the_whole_command_prints_the_plan_wherever_it_is_called(data_dir):
    """Relative folders count from where the user stands; what takes seconds to import is left to training."""
    environment = {**os.environ, "DATA_DIR": data_dir.name, "DRY_RUN": "1", "NPROC": "8", "OUTPUT_DIR": "runs"}
    environment["PYTHONPROFILEIMPORTTIME"] = "1"
    command = ["bash", f"{ROOT}/scripts/{CUMULATIVE}"]
    done = subprocess.run(command, cwd=data_dir.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "runs/medium_basic_cumulative: datacomp, basic, cumulative, tic_medium" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "numpy" in imported
    assert not {"torch", "pandas", "matplotlib"} & imported


def test_all_methods_of_emoji_are_run_beside_each_other(checkout):
    paper = METHODS.keys() - {"ewc", "averaging"}
    folders = (({}, "results/emoji"), ({"OUTPUT_DIR": "o"}, "o/emoji"), ({"RESULTS": "r"}, "r"), ({"OUT": "x"}, "x"))
    for settings, out in (*folders, ({"METHOD": "lwf"}, "results/emoji")):
        [(words, environment)] = calls(checkout, "scripts/run_emoji_all.sh", **settings)
        assert words[-2:] == ["--benchmark", "emoji"]
        assert (environment["OUT"], "METHOD" in environment) == (out, False)
        assert set(environment["METHODS"].split()) == ({"lwf"} if settings.get("METHOD") else paper)


@pytest.fixture
def swept(run, data_dir, monkeypatch):
    """What run.py has done by train.py, evaluate.py and report.py, which do nothing: seeds, copies and folders."""

    def call(script, **settings):
        done = []
        for name in ("train", "evaluate", "report"):

            def main(words, *_, name=name):
                if not {"--check", "--dry_run"} & set(words):
                    done.append(" ".join([name, *(word for word in words if re.match("--(seed|remote)=|runs", word))]))

            module = ModuleType(name)
            module.main, module.parse_args = main, list
            monkeypatch.setitem(sys.modules, name, module)
        assert not run(script, **{"DATA_DIR": data_dir, **settings})
        return done

    return call


def test_methods_and_seeds_are_run_and_compared(swept):
    done = swept("run_datacomp.sh", METHODS="lwf sequential", SEEDS="0,2,0", OUTPUT_DIR="runs", REMOTE="s3://b")
    expected, folders = [], []
    for name in ("lwf", "lwf_seed2", "sequential", "sequential_seed2"):
        copy, out = f"--remote=s3://b/medium_basic_{name}", f"runs/medium_basic_{name}"
        seed = f"--seed={2 if 'seed2' in name else 0}"
        expected += [f"train {seed} {copy} {out}", f"evaluate {out}", f"report {out} {out}"]
        folders.append(out)
    assert done == [*expected, f"report {' '.join(folders)} runs/medium_basic_comparison"]


def test_out_is_the_folder_of_one_run_or_of_several(swept):
    done = swept(CUMULATIVE, SEEDS="1", OUT="runs", REMOTE="c")
    assert done[0] == "train --seed=1 --remote=c/cumulative_seed1 runs/cumulative_seed1"
    assert done[-1] == "report runs/cumulative_seed1 runs/comparison"
    done = swept(CUMULATIVE, SEED="1", OUT="runs", REMOTE="c")
    assert done == ["train --seed=1 --remote=c runs", "evaluate runs", "report runs runs"]


def test_what_a_killed_run_has_started_gets_to_know(tmp_path):
    """As torchrun does, which then ends its processes."""
    child = (
        f"trap 'mkdir {tmp_path}/told; exit' TERM; touch {tmp_path}/begun; for i in {{1..1200}}; do sleep 0.05; done"
    )
    code = f"import sys; sys.path.insert(0, 'scripts'); import run; run.start(['bash', '-c', {child!r}])"
    (tmp_path / "script.py").write_text(code)
    run = Script(tmp_path / "script.py", folder=ROOT)
    wait_for((tmp_path / "begun").exists)
    assert not (tmp_path / "told").exists()
    os.kill(run.processes[0].pid, signal.SIGKILL)
    wait_for((tmp_path / "told").exists)
    assert (tmp_path / "told").is_dir()


# --- Slurm


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
        write_program(tmp_path / "bin" / name, f"#!/usr/bin/env bash\n{body}\n")
    names = {"SUBMIT_DIR": checkout, "JOB_ID": 1234567, "JOB_NODELIST": "node-[7-10]", "NNODES": 4, "GPUS_ON_NODE": 8}
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}
    return str(tmp_path / "slurm_script"), environment | {f"SLURM_{name}": str(names[name]) for name in names}


def test_a_slurm_job_starts_the_script_on_every_node(checkout, slurm):
    script, environment = slurm
    nodes = [called[1] for called in calls(checkout, script, f"scripts/{CUMULATIVE}", **environment)]
    names = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    wanted = [["8", "4", str(i), "node-7", "24567"] for i in range(4)]
    assert [[node[name] for name in names] for node in nodes] == wanted


def test_a_slurm_job_requeues_itself_before_its_time_is_over(slurm, tmp_path):
    script, environment = slurm
    environment["HANG"] = str(tmp_path / "begun")
    job = subprocess.Popen(["bash", script, f"scripts/{CUMULATIVE}"], env=environment, start_new_session=True)
    try:
        wait_for((tmp_path / "begun").exists)
        os.kill(job.pid, signal.SIGUSR1)
        assert job.wait(10) != 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    assert Path(environment["TOLD"]).read_text() == "requeue 1234567\n"


# --- Released models


def test_the_settings_of_released_models_are_flags(checkout, tmp_path):
    (tmp_path / "TiC-CLIP-basic-oracle").mkdir()
    settings = {"IMAGENET_VAL": "/val", "TASKLIST": "list.yml", "PRECISION": "amp", "SKIP_BAD": "1", "DATA_DIR": "d"}
    settings["MODELS_DIR"] = tmp_path
    _, (evaluated, _), (reported, _) = calls(checkout, "scripts/evaluate_released.sh", **settings)
    own = f"--released {tmp_path}/TiC-CLIP-basic-oracle --output_dir results/released/TiC-CLIP-basic-oracle"
    what = "--data_dir d --tasklist list.yml --imagenet_val /val --precision amp --skip_bad"
    assert " ".join(evaluated).endswith(f"scripts/evaluate.py {own} {what}")
    assert " ".join(reported).endswith("report.py results/released/TiC-CLIP-basic-oracle --out results/released")
    _, (evaluated, _) = calls(checkout, "scripts/evaluate_released.sh", DRY_RUN="yes", **settings)
    assert evaluated[-1] == "--dry_run"
