import csv
import io
import json
import os
import re
import shutil

import made_results
import numpy as np
import pytest
from conftest import call_script, run_script
from made_results import (
    CUMULATIVE,
    RUN,
    SEQUENTIAL,
    SQUARE,
    STATIC,
    STEPS,
    write_lines,
    write_log,
    write_models,
    write_run,
    write_static,
)
from PIL import Image

from tic_clip import TicError
from tic_clip import report as report_module
from tic_clip.report.compare import IMAGENET
from tic_clip.report.frame import load_results

runs, report = made_results.runs, made_results.report


def test_one_run(report, runs):
    found = report(runs[0])
    transfers = {"id": pytest.approx(0.55), "backward": pytest.approx(0.4), "forward": pytest.approx(0.1)}
    assert found.summary == {
        **RUN,
        "steps": STEPS,
        "tasks": {"retrieval": {"metric": "mean_recall@1", "matrix": CUMULATIVE, **transfers}},
        "samples_seen": [10_000, 20_000, 30_000, 40_000],
        "macs_seen": [None] * 4,
        "pins": {"torch": "2.15.0"},
    }
    assert found.text.splitlines() == [
        "TiC-YFCC15M, cumulative: retrieval, mean_recall@1 in per cent",
        "",
        "trained up to  2004-2008  2009-2010  2011-2012  2013-2014",
        "2004-2008           50.0*      10.0       10.0       10.0",
        "2009-2010           40.0       50.0*      10.0       10.0",
        "2011-2012           40.0       40.0       50.0*      10.0",
        "2013-2014           40.0       40.0       40.0       70.0*",
        "",
        "ID 55.0, backward 40.0, forward 10.0 (*: a step's model on the step's own periods)",
    ]
    cells = re.findall(r"<(?:dt|dd|td|th)\b[^>]*>(?:<b>)?([^<]+)", found.html)
    assert cells[:6] == ["retrieval backward", "40.0", "retrieval ID", "55.0", "retrieval forward", "10.0"]
    assert cells[6:14] == ["trained up to", *STEPS, "2004-2008", "50.0", "10.0"]
    assert 'title="trained up to 2009-2010, on 2004-2008: 40.0"' in found.html
    assert all(word in found.html for word in ("tic_tiny", "40,000", "4 of 4", "torch 2.15.0", "(bold: a step"))


def test_comparison_marks_the_best(report, runs, tmp_path):
    found = report(*runs)
    assert list(found.summary["runs"]) == ["cumulative", "sequential"]
    assert found.summary["runs"]["sequential"]["tasks"]["retrieval"]["backward"] == pytest.approx(1.4 / 6)
    assert found.text.splitlines()[-4:-2] == [
        "cumulative  cumulative   40,000       40.0*      55.0*      10.0",
        "sequential  sequential   40,000       23.3       50.0       20.0*",
    ]
    assert "| cumulative | cumulative | 40,000 | **40.0** | **55.0** | 10.0 |" in found.md
    almost = write_run(tmp_path / "b", [[value - 1e-6 for value in row] for row in CUMULATIVE])
    assert report(runs[0], almost).md.count("**55.0**") == 2  # what reads the same is equally good
    assert r"sequential & sequential & 40,000 & 23.3 & 50.0 & \textbf{20.0} \\" in found.tex
    assert found.matrix.splitlines()[:2] == [
        "run,task,step," + ",".join(STEPS),
        "cumulative,retrieval,2004-2008,0.5,0.1,0.1,0.1",
    ]


def test_missing_cells_are_missing_in_all_files(report, tmp_path):
    values = [[1 / 3, float("inf"), float("nan"), 0.1], *CUMULATIVE[1:3], [None, *CUMULATIVE[3][1:]]]
    found = report(write_run(tmp_path / "run", values))
    task = found.summary["tasks"]["retrieval"]
    assert task["matrix"][0] == [1 / 3, None, None, 0.1]
    assert (task["backward"], task["forward"]) == (None, None)
    assert not re.search("Infinity|NaN", json.dumps(found.summary))
    assert found.matrix.splitlines()[1] == "retrieval,2004-2008,0.3333333333333333,,,0.1"
    assert "| 2013-2014 | – | 40.0 | 40.0 | **70.0** |" in found.md
    assert r"2013-2014 & -- & 40.0 & 40.0 & \textbf{70.0} \\" in found.tex
    assert "backward –, forward –" in found.text
    assert all("results 13 of 16" in text for text in (found.text, found.md, found.html))


def test_a_run_that_is_not_finished_and_a_task_that_it_lacks(report, tmp_path):
    half = write_run(tmp_path / "half", SQUARE[:2], "emoji")
    both = write_run(write_run(tmp_path / "both", SQUARE, "emoji"), SQUARE, "emoji", task="emojinet")
    found = report(half, both)
    assert found.summary["runs"]["half"]["samples_seen"] == [10_000, 20_000] + [None] * 5
    assert "2 of 7" in found.html
    assert list(found.summary["runs"]["half"]["tasks"]) == ["retrieval"]
    assert found.summary["runs"]["both"]["tasks"]["emojinet"]["metric"] == "mean_per_class_recall"
    assert "| half | cumulative | 20,000 | 14 of 98 | – | – | – | – | – | – |" in found.md


def test_intervals_macs_and_versions(report, tmp_path, runs):
    assert "MACs" not in report(*runs).md
    more = {"method": "oracle", "macs_seen": 3.16e11, "ci95": [0.4, 0.48]}
    run = write_run(tmp_path / "oracle", CUMULATIVE, **more)
    write_run(run, CUMULATIVE[:1], **more, pins={"torch": "2.16.0"})  # the last line of a step and task counts
    write_run(run, SEQUENTIAL, method="oracle", final=False)  # checkpoints inside a step do not
    found = report(*runs, run)
    assert found.summary["runs"]["oracle"]["macs_seen"] == [3.16e11] * 4
    assert found.summary["runs"]["oracle"]["pins"] == {"torch": "2.16.0, 2.15.0"}
    assert found.summary["runs"]["oracle"]["tasks"]["retrieval"]["ci95"] == [[[0.4, 0.48]] * 4] * 4
    assert "| oracle | oracle | 40,000 | 3.2e11 | **40.0** |" in found.md
    assert r"40,000 & $3.2 \times 10^{11}$ & \textbf{40.0}" in found.tex
    assert "a cell is good to ± 4.0 on average (95 %)" in report(run).html


def test_wide_matrix_stays_out_of_the_terminal(report, tmp_path):
    text = report(write_run(tmp_path / "run", np.full((2, 102), 0.5).tolist(), "datacomp_monthly")).text
    assert "103 columns: see table.md" in text
    assert max(map(len, text.splitlines())) < 160


def test_runs_of_one_name_are_told_apart_by_their_parents(report, tmp_path):
    runs = [write_run(tmp_path / seed / "run", CUMULATIVE) for seed in ("seed0", "seed1")]
    assert list(report(*runs).summary["runs"]) == ["seed0/run", "seed1/run"]
    with pytest.raises(TicError, match="different names"):
        report(runs[0], runs[0])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"method": "sequential"}, "eval_results.jsonl: .* of one method, not cumulative, sequential"),
        ({"method": None}, "of one method, not None, cumulative"),
        ({"benchmark": "emoji"}, "of one benchmark, not emoji, yfcc15m"),
        ({"metric_version": 2}, r"1 in .*, 2 in .*different metric versions: run scripts/evaluate.py again"),
        ({"step": "1999"}, "unknown step '1999'"),
        ({"data": "b"}, f"^run: evaluated on different data of {IMAGENET}"),
    ],
)
def test_results_that_cannot_be_reported(report, tmp_path, second, message):
    run = write_run(tmp_path / "run", CUMULATIVE)
    write_lines(run, [(IMAGENET, 0.5, {})], **RUN | {"step": STEPS[1], "data": "a"})
    write_lines(run, [(IMAGENET, 0.5, {})], **RUN | {"step": STEPS[0]} | second)
    with pytest.raises(TicError, match=message):
        report(run)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_reported(report, tmp_path):
    for folder, message in (
        (tmp_path, r"^\S+eval_results.jsonl is missing: run scripts/evaluate.py first"),
        (write_lines(tmp_path / "empty", []), r"eval_results.jsonl: no result"),
        (write_run(tmp_path / "run", [[float("nan")] * 4]), r"nothing to report: no result in .*run has a number"),
        (write_lines(tmp_path / "datacomps_own", [("x", 0.1, {})]), "of one benchmark, not None"),
        (write_lines(tmp_path / "other", [("tic/yfcc15m/x", 0.1, {})], benchmark="emoji"), "result of a task of emoji"),
    ):
        with pytest.raises(TicError, match=message):
            report(folder)


# The command and the page.


def test_command_writes_equal_bytes_each_time(tmp_path, runs):
    folders = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    write_static(folders[0])
    write_log(folders[0] / STEPS[0], [(100, 4.0), (200, 3.0)])
    write_models(tmp_path / "models")
    (tmp_path / "paper.csv").write_text("method,retrieval ID\nsequential,51\n")
    arguments = [*folders, tmp_path / "models", "--reference", tmp_path / "paper.csv", "--out", tmp_path / "by_command"]
    assert call_script("scripts/report.py", "a", "b").stderr == "error: --out DIR is needed to compare several runs\n"
    done = run_script("scripts/report.py", *arguments, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert "differences are ours - published" in done.stdout
    out = tmp_path / "here"
    _, files = report_module.report([*folders, tmp_path / "models"], out, str(tmp_path / "paper.csv"))
    assert set(files) == {path.name for path in out.iterdir()}
    assert files == re.findall(r"[\w.]+\.(?:json|csv|md|tex|html|png|svg)", done.stdout.splitlines()[-1])
    assert len(files) == 18
    assert all((out / name).read_bytes() == (tmp_path / "by_command" / name).read_bytes() for name in files)
    with Image.open(out / "training.png") as image:
        assert image.size == (1500, 960)
        assert not image.text  # no date, no version
    html = (out / "report.html").read_text()
    assert not {"link", "iframe"} & set(re.findall(r"<(\w+)", html))
    assert re.findall(r'(?:src|href)="(.{,22})', html) == ["data:image/png;base64,"] * 5
    assert "http" not in re.sub('base64,[^"]*', "", html)
    _, files = report_module.report([tmp_path / "models"], out)  # a figure that has nothing to show any more is removed
    assert {path.name for path in out.iterdir()} == set(files)
    assert "heatmap.png" not in files


def test_what_comes_from_files_is_escaped(report, tmp_path):
    evil = '<script>"&</script>|_%'
    runs = [write_run(tmp_path / name, CUMULATIVE, method=evil, scale=evil, pins={evil: evil}) for name in ("a", "b")]
    for chosen in (runs, runs[:1]):
        found = report(*chosen)
        assert re.findall("<script.*", found.html) == ["<script>"]  # the page's own, which sorts tables
        assert "&lt;script&gt;&#34;&amp;&lt;/script&gt;|_%" in found.html
        assert "<script>" not in found.md
        assert "&lt;/script&gt;\\|_%" in found.md
        assert '\\textless{}script\\textgreater{}"\\&\\textless{}/script\\textgreater{}\\textbar{}\\_\\%' in found.tex


# Several seeds, static tasks, other models, published numbers, evaluation data.


def write_seeds(tmp_path, values=CUMULATIVE, **changes):
    """Two runs of CUMULATIVE, one of them 0.1 lower, that differ in the seed and in ``changes`` of the second."""
    lower = [[value if value is None else value - 0.1 for value in row] for row in values]
    first = write_run(tmp_path / "one", CUMULATIVE, seed=0, settings="x")
    return [first, write_run(tmp_path / "two", lower, **{"seed": 1, "settings": "x", **changes})]


def test_runs_with_different_seeds_are_one_row(report, tmp_path):
    found, deviation = report(*write_seeds(tmp_path / "a")), 0.1 / 2**0.5
    row = "| one and 1 more | cumulative | 40,000 | **35.0 ± 7.1** | **50.0 ± 7.1** | **5.0 ± 7.1** |"
    assert row in found.md
    assert "±: standard deviation over n = 2 runs with different seeds" in found.md
    assert "35.0 $\\pm$ 7.1" in found.tex
    head, row = csv.reader(io.StringIO(found.csv))
    assert head[2:7] == ["runs", "samples seen", "MACs", "retrieval backward", "retrieval backward sd"]
    assert (row[2], [float(cell) for cell in row[5:9]]) == ("2", pytest.approx([0.35, deviation, 0.5, deviation]))
    assert "| 2013-2014 | 35.0 | 35.0 | 35.0 | **65.0** |" in found.md  # the mean
    assert "mean over 2 seeds" in found.text
    assert "35.0 ± 7.1* 50.0 ± 7.1* 5.0 ± 7.1*" in found.text
    assert "ID 50.0 ± 7.1, backward 35.0 ± 7.1, forward 5.0 ± 7.1 (" in found.text
    assert "50.0 ± 7.1" in found.html
    one_lacks = report(*write_seeds(tmp_path / "b", [*CUMULATIVE[:3], [*CUMULATIVE[3][:3], None]]))
    assert "| 40,000 | 31 of 32 | **35.0 ± 7.1** | – | **5.0 ± 7.1** |" in one_lacks.md


def test_seeds_have_the_name_that_their_folders_share(tmp_path):
    for i, names in enumerate((("lwf_seed0", "lwf_seed1"), ("lwf-0", "lwf-1"), ("lwf", "lwf_seed1"))):
        runs = [write_run(tmp_path / f"{i}" / name, CUMULATIVE, seed=k, settings="x") for k, name in enumerate(names)]
        assert [row.name for row in load_results(runs).rows] == ["lwf"]


@pytest.mark.parametrize("change", [{"settings": "y"}, {"seed": 0}, {"scale": "tic_debug"}, {"samples_seen": 7}])
def test_runs_that_differ_in_more_are_rows_of_their_own(change, report, tmp_path):
    text = report(*write_seeds(tmp_path, **change)).md
    assert all(part in text for part in ("| one | cumulative |", "| two | cumulative |"))


AVERAGE = f"**{100 * (0.5 + 1.5 + 0.6 + 0.8) / 9:.1f}**"  # the shifts are 0, 0.1, … 0.5


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (STATIC, ["**50.0**", "**25.0**", "**60.0**", AVERAGE]),
        ({IMAGENET: 0.55, "imagenet-a": 0.3}, ["**55.0**", "–", "–", "–"]),  # nothing missing is averaged over
    ],
)
def test_static_tasks_are_those_of_the_last_step_and_complete(last, expected, report, tmp_path, runs):
    run = write_static(write_run(tmp_path / "run", CUMULATIVE), step="2011-2012")
    found = report(write_static(run, last), runs[1])
    header, _, row, other = (re.split(r" *\| *", line) for line in found.md.splitlines()[2:6])
    first = header.index("ImageNet")
    assert (row[first : first + 4], other[first]) == (expected, "–")
    assert found.summary["runs"]["run"]["static"][IMAGENET] == [None, None, 0.5, last[IMAGENET]]
    assert f"| imagenet1k | {100 * last[IMAGENET]:.1f} |" in found.md


def test_static_results_alone(report, tmp_path):
    run = write_static(tmp_path / "run")
    model = write_lines(tmp_path / "m", [(IMAGENET, 0.6, {})], benchmark="yfcc15m", family="f", model={"name": "b"})
    for chosen, names in (([run], ["run"]), ([model], ["b"]), ([run, model], ["run", "b"])):
        lines = report(*chosen).md.splitlines()
        assert lines[0] == "**TiC-YFCC15M: in per cent**"
        assert [line.split(" | ")[0] for line in lines[4 : 4 + len(names)]] == [f"| {name}" for name in names]


def test_models_that_are_not_runs(report, tmp_path, runs):
    folder = write_models(tmp_path / "models")
    found = report(folder)
    assert list(found.summary) == ["models"]
    assert found.summary["models"]["b"]["tasks"]["retrieval"]["periods"]["2013-2014"] == 0.9
    assert "| b | b | all | 50.0 | 80.0 | 52.5 |" in found.md
    assert "| c | c | 3 of 4 | 50.0 | – | – |" in found.md
    assert found.matrix.splitlines()[-1] == "c,retrieval,,0.5,0.0,0.0,"
    head, *rows = csv.reader(io.StringIO(found.csv))
    first = head.index("retrieval 2004-2008")
    assert head[first + 1 : first + 3] == ["retrieval 2011-2012 to 2013-2014", "retrieval all"]
    assert [row[first : first + 3] for row in rows[2:]] == [["0.5", "0.8", "0.525"], ["0.5", "", ""]]
    write_lines(folder, [(IMAGENET, 0.6, {})], benchmark="yfcc15m", family="b", model={"name": "b"})
    found = report(folder, *runs)
    assert (list(found.summary["runs"]), len(found.summary["models"])) == (["cumulative", "sequential"], 4)
    assert "| b | b | – | **60.0** | **60.0** | – | – | – |" in found.md


def test_published_numbers_stand_beside_ours(report, tmp_path, runs):
    path = tmp_path / "paper.csv"
    path.write_text("method,retrieval ID,retrieval forward\ncumulative, 54.3 ,\n\nsequential,51,20.0\n")
    found = report(*runs, reference=str(path))
    for row in ("cumulative | retrieval ID | 55.0 | 54.3 | +0.7", "sequential | retrieval ID | 50.0 | 51.0 | -1.0"):
        assert f"| {row} |" in found.md
    assert "Beside the numbers of paper.csv" in found.html


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a table of method and numbers in per cent"),
        ("retrieval ID\n1\n", "is not a table of method"),
        ("method,ID\ncumulative,1\n", "unknown column 'ID'; there are: retrieval backward, retrieval ID"),
        ("method,retrieval ID\nreplay,1\n", "unknown method 'replay'; there are: cumulative, sequential"),
        ("method,retrieval ID\ncumulative,high\n", "is not a table of method and numbers"),
    ],
)
def test_published_numbers_that_are_wrong(text, message, report, tmp_path, runs):
    (tmp_path / "paper.csv").write_text(text)
    with pytest.raises(TicError, match=re.escape(message)):
        report(*runs, reference=str(tmp_path / "paper.csv"))
    assert not (tmp_path / "out").exists()


def test_evaluation_data_and_what_was_left_out(report, tmp_path):
    about = {"num_samples": 1500, "coverage": 0.9999, "dropped": {"bad image": 2}, "nonfinite": 7}
    part = write_run(tmp_path / "part", CUMULATIVE, **about)
    rest = [write_run(tmp_path / name, CUMULATIVE, num_samples=1503, coverage=1.0) for name in ("all", "too")]
    found = report(part, *rest)
    assert found.summary["runs"]["part"]["data"]["retrieval"]["2009-2010"] == about
    assert "| part | retrieval | 6,000 | 99.99% | 8 bad image, 28 features not finite |" in found.md
    assert "| all, too | retrieval | 6,012 | 100.00% | 0 |" in found.md
    found = report(write_static(tmp_path / "static", {IMAGENET: 0.5}, nonfinite=3))
    assert found.summary["data"] == {"static": {IMAGENET: {"nonfinite": 3}}}
    assert "| static | static | – | – | 3 features not finite |" in found.md
