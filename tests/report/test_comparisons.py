"""Results of other benchmarks and cadences, runs that are not finished, and runs with other settings."""

import json

import made_results
import numpy as np
import pytest
from made_results import CUMULATIVE, RUN, SEQUENTIAL, SQUARE, STEPS, write_lines, write_run

from tic_clip.benchmarks import MONTHS, get_benchmark
from tic_clip.evaluation.results import task_key
from tic_clip.report.compare import compare
from tic_clip.report.frame import load_results

SQUARE_4 = [[0.5] * 4] * 4
report = made_results.report
MONTHLY = get_benchmark("datacomp_monthly")


def write_months(folder, step=None, **fields):
    """Results of one model on the 102 months: 0.00, 0.01, … of the month before 2023, and 0.9 in 2023."""
    values = [0.9 if month > "2023" else int(month[2:4]) / 100 for month in MONTHS]
    keys = [task_key(MONTHLY, "retrieval", month) for month in MONTHS]
    entries = [(key, value, {"step": step} if step else {}) for key, value in zip(keys, values, strict=True)]
    return write_lines(folder, entries, **fields)


def test_the_benchmark_is_that_of_the_tasks(report, tmp_path):
    """What evaluate.py has recorded under the name of the yearly benchmark are results of months."""
    folder = write_months(tmp_path / "monthly", benchmark="datacomp", model={"name": "m"}, family="f")
    found = report(folder)
    assert "**TiC-DataComp (monthly): models by the time of the data, in per cent**" in found.md
    assert "| m | f | 14.0 | 90.0 |" in found.md  # on 201403, and on the last two months
    assert found.summary["models"]["m"]["benchmark"] == "datacomp_monthly"


def test_a_yearly_run_on_months_beside_its_years(report, tmp_path):
    """By hand: the step 2014-2016 has the 8, 10 and 9 months of its years, every later step the months of one."""
    run = write_run(tmp_path / "run", np.full((7, 9), 0.5).tolist(), "datacomp")
    for step in get_benchmark("datacomp").steps:
        write_months(run, step.name, **RUN | {"benchmark": "datacomp"})
    found = report(run)
    assert "**TiC-DataComp, cumulative: retrieval, mean_recall@1 in per cent**" in found.md
    assert "**TiC-DataComp (monthly), cumulative: retrieval, mean_recall@1 in per cent**" in found.md
    assert found.summary["tasks"]["retrieval"]["id"] == 0.5
    first = (8 * 0.14 + 10 * 0.15 + 9 * 0.16) / 27
    monthly = found.summary["tasks"]["retrieval (datacomp_monthly)"]
    assert monthly["id"] == pytest.approx((first + 0.17 + 0.18 + 0.19 + 0.2 + 0.21 + 0.22) / 7)
    assert np.shape(monthly["periods_matrix"]) == (7, 102)
    header = found.matrix.splitlines()[0].split(",")
    assert header[:3] == ["task", "step", "2014"]
    assert len(header) == 2 + 9 + 102


def test_runs_of_two_benchmarks_stand_side_by_side(report, tmp_path):
    md = report(write_run(tmp_path / "a", CUMULATIVE), write_run(tmp_path / "b", SQUARE, "emoji")).md
    assert "**TiC-YFCC15M, TiC-Emoji: retrieval = mean_recall@1, retrieval (emoji) = mean_recall@1, in per cent**" in md
    assert "| **40.0** | **55.0** | **10.0** | – | – | – |" in md
    assert "| – | – | – | **50.0** | **50.0** | **50.0** |" in md


def test_a_run_on_a_benchmark_of_other_years(report, tmp_path, caplog):
    """Of TiC-Emoji's periods only 2014 is within a step of TiC-YFCC15M, its last."""
    run = write_run(tmp_path / "run", CUMULATIVE)
    emoji = get_benchmark("emoji")
    keys = [task_key(emoji, "retrieval", period) for period in emoji.periods]
    write_lines(run, [(key, 0.3, {"step": STEPS[3]}) for key in [*keys, "tic/other/retrieval/yearly/2014"]], **RUN)
    md = report(run).md
    assert "1 results of tasks of no known benchmark are left out" in caplog.text
    assert "| 2013-2014 | **30.0** | 30.0 | 30.0 | 30.0 | 30.0 | 30.0 | 30.0 |" in md
    assert "ID 30.0 (over 1 of 4), backward – (over 0 of 6), forward – (over 0 of 6)" in md


# Runs that are not finished, or that begin late.


def test_means_over_what_all_runs_have(report, tmp_path):
    """One with INIT and FIRST_STEP has one row: ID 0.7, backward 0.4, nothing above the diagonal.

    Sequential's last row: ID 0.5, backward (0.1 + 0.2 + 0.3) / 3 = 0.2.
    """
    late = write_run(tmp_path / "late", [[None] * 4] * 3 + CUMULATIVE[3:])
    md = report(late).md
    assert "| 2013-2014 | 40.0 | 40.0 | 40.0 | **70.0** |" in md
    assert "\n| 2004-2008 |" not in md
    assert "ID 70.0 (over 1 of 4), backward 40.0 (over 3 of 6), forward – (over 0 of 6)" in md
    md = report(late, write_run(tmp_path / "all", SEQUENTIAL, method="sequential")).md
    assert "| late | cumulative | 40,000 | 4 of 16 | – | – | – |" in md
    assert "| all | sequential | 40,000 | all | **23.3** | **50.0** | **20.0** |" in md
    assert "means over the results that all runs have" in md
    assert "| late | cumulative | 40.0 | 70.0 | – |" in md
    assert "| all | sequential | 20.0 | 50.0 | – |" in md
    assert "backward (over 3 of 6), ID (over 1 of 4), forward (over 0 of 6)" in md


# Settings.


def write_plan(run, step=STEPS[0], **changes):
    """Write a finished step as training does."""
    plan = {"model": "ViT-B-16", "samples": 10_000, "batch_size": 64, "learning_rate": 1e-3, "sampling": "exact"}
    plan |= {"scale": "tic_tiny", "filter": "all", "command": ["python", "scripts/train.py", "--step", step]} | changes
    done = {"checkpoint": "x.pt", "finished": "2026-11-27T13:11:24+00:00", "plan": plan}
    (run / step).mkdir(parents=True, exist_ok=True)
    (run / step / "done.json").write_text(json.dumps(done))
    return run


def test_runs_with_other_settings_are_marked_apart(report, tmp_path):
    """Three runs of 10,000 samples a step, one of them late, and one of 7, which is compared with none of them."""
    runs = [write_run(tmp_path / "a", CUMULATIVE), write_run(tmp_path / "b", SEQUENTIAL, method="sequential")]
    small = write_run(tmp_path / "small", SEQUENTIAL, samples_seen=7)
    found = report(*runs, small)
    assert "| a | cumulative | A | 40,000 | **40.0** | **55.0** | 10.0 |" in found.md
    assert "| b | sequential | A | 40,000 | 23.3 | 50.0 | **20.0** |" in found.md
    assert "| small | cumulative | B | 7 | 23.3 | 50.0 | 20.0 |" in found.md
    assert "A: samples a step 10,000; B: samples a step 7" in found.md
    rows = found.csv.splitlines()
    assert [row.rsplit(",", 1)[1] for row in rows] == ["settings", "A", "A", "B"]
    assert "settings" not in report(*runs).md
    late = write_run(tmp_path / "late", [[None] * 4] * 3 + CUMULATIVE[3:])
    assert "| late | cumulative | A | 40,000 | 4 of 16 | – | – | – |" in report(*runs, small, late).md


def test_what_was_run_is_said(report, tmp_path):
    runs = [write_plan(write_run(tmp_path / "a", CUMULATIVE)), write_run(tmp_path / "b", CUMULATIVE)]
    write_plan(runs[1], batch_size=128)
    html = report(*runs).html
    words = ("ViT-B-16", "10,000", "0.001", "exact", "2026-11-27T13:11:24+00:00", "train.py --step", "torch 2.15.0")
    assert all(word in html for word in words)
    assert "A: batch 64; B: batch 128" in html


# Intervals.


def test_cells_in_which_all_or_none_are_hits_do_not_count_in_what_a_cell_is_good_to(report, tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE, ci95=[0.3, 0.5])
    keys = [task_key(get_benchmark("yfcc15m"), "retrieval", period) for period in STEPS]
    cells = [(key, 0.0, {"ci95": [0.0, i / 50]}) for i, key in enumerate(keys)]
    write_lines(run, cells, step=STEPS[0], **RUN)
    assert "a cell is good to ± 10.0 on average (95 %)" in report(run).md


def test_what_is_within_noise_of_the_best_is_marked(report, tmp_path):
    """± 0.02 a cell: ID ± 0.02 / 2, of a difference ± 0.0141; more for backward and forward, whose cells share data."""
    first = write_run(tmp_path / "a", CUMULATIVE, ci95=[0.08, 0.12])
    second = write_run(tmp_path / "b", (np.array(CUMULATIVE) - 0.012).tolist(), ci95=[0.08, 0.12])
    third = write_run(tmp_path / "c", (np.array(CUMULATIVE) - 0.05).tolist(), ci95=[0.08, 0.12])
    md = report(first, second, third).md
    assert "| b | cumulative | 40,000 | 38.8~ | 53.8~ | 8.8~ |" in md
    assert "| c | cumulative | 40,000 | 35.0 | 50.0 | 5.0 |" in md
    assert "~: within noise of it, by the 95 % intervals" in md
    errors = compare(load_results([first])).table
    assert errors.loc["a", "retrieval ID error"] == pytest.approx(0.02 / 2)
    assert errors.loc["a", "retrieval backward error"] == pytest.approx(0.02 * (9 + 4 + 1) ** 0.5 / 6)


# Forgetting.


def test_forgetting_and_what_is_relative_to_the_oracle(report, tmp_path):
    """By hand, sequential: the last row 0.1, 0.2, 0.3, 0.5; own steps 0.5 and best earlier ones 0.5, 0.5, 0.5."""
    runs = [write_run(tmp_path / "a", SEQUENTIAL, method="sequential"), write_run(tmp_path / "b", CUMULATIVE)]
    write_run(tmp_path / "oracle", SQUARE_4, method="oracle")
    average = (0.5 + 0.8 / 2 + 1.0 / 3 + 1.1 / 4) / 4
    area = (1.1 / 2 + 1.2 + 1.2 + 1.1 / 2) / 4 / 3  # trapezoids of the rows' means over equal steps
    row = f"| a | sequential | {100 * average:.1f} | 27.5 | -30.0 | 30.0 | {100 * area:.1f} |"
    other = write_run(tmp_path / "other", SQUARE_4, method="oracle", samples_seen=7)
    assert "/ oracle" not in report(*runs, other).md
    md = report(*runs).md
    assert "oracle" not in md
    assert row in md
    found = report(*runs, tmp_path / "oracle")
    assert row + " 46.7 | 100.0 | 40.0 |" in found.md  # 0.2333 / 0.5, 0.5 / 0.5, 0.2 / 0.5
    head = found.csv.splitlines()[0].split(",")
    names = ("average accuracy", "last model", "BWT", "forgetting", "over compute")
    assert head[11:16] == [f"retrieval {name}" for name in names]
    assert head[16:] == [f"retrieval {name} / oracle" for name in ("backward", "ID", "forward")] + ["settings"]
