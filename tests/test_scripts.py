"""The run scripts: their settings, what they plan and start, their errors."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from tic_clip.benchmarks import get_benchmark
from tic_clip.storage import write_json
from tic_clip.training.config import Config
from tic_clip.training.methods import METHODS
from tic_clip.training.plan import make_plan

BASH_SCRIPTS = sorted([*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


@pytest.mark.parametrize("script", BASH_SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_it_and_it_stops_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if os.access(script, os.X_OK):
        assert "\nset -euo pipefail\n" in script.read_text()


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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The bash scripts, beside a setup.sh that does nothing and a python that prints its arguments and environment."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "setup.sh").touch()
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    code = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))"
    python.write_text(f"#!{sys.executable}\n{code}\n")
    python.chmod(0o755)
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
    forget_scripts()

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

    yield call
    forget_scripts()


def forget_scripts():
    """DataComp and bench/ have scripts of the same names."""
    for name in ("train", "evaluate", "report"):
        sys.modules.pop(name, None)


CUMULATIVE, ORACLE = "run_medium_basic_cumulative.sh", "run_medium_basic_oracle.sh"
MILLIONS = [million * 1_000_000 for million in range(1, 10)]  # 2014 … 2022: steps of 6, 4, 5, 6, 7, 8 and 9 M


def fake_splits(data_dir, benchmark, sizes, folder="train"):
    """Tables without shards, all that a plan reads: the size of each split in the order of time, or of all."""
    root = data_dir / get_benchmark(benchmark).root / folder
    splits = [split for step in get_benchmark(benchmark).steps for split in step.splits]
    for split, size in zip(splits, [sizes] * len(splits) if isinstance(sizes, int) else sizes, strict=True):
        write_json(root / split / "sizes.json", {"00000000.tar": size})


@pytest.fixture
def data_dir(tmp_path):
    fake_splits(tmp_path, "datacomp", MILLIONS)
    fake_splits(tmp_path, "datacomp", [size // 2 for size in MILLIONS], "train_bestpool")
    fake_splits(tmp_path, "datacomp_monthly", 100_000)
    fake_splits(tmp_path, "yfcc15m", 3_000_000)
    fake_splits(tmp_path, "redcaps", 3_000_000)
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
    code = run("run.sh", TABLE="t.csv", **{**settings, "BENCHMARK": "emoji"})
    assert code == "error: TABLE needs BENCHMARK=LISTS/benchmark.yaml, the file that is made of it, not 'emoji'"
    code = run("run.sh", TABLE="my/t.csv.gz", DRY_RUN=1, METHOD="cumulative", SCALE=scale, DATA_DIR=tmp_path)
    assert code.startswith(f"error: {tmp_path}/lists/t/benchmark.yaml is missing: a dry run does not make it of TABLE")


def test_run_sh_needs_a_benchmark(checkout):
    done = bash(checkout, "scripts/run.sh", METHOD="cumulative")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "BENCHMARK is not set" in done.stderr


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
        (CUMULATIVE, {"BLOCK": 9, "RESUME_EVERY": 9}, "BLOCK is the old name of RESUME_EVERY"),
        (CUMULATIVE, {"NPROC": 3}, "the batch of 4096 does not divide among 3 processes"),
        (CUMULATIVE, {"EVALUATE": "often"}, "EVALUATE is often: it must be one of end, step"),
        (CUMULATIVE, {"NPROC": 0}, "NPROC is 0, not a whole number from 1"),
        (CUMULATIVE, {"NODE_RANK": 1}, "NODE_RANK is 1, not a number from 0 to 0"),
        (CUMULATIVE, {"NNODES": 2}, "MASTER_ADDR is not set: NNODES is 2"),
        (CUMULATIVE, {"DATA_DIR": "/no"}, "/no/tic/datacomp/yearly/train/2014 is missing"),
        (CUMULATIVE, {"RANK": 0}, "this starts torchrun itself: set NPROC"),
        ("run_redcaps.sh", {"METHOD": "oracle", "SOURCE": "nowhere"}, "SOURCE is nowhere, which does not exist"),
        ("run_redcaps.sh", {"METHOD": "oracle", "DATA_DIR": "/no"}, "nor /no/tic/redcaps (DATA_DIR)"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_one_line(run, data_dir, script, settings, message):
    code = run(script, **{"DATA_DIR": data_dir, "OUT": data_dir / "out", **settings})
    assert code.startswith("error: ")
    assert message in code
    assert "\n" not in code
    assert not (data_dir / "out").exists()


def test_old_names_of_settings_work_and_the_new_ones_are_named(run, data_dir, capsys):
    old = {"BUFFER": 0.5, "BLOCK": 50, "METHOD": "cumulative-equal"}
    assert not run("run_datacomp.sh", DRY_RUN=1, DATA_DIR=data_dir, **old)
    printed = capsys.readouterr().err
    assert "BUFFER is now called REPLAY" in printed
    assert "BLOCK is now called RESUME_EVERY" in printed


def test_variables_of_others_are_not_taken_for_misspelt_ones(run, data_dir):
    others = dict.fromkeys(("MKL_NUM_THREADS", "OMP_NUM_THREADS", "MODELS", "RESULTS", "MODEL_DIR", "DATASET"), 4)
    assert not run(CUMULATIVE, DRY_RUN=1, DATA_DIR=data_dir, **others)


@pytest.fixture
def started(run, data_dir, monkeypatch, tmp_path):
    """What run.py starts: (environment, words) of each command but train.py's own checks."""
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps([sys.argv[1:], dict(os.environ)]) + '\\n')\n"
    )
    python.chmod(0o755)

    def call(script, **settings):
        log.write_text("")
        monkeypatch.setattr(sys, "executable", str(python))
        code = run(script, **{"DATA_DIR": data_dir, **settings})
        return code, [json.loads(line) for line in log.read_text().splitlines()]

    return call


def test_a_machine_of_several_starts_torchrun_once_for_all_steps(started, tmp_path):
    several = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "MASTER_PORT": 7000, "NPROC": 8, "REMOTE": "s3://b/x/"}
    code, [(words, environment), (evaluation, _)] = started(ORACLE, OUTPUT_DIR="/runs", **several)
    assert not code
    assert " ".join(evaluation) == (
        f"-m torch.distributed.run --nproc-per-node 8 --standalone {ROOT}/scripts/evaluate.py "
        f"--train_output_dir /runs/medium_basic_oracle --data_dir {tmp_path}"
    )
    assert " ".join(words).startswith(
        "-m torch.distributed.run --nproc-per-node 8 --nnodes 2 --node-rank 1 --master-addr a --master-port 7000 "
        f"{ROOT}/scripts/train.py --benchmark=datacomp --method=oracle --scale=tic_medium "
    )
    assert " ".join(words).endswith("--output_dir /runs/medium_basic_oracle --step all")
    assert "--remote=s3://b/x/medium_basic_oracle" in " ".join(words)
    assert environment["OMP_NUM_THREADS"] == "1"


def test_each_step_is_trained_and_evaluated_before_the_next_one(started, tmp_path):
    """What is done and was evaluated is not started again; the last step that is done may lack its results."""
    out = tmp_path / "out"
    names = {"benchmark": "datacomp", "method": "oracle", "scale": "tic_medium", "data_dir": str(tmp_path)}
    for step in ("2014-2016", "2017"):
        plan = make_plan(Config(step=step, output_dir=str(out), **names), 4)
        write_json(out / step / "plan.json", plan)
        write_json(out / step / "done.json", {"plan": plan, "checkpoint": "plan.json"})
    several = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "NPROC": 2, "OUT": out}
    code, commands = started(ORACLE, RESAMPLED=0, EVALUATE="step", **several)
    assert not code
    names = [Path(next(word for word in words if word.endswith(".py"))).name for words, _ in commands]
    assert names == ["train.py", "evaluate.py"] * 6
    assert [words[-1] for words, _ in commands[::2]] == ["2017", "2018", "2019", "2020", "2021", "2022"]


def test_several_machines_train_and_evaluate_each_run(started):
    several = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "a", "NPROC": 2, "SEEDS": "0 1", "OUTPUT_DIR": "/runs"}
    code, commands = started(ORACLE, **several)
    assert not code
    words = [re.search("output_dir (\\S+)", " ".join(words))[1] for words, _ in commands]
    assert words == ["/runs/medium_basic_oracle"] * 2 + ["/runs/medium_basic_oracle_seed1"] * 2


def test_sources_are_split_and_packed_with_the_settings(started, tmp_path):
    (tmp_path / "source").mkdir()
    settings = {"SOURCE": tmp_path / "source", "TEST_SHARE": "0.2", "OVERWRITE": "true", "DATA_DIR": tmp_path / "new"}
    code, commands = started("run_yfcc15m.sh", METHOD="oracle", BENCHMARK="yfcc15m_2011", **settings)
    assert "is missing" in code  # nothing has been packed
    splits, tars = (" ".join(words) for words, _ in commands)
    creation = f"{ROOT}/dataset_creation"
    assert splits.startswith(f"{creation}/tic-yfcc15m/create_splits.py --csv-path {tmp_path}/source/yfcc15m.csv ")
    assert " --overwrite --benchmark yfcc15m_2011 " in splits
    assert splits.endswith(" --test_share=0.2")
    assert tars.startswith(f"{creation}/create_tars.py --csv-path {tmp_path}/new/lists/yfcc15m_2011 --image-path ")
    assert tars.endswith(" --overwrite")


def test_the_whole_command_prints_the_plan_wherever_it_is_called(data_dir, tmp_path):
    """Relative folders count from where the user stands."""
    command = ["bash", str(ROOT / "scripts/run_medium_basic_cumulative.sh")]
    environment = {**os.environ, "DATA_DIR": data_dir.name, "DRY_RUN": "1", "NPROC": "8", "OUTPUT_DIR": "runs"}
    done = subprocess.run(command, cwd=data_dir.parent, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "runs/medium_basic_cumulative: datacomp, basic, cumulative, tic_medium" in done.stdout


def test_all_methods_of_emoji_are_run_beside_each_other(checkout):
    folders = (({}, "results/emoji"), ({"OUTPUT_DIR": "o"}, "o/emoji"), ({"RESULTS": "r"}, "r"), ({"OUT": "x"}, "x"))
    for settings, out in folders:
        [(words, environment)] = calls(checkout, "scripts/run_emoji_all.sh", **settings)
        assert words[-2:] == ["--benchmark", "emoji"]
        assert environment["OUT"] == out
        assert set(environment["METHODS"].split()) == METHODS.keys() - {"ewc", "averaging"}  # those of the paper
        assert "METHOD" not in environment
    [(_, environment)] = calls(checkout, "scripts/run_emoji_all.sh", METHOD="lwf")
    assert (environment["METHODS"], environment.get("METHOD")) == ("lwf", None)


@pytest.fixture
def swept(run, data_dir, monkeypatch):
    """What run.py has done by train.py, evaluate.py and report.py, which do nothing: a word and a run's folder each."""

    def call(script, **settings):
        done = []
        for name, flag in (("train", "--output_dir"), ("evaluate", "--train_output_dir"), ("report", "--out")):
            module = ModuleType(name)
            module.parse_args = list

            def main(words, *_, name=name, flag=flag):
                if not {"--check", "--dry_run"} & set(words):
                    given = dict(word.split("=", 1) for word in words if "=" in word)
                    seed, copy = given.get("--seed"), given.get("--remote")
                    more = [word for word in words[: words.index("--out")]] if name == "report" else []
                    done.append((name, words[words.index(flag) + 1], *filter(None, (seed, copy)), *more[1:]))

            module.main = main
            monkeypatch.setitem(sys.modules, name, module)
        return run(script, **{"DATA_DIR": data_dir, **settings}), done

    return call


def test_methods_and_seeds_are_run_and_compared(swept):
    several = {"METHODS": "lwf sequential", "SEEDS": "0,2,0", "OUTPUT_DIR": "r", "REMOTE": "s3://b"}
    code, done = swept("run_datacomp.sh", **several)
    assert not code
    names = [f"medium_basic_{name}" for name in ("lwf", "lwf_seed2", "sequential", "sequential_seed2")]
    seeds = ["0", "2", "0", "2"]
    expected = [
        call
        for n, seed in zip(names, seeds, strict=True)
        for call in (("train", f"r/{n}", seed, f"s3://b/{n}"), ("evaluate", f"r/{n}"), ("report", f"r/{n}"))
    ]
    compared = ("report", "r/medium_basic_comparison", *(f"r/{n}" for n in names[1:]))
    assert done == [*expected, compared]
    code, done = swept(CUMULATIVE, SEEDS="1", OUT="o", REMOTE="c")  # OUT holds them all
    assert done[0] == ("train", "o/cumulative_seed1", "1", "c/cumulative_seed1")
    assert done[-1] == ("report", "o/comparison")
    code, done = swept(CUMULATIVE, SEED="1", OUT="o", REMOTE="c")  # one run, where it always was
    assert done == [("train", "o", "1", "c"), ("evaluate", "o"), ("report", "o")]


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
    nodes = [called[1] for called in calls(checkout, script, "scripts/run_medium_basic_cumulative.sh", **environment)]
    names = ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    wanted = [["8", "4", str(i), "node-7", "24567"] for i in range(4)]
    assert [[node[name] for name in names] for node in nodes] == wanted


def test_a_slurm_job_requeues_itself_before_its_time_is_over(slurm, tmp_path):
    script, environment = slurm
    command = ["bash", script, "scripts/run_medium_basic_cumulative.sh"]
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


def test_what_a_killed_run_has_started_gets_to_know(tmp_path):
    """As torchrun does, which then ends its processes."""
    told = tmp_path / "told"
    child = f"trap 'mkdir {told}; exit' TERM; touch {tmp_path}/begun; for i in {{1..1200}}; do sleep 0.05; done"
    code = f"import sys; sys.path.insert(0, 'scripts'); import run; run.start(['bash', '-c', {child!r}])"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    while not told.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert told.exists()


@pytest.mark.parametrize("arguments", [[], ["scripts/run_nothing.sh"], ["scripts/run_tests.sh", "tests"]])
def test_a_slurm_job_without_a_script_is_one_line(slurm, arguments):
    script, environment = slurm
    done = subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(r"error: no script in '.*': give one run_\*\.sh, .*\n", done.stderr)


def test_the_page_on_clusters_names_scripts_and_settings_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    forget_scripts()
    text = (ROOT / "docs/cluster.md").read_text()
    known = runpy.run_path(str(ROOT / "scripts/run.py"))["KNOWN"]
    forget_scripts()
    named = re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:sh|py)", text)
    settings = re.findall(r"\b([A-Z][A-Z_]+)=", text)
    assert (len(named) > 5, {"NODE_RANK", "REMOTE", "BENCHMARK"} <= set(settings)) == (True, True)
    assert all((ROOT / script).is_file() for script in named)
    assert [name for name in settings if name not in known] == []


# --- Released models


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
    settings = released(tmp_path, "basic-oracle", "bestpool-cumulative")
    done = bash(ROOT, "scripts/evaluate_released.sh", DRY_RUN="yes", **settings)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("setup: ")]
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


def test_the_settings_of_released_models_are_flags(checkout, tmp_path):
    (tmp_path / "TiC-CLIP-basic-oracle").mkdir()
    settings = {"IMAGENET_VAL": "/val", "TASKLIST": "list.yml", "PRECISION": "amp", "SKIP_BAD": "1", "DATA_DIR": "d"}
    _, (evaluated, _), (reported, _) = calls(checkout, "scripts/evaluate_released.sh", MODELS_DIR=tmp_path, **settings)
    own = f"--released {tmp_path}/TiC-CLIP-basic-oracle --output_dir results/released/TiC-CLIP-basic-oracle"
    what = "--data_dir d --tasklist list.yml --imagenet_val /val --precision amp --skip_bad"
    assert " ".join(evaluated).endswith(f"scripts/evaluate.py {own} {what}")
    assert " ".join(reported).endswith("report.py results/released/TiC-CLIP-basic-oracle --out results/released")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no TiC-CLIP-*/: run: bash scripts/fetch_models.sh "),
        ({"MODELS": "x", "SKIP_BAD": "on"}, "SKIP_BAD is on"),
        ({"MODELS": "x", "BATCHSIZE": 8}, "unknown setting BATCHSIZE: did you mean BATCH_SIZE?"),
    ],
)
def test_released_models_that_cannot_be_evaluated_are_one_line(tmp_path, settings, message):
    done = bash(ROOT, "scripts/evaluate_released.sh", MODELS_DIR=tmp_path, **settings)
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("setup: ")]
    assert (done.returncode, message in error) == (1, True)
