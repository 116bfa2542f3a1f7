import json

import pytest

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.results import append_result, read_results, task_key

YFCC = get_benchmark("yfcc15m")


def result(step, period, value):
    return {"key": task_key(YFCC, "retrieval", period), "metrics": {"main_metric": value}, "step": step}


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "run" / "eval_results.jsonl"
    results = [result("2004-2008", "2004-2008", 0.5), result("2004-2008", "2009-2010", 1 / 3)]
    for item in results:
        append_result(path, item)
    assert read_results(path) == results
    assert path.read_text() == "".join(json.dumps(item) + "\n" for item in results)
    with pytest.raises(TicError, match=r"nothing.jsonl is missing"):
        read_results(tmp_path / "nothing.jsonl")


def test_an_incomplete_line_is_skipped_wherever_the_write_was_cut_off(tmp_path, caplog):
    first, second, third = (result("2004-2008", period, 0.5) for period in YFCC.periods[:3])
    path = tmp_path / "eval_results.jsonl"
    complete, line = (json.dumps(first) + "\n").encode(), (json.dumps(second) + "\n").encode()
    for cut in range(len(line) + 1):
        path.write_bytes(complete + line[:cut])
        kept = [first, second] if cut >= len(line) - 1 else [first]  # lacking only its newline, a line is complete
        assert read_results(path) == kept
        append_result(path, third)
        caplog.clear()
        assert read_results(path) == [*kept, third]
        assert ("line 2" in caplog.text) == (0 < cut < len(line) - 1)


UNTIMED = '{"key": "a", "metrics": {}, "time": null}'


@pytest.mark.parametrize("damaged", ["{'key': 1}", "[1]", '{"key": "a"}', '{"metrics": {}}', "\xff", UNTIMED])
def test_a_damaged_line_is_skipped_with_a_warning(tmp_path, damaged, caplog):
    path = tmp_path / "eval_results.jsonl"
    good = result("2004-2008", "2004-2008", 0.5)
    path.write_bytes(f"{json.dumps(good)}\n{damaged}\n{json.dumps(good)}\n".encode("latin-1"))
    assert read_results(path) == [good, good]
    assert f"{path}: skipped what is not a complete result: line 2" in caplog.text
