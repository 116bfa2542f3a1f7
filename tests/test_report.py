import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from tic_clip import TicError
from tic_clip.figure import COLOURS, curves, heatmap
from tic_clip.report import report
from tic_clip.results import RESULTS, read_log, task_key
from tic_clip.tables import table_text, tables, to_latex, to_markdown
from tic_clip.timeline import get_benchmark

FILES = {"summary.json", "matrix.csv", "table.md", "table.tex", "heatmap.png", "report.html"}
STEPS = ["2004-2008", "2009-2010", "2011-2012", "2013-2014"]
CUMULATIVE = [[0.5, 0.1, 0.1, 0.1], [0.4, 0.5, 0.1, 0.1], [0.4, 0.4, 0.5, 0.1], [0.4, 0.4, 0.4, 0.7]]
"""ID (0.5 + 0.5 + 0.5 + 0.7) / 4 = 0.55, backward 0.4, forward 0.1."""
SEQUENTIAL = [[0.5, 0.2, 0.2, 0.2], [0.3, 0.5, 0.2, 0.2], [0.2, 0.3, 0.5, 0.2], [0.1, 0.2, 0.3, 0.5]]
"""ID 0.5, backward (3 * 0.3 + 2 * 0.2 + 0.1) / 6 = 0.2333…, forward 0.2."""


def write_run(folder, values, benchmark="yfcc15m", method="cumulative", task="retrieval", **fields):
    """Write the results of a (num_steps, num_periods) matrix; None where there is none."""
    table = get_benchmark(benchmark)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"benchmark": benchmark, "method": method, "scale": "tic_tiny", "pins": {"torch": "2.15.0"}}
    with open(folder / RESULTS, "a") as file:
        for i, row in enumerate(values):
            for period, value in zip(table.periods, row, strict=True):
                if value is not None:
                    line = {"key": task_key(table, task, period), "metrics": {"main_metric": value}, **common}
                    line |= {"step": table.steps[i].name, "samples_seen": 10_000 * (i + 1), **fields}
                    file.write(json.dumps(line) + "\n")
    return folder


@pytest.fixture
def two_runs(tmp_path):
    return [
        write_run(tmp_path / "cumulative", CUMULATIVE),
        write_run(tmp_path / "sequential", SEQUENTIAL, method="sequential"),
    ]


def test_summary_of_one_run(tmp_path, two_runs):
    summary = report(two_runs[:1], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    task = summary.pop("tasks").pop("retrieval")
    assert summary == {
        "benchmark": "yfcc15m",
        "method": "cumulative",
        "scale": "tic_tiny",
        "steps": STEPS,
        "samples_seen": [10_000, 20_000, 30_000, 40_000],
        "macs_seen": [None] * 4,
        "pins": {"torch": "2.15.0"},
    }
    assert task == {
        "metric": "mean_recall@1",
        "matrix": CUMULATIVE,
        "id": pytest.approx(0.55),
        "backward": pytest.approx(0.4),
        "forward": pytest.approx(0.1),
    }


def test_summary_of_two_runs(tmp_path, two_runs):
    runs = report(two_runs, tmp_path / "out")["runs"]
    assert list(runs) == ["cumulative", "sequential"]
    assert runs["sequential"]["tasks"]["retrieval"]["backward"] == pytest.approx(1.4 / 6)
    assert report(two_runs[1:], tmp_path / "one") == runs["sequential"]


def test_periods_are_reduced_to_steps_and_kept(tmp_path):
    values = (np.arange(63).reshape(7, 9) / 100).tolist()
    task = report([write_run(tmp_path / "run", values, "datacomp")], tmp_path / "out")["tasks"]["retrieval"]
    assert task["periods_matrix"] == values
    assert np.shape(task["matrix"]) == (7, 7)
    assert task["matrix"][0][:2] == [pytest.approx(0.01), 0.03]  # mean of 0.00, 0.01, 0.02; then 2017
    rows = list(csv.reader(io.StringIO((tmp_path / "out" / "matrix.csv").read_text())))
    assert len(rows[0]) == 2 + 9
    assert "| 2014-2016 | **0.0** | **1.0** | **2.0** | 3.0 |" in (tmp_path / "out" / "table.md").read_text()


def test_csv_has_full_precision_and_empty_cells(tmp_path):
    values = [[1 / 3, None, 0.1, 0.1], *CUMULATIVE[1:]]
    run = write_run(tmp_path / "run", values)
    report([run], tmp_path / "out")
    lines = (tmp_path / "out" / "matrix.csv").read_text().splitlines()
    assert lines[0] == "task,step,2004-2008,2009-2010,2011-2012,2013-2014"
    assert lines[1] == "retrieval,2004-2008,0.3333333333333333,,0.1,0.1"
    report([run, write_run(tmp_path / "other", CUMULATIVE)], tmp_path / "both")
    lines = (tmp_path / "both" / "matrix.csv").read_text().splitlines()
    assert lines[0].startswith("run,task,step,")
    assert lines[1].startswith("run,retrieval,2004-2008,0.3333333333333333,,")
    assert len(lines) == 1 + 2 * 4


def test_missing_cells_are_shown_as_missing(tmp_path):
    values = [row[:] for row in CUMULATIVE]
    values[3][0] = None
    summary = report([write_run(tmp_path / "run", values)], tmp_path / "out")
    task = summary["tasks"]["retrieval"]
    assert task["matrix"][3][0] is None
    assert task["backward"] is None
    assert task["id"] == pytest.approx(0.55)
    assert "NaN" not in (tmp_path / "out" / "summary.json").read_text()
    assert "| 2013-2014 | – | 40.0 | 40.0 | **70.0** |" in (tmp_path / "out" / "table.md").read_text()
    assert "2013-2014 & -- & 40.0 & 40.0 & \\textbf{70.0} \\\\" in (tmp_path / "out" / "table.tex").read_text()
    assert "ID 55.0, backward –, forward 10.0" in table_text(summary)


def test_run_that_is_not_finished(tmp_path):
    summary = report([write_run(tmp_path / "run", CUMULATIVE[:2])], tmp_path / "out")
    assert summary["samples_seen"] == [10_000, 20_000, None, None]
    assert summary["tasks"]["retrieval"]["id"] is None
    assert "20,000, after 2 of 4 steps" in (tmp_path / "out" / "report.html").read_text()


def test_text_of_one_run(tmp_path, two_runs):
    assert table_text(report(two_runs[:1], tmp_path)).splitlines() == [
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


def test_comparison_marks_the_best(tmp_path, two_runs):
    text = table_text(report(two_runs, tmp_path)).splitlines()
    assert text[-4:-2] == [
        "cumulative  cumulative   40,000       55.0*      40.0*      10.0",
        "sequential  sequential   40,000       50.0       23.3       20.0*",
    ]
    markdown = (tmp_path / "table.md").read_text()
    assert "| cumulative | cumulative | 40,000 | **55.0** | **40.0** | 10.0 |" in markdown
    assert "| sequential | sequential | 40,000 | 50.0 | 23.3 | **20.0** |" in markdown


def test_equal_figures_are_equally_good(tmp_path):
    almost = [[value - 1e-6 for value in row] for row in CUMULATIVE]
    runs = [write_run(tmp_path / name, values) for name, values in (("a", CUMULATIVE), ("b", almost))]
    report(runs, tmp_path)
    assert (tmp_path / "table.md").read_text().count("**55.0**") == 2


def test_task_that_one_run_lacks(tmp_path):
    square = [[0.5] * 7] * 7
    both = write_run(write_run(tmp_path / "both", square, "emoji"), square, "emoji", task="emojinet")
    one = write_run(tmp_path / "one", square, "emoji")
    summary = report([one, both], tmp_path)
    assert list(summary["runs"]["one"]["tasks"]) == ["retrieval"]
    assert summary["runs"]["both"]["tasks"]["emojinet"]["metric"] == "acc1"
    assert "| one | cumulative | 70,000 | **50.0** | **50.0** | **50.0** | – | – | – |" in (
        (tmp_path / "table.md").read_text()
    )


def test_a_second_version_of_a_package_is_not_hidden(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE[:1])
    write_run(run, [[None] * 4, CUMULATIVE[1]], pins={"torch": "2.16.0"})
    assert report([run], tmp_path)["pins"] == {"torch": "2.15.0, 2.16.0"}


def test_same_results_give_same_bytes(tmp_path, two_runs):
    for runs in (two_runs, two_runs[:1]):
        report(runs, tmp_path / "a")
        report(runs, tmp_path / "b")
        assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("benchmark", ["yfcc15m", "datacomp", "datacomp_monthly"])
def test_heatmap_is_a_picture_of_sensible_size(tmp_path, benchmark):
    table = get_benchmark(benchmark)
    values = np.linspace(0, 1, len(table.steps) * len(table.periods)).reshape(len(table.steps), -1).tolist()
    report([write_run(tmp_path / "run", values, benchmark)], tmp_path)
    with Image.open(tmp_path / "heatmap.png") as image:
        image.load()
        assert image.format == "PNG"
        assert not image.text  # no date, no version
        assert all(500 < side < 3000 for side in image.size)
        assert len(image.getcolors(1 << 20)) > 50


def test_heatmap_of_five_runs_and_of_equal_values(tmp_path):
    runs = [write_run(tmp_path / str(i), [[0.0] * 4] * 4) for i in range(5)]
    with Image.open(io.BytesIO(heatmap(report(runs, tmp_path)["runs"]))) as image:
        assert image.width > image.height > 900  # three and two beside each other


class Page(HTMLParser):
    """The tags, attributes and table cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.in_cell = tag in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.cells.append(data)
            self.in_cell = False


def test_page_is_self_contained_and_has_the_table(tmp_path, two_runs):
    report(two_runs[:1], tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert "http" not in re.sub('base64,[^"]*', "", text)
    assert page.cells[:10] == ["trained up to", *STEPS, "2004-2008", "50.0", "10.0", "10.0", "10.0"]
    assert all(word in text for word in ("tic_tiny", "40,000", "torch 2.15.0", "Backward transfer"))


def test_what_comes_from_files_is_escaped(tmp_path):
    evil = '<script>"&</script>|_%'
    runs = [write_run(tmp_path / name, CUMULATIVE, method=evil, scale=evil, pins={evil: evil}) for name in ("a", "b")]
    for chosen in (runs, runs[:1]):
        report(chosen, tmp_path)
        text = (tmp_path / "report.html").read_text()
        assert "script" not in Page(text).tags
        assert "&lt;script&gt;&quot;&amp;&lt;/script&gt;|_%" in text
        markdown = (tmp_path / "table.md").read_text()
        assert "<script>" not in markdown
        assert "&lt;/script&gt;\\|_%" in markdown
        assert '<script>"\\&</script>|\\_\\%' in (tmp_path / "table.tex").read_text()


def test_latex_and_markdown_of_nothing():
    assert to_latex([]) == to_markdown([]) == ""


def test_wide_matrix_stays_out_of_the_terminal(tmp_path):
    values = (np.ones((102, 102)) / 2).tolist()
    text = table_text(report([write_run(tmp_path / "run", values, "datacomp_monthly")], tmp_path))
    assert "102 columns: see matrix.csv" in text
    assert max(map(len, text.splitlines())) < 100


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [write_run(tmp_path / seed / "run", CUMULATIVE) for seed in ("seed0", "seed1")]
    assert list(report(runs, tmp_path)["runs"]) == ["seed0/run", "seed1/run"]
    with pytest.raises(TicError, match="different names"):
        report([runs[0], runs[0]], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "no step: a released model"),
        ({"key": "imagenet1k"}, "no result on a time period"),
        ({"method": None}, "one method, these are of none"),
    ],
)
def test_results_that_cannot_be_reported(tmp_path, change, message):
    run = write_run(tmp_path / "run", CUMULATIVE, **change)
    with pytest.raises(TicError, match=message) as error:
        report([run], tmp_path / "out")
    assert str(run / RESULTS) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_results_of_an_unknown_benchmark(tmp_path):
    results = write_run(tmp_path, CUMULATIVE) / RESULTS
    results.write_text(results.read_text().replace('"yfcc15m"', '"nope"'))
    with pytest.raises(TicError, match="unknown benchmark 'nope'"):
        report([tmp_path], tmp_path)


def test_one_folder_with_two_methods(tmp_path):
    run = write_run(write_run(tmp_path / "run", CUMULATIVE), SEQUENTIAL, method="sequential")
    with pytest.raises(TicError, match="of several: cumulative, sequential"):
        report([run], tmp_path)


def test_run_without_results(tmp_path):
    with pytest.raises(TicError, match=r"eval_results.jsonl is missing: run scripts/evaluate.py first"):
        report([tmp_path], tmp_path)


def test_empty_results(tmp_path):
    (tmp_path / RESULTS).touch()
    with pytest.raises(TicError, match=r"eval_results.jsonl: no result"):
        report([tmp_path], tmp_path)


def test_different_benchmarks_are_not_compared(tmp_path, two_runs):
    other = write_run(tmp_path / "emoji", [[0.5] * 7] * 7, "emoji")
    with pytest.raises(TicError, match="different benchmarks: emoji, yfcc15m"):
        report([two_runs[0], other], tmp_path)


def script(*arguments):
    path = Path(__file__).parent.parent / "scripts" / "report.py"
    return subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True)


def test_script_writes_beside_the_results(tmp_path, two_runs):
    done = script(two_runs[0])
    assert done.returncode == 0, done.stderr
    assert "ID 55.0, backward 40.0, forward 10.0" in done.stdout
    assert {path.name for path in two_runs[0].iterdir()} == FILES | {RESULTS}


def test_script_compares(tmp_path, two_runs):
    refused = script(*two_runs)
    assert (refused.returncode, refused.stderr) == (1, "error: --out DIR is needed to compare several runs\n")
    assert script(*two_runs, "--out", tmp_path / "out").returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_page_in_a_browser_fits_a_phone(tmp_path, two_runs):
    report(two_runs, tmp_path)
    page = tmp_path / "probe.html"
    probe = (
        "<script>document.title = [innerWidth, document.documentElement.scrollWidth, document.images[0].naturalWidth]"
    )
    page.write_text((tmp_path / "report.html").read_text().replace("</body>", f"{probe}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800", f"--user-data-dir={tmp_path}/user"]
    done = subprocess.run(["chromium", *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=90)
    window, content, picture = map(int, re.search(r"<title>(\d+),(\d+),(\d+)", done.stdout).groups())
    assert content <= window <= 500
    assert picture > 500
    assert '<td class="mark">55.0</td>' in done.stdout


def write_log(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"step": i + 1, "samples_seen": seen, "loss": loss, "lr": 1e-3, "samples_per_second": 300.0, "data_wait": 0.01}
        for i, (seen, loss) in enumerate(lines)
    ]
    (folder / "train.log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


def test_macs_stand_in_the_comparison_where_a_run_has_them(tmp_path, two_runs):
    assert "MACs" not in to_markdown(tables(report(two_runs, tmp_path / "out")))
    write_run(tmp_path / "oracle", CUMULATIVE, method="oracle", macs_seen=3.16e11)
    summary = report([*two_runs, tmp_path / "oracle"], tmp_path / "out")
    assert summary["runs"]["oracle"]["macs_seen"] == [3.16e11] * 4
    rows = [line.split(" | ")[:5] for line in to_markdown(tables(summary)).splitlines() if line.startswith("| ")]
    assert rows[0] == ["| run", "method", "samples seen", "MACs", "retrieval ID"]
    assert [row[3] for row in rows[2:]] == ["–", "–", "3.2e11"]
    assert rows[2][4] == "**55.0**"  # the marks are in their columns
    assert "3.2e11" in (tmp_path / "out/report.html").read_text()
    latex = (tmp_path / "out/table.tex").read_text()
    assert "40,000 & -- &" in latex
    assert r"40,000 & $3.2 \times 10^{11}$ & \textbf{55.0}" in latex


def test_a_summary_recorded_without_macs_is_still_a_table(tmp_path, two_runs):
    summary = report(two_runs, tmp_path / "out")
    for run in summary["runs"].values():
        del run["macs_seen"]
    assert "| cumulative | cumulative | 40,000 |" in to_markdown(tables(summary))


def test_the_log_of_training_is_read_step_after_step(tmp_path):
    write_log(tmp_path / "2009-2010", [(200, 2.0)])
    write_log(tmp_path / "2004-2008", [(100, 4.0), (150, 3.0)], tail='{"step": 3, "sam')
    logs = read_log(tmp_path, STEPS)
    assert [[(line["samples_seen"], line["loss"]) for line in step] for step in logs] == [
        [(100, 4.0), (150, 3.0)],
        [(200, 2.0)],
        [],
        [],
    ]


def test_training_is_drawn_where_there_is_a_log_and_taken_away_where_there_is_none(tmp_path, two_runs):
    out = tmp_path / "out"
    report(two_runs, out)
    page = (out / "report.html").read_text()
    assert not (out / "training.png").exists()
    write_log(two_runs[0] / "2004-2008", [(100, 4.0), (200, 3.0)])
    for runs in (two_runs[:1], two_runs):
        report(runs, out)
        picture = (out / "training.png").read_bytes()
        assert Image.open(io.BytesIO(picture)).size == (1500, 960)
        assert base64.b64encode(picture).decode() in (out / "report.html").read_text()
        report(runs, out)
        assert (out / "training.png").read_bytes() == picture
    shutil.rmtree(two_runs[0] / "2004-2008")
    report(two_runs, out)
    assert not (out / "training.png").exists()
    assert (out / "report.html").read_text() == page


def test_curves_show_what_was_logged():
    """Another loss is another picture, and so is another run; of nothing there is none."""
    line = {"samples_seen": 100, "loss": 4.0, "lr": 1e-3, "samples_per_second": 300.0}
    later = {**line, "samples_seen": 200}
    pictures = {
        curves({"a": [[line], [later]]}),
        curves({"a": [[line], [{**later, "loss": 3.0}]]}),
        curves({"a": [[line], [{**later, "lr": 1e-4}]]}),
        curves({"a": [[line, later]]}),  # one step
        curves({"a": [[line], [later]], "b": [[line], [later]]}),
    }
    assert len(pictures) == 5
    assert curves({"a": [[], []]}) is None


def test_eight_runs_have_eight_colours():
    """Found by their hue in the picture; each run's curve has a height of its own."""
    lines = [{"samples_seen": 100 * i, "lr": 1e-3, "samples_per_second": 300.0} for i in range(1, 9)]
    logs = {f"run {k}": [[{**line, "loss": float(k)} for line in lines]] for k in range(8)}
    with Image.open(io.BytesIO(curves(logs))) as image:
        found = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert len({ImageColor.getrgb(colour) for colour in COLOURS} & found) == len(logs)
