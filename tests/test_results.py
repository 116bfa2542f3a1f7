import json

import numpy as np
import pytest

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.results import append_result, matrix, read_results, reduce_periods, task_key

YFCC = get_benchmark("yfcc15m")
DATACOMP = get_benchmark("datacomp")


def result(step, period, value, task="retrieval", benchmark=YFCC):
    return {
        "key": task_key(benchmark, task, period),
        "metrics": {"main_metric": value, "other": 1 - value},
        "step": step,
    }


def test_task_key():
    assert task_key(get_benchmark("emoji"), "retrieval", "2014") == "tic/emoji/retrieval/yearly/2014"
    assert task_key(get_benchmark("datacomp_monthly"), "datacompnet", "201403") == (
        "tic/datacomp/datacompnet/monthly/201403"
    )


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "run" / "eval_results.jsonl"
    results = [result("2004-2008", "2004-2008", 0.5), result("2004-2008", "2009-2010", 1 / 3)]
    for item in results:
        append_result(path, item)
    assert read_results(path) == results
    assert path.read_text() == "".join(json.dumps(item) + "\n" for item in results)


def test_a_write_cut_off_anywhere_is_repaired(tmp_path):
    first, second, third = (result("2004-2008", period, 0.5) for period in YFCC.periods[:3])
    path = tmp_path / "eval_results.jsonl"
    whole, line = (json.dumps(first) + "\n").encode(), (json.dumps(second) + "\n").encode()
    for cut in range(len(line) + 1):
        path.write_bytes(whole + line[:cut])
        kept = [first, second] if cut >= len(line) - 1 else [first]  # lacking only its newline, a line is whole
        assert read_results(path) == kept
        append_result(path, third)
        assert path.read_text() == "".join(json.dumps(item) + "\n" for item in [*kept, third])


@pytest.mark.parametrize("damaged", ["{'key': 1}", "", "[1]", '{"key": "a"}', '{"metrics": {}}', "\xff"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    path = tmp_path / "eval_results.jsonl"
    good = json.dumps(result("2004-2008", "2004-2008", 0.5))
    path.write_bytes(f"{good}\n{damaged}\n{good}\n".encode("latin-1"))
    with pytest.raises(TicError, match=r"eval_results.jsonl, line 2: "):
        read_results(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TicError, match=r"nothing.jsonl is missing"):
        read_results(tmp_path / "nothing.jsonl")


def test_appending_to_the_cloud_is_refused():
    with pytest.raises(TicError, match="local disk"):
        append_result("s3://bucket/eval_results.jsonl", {})


def test_matrix_places_each_result_and_the_later_one_wins():
    results = [
        result("2004-2008", "2004-2008", 0.1),
        result("2009-2010", "2004-2008", 0.2),
        result("2004-2008", "2013-2014", 0.3),
        result("2004-2008", "2004-2008", 0.4),
        {"key": "imagenet1k", "metrics": {"acc1": 0.9}, "step": "2004-2008"},
    ]
    expected = np.full((4, 4), np.nan)
    expected[0, 0], expected[1, 0], expected[0, 3] = 0.4, 0.2, 0.3
    values = matrix(results, YFCC, "retrieval")
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(matrix(results, YFCC, "retrieval", "other"), 1 - expected)


def test_matrix_keeps_tasks_and_cadences_apart():
    results = [
        result("2017", "2017", 0.1, "datacompnet", DATACOMP),
        result("2017", "201703", 0.2, "datacompnet", get_benchmark("datacomp_monthly")),
    ]
    assert np.isnan(matrix(results, DATACOMP, "retrieval")).all()
    assert np.nansum(matrix(results, DATACOMP, "datacompnet")) == 0.1


def test_a_null_metric_is_missing():
    null = {"key": task_key(YFCC, "retrieval", "2004-2008"), "metrics": {"main_metric": None}, "step": "2004-2008"}
    assert np.isnan(matrix([null], YFCC, "retrieval")).all()


@pytest.mark.parametrize(
    ("wrong", "metric", "message"),
    [
        (result("1999", "2004-2008", 0.1), "main_metric", "unknown step '1999'"),
        (result("2004-2008", "1999", 0.1), "main_metric", "retrieval/yearly/1999 is of no period"),
        (result("2004-2008", "2004-2008", 0.1), "acc7", "no metric 'acc7', only main_metric, other"),
    ],
)
def test_matrix_refuses_what_it_cannot_place(wrong, metric, message):
    with pytest.raises(TicError, match=message):
        matrix([wrong], YFCC, "retrieval", metric)


def test_seven_by_nine_becomes_seven_by_seven():
    values = np.arange(63, dtype=float).reshape(7, 9)
    values[0, :3] = 0.1, 0.2, 0.6
    values[1, 2] = np.nan
    reduced = reduce_periods(values, DATACOMP)
    assert reduced.shape == (7, 7)
    assert reduced[0, 0] == pytest.approx(0.3)
    assert np.isnan(reduced[1, 0])
    assert reduced[2, 0] == 19  # the mean of 18, 19 and 20
    np.testing.assert_array_equal(reduced[:, 1:], values[:, 3:])


def test_a_period_a_step_changes_nothing():
    values = np.arange(16, dtype=float).reshape(4, 4)
    np.testing.assert_array_equal(reduce_periods(values, YFCC), values)
