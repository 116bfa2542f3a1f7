"""What a newcomer reads where the step before was left out: one line, with the path and what makes it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tic_clip.storage import write_json

ROOT = Path(__file__).parent.parent
DATACOMP = "dataset_creation/tic-datacomp"
TRAIN = (
    "scripts/train.py --benchmark datacomp --method cumulative --scale tic_medium --step 2014-2016 --output_dir {x}/o"
)
EVALUATE = "scripts/evaluate.py --data_dir {x}/sizes --output_dir {x}/o"
CHECKED = f"{TRAIN} --data_dir {{x}}/sizes --check"
BUILD = "bash dataset_creation/tic-datacomp/build_tic_datacomp.sh"
RUN = "bash scripts/run_{}.sh"

# What is missing or wrong: the command, the settings of its environment, and the words that its line must hold. In {x}
# are file (a file), empty/, sizes/ (only the tables of TiC-DataComp's training splits), shards/ (a tar, no table),
# stats/ (a tar, stats, no table) and uids.npy/.
CASES = {
    # The data.
    "POOL unset": (BUILD, {}, "POOL is not set", "the folder of the pool's tars"),
    "no pool": (BUILD, {"POOL": "{x}/none"}, "POOL is {x}/none, which is no folder"),
    "released lists": (
        BUILD,
        {"POOL": "{x}/shards"},
        "{x}/lists/released has no ",
        "download_uids.py --output-path {x}/",
    ),
    "eval lists": (
        f"{DATACOMP}/generate_eval_uids.py --output-path {{x}}/o",
        {},
        "{x}/o/released has no",
        "download_uids.py",
    ),
    "class lists": (
        f"{DATACOMP}/generate_datacompnet_uid2classid.py --output-path {{x}}/o",
        {},
        "{x}/o/released",
        "download_uids",
    ),
    "pool": (
        "dataset_creation/reshard.py -i {x}/none -o {x}/o -s {x}",
        {},
        "{x}/none is missing",
        "download_upstream.py",
    ),
    "pool is a file": (
        "dataset_creation/reshard.py -i {x}/file -o {x}/o -s {x}",
        {},
        "{x}/file is missing or no folder",
    ),
    "empty pool": (
        "dataset_creation/reshard.py -i {x}/empty -o {x}/o -s {x}",
        {},
        "{x}/empty holds no .tar",
        "upstream.py",
    ),
    "UID lists": (
        "dataset_creation/reshard.py -i {x}/shards -o {x}/o -s {x}/uids",
        {},
        "{x}/uids is missing",
        "generate_eval_",
    ),
    "no UID list": (
        "dataset_creation/reshard.py -i {x}/shards -o {x}/o -s {x}/empty",
        {},
        "{x}/empty holds no .npy",
        "_uids.py",
    ),
    "output is a file": (
        "dataset_creation/reshard.py -i {x}/shards -o {x}/file -s {x}/uids.npy",
        {},
        "{x}/file is no folder",
    ),
    "class ids": (
        "dataset_creation/reshard.py -i {x}/shards -o {x}/o -s {x}/uids.npy -c {x}/none",
        {},
        "{x}/none is missing",
        "generate_datacompnet_uid2classid.py",
    ),
    "convert: no split": (
        f"bash {DATACOMP}/convert_wds.sh {{x}}/none retrieval",
        {},
        "{x}/none holds no .tar",
        "reshard.py first",
    ),
    "convert: no setup": (
        f"bash {DATACOMP}/convert_wds.sh {{x}} retrieval",
        {"PYTHON": "{x}/none"},
        "{x}/none is missing: run: bash ",
        "setup.sh",
    ),
    "verify: no split": ("dataset_creation/verify.py {x}/none", {}, "{x}/none is missing", "reshard.py makes splits"),
    "stats: no split": (
        f"{DATACOMP}/generate_stats.py --url {{x}}/none",
        {},
        "{x}/none is missing",
        "reshard.py makes splits",
    ),
    "stats": (
        f"{DATACOMP}/add_sizes.py --url {{x}}/shards",
        {},
        "{x}/shards/0.tar has no stats",
        "generate_stats.py --url {x}/shards",
    ),
    "task list in a file": (
        f"{DATACOMP}/generate_tasklist.py --yaml-path {{x}}/file/t.yml",
        {},
        "{x}/file: is a file, where",
    ),
    "task list on a folder": (
        f"{DATACOMP}/generate_tasklist.py --yaml-path {{x}}/empty",
        {},
        "{x}/empty: is a folder, where",
    ),
    "emoji in a file": ("dataset_creation/tic-emoji/create_pool.py --output_dir {x}/file", {}, "{x}/file is a file"),
    "yfcc15m.csv": (
        "dataset_creation/tic-yfcc15m/create_splits.py --csv-path {x}/y.csv --output-path {x}/o",
        {},
        "{x}/y.csv is missing",
    ),
    "annotations": (
        "dataset_creation/tic-redcaps/create_splits.py --annotations-path {x}/a --output-path {x}/o",
        {},
        "{x}/a is missing",
    ),
    "no lists": (
        "dataset_creation/create_tars.py --csv-path {x}/l --image-path {x} --output-path {x}/o",
        {},
        "{x}/l is no folder of lists",
        "create_splits.py first",
    ),
    "no manifest": (
        "dataset_creation/create_tars.py --csv-path {x}/empty --image-path {x} --output-path {x}/o",
        {},
        "{x}/empty has no manifest.json",
        "create_splits.py first",
    ),
    # Training.
    "split": (
        f"{TRAIN} --data_dir {{x}}/none",
        {},
        "{x}/none/tic/datacomp/yearly/train/2014 is missing",
        "build_tic_datacomp.sh",
        "DATA_DIR",
    ),
    "data in a file": (
        f"{TRAIN} --data_dir {{x}}/file --dry_run",
        {},
        "{x}/file/tic/datacomp/yearly/train/2014 is missing",
        "DATA_DIR",
    ),
    "data_dir is empty": (f"{TRAIN} --data_dir=", {}, "--data_dir (DATA_DIR) and --output_dir must not be empty"),
    "sizes.json": (
        f"{TRAIN} --data_dir {{x}}/unfinished",
        {},
        "yearly/train/2014 has no sizes.json: finish reshard.py",
        "add_sizes.py --url {x}/unf",
    ),
    "the step before": (
        f"{TRAIN} --data_dir {{x}}/sizes --step 2017",
        {},
        "2017 starts from {x}/o/2014-2016/",
        "train it first",
    ),
    "checkpoint": (f"{CHECKED} --init {{x}}/none.pt", {}, "--init {x}/none.pt is missing"),
    "weights": (f"{CHECKED} --weights {{x}}/none.json", {}, "{x}/none.json is missing"),
    "architecture": (f"{CHECKED} --model nonsense", {}, "no model 'nonsense'", "ViT-B-16"),
    "architecture's case": (f"{CHECKED} --model vit-b-32", {}, "no model 'vit-b-32'; similar ones are ViT-B-32"),
    "run in a file": (f"{CHECKED} --output_dir {{x}}/file/run", {}, "{x}/file is a file, so {x}/file/run can't be"),
    "wandb's login": (f"{CHECKED} --report_to wandb", {}, "wandb: No API key configured", "WANDB_MODE=offline"),
    "datacomp": (
        RUN.format("medium_basic_cumulative"),
        {},
        "{x}/none/tic/datacomp/yearly/train/2014 is missing",
        "build_tic_datacomp.sh",
    ),
    "bestpool": (
        RUN.format("medium_bestpool_oracle"),
        {"DRY_RUN": "1"},
        "{x}/none/tic/datacomp/yearly/train_bestpool/2014 is missing",
        "reshard.py",
        "baselines.py",
    ),
    "months": (
        RUN.format("large_basic_sequential"),
        {"BENCHMARK": "datacomp_monthly"},
        "{x}/none/tic/datacomp/monthly/train/201403 is",
    ),
    "a source that is away": (RUN.format("yfcc15m_cumulative"), {"SOURCE": "{x}/none"}, "SOURCE is {x}/none, which is"),
    "evaluation data before weeks of training": (
        RUN.format("medium_basic_oracle"),
        {"DATA_DIR": "{x}/sizes"},
        "{x}/sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing",
        "build_tic_",
    ),
    "PRECISION before weeks of training": (
        RUN.format("medium_basic_oracle"),
        {"DATA_DIR": "{x}/sizes", "PRECISION": "fp8"},
        "--precision: invalid choice: 'fp8'",
    ),
    "a URL with one slash": (f"{TRAIN} --data_dir s3:/bucket/data --dry_run", {}, "two slashes: s3://bucket/data"),
    "METHOD before hours of packing": (
        RUN.format("yfcc15m"),
        {"SOURCE": "{x}", "METHOD": "cumulatve"},
        "unknown method 'cumulatve'; the methods are ",
    ),
    "SCALE before hours of packing": (
        RUN.format("redcaps_oracle"),
        {"SOURCE": "{x}", "SCALE": "tic_tiy"},
        "unknown scale 'tic_tiy'; the scales are tic_",
    ),
    "no source": (
        RUN.format("redcaps_oracle"),
        {},
        "neither sources/redcaps (SOURCE)",
        "nor {x}/none/tic/redcaps (DATA_DIR)",
    ),
    "yfcc15m": (
        f"{TRAIN} --data_dir {{x}}/none --benchmark yfcc15m --step 2004-2008",
        {},
        "{x}/none/tic/yfcc15m/yearly/train/2004-2008 is missing",
        "create_splits.py and dataset_creation/create_tars.py",
    ),
    "METHOD unset": (RUN.format("datacomp"), {}, "METHOD is not set", "lwf"),
    "MASTER_ADDR unset": (RUN.format("medium_basic_oracle"), {"NNODES": "2"}, "MASTER_ADDR is not set"),
    "not sbatch": ("bash scripts/slurm.sh scripts/run_datacomp.sh", {}, "SLURM_SUBMIT_DIR is not set", "sbatch"),
    # Evaluation and the report.
    "no run": (
        "scripts/evaluate.py --train_output_dir {x}/none --data_dir {x}",
        {},
        "{x}/none has no finished step",
        "scripts/train.py first",
    ),
    "eval data": (
        f"{EVALUATE} --use_model 'RN50 openai'",
        {},
        "{x}/sizes/tic/datacomp/yearly/eval/retrieval/2014 is missing",
        "build_tic_",
    ),
    "emoji's data": (
        f"{EVALUATE} --use_model 'RN50 openai' --benchmark emoji",
        {},
        "eval/retrieval/2014 is missing",
        "run_emoji_cumulative.sh",
    ),
    "static data": (
        f"{EVALUATE} --use_model 'RN50 openai' --tasklist {{x}}/tasks.yml",
        {},
        "{x}/sizes/wds_imagenet1k_test is missing",
        "webdataset",
    ),
    "task list": (
        f"{EVALUATE} --use_model 'RN50 openai' --tasklist {{x}}/none.yml",
        {},
        "{x}/none.yml is missing",
        "generate_tasklist.py",
    ),
    "a model's file": (
        f"{EVALUATE} --use_model 'RN50 {{x}}/none.pt'",
        {},
        "{x}/none.pt is neither a checkpoint file nor a",
    ),
    "no released model": (
        f"{EVALUATE} --released {{x}}/TiC-CLIP-basic-oracle",
        {},
        "{x}/TiC-CLIP-basic-oracle has no ch",
        "fetch_models.sh",
    ),
    "released models": (
        "bash scripts/evaluate_released.sh",
        {"MODELS_DIR": "{x}/none"},
        "{x}/none has no TiC-CLIP-*/",
        "fetch_models.sh {x}/none",
    ),
    "results": (
        "scripts/report.py {x}/none",
        {},
        "{x}/none/eval_results.jsonl is missing",
        "scripts/evaluate.py first",
    ),
    "report of a file": (
        "scripts/report.py {x}/file",
        {},
        "{x}/file/eval_results.jsonl is missing",
        "scripts/evaluate.py first",
    ),
}


@pytest.fixture(scope="module")
def x(tmp_path_factory):
    folder = tmp_path_factory.mktemp("x")
    (folder / "file").touch()
    for name in ("empty", "shards", "unfinished/tic/datacomp/yearly/train/2014"):
        (folder / name).mkdir(parents=True)
    for name in ("shards", "unfinished/tic/datacomp/yearly/train/2014"):
        (folder / name / "0.tar").touch()
    for year in range(2014, 2023):
        write_json(folder / f"sizes/tic/datacomp/yearly/train/{year}/sizes.json", {"00000000.tar": 1_000_000})
    (folder / "uids.npy").touch()
    (folder / "tasks.yml").write_text("imagenet1k:\n")
    return folder


def content(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_the_step_before_is_named_in_one_line(case, x, tmp_path):
    command, settings, *words = CASES[case]
    start = "" if command.startswith("bash ") else f"{sys.executable} "
    given = {"DATA_DIR": "{x}/none", "OUTPUT_DIR": "{x}/o", "OUT": "{x}/o", "LISTS": "{x}/lists", **settings}
    given = {"HOME": str(tmp_path), **given}
    unset = (
        "METHOD",
        "POOL",
        "WANDB_API_KEY",
        "WANDB_MODE",
        "SLURM_SUBMIT_DIR",
        "MASTER_ADDR",
        "BENCHMARK",
        "NPROC",
        "PYTHON",
    )
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {name: value.format(x=x) for name, value in given.items()}
    before = content(x)
    done = subprocess.run(
        ["bash", "-c", start + command.format(x=x)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    *before_it, line = [line for line in done.stderr.splitlines() if not line.startswith("setup: ")]
    assert [line for line in before_it if line and not re.match(r"[\w ]+: +\d+%", line)] == []  # a progress bar
    assert line.startswith("error: ")
    assert [word for word in words if word.format(x=x) not in line] == []
    assert content(x) == before


def test_every_script_that_a_line_names_exists():
    """In the messages of the library and the scripts."""
    sources = [*ROOT.glob("tic_clip/**/*.py"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("dataset_creation/**/*.sh")]
    named = {
        name
        for path in sources
        for name in re.findall(r"(?:scripts|dataset_creation)/[\w/-]+\.(?:py|sh)", path.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
