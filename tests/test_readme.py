"""The README: its numbers are those of the recorded runs. (Its commands run in test_readme_runs.py.)"""

import csv
import json
import re

import pytest
from conftest import ROOT

from tic_clip.benchmarks import BENCHMARKS
from tic_clip.training.config import SCALES
from tic_clip.training.methods import METHODS

README = (ROOT / "README.md").read_text()
BUDGET = SCALES["tic_tiny"].samples_per_step


def recorded(name):
    return json.loads((ROOT / "docs" / name).read_text())


def between(mark, page="README.md"):
    return re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", (ROOT / page).read_text(), re.DOTALL)[1]


def test_the_readme_begins_with_a_figure_and_two_commands():
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
    commands = ["bash scripts/run_emoji_cumulative.sh", "bash scripts/run_tests.sh"]
    assert [" ".join(line.split()[:2]) for line in lines[:2]] == commands
    assert len(README.splitlines()) <= 220
    for image in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / image).read_bytes().startswith(b"\x89PNG")


def percents(values):
    return [f"{100 * value:.1f}" for value in values]


def test_its_tables_have_the_numbers_of_the_recorded_runs():
    run, table = recorded("emoji_cumulative.json"), between("table")
    lines = [line.replace("*", " ").split() for line in table.splitlines()]
    tasks = run["tasks"].values()
    expected = [
        [step, *percents(row)] for task in tasks for step, row in zip(run["steps"], task["matrix"], strict=True)
    ]
    assert [line for line in lines if line[:1] and line[0] in run["steps"]] == expected
    for task in tasks:
        assert (
            "ID {}, backward {}, forward {} (".format(*percents(task[key] for key in ("id", "backward", "forward")))
            in table
        )


def test_the_recorded_run_is_the_default_one():
    assert recorded("emoji_cumulative.json")["samples_seen"] == [BUDGET * (t + 1) for t in range(7)]


def test_the_comparison_is_the_recorded_one_and_in_the_papers_order():
    with open(ROOT / "docs/emoji_comparison.csv") as file:
        runs = {row["run"]: row for row in csv.DictReader(file)}
    assert len(runs) == 8
    head, _, *lines = (line.strip("| ").split(" | ") for line in between("comparison").splitlines() if line[:1] == "|")
    for run, line in zip(runs.values(), lines, strict=True):
        macs = f"{float(run['MACs']):.1e}".replace("e+", "e")
        cells = [run["run"], run["method"], f"{int(run['samples seen']):,}", macs]
        cells += [f"{100 * float(run[name]):.1f} ± {100 * float(run[f'{name} sd']):.1f}" for name in head[4:]]
        assert [re.sub("[*~]", "", cell) for cell in line] == cells
        assert run["runs"] == "3"
    seen = {name: int(run["samples seen"]) / BUDGET for name, run in runs.items()}
    assert seen == dict.fromkeys(runs, 7) | {"oracle": 28}


@pytest.mark.parametrize("names", [METHODS, SCALES, BENCHMARKS], ids=["methods", "scales", "benchmarks"])
def test_the_pages_name_every_row_of_the_tables(names):
    pages = "".join((ROOT / f"docs/{page}.md").read_text() for page in ("training", "methods"))
    assert all(f"`{name}`" in pages for name in names)


def test_the_page_on_clusters_names_settings_that_exist():
    known = re.findall(r"[A-Z][A-Z_]+", (ROOT / "scripts/cli.sh").read_text())
    named = re.findall(r"\b([A-Z][A-Z_]+)=", (ROOT / "docs/cluster.md").read_text())
    assert {"NODE_RANK", "REMOTE", "BENCHMARK"} <= set(named) <= set(known)


@pytest.mark.parametrize(("mark", "page"), [("bench", "data"), ("pack", "yfcc_redcaps")])
def test_its_figures_of_speed_are_those_measured(mark, page):
    measured = (ROOT / "bench/README.md").read_text()
    ratios = re.findall(r"\b\d\.\d\d\b", between(mark, f"docs/{page}.md"))
    assert len(ratios) >= 2
    assert [ratio for ratio in ratios if f"| {ratio} |" not in measured] == []
