"""What a newcomer reads where the step before was left out: one line, with the path and what makes it."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from forked import Script

from tic_clip.storage import write_json

DATACOMP = "dataset_creation/tic-datacomp"
TRAIN = (
    "scripts/train.py --benchmark datacomp --method cumulative --scale tic_medium --step 2014-2016 --output_dir {x}/o"
)
EVALUATE = "scripts/evaluate.py --data_dir {x}/sizes --output_dir {x}/o"
CHECKED = f"{TRAIN} --data_dir {{x}}/sizes --check"
BUILD = "bash dataset_creation/tic-datacomp/build_tic_datacomp.sh"

# A case is its name, the command with the settings of its environment, and below the words that the error must
# hold. In {x} are file (a file), empty/, sizes/ (only the tables of TiC-DataComp's training splits), shards/ (a tar, no
# table), unfinished/ (a split with a tar, no table) and uids.npy.
CASES = """
# The data.
POOL unset: BUILD
    POOL is not set | the folder of the pool's tars
cadence: POOL={x}/shards CADENCE=weekly BUILD
    CADENCE is weekly; it can be yearly or monthly, or is left out for both
pool: dataset_creation/reshard.py -i {x}/none -o {x}/o -s {x}
    {x}/none is missing | download_upstream.py
empty pool: dataset_creation/reshard.py -i {x}/empty -o {x}/o -s {x}
    {x}/empty holds no .tar | upstream.py
UID lists: dataset_creation/reshard.py -i {x}/shards -o {x}/o -s {x}/uids
    {x}/uids is missing | generate_eval_
class ids: dataset_creation/reshard.py -i {x}/shards -o {x}/o -s {x}/uids.npy -c {x}/none
    {x}/none is missing | generate_datacompnet_uid2classid.py
convert without set-up: PYTHON={x}/none bash DATACOMP/convert_wds.sh {x} retrieval
    {x}/none is missing: run: bash  | setup.sh
verify without a split: dataset_creation/verify.py {x}/none
    {x}/none is missing | reshard.py makes splits
stats: DATACOMP/add_sizes.py --url {x}/shards
    {x}/shards/0.tar has no stats | generate_stats.py --url {x}/shards
annotations: dataset_creation/tic-redcaps/create_splits.py --annotations-path {x}/a --output-path {x}/o
    {x}/a is missing
no lists: dataset_creation/create_tars.py --csv-path {x}/l --image-path {x} --output-path {x}/o
    {x}/l has no manifest.json | create_splits.py first
# Training.
split: TRAIN --data_dir {x}/none
    {x}/none/tic/datacomp/yearly/train/2014 is missing | build_tic_datacomp.sh | DATA_DIR
data_dir is empty: TRAIN --data_dir=
    argument --data_dir: '' is not a folder or a URL
sizes.json: TRAIN --data_dir {x}/unfinished
    yearly/train/2014 has no sizes.json: finish reshard.py | add_sizes.py --url {x}/unf
wandb's login: CHECKED --report_to wandb
    wandb: No API key configured | WANDB_MODE=offline
bestpool: DRY_RUN=1 METHOD=oracle FILTER=bestpool bash scripts/run_datacomp.sh
    {x}/none/tic/datacomp/yearly/train_bestpool/2014 is missing | reshard.py | baselines.py
evaluation data before weeks of training: DATA_DIR={x}/sizes bash scripts/run_medium_basic_oracle.sh
    {x}/sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing | build_tic_
PRECISION before weeks of training: DATA_DIR={x}/sizes PRECISION=fp8 bash scripts/run_medium_basic_oracle.sh
    argument PRECISION: 'fp8' is not fp32, amp or amp_bf16
OPENCLIP_FLAGS before weeks: DATA_DIR={x}/sizes OPENCLIP_FLAGS=--lr=1 bash scripts/run_medium_basic_oracle.sh
    argument OPENCLIP_FLAGS: OpenCLIP's --lr is set by the plan
METHOD before hours of packing: SOURCE={x} METHOD=cumulatve bash scripts/run_yfcc15m.sh
    METHOD is cumulatve: it must be one of oracle
no source: METHOD=oracle bash scripts/run_redcaps.sh
    neither sources/redcaps (SOURCE) | nor {x}/none/tic/redcaps (DATA_DIR)
yfcc15m: TRAIN --data_dir {x}/none --benchmark yfcc15m --step 2004-2008
    {x}/none/tic/yfcc15m/yearly/train/2004-2008 is missing | create_splits.py and dataset_creation/create_tars.py
not sbatch: bash scripts/slurm.sh scripts/run_datacomp.sh
    SLURM_SUBMIT_DIR is not set | sbatch
# Evaluation and the report.
no run: scripts/evaluate.py --train_output_dir {x}/none --data_dir {x}
    {x}/none has no finished step | scripts/train.py first
eval data: EVALUATE --use_model 'RN50 openai'
    {x}/sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing | build_tic_
emoji's data: EVALUATE --use_model 'RN50 openai' --benchmark emoji
    eval/retrieval/2014 is missing | run_emoji_cumulative.sh
static data: EVALUATE --use_model 'RN50 openai' --tasklist {x}/tasks.yml
    {x}/sizes/wds_imagenet1k_test is missing | webdataset
a model's file: EVALUATE --use_model 'RN50 {x}/none.pt'
    {x}/none.pt is neither a checkpoint file nor a
no released model: EVALUATE --released {x}/TiC-CLIP-basic-oracle
    {x}/TiC-CLIP-basic-oracle has no ch | fetch_models.sh
released models: MODELS_DIR={x}/none bash scripts/evaluate_released.sh
    {x}/none has no TiC-CLIP-*/ | fetch_models.sh {x}/none
"""
WORDS = {"CHECKED": CHECKED, "TRAIN": TRAIN, "EVALUATE": EVALUATE, "BUILD": BUILD, "DATACOMP": DATACOMP}


def read_cases():
    """Name -> (command, settings of the environment, words of the error)."""
    lines = [line for line in CASES.splitlines() if line and not line.startswith("#")]
    for case, words in zip(lines[::2], lines[1::2], strict=True):
        name, _, command = case.partition(": ")
        settings, command = re.fullmatch(r"((?:[A-Z_]+=\S+ )*)(.*)", command).groups()
        for word, text in WORDS.items():
            command = re.sub(rf"\b{word}\b", lambda _, text=text: text, command)
        yield name, (command, dict(pair.split("=", 1) for pair in settings.split()), words.strip().split(" | "))


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x")
    (folder / "empty").mkdir()
    for name in ("file", "uids.npy", "shards/0.tar", "unfinished/tic/datacomp/yearly/train/2014/0.tar"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for year in range(2014, 2023):
        write_json(folder / f"sizes/tic/datacomp/yearly/train/{year}/sizes.json", {"00000000.tar": 1_000_000})
    (folder / "tasks.yml").write_text("imagenet1k:\n")
    return folder


def content(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize(("command", "settings", "words"), dict(read_cases()).values(), ids=dict(read_cases()))
def test_the_step_before_is_named_in_one_line(command, settings, words, x, tmp_path):
    given = {"DATA_DIR": "{x}/none", "OUTPUT_DIR": "{x}/o", "OUT": "{x}/o", "LISTS": "{x}/lists", "HOME": str(tmp_path)}
    given = {name: value.format(x=x) for name, value in {**given, **settings}.items()}
    before, command = content(x), command.format(x=x)
    if command.startswith("scripts/"):
        name, *arguments = shlex.split(command)
        done = Script(ROOT / name, *arguments, **given).wait()
    else:
        start = "" if command.startswith("bash ") else f"{sys.executable} "
        unset = re.compile(r"METHOD|POOL|WANDB_\w+|SLURM_\w+|MASTER_ADDR|BENCHMARK|NPROC|PYTHON")
        environment = {name: value for name, value in os.environ.items() if not unset.fullmatch(name)} | given
        options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "cwd": ROOT, "env": environment}
        done = subprocess.run(["bash", "-c", start + command], **options)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    *before_it, line = [line for line in done.stderr.splitlines() if not line.startswith("setup: ")]
    assert [line for line in before_it if line and not re.match(r"[\w ]+: +\d+%", line)] == []  # a progress bar
    assert line.startswith("error: ")
    assert [word for word in words if word.format(x=x) not in line] == []
    assert content(x) == before


def test_every_script_that_a_line_names_exists():
    """In the messages of the library and the scripts."""
    sources = [*ROOT.glob("tic_clip/**/*.py"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("dataset_creation/**/*.sh")]
    text = "\n".join(path.read_text() for path in sources)
    named = set(re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:py|sh)", text))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
