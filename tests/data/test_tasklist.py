"""The list of TiC-DataComp's tasks, read by our evaluation and as DataComp's evaluate.py reads it."""

import yaml
from conftest import call_script

from tic_clip.benchmarks import MONTHS
from tic_clip.evaluation.tasks import DATACOMP_GROUPS as GROUPS
from tic_clip.evaluation.tasks import list_tasks, read_tasklist


def test_all_tasks():
    kinds, years = ("retrieval", "datacompnet"), range(2014, 2023)
    assert list(list_tasks()) == [
        *(f"tic/datacomp/{kind}/yearly/{year}" for kind in kinds for year in years),
        *(f"tic/datacomp/{kind}/monthly/{month}" for kind in kinds for month in MONTHS),
    ]


def test_what_datacomp_reads_of_a_task():
    """``evaluate.py`` takes name, size and main_metric; the tables take the rest."""
    retrieval = {"main_metric": "mean_recall@1", "tags": ["tic", "retrieval"]}
    classes = {"main_metric": "acc1", "num_classes": 1000, "random_score": 0.001, "tags": ["tic"]}
    assert list_tasks(sample=True) == {
        "tic/datacomp/retrieval/yearly/2014": {"name": "TiC-DataComp-Retrieval-Yearly-2014", **retrieval},
        "tic/datacomp/datacompnet/yearly/2014": {"name": "TiC-DataCompNet-Yearly-2014", **classes},
        "tic/datacomp/retrieval/monthly/201403": {"name": "TiC-DataComp-Retrieval-Monthly-201403", **retrieval},
        "tic/datacomp/datacompnet/monthly/201403": {"name": "TiC-DataCompNet-Monthly-201403", **classes},
    }


def test_the_script(tmp_path):
    def run(*flags):
        return call_script("dataset_creation/tic-datacomp/generate_tasklist.py", "--yaml-path", path, *flags)

    path = tmp_path / "lists/tasklist.yml"
    assert run().stdout == f"{path}: 222 tasks\n"
    assert yaml.safe_load(path.read_text()) == list_tasks()
    tasks = read_tasklist(str(path), "data")
    assert {task.key: task.name for task in tasks} == {key: task["name"] for key, task in list_tasks().items()}
    assert tasks[0].folder == "data/tic/datacomp/yearly/eval/retrieval/2014"
    run("--sample-eval", "--eval-tasks", f"{GROUPS[0]},{GROUPS[3]},tic/redcaps/retrieval/yearly/2018")
    names = [task.name for task in read_tasklist(str(path), "data")]
    assert names[:2] == ["TiC-DataComp-Retrieval-Yearly-2014", "TiC-DataCompNet-Monthly-201403"]
    assert names[2:] == ["TiC-RedCaps-Retrieval-Yearly-2018"]
