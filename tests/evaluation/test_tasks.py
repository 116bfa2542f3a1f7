"""Tasks by their keys, and lists of them."""

import subprocess

import pytest
import yaml
from conftest import ROOT

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.tasks import read_tasklist, static_task, task_of, tasks_of
from tic_clip.report.compare import FLICKR, IMAGENET, SHIFTS


def test_keys_names_and_folders():
    first = task_of("tic/datacomp/datacompnet/monthly/201403", "/data/")
    assert (first.name, first.kind) == ("TiC-DataCompNet-Monthly-201403", "classification")
    assert first.folder == "/data/tic/datacomp/monthly/eval/datacompnet/201403"
    second = task_of("tic/datacomp/retrieval/yearly/2014", "s3://bucket/data")
    assert (second.name, second.kind) == ("TiC-DataComp-Retrieval-Yearly-2014", "retrieval")
    assert second.folder == "s3://bucket/data/tic/datacomp/yearly/eval/retrieval/2014"
    tasks = tasks_of(get_benchmark("datacomp"), "data")
    assert len(tasks) == 2 * 9
    assert [task for task in tasks if task_of(task.key, "data") != task] == []
    with pytest.raises(TicError, match="is a group of tasks: add a period, as in tic/emoji/retrieval/yearly/2014"):
        task_of("tic/emoji/retrieval/yearly", "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of tasks"),
        ("- tic/emoji/retrieval/yearly/2014", "not a list of tasks"),
        ("a: [", "is not valid YAML"),
        ("tic/emoji/none: {}", "unknown evaluation task 'tic/emoji/none'"),
        ("2014: {}", "unknown evaluation task 2014"),
        ("tic/datacomp/retrieval/yearly/2023: {}", "unknown evaluation task 'tic/datacomp/retrieval/yearly/2023'"),
        ("x: [1]", r"task x has \[1\]; a task may have folder, kind, main_metric"),
        ("x: {path: here}", "task x has {'path': 'here'}; a task may have folder, kind, main_metric"),
        ("x: {kind: recall}", "unknown kind of task 'recall'; the kinds are retrieval, classification"),
        ("x: {main_metric: f1}", "task x needs DataComp's own evaluate.py; a classification task here has acc1, acc5"),
        ("retrieval/x: {main_metric: acc1}", "a retrieval task here has mean_recall@1, image_retrieval_recall@1"),
        ("wilds/iwildcam: {}", "task wilds/iwildcam needs DataComp's own evaluate.py"),
    ],
)
def test_a_bad_tasklist(text, message, tmp_path):
    path = tmp_path / "tasklist.yml"
    path.write_text(text)
    with pytest.raises(TicError, match=message) as caught:
        read_tasklist(str(path), "data")
    assert len(str(caught.value).splitlines()) == 1


def test_a_key_can_stand_for_all_periods(tmp_path):
    path = tmp_path / "tasklist.yml"
    path.write_text("tic/datacomp/datacompnet/monthly:\ntic/datacomp/retrieval/yearly/2016: {name: any, tags: [any]}\n")
    *months, year = read_tasklist(str(path), "data")
    assert months == [task for task in tasks_of(get_benchmark("datacomp_monthly"), "data") if "net" in task.key]
    assert year.key == "tic/datacomp/retrieval/yearly/2016"


def test_static_tasks(tmp_path):
    path = tmp_path / "tasklist.yml"
    path.write_text(
        "imagenet1k: {name: ImageNet 1k, size: 50000, time: 136}\n"
        "vtab/caltech101: {main_metric: mean_per_class_recall, tags: [vtab_natural]}\n"
        "retrieval/flickr_1k_test_image_text_retrieval: {main_metric: mean_recall@1}\n"
        "mine: {folder: /sets/mine}\n"
        "far: {folder: s3://bucket/far, kind: retrieval}\n"
    )
    one, two, three, four, five = read_tasklist(str(path), "data/")
    assert (one.key, one.name, one.kind, one.size) == ("imagenet1k", "ImageNet 1k", "classification", 50000)
    assert (one.folder, one.main_metric) == ("data/wds_imagenet1k_test", "acc1")
    assert (two.folder, two.main_metric) == ("data/wds_vtab-caltech101_test", "mean_per_class_recall")
    assert (three.kind, three.folder) == ("retrieval", "data/wds_retrieval-flickr_1k_test_image_text_retrieval_test")
    assert (four.folder, five.folder, five.kind) == ("/sets/mine", "s3://bucket/far", "retrieval")
    assert static_task("x", {"folder": "sets/x"}, "s3://bucket/data").folder == "s3://bucket/data/sets/x"


def test_the_lists_that_are_shipped():
    """The names are those of the report, and the facts DataComp's, where its checkout is there."""
    lists = {path.stem: read_tasklist(str(path), "data") for path in (ROOT / "scripts/tasklists").glob("*.yml")}
    assert {name: (len(tasks), sum(task.size for task in tasks)) for name, tasks in lists.items()} == {
        "imagenet": (8, 169_963),
        "datacomp": (32, 527_862),
    }
    assert {task.key for task in lists["imagenet"]} == {IMAGENET, *SHIFTS, FLICKR}
    assert {(task.key, task.folder) for task in lists["imagenet"]} <= {(t.key, t.folder) for t in lists["datacomp"]}
    assert lists["imagenet"][-1].folder == "data/wds_flickr30k"
    if (ROOT / "datacomp").exists():
        text = subprocess.check_output(["git", "-C", ROOT / "datacomp", "show", "HEAD:tasklist.yml"], text=True)
        theirs = yaml.safe_load(text)
        for task in lists["datacomp"]:
            entry = theirs[task.key]
            assert (task.size, task.main_metric) == (entry["size"], entry.get("main_metric", "acc1"))
        others = {key.partition("/")[0] for key in theirs.keys() - {task.key for task in lists["datacomp"]}}
        assert others == {"misc", "wilds", "fairness"}
