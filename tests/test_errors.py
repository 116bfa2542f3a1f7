"""What a newcomer reads where the step before was left out: one line, with the path and what makes it."""

import re
import shlex
import subprocess

import pytest
from conftest import ROOT, call_script

from tic_clip.storage import write_json

# A case is its name, the command with the settings of its environment, and below the words that the error must hold.
# It is run where empty/, sizes/ (only the tables of TiC-DataComp's training splits), shards/ (a tar, no table),
# unfinished/ (a split with a tar, no table) and uids.npy are. test_scripts.py has the errors of the run_*.sh.
CASES = """
# The data.
POOL unset: bash DATACOMP/build_tic_datacomp.sh
    POOL is not set | the folder of the pool's tars
cadence: POOL=shards CADENCE=weekly bash DATACOMP/build_tic_datacomp.sh
    CADENCE is weekly; it can be yearly or monthly, or is left out for both
pool: dataset_creation/reshard.py -i none -o o -s .
    none is missing | download_upstream.py
empty pool: dataset_creation/reshard.py -i empty -o o -s .
    empty holds no .tar | upstream.py
UID lists: dataset_creation/reshard.py -i shards -o o -s uids
    uids is missing | generate_eval_
class ids: dataset_creation/reshard.py -i shards -o o -s uids.npy -c none
    none is missing | generate_datacompnet_uid2classid.py
convert without set-up: PYTHON=none bash DATACOMP/convert_wds.sh . retrieval
    none is missing: run: bash  | setup.sh
verify without a split: dataset_creation/verify.py none
    none is missing | reshard.py makes splits
stats: DATACOMP/add_sizes.py --url shards
    shards/0.tar has no stats | generate_stats.py --url shards
annotations: dataset_creation/tic-redcaps/create_splits.py --annotations-path a --output-path o
    a is missing
no lists: dataset_creation/create_tars.py --csv-path l --image-path . --output-path o
    l has no manifest.json | create_splits.py first
# Training.
split: TRAIN --data_dir none
    none/tic/datacomp/yearly/train/2014 is missing | build_tic_datacomp.sh | DATA_DIR
data_dir is empty: TRAIN --data_dir=
    argument --data_dir: '' is not a folder or a URL
sizes.json: TRAIN --data_dir unfinished
    yearly/train/2014 has no sizes.json: finish reshard.py | add_sizes.py --url unf
wandb's login: TRAIN --data_dir sizes --check --report_to wandb
    wandb: No API key configured | WANDB_MODE=offline
yfcc15m: TRAIN --data_dir none --benchmark yfcc15m --step 2004-2008
    none/tic/yfcc15m/yearly/train/2004-2008 is missing | create_splits.py and dataset_creation/create_tars.py
run.sh without a benchmark: METHOD=cumulative bash scripts/run.sh
    BENCHMARK is not set: give a name or a benchmark.yaml
not sbatch: bash scripts/slurm.sh scripts/run_datacomp.sh
    SLURM_SUBMIT_DIR is not set | sbatch
sbatch without a script: SLURM_SUBMIT_DIR=. bash scripts/slurm.sh
    no script in '': give one run_*.sh, from the checkout's root
sbatch with two words: SLURM_SUBMIT_DIR=. bash scripts/slurm.sh uids.npy x
    no script in 'uids.npy x': give one run_*.sh
# Evaluation and the report.
no run: scripts/evaluate.py --train_output_dir none --data_dir .
    none has no finished step | scripts/train.py first
eval data: EVALUATE --use_model 'RN50 openai'
    sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing | build_tic_
emoji's data: EVALUATE --use_model 'RN50 openai' --benchmark emoji
    eval/retrieval/2014 is missing | run_emoji_cumulative.sh
static data: EVALUATE --use_model 'RN50 openai' --tasklist tasks.yml
    sizes/wds_imagenet1k_test is missing | webdataset
a model's file: EVALUATE --use_model 'RN50 none.pt'
    none.pt is neither a checkpoint file nor a
no released model: EVALUATE --released TiC-CLIP-basic-oracle
    TiC-CLIP-basic-oracle has no ch | fetch_models.sh
released models: MODELS_DIR=none bash scripts/evaluate_released.sh
    none has no TiC-CLIP-*/: run: bash scripts/fetch_models.sh none
a setting of released models: MODELS=x SKIP_BAD=on bash scripts/evaluate_released.sh
    SKIP_BAD is on: it must be one of 1,
a misspelt setting: MODELS=x BATCHSIZE=8 bash scripts/evaluate_released.sh
    unknown setting BATCHSIZE: did you mean BATCH_SIZE?
"""
WORDS = {
    "DATACOMP": "dataset_creation/tic-datacomp",
    "TRAIN": "scripts/train.py --benchmark datacomp --method cumulative --scale tic_medium --step 2014-2016 "
    "--output_dir o",
    "EVALUATE": "scripts/evaluate.py --data_dir sizes --output_dir o",
}


def read_cases():
    """Name -> (settings of the environment, words of the command, words of the error)."""
    lines = [line for line in CASES.splitlines() if line and not line.startswith("#")]
    for case, words in zip(lines[::2], lines[1::2], strict=True):
        name, _, command = case.partition(": ")
        settings, command = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(.*)", command).groups()
        command = re.sub("|".join(WORDS), lambda match: WORDS[match[0]], command)
        settings = dict(pair.split("=", 1) for pair in settings.split())
        yield name, (settings, shlex.split(command), words.strip().split(" | "))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x")
    for name in ("uids.npy", "shards/0.tar", "unfinished/tic/datacomp/yearly/train/2014/0.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "empty").mkdir()
    for year in range(2014, 2023):
        write_json(folder / f"sizes/tic/datacomp/yearly/train/{year}/sizes.json", {"00000000.tar": 1_000_000})
    (folder / "tasks.yml").write_text("imagenet1k:\n")
    return folder


@pytest.mark.parametrize(("settings", "command", "words"), dict(read_cases()).values(), ids=dict(read_cases()))
def test_the_step_before_is_named_in_one_line(settings, command, words, folder, tmp_path, monkeypatch):
    for name in ("POOL", "BENCHMARK", "SLURM_SUBMIT_DIR", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path), "DATA_DIR": "none", "LISTS": "lists", **settings}.items():
        monkeypatch.setenv(name, value)
    before = sorted(folder.rglob("*"))
    if command[0] == "bash":
        command = ["bash", f"{ROOT}/{command[1]}", *command[2:]]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder)
    else:
        done = call_script(*command, cwd=folder)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    *before_it, line = [line for line in done.stderr.splitlines() if line and not line.startswith("setup: ")]
    assert [line for line in before_it if not re.match(r"[\w ]+: +\d+%", line)] == []  # a progress bar
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []
    assert sorted(folder.rglob("*")) == before


def test_every_script_that_a_line_names_exists():
    """In the messages of the library and the scripts, and in the pages."""
    patterns = ("tic_clip/**/*.py", "scripts/*.sh", "dataset_creation/**/*.sh", "docs/*.md", "README.md")
    text = "\n".join(path.read_text() for pattern in patterns for path in ROOT.glob(pattern))
    named = set(re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:py|sh)", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
