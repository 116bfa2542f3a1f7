"""What a newcomer reads where the step before was left out: one line, with the path and what makes it."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, call_script

from tic_clip.storage import write_json

TRAIN = "scripts/train.py --benchmark datacomp --method cumulative --scale tic_medium --step 2014-2016 --output_dir o"
EVALUATE = "scripts/evaluate.py --data_dir sizes --output_dir o --use_model 'RN50 openai'"
RELEASED = "bash scripts/evaluate_released.sh"
DATACOMP = "dataset_creation/tic-datacomp"
RESHARD = "dataset_creation/reshard.py -o o"
CASES = [
    (f"bash {DATACOMP}/build_tic_datacomp.sh", "POOL is not set.*the folder of the pool's tars"),
    (f"POOL=shards CADENCE=weekly bash {DATACOMP}/build_tic_datacomp.sh", "CADENCE is weekly; it can be yearly or "),
    (f"{RESHARD} -i none -s .", "none is missing.*download_upstream.py"),
    (f"{RESHARD} -i empty -s .", "empty holds no .tar.*upstream.py"),
    (f"{RESHARD} -i shards -s uids", "uids is missing.*generate_eval_"),
    (f"{RESHARD} -i shards -s uids.npy -c none", "none is missing.*generate_datacompnet_uid2classid.py"),
    (f"PYTHON=none bash {DATACOMP}/convert_wds.sh . retrieval", "none is missing: run: bash .*setup.sh"),
    ("dataset_creation/verify.py none", "none is missing.*reshard.py makes splits"),
    ("dataset_creation/tic-redcaps/create_splits.py --annotations-path a --output-path o", "a is missing"),
    (f"{TRAIN} --data_dir none", "none/tic/datacomp/yearly/train/2014 is missing.*build_tic_datacomp.sh.*DATA_DIR"),
    (f"{TRAIN} --data_dir unfinished", "train/2014 has no sizes.json: finish reshard.py.*add_sizes.py --url unf"),
    (f"{TRAIN} --data_dir sizes --check --report_to wandb", "wandb: No API key configured.*WANDB_MODE=offline"),
    (
        f"{TRAIN} --data_dir none --benchmark redcaps --step 2018",
        "train/2011-2017 is missing.*splits.py and .*_tars.py",
    ),
    ("METHOD=cumulative bash scripts/run.sh", "BENCHMARK is not set: give a name or a benchmark.yaml"),
    ("bash scripts/slurm.sh scripts/run_datacomp.sh", "SLURM_SUBMIT_DIR is not set.*sbatch"),
    ("SLURM_SUBMIT_DIR=. bash scripts/slurm.sh", "no script in '': give one run_"),
    ("SLURM_SUBMIT_DIR=. bash scripts/slurm.sh uids.npy x", "no script in 'uids.npy x': give one run_"),
    ("scripts/evaluate.py --train_output_dir none --data_dir .", "none has no finished step.*scripts/train.py first"),
    (EVALUATE, "sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing.*build_tic_"),
    (f"{EVALUATE} --tasklist tasks.yml", "sizes/wds_imagenet1k_test is missing.*webdataset"),
    (f"MODELS_DIR=none {RELEASED}", r"none has no TiC-CLIP-\*/: run: bash scripts/fetch_models.sh none"),
    (f"MODELS=x SKIP_BAD=on {RELEASED}", "SKIP_BAD is on: it must be one of 1,"),
    (f"MODELS=x BATCHSIZE=8 {RELEASED}", "unknown setting BATCHSIZE: did you mean BATCH_SIZE?"),
]
"""Each with its settings of the environment, where ``folder`` lies. test_scripts.py has the errors of the run_*.sh."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Training splits of which only the tables are there, shards and a split without a table, and an empty folder."""
    folder = tmp_path_factory.mktemp("x")
    for name in ("uids.npy", "shards/0.tar", "unfinished/tic/datacomp/yearly/train/2014/0.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "empty").mkdir()
    for year in range(2014, 2023):
        write_json(folder / f"sizes/tic/datacomp/yearly/train/{year}/sizes.json", {"00000000.tar": 1_000_000})
    (folder / "tasks.yml").write_text("imagenet1k:\n")
    return folder


@pytest.mark.parametrize(("command", "message"), CASES)
def test_the_step_before_is_named_in_one_line(command, message, folder, tmp_path, monkeypatch):
    for name in ("POOL", "BENCHMARK", "SLURM_SUBMIT_DIR", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    settings, words = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(.*)", command).groups()
    for setting in (f"HOME={tmp_path}", "DATA_DIR=none", "LISTS=lists", *settings.split()):
        monkeypatch.setenv(*setting.split("="))
    before, words = sorted(folder.rglob("*")), shlex.split(words)
    if words[0] == "bash":
        words[1] = str(ROOT / words[1])
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    else:
        done = call_script(*words, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    *others, line = [line for line in done.stderr.splitlines() if line]
    assert [line for line in others if not re.match(r"setup: |[\w ]+: +\d+%", line)] == []  # a progress bar
    assert re.match(f"error: .*{message}", line)
    assert sorted(folder.rglob("*")) == before


def test_every_script_that_a_line_names_exists():
    """In the messages of the library and the scripts, and in the pages."""
    patterns = ("tic_clip/**/*.py", "scripts/*.sh", "dataset_creation/**/*.sh", "docs/*.md", "README.md")
    text = "\n".join(path.read_text() for pattern in patterns for path in ROOT.glob(pattern))
    named = set(re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:py|sh)", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
