"""The list of TiC-DataComp's tasks, read by our evaluation and as DataComp's evaluate.py reads it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tic_clip import TicError
from tic_clip.benchmarks import MONTHS
from tic_clip.evaluation.tasks import DATACOMP_GROUPS as GROUPS
from tic_clip.evaluation.tasks import list_tasks, read_tasklist

ROOT = Path(__file__).parent.parent
SAMPLE = {
    "tic/datacomp/retrieval/yearly/2014": "TiC-DataComp-Retrieval-Yearly-2014",
    "tic/datacomp/datacompnet/yearly/2014": "TiC-DataCompNet-Yearly-2014",
    "tic/datacomp/retrieval/monthly/201403": "TiC-DataComp-Retrieval-Monthly-201403",
    "tic/datacomp/datacompnet/monthly/201403": "TiC-DataCompNet-Monthly-201403",
}


def names(tasks):
    return {key: task["name"] for key, task in tasks.items()}


def run(*flags):
    script = ROOT / "dataset_creation/tic-datacomp/generate_tasklist.py"
    return subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True)


def test_all_tasks():
    tasks = list_tasks()
    kinds, years = ("retrieval", "datacompnet"), range(2014, 2023)
    assert list(tasks) == [
        *(f"tic/datacomp/{kind}/yearly/{year}" for kind in kinds for year in years),
        *(f"tic/datacomp/{kind}/monthly/{month}" for kind in kinds for month in MONTHS),
    ]
    assert len(set(names(tasks).values())) == len(tasks)


@pytest.mark.parametrize("key", SAMPLE)
def test_what_datacomp_reads_of_a_task(key):
    """``evaluate.py`` takes name, size and main_metric; the tables take the rest."""
    tasks = list_tasks(sample=True)
    assert names(tasks) == SAMPLE
    classes = {"num_classes": 1000, "random_score": 0.001} if "datacompnet" in key else {}
    metric, tags = ("acc1", ["tic"]) if classes else ("mean_recall@1", ["tic", "retrieval"])
    assert tasks[key] == {"name": SAMPLE[key], "main_metric": metric, **classes, "tags": tags}


def test_the_other_benchmarks():
    tasks = list_tasks(["tic/yfcc15m/retrieval/yearly", "tic/redcaps/retrieval/yearly/2018"])
    periods = ("2004-2008", "2009-2010", "2011-2012", "2013-2014")
    assert list(tasks) == [*(f"tic/yfcc15m/retrieval/yearly/{p}" for p in periods), "tic/redcaps/retrieval/yearly/2018"]
    assert tasks["tic/redcaps/retrieval/yearly/2018"]["name"] == "TiC-RedCaps-Retrieval-Yearly-2018"


@pytest.mark.parametrize("name", ["imagenet1k", "tic/datacomp/retrieval/yearly/2023"])
def test_no_such_task(name):
    with pytest.raises(TicError, match=f"unknown evaluation task {name!r}; the groups are tic/"):
        list_tasks([name])


def test_the_script(tmp_path):
    path = tmp_path / "lists/tasklist.yml"
    assert run("--yaml-path", path).stdout == f"{path}: 222 tasks\n"
    assert yaml.safe_load(path.read_text()) == list_tasks()
    tasks = read_tasklist(str(path), "data")
    assert {task.key: task.name for task in tasks} == names(list_tasks())
    assert tasks[0].folder == "data/tic/datacomp/yearly/eval/retrieval/2014"
    run("--yaml-path", path, "--sample-eval", "--eval-tasks", f"{GROUPS[0]},{GROUPS[3]}")
    sample = [task.name for task in read_tasklist(str(path), "data")]
    assert sample == ["TiC-DataComp-Retrieval-Yearly-2014", "TiC-DataCompNet-Monthly-201403"]
