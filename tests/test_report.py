import base64
import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tic_clip import TicError
from tic_clip import report as report_module
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.results import RESULTS, read_log, task_key
from tic_clip.report.figures import FIGURE_1, SERIES, draw_compute, draw_curves, draw_robustness
from tic_clip.report.frame import load_results
from tic_clip.report.tables import FLICKR, IMAGENET, SHIFTS

TEXTS = {"summary.json", "matrix.csv", "table.csv", "table.md", "table.tex", "report.html"}
FIGURES = {f"{name}.{kind}" for name in ("heatmap", "curves", "robustness") for kind in ("png", "svg")}
FILES = TEXTS | FIGURES
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


def report(folders, output, reference=None):
    """The content of summary.json."""
    report_module.report(folders, output, reference)
    return json.loads((Path(output) / "summary.json").read_text())


def text_of(folders, output):
    return report_module.report(folders, output)[0]


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
    assert "ID 55.0, backward –, forward 10.0" in text_of([tmp_path / "run"], tmp_path / "out")


def test_run_that_is_not_finished(tmp_path):
    summary = report([write_run(tmp_path / "run", CUMULATIVE[:2])], tmp_path / "out")
    assert summary["samples_seen"] == [10_000, 20_000, None, None]
    assert summary["tasks"]["retrieval"]["id"] is None
    assert "20,000, after 2 of 4 steps" in (tmp_path / "out" / "report.html").read_text()


def test_text_of_one_run(tmp_path, two_runs):
    assert text_of(two_runs[:1], tmp_path).splitlines() == [
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
    text = text_of(two_runs, tmp_path).splitlines()
    assert text[-4:-2] == [
        "cumulative  cumulative   40,000       40.0*      55.0*      10.0",
        "sequential  sequential   40,000       23.3       50.0       20.0*",
    ]
    markdown = (tmp_path / "table.md").read_text()
    assert "| cumulative | cumulative | 40,000 | **40.0** | **55.0** | 10.0 |" in markdown
    assert "| sequential | sequential | 40,000 | 23.3 | 50.0 | **20.0** |" in markdown


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
    assert "| one | cumulative | 70,000 | 49 of 98 | **50.0** | **50.0** | **50.0** | – | – | – |" in (
        (tmp_path / "table.md").read_text()
    )


def test_a_second_version_of_a_package_is_not_hidden(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE[:1])
    write_run(run, [[None] * 4, CUMULATIVE[1]], pins={"torch": "2.16.0"})
    assert report([run], tmp_path)["pins"] == {"torch": "2.15.0, 2.16.0"}


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
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
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
        assert "&lt;script&gt;&#34;&amp;&lt;/script&gt;|_%" in text
        markdown = (tmp_path / "table.md").read_text()
        assert "<script>" not in markdown
        assert "&lt;/script&gt;\\|_%" in markdown
        latex = '\\textless{}script\\textgreater{}"\\&\\textless{}/script\\textgreater{}\\textbar{}\\_\\%'
        assert latex in (tmp_path / "table.tex").read_text()


def test_wide_matrix_stays_out_of_the_terminal(tmp_path):
    values = (np.ones((102, 102)) / 2).tolist()
    text = text_of([write_run(tmp_path / "run", values, "datacomp_monthly")], tmp_path)
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
    """The page as it is, but for a script that tells the window's width, the content's, and that of each picture."""
    report(two_runs, tmp_path)
    page = tmp_path / "probe.html"
    widths = "[innerWidth, document.documentElement.scrollWidth, ...[...document.images].map(one => one.naturalWidth)]"
    probe = f"<script>document.title = {widths}</script></body>"
    page.write_text((tmp_path / "report.html").read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,800", "--enable-logging=stderr"]
    command = ["chromium", *flags, f"--user-data-dir={tmp_path}/user", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    window, content, *pictures = map(int, re.search(r"<title>([\d,]+)<", done.stdout)[1].split(","))
    assert content <= window <= 500
    assert len(pictures) == 3
    assert min(pictures) > 500
    assert '<td class="mark">55.0</td>' in done.stdout
    assert ":CONSOLE" not in done.stderr


def write_log(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"step": i + 1, "samples_seen": seen, "loss": loss, "lr": 1e-3, "samples_per_second": 300.0, "data_wait": 0.01}
        for i, (seen, loss) in enumerate(lines)
    ]
    (folder / "train.log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)


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


# Several seeds, static tasks, other models, published numbers, coverage.


def write_lines(folder, *entries, **common):
    """Append results given as (key, value, fields)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RESULTS, "a") as file:
        for key, value, fields in entries:
            file.write(json.dumps({"key": key, "metrics": {"main_metric": value}, **common, **fields}) + "\n")
    return folder


def seeds(tmp_path, **changes):
    """Two runs of CUMULATIVE, one of them 0.2 lower, that differ in the seed and in ``changes`` of the second."""
    lower = [[value - 0.1 for value in row] for row in CUMULATIVE]
    one = write_run(tmp_path / "one", CUMULATIVE, seed=0, settings="x")
    return [one, write_run(tmp_path / "two", lower, **{"seed": 1, "settings": "x", **changes})]


def test_runs_with_different_seeds_are_one_row(tmp_path):
    report(seeds(tmp_path), tmp_path / "out")
    deviation = 0.1 / 2**0.5
    rows = (tmp_path / "out/table.md").read_text().splitlines()
    assert "| one and 1 more | cumulative | 40,000 | **35.0 ± 7.1** | **50.0 ± 7.1** | **5.0 ± 7.1** |" in rows
    assert "±: standard deviation over n = 2 runs with different seeds" in (tmp_path / "out/table.md").read_text()
    head, row = csv.reader(io.StringIO((tmp_path / "out/table.csv").read_text()))
    assert (head[2], row[2]) == ("runs", "2")
    assert head[5:7] == ["retrieval backward", "retrieval backward sd"]
    assert [float(cell) for cell in row[5:9]] == pytest.approx([0.35, deviation, 0.5, deviation])


@pytest.mark.parametrize("change", [{"settings": "y"}, {"seed": 0}, {"scale": "tic_debug"}, {"samples_seen": 7}])
def test_runs_that_differ_in_more_are_rows_of_their_own(change, tmp_path):
    report(seeds(tmp_path, **change), tmp_path / "out")
    text = (tmp_path / "out/table.md").read_text()
    assert "±" not in text
    assert "| one | cumulative |" in text
    assert "| two | cumulative |" in text


STATIC = {IMAGENET: 0.5, **{key: 0.1 * i for i, key in enumerate(SHIFTS)}, FLICKR: 0.6, "vtab/x": 0.8}


def with_static(folder, values=STATIC, step="2013-2014", **fields):
    lines = [(key, value, {"step": step, "macs_seen": 2e18, **fields}) for key, value in values.items()]
    return write_lines(folder, *lines, benchmark="yfcc15m", method="cumulative", scale="tic_tiny")


def test_static_tasks_stand_in_the_comparison_as_in_the_paper(tmp_path, two_runs):
    with_static(two_runs[0])
    summary = report(two_runs, tmp_path / "out")
    assert summary["runs"]["cumulative"]["static"]["vtab/x"] == [None, None, None, 0.8]
    header, _, row, other = (tmp_path / "out/table.md").read_text().splitlines()[2:6]
    heads = ["ImageNet", "shifts (6)", "Flickr30k", "average (9)", "retrieval backward"]
    assert [cell.strip() for cell in header.split("|")[5:10]] == heads
    average = (0.5 + 1.5 + 0.6 + 0.8) / 9  # the shifts are 0, 0.1, … 0.5
    assert [cell.strip() for cell in row.split("|")[5:9]] == [
        "**50.0**",
        "**25.0**",
        "**60.0**",
        f"**{100 * average:.1f}**",
    ]
    assert [cell.strip() for cell in other.split("|")[4:9]] == ["–"] * 5
    assert "| vtab/x | 80.0 |" in (tmp_path / "out/table.md").read_text()


def test_static_results_of_two_steps_are_not_mixed(tmp_path, two_runs):
    with_static(two_runs[0], {IMAGENET: 0.9, FLICKR: 0.5}, step="2009-2010")
    with_static(two_runs[0], {IMAGENET: 0.3})
    report(two_runs, tmp_path / "out")
    row = (tmp_path / "out/table.md").read_text().splitlines()[4]
    assert [cell.strip() for cell in row.split("|")[5:9]] == ["17 of 18", "**30.0**", "–", "–"]
    assert "| retrieval/flickr_1k_test_image_text_retrieval | – |" in (tmp_path / "out/table.md").read_text()


def labels(figure):
    return [line.get_label() for line in figure.axes[0].lines]


def test_compute_is_beside_the_papers_points_where_there_is_imagenet(tmp_path, two_runs):
    assert draw_compute(load_results(two_runs)) is None  # no MACs
    with_static(two_runs[0])
    figure = draw_compute(load_results(two_runs))
    run, *paper = figure.axes[0].lines
    assert (run.get_label(), run.get_xdata().tolist()) == ("cumulative", [2e18])
    assert run.get_ydata() == pytest.approx([100 * (0.5 + 1.5) / 7])
    assert [line.get_label() for line in paper] == [
        f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)" for name in FIGURE_1
    ]
    assert (paper[1].get_xdata()[-1], paper[1].get_ydata()[-1]) == (10.5 * 5e18, 45.6)


def test_compute_without_imagenet_is_the_mean_over_all_periods(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE, macs_seen=4.0)
    (line,) = draw_compute(load_results([run])).axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata()) == ([4.0] * 4, pytest.approx([20, 27.5, 35, 47.5]))


def models(folder):
    """Two models of one family and one of another, on the four periods."""
    table = get_benchmark("yfcc15m")
    values = {"a one": [0.3, 0, 0.1, 0.3], "a two": [0.5, 0, 0.3, 0.5], "b": [0.5, 0, 0.7, 0.9], "c": [0.5, 0, 0, None]}
    for name, row in values.items():
        entries = [
            (task_key(table, "retrieval", period), value, {}) for period, value in zip(table.periods, row, strict=True)
        ]
        about = {"benchmark": "yfcc15m", "family": name[0], "model": {"name": name}}
        write_lines(folder, *(entry for entry in entries if entry[1] is not None), **about)
    return folder


def test_robustness_has_a_fitted_line_for_each_family_and_joins_the_steps_of_a_run(tmp_path, two_runs):
    figure = draw_robustness(load_results([models(tmp_path / "models"), two_runs[0]]))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["a"].get_xydata().tolist() == [pytest.approx([30, 20]), pytest.approx([50, 40])]
    assert lines["b"].get_xydata().tolist() == [pytest.approx([50, 80])]
    assert "c" not in lines  # lacks a new period
    assert lines["cumulative"].get_xydata()[3].tolist() == pytest.approx([40, 55])
    drawn_lines = [line.get_xydata() for line in figure.axes[0].lines if str(line.get_label()).startswith("_child")]
    assert len(drawn_lines) == 2  # the run's steps, and family a's; b has one model
    assert drawn_lines[1] == pytest.approx(np.array([[30, 20], [50, 40]]))


def test_over_time_is_of_the_steps_of_one_run_or_of_the_last_models(tmp_path, two_runs):
    assert labels(draw_curves(load_results(two_runs[:1]))) == STEPS
    write_run(two_runs[0], CUMULATIVE[:2])
    figure = draw_curves(load_results([*two_runs, models(tmp_path / "models")]))
    assert labels(figure) == ["cumulative", "sequential", "a one", "a two", "b", "c"]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([40, 40, 40, 70])


def test_published_numbers_stand_beside_ours(tmp_path, two_runs):
    paper = tmp_path / "paper.csv"
    paper.write_text("method,retrieval ID,retrieval forward\ncumulative, 54.3 ,\nsequential,51,20.0\n")
    report(two_runs, tmp_path / "out", str(paper))
    markdown = (tmp_path / "out/table.md").read_text()
    assert "| cumulative | cumulative | 55.0 | 54.3 | +0.7 | 10.0 | – | – |" in markdown
    assert "| sequential | sequential | 50.0 | 51.0 | −1.0 | 20.0 | 20.0 | +0.0 |" in markdown
    assert "Beside the numbers of paper.csv" in (tmp_path / "out/report.html").read_text()


def test_intervals_are_in_the_summary_and_told_of_the_matrix(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE, ci95=[0.4, 0.48])
    summary = report([run], tmp_path / "out")
    assert summary["tasks"]["retrieval"]["ci95"] == [[[0.4, 0.48]] * 4] * 4
    assert "a cell is good to ± 4.0 on average (95 %)" in (tmp_path / "out/table.md").read_text()


def test_checkpoints_inside_a_step_are_in_no_matrix(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE)
    before = report([run], tmp_path / "out")
    write_run(run, SEQUENTIAL, final=False)
    assert report([run], tmp_path / "out") == before


def test_results_of_two_metric_versions_are_not_compared(tmp_path, two_runs):
    write_run(two_runs[0], CUMULATIVE[:2], metric_version=2)
    for chosen in (two_runs[:1], two_runs):
        with pytest.raises(TicError, match=r"several metric versions can't be compared \(1 in .*, 2 in .*again"):
            report(chosen, tmp_path / "out")
    write_run(two_runs[0], CUMULATIVE, metric_version=2)  # all of it again: the last line counts
    report(two_runs[:1], tmp_path / "out")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figures_have_the_same_bytes_each_time(kind, tmp_path, two_runs):
    for out in ("a", "b"):
        report([*two_runs, models(tmp_path / f"models_{out}" / "models")], tmp_path / out)
    names = sorted(path.name for path in (tmp_path / "a").glob(f"*.{kind}"))
    assert len(names) == 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["_x", "a$b$c", r"$\foo$", "a&<|_"])
def test_a_name_is_what_it_is_in_the_figures(name, tmp_path, two_runs):
    """No formula, and not left out of the legend."""
    runs = [two_runs[0].rename(tmp_path / name), two_runs[1]]
    report(runs, tmp_path / "out")
    texts = draw_curves(load_results(runs)).legends[0].get_texts()
    assert [text.get_text().replace(r"\$", "$").strip() for text in texts] == [name, "sequential"]


def test_infinity_is_missing(tmp_path):
    values = [[float("inf"), 0.1, 0.1, float("nan")], *CUMULATIVE[1:]]
    summary = report([write_run(tmp_path / "run", values)], tmp_path / "out")
    assert summary["tasks"]["retrieval"]["matrix"][0] == [None, 0.1, 0.1, None]
    assert summary["tasks"]["retrieval"]["id"] is None
    assert not re.search("Infinity|NaN", (tmp_path / "out/summary.json").read_text())


def test_a_figure_that_has_nothing_to_show_any_more_is_taken_away(tmp_path, two_runs):
    report(two_runs, tmp_path / "out")
    report([models(tmp_path / "models")], tmp_path / "out")
    assert not list((tmp_path / "out").glob("heatmap.*"))


def test_the_script_takes_published_numbers(tmp_path, two_runs):
    (tmp_path / "paper.csv").write_text("method,retrieval ID\nsequential,51\n")
    done = script(*two_runs, "--out", tmp_path / "out", "--reference", tmp_path / "paper.csv")
    assert done.returncode == 0, done.stderr
    assert "differences are ours - published" in done.stdout
    names = re.findall(r"[\w.]+\.(?:json|csv|md|tex|html|png|svg)", done.stdout.splitlines()[-1])
    assert set(names) == {path.name for path in (tmp_path / "out").iterdir()}


def test_what_stands_on_the_page_and_in_which_order(tmp_path, two_runs):
    write_run(tmp_path / "half", CUMULATIVE[:2], method="restart")
    report([*two_runs, tmp_path / "half"], tmp_path / "out")
    text = (tmp_path / "out/report.html").read_text()
    parts = ["Results", "Step by period", "Over time", "Robustness over time", "The matrices in numbers"]
    parts += ["How to read this", "What was run"]
    assert re.findall("<h2>(.*?)</h2>", text) == parts
    assert text.count("<details>") == 3
    assert re.search('<details><summary>half</summary>.*?<td class="mark">50.0</td>', text, re.DOTALL)
    assert "half (up to 2009-2010)" in labels(draw_curves(load_results([*two_runs, tmp_path / "half"])))


def test_macs_stand_in_the_comparison_where_a_run_has_them(tmp_path, two_runs):
    report(two_runs, tmp_path / "out")
    assert "MACs" not in (tmp_path / "out/table.md").read_text()
    write_run(tmp_path / "oracle", CUMULATIVE, method="oracle", macs_seen=3.16e11)
    summary = report([*two_runs, tmp_path / "oracle"], tmp_path / "out")
    assert summary["runs"]["oracle"]["macs_seen"] == [3.16e11] * 4
    assert "| oracle | oracle | 40,000 | 3.2e11 | **40.0** |" in (tmp_path / "out/table.md").read_text()
    assert r"40,000 & $3.2 \times 10^{11}$ & \textbf{40.0}" in (tmp_path / "out/table.tex").read_text()


def test_models_that_are_not_runs(tmp_path, two_runs):
    summary = report([models(tmp_path / "models")], tmp_path / "out")
    assert list(summary) == ["models"]
    assert summary["models"]["b"]["tasks"]["retrieval"]["periods"]["2013-2014"] == 0.9
    markdown = (tmp_path / "out/table.md").read_text()
    assert "| b | b | all | 50.0 | 80.0 | 52.5 |" in markdown
    assert "| c | c | 3 of 4 | 50.0 | – | – |" in markdown
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES - {"heatmap.png", "heatmap.svg"}
    assert (tmp_path / "out/matrix.csv").read_text().splitlines()[-1].startswith("c,retrieval,,0.5,0.0,0.0,")
    write_lines(tmp_path / "models", (IMAGENET, 0.6, {}), benchmark="yfcc15m", family="b", model={"name": "b"})
    report([tmp_path / "models", *two_runs], tmp_path / "out")
    assert "| b | b | – | **60.0** | **60.0** | – | – | – |" in (tmp_path / "out/table.md").read_text()


def test_twenty_runs_are_told_apart_by_colour_and_marker():
    assert len({(style["color"], style["marker"]) for style in itertools.islice(SERIES, 20)}) == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a table of method and numbers in per cent"),
        ("retrieval ID\n1\n", "is not a table of method"),
        ("method,ID\ncumulative,1\n", "unknown or repeated column 'ID'; there are: retrieval backward, retrieval ID"),
        ("method,retrieval ID\nreplay,1\n", "unknown or repeated method 'replay'; there are: cumulative, sequential"),
        ("method,retrieval ID\ncumulative,1\ncumulative,2\n", "repeated method 'cumulative'"),
        ("method,retrieval ID\ncumulative,high\n", "is not a table of method and numbers"),
        ("method,retrieval ID\ncumulative,101\n", "a number is not in per cent, from 0 to 100"),
    ],
)
def test_published_numbers_that_are_wrong(text, message, tmp_path, two_runs):
    (tmp_path / "paper.csv").write_text(text)
    with pytest.raises(TicError, match=re.escape(message)) as error:
        report(two_runs, tmp_path / "out", str(tmp_path / "paper.csv"))
    assert str(error.value).startswith(str(tmp_path / "paper.csv"))
    assert not (tmp_path / "out").exists()


def test_data_and_missing_results(tmp_path):
    values = [[*row[:3], None] if i < 2 else row for i, row in enumerate(CUMULATIVE)]
    run = write_run(tmp_path / "run", values, num_samples=1500, coverage=0.9999, dropped={"bad image": 2}, nonfinite=7)
    other = write_run(tmp_path / "other", CUMULATIVE, num_samples=1503, coverage=1.0)
    summary = report([run, other], tmp_path / "out")
    facts = {"num_samples": 1500, "coverage": 0.9999, "dropped": {"bad image": 2}, "nonfinite": 7}
    assert summary["runs"]["run"]["data"]["retrieval"]["2009-2010"] == facts
    markdown = (tmp_path / "out/table.md").read_text()
    cells = " | ".join(["1,500 (99.9 %)"] * 4)
    assert f"| retrieval: run | {cells} | 8 bad image, 28 features not finite |" in markdown
    assert "| retrieval: other | 1,503 | 1,503 | 1,503 | 1,503 | 0 |" in markdown
    assert "not all were scored on the same samples" in markdown
    assert "| run | cumulative | 40,000 | 14 of 16 |" in markdown
    assert "| other | cumulative | 40,000 | all |" in markdown
    report([run], tmp_path / "one")
    assert "results 14 of 16" in (tmp_path / "one/report.html").read_text()
