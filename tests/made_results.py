"""Results of runs and models, as scripts/evaluate.py writes them, with hand-worked means."""

import json
from types import SimpleNamespace

import pytest

from tic_clip import report as report_module
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.results import RESULTS, task_key
from tic_clip.report.compare import FLICKR, IMAGENET, SHIFTS

STEPS = ["2004-2008", "2009-2010", "2011-2012", "2013-2014"]
CUMULATIVE = [[0.5, 0.1, 0.1, 0.1], [0.4, 0.5, 0.1, 0.1], [0.4, 0.4, 0.5, 0.1], [0.4, 0.4, 0.4, 0.7]]
"""ID (0.5 + 0.5 + 0.5 + 0.7) / 4 = 0.55, backward 0.4, forward 0.1."""
SEQUENTIAL = [[0.5, 0.2, 0.2, 0.2], [0.3, 0.5, 0.2, 0.2], [0.2, 0.3, 0.5, 0.2], [0.1, 0.2, 0.3, 0.5]]
"""ID 0.5, backward (3 * 0.3 + 2 * 0.2 + 0.1) / 6 = 0.2333…, forward 0.2."""
SQUARE = [[0.5] * 7] * 7
STATIC = {IMAGENET: 0.5, **{key: 0.1 * i for i, key in enumerate(SHIFTS)}, FLICKR: 0.6, "vtab/x": 0.8}
RUN = {"benchmark": "yfcc15m", "method": "cumulative", "scale": "tic_tiny"}


def write_lines(folder, entries, **common):
    """Append results given as (key, value, fields)."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RESULTS, "a") as file:
        for key, value, fields in entries:
            file.write(json.dumps({"key": key, "metrics": {"main_metric": value}, **common, **fields}) + "\n")
    return folder


def write_run(folder, values, benchmark="yfcc15m", task="retrieval", **fields):
    """Write the results of a (num_steps, num_periods) matrix; None where there is none."""
    table = get_benchmark(benchmark)
    entries = [
        (task_key(table, task, period), value, {"step": step.name, "samples_seen": 10_000 * (i + 1), **fields})
        for i, (step, row) in enumerate(zip(table.steps, values, strict=False))
        for period, value in zip(table.periods, row, strict=True)
        if value is not None
    ]
    return write_lines(folder, entries, **RUN | {"benchmark": benchmark, "pins": {"torch": "2.15.0"}})


def write_static(folder, values=STATIC, step="2013-2014", **fields):
    entries = [(key, value, {"step": step, "macs_seen": 2e18, **fields}) for key, value in values.items()]
    return write_lines(folder, entries, **RUN)


def write_models(folder):
    """Two models of one family and two of others, on the four periods."""
    rows = {"a one": [0.3, 0.0, 0.1, 0.3], "a two": [0.5, 0.0, 0.3, 0.5], "b": [0.5, 0.0, 0.7, 0.9], "c": [0.5, 0.0, 0]}
    for name, row in rows.items():
        keys = [task_key(get_benchmark("yfcc15m"), "retrieval", period) for period in STEPS[: len(row)]]
        entries = [(key, value, {}) for key, value in zip(keys, row, strict=True)]
        write_lines(folder, entries, benchmark="yfcc15m", family=name[0], model={"name": name})
    return folder


def write_log(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    common = {"lr": 1e-3, "samples_per_second": 300.0}
    entries = [json.dumps({"samples_seen": seen, "loss": loss, **common}) + "\n" for seen, loss in lines]
    (folder / "train.log.jsonl").write_text("".join(entries) + tail)


TEXTS = ["summary.json", "matrix.csv", "table.csv", "table.md", "table.tex", "report.html"]


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Write a report without figures and return what is in it."""
    monkeypatch.setattr(report_module, "draw_figures", lambda results, compared: {})

    def make(*folders, reference=None):
        out = tmp_path / "out"
        text, files = report_module.report(folders, out, reference)
        assert files == TEXTS
        md, tex, html, matrix, table = ((out / name).read_text() for name in (*TEXTS[3:], *TEXTS[1:3]))
        summary = json.loads((out / "summary.json").read_text())
        return SimpleNamespace(text=text, md=md, tex=tex, html=html, matrix=matrix, csv=table, summary=summary)

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "sequential", SEQUENTIAL, method="sequential")
    return [write_run(folder / "cumulative", CUMULATIVE), folder / "sequential"]
