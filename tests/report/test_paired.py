"""Is the difference of two runs real? By hits of samples that are made here."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from made_results import RUN, STEPS

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.evaluation.results import RESULTS, append_result, hits_path, read_hits, task_key
from tic_clip.report import report

YFCC = get_benchmark("yfcc15m")
COUNT = 300


def write_hits(folder, values, step, period, name="m", **fields):
    """A result and its hits."""
    result = {"key": task_key(YFCC, "retrieval", period), "metrics": {"main_metric": float(np.mean(values))}, **RUN}
    result |= {"step": step, "samples_seen": 1, "model": {"name": f"{name} {step}"}, "data": "d", **fields}
    append_result(folder / RESULTS, result | {"hits": np.array(values)})


def write_pair(tmp_path):
    """Two runs: the first finds 30 more of 300 on its own period and on older ones; on newer ones both are as good."""
    rng, tables = np.random.default_rng(0), {}
    for i, step in enumerate(STEPS):
        for j, period in enumerate(STEPS):
            hits = rng.integers(0, 2, size=COUNT) / 2
            better = hits.copy()
            if j <= i:
                hits[:60], better[:60] = 0.5, 1
            tables[step, period] = (better, hits)
            for name, values in (("a", better), ("b", hits)):
                write_hits(tmp_path / name, values, step, period, name)
    return [tmp_path / "a", tmp_path / "b"], tables


def test_differences_intervals_and_p(tmp_path):
    """By hand: 60 of 300 samples gain a half: + 10 points. None draws a loss, so p is the least, 2 / 1001."""
    folders, tables = write_pair(tmp_path)
    text, files = report(folders, None, paired=True)
    assert (files, text.partition(",")[0]) == ([], "TiC-YFCC15M: retrieval")  # only the test
    assert not (folders[0] / "report.html").exists()
    text, files = report(folders, tmp_path / "out", paired=True)
    pairs = pd.read_csv(tmp_path / "out/paired.csv", keep_default_na=False).set_index(["step", "period"])
    for (step, period), (better, hits) in tables.items():
        row = pairs.loc[(step, period)]
        assert (row["first"], row["second"]) == (pytest.approx(better.mean()), pytest.approx(hits.mean()))
        assert row["difference"] == pytest.approx(0.1 if STEPS.index(period) <= STEPS.index(step) else 0)
        slow = [(better - hits)[np.random.default_rng(k).integers(0, COUNT, size=COUNT)].mean() for k in range(300)]
        assert (row["low"], row["high"]) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=0.015)
    means = pairs.loc[""]
    assert means["difference"].to_dict() == pytest.approx({"id": 0.1, "backward": 0.1, "forward": 0})
    assert means["p"].to_dict() == pytest.approx({"id": 2 / 1001, "backward": 2 / 1001, "forward": 1})
    own = [pairs.loc[(step, step), "high"] - pairs.loc[(step, step), "low"] for step in STEPS]
    assert (means["high"] - means["low"])["id"] == pytest.approx(np.mean(own) / 2, rel=0.2)  # of four independent ones
    assert re.search(r"2009-2010 +\+10.0\* +\+10.0\* +\+0.0 +\+0.0\n", text)
    assert "paired.csv" in files
    assert "a - b, in points, of each cell" in (tmp_path / "out/report.html").read_text()


def test_hits_are_kept_beside_the_results_by_model_and_task(tmp_path):
    write_hits(tmp_path, [0, 0.5, 1], STEPS[0], STEPS[1], name="hub:a/b")
    assert "hits" not in json.loads((tmp_path / RESULTS).read_text())
    key = task_key(YFCC, "retrieval", STEPS[1])
    assert read_hits(tmp_path, f"hub:a/b {STEPS[0]}", key).tolist() == [0, 0.5, 1]
    path = hits_path(tmp_path, f"hub:a/b {STEPS[0]}", key)
    assert path.parent.parent == tmp_path / "hits"
    assert path.name == "tic-yfcc15m-retrieval-yearly-2009-2010.npz"
    assert read_hits(tmp_path, f"hub:a-b {STEPS[0]}", key) is None
    path.write_bytes(b"PK broken")
    with pytest.raises(TicError, match="is damaged: delete it and run"):
        read_hits(tmp_path, f"hub:a/b {STEPS[0]}", key)


def test_what_cannot_be_tested(tmp_path):
    folders, _ = write_pair(tmp_path)
    for chosen, message in ((folders[:1], "two runs or two models, not a"), ([*folders, tmp_path / "c"], "a, b, c")):
        write_hits(tmp_path / "c", [1], STEPS[0], STEPS[0])
        with pytest.raises(TicError, match=message):
            report(chosen, tmp_path / "out", paired=True)
    write_hits(tmp_path / "other", [1, 0], STEPS[0], STEPS[0], data="e")
    with pytest.raises(TicError, match="different data of retrieval, 2004-2008"):
        report([folders[0], tmp_path / "other"], tmp_path / "out", paired=True)
    write_hits(tmp_path / "later", [1], STEPS[3], STEPS[0], name="x")
    hits_path(tmp_path / "later", f"x {STEPS[3]}", task_key(YFCC, "retrieval", STEPS[0])).unlink()
    with pytest.raises(TicError, match=r"have no hits in common: run scripts/evaluate.py --force"):
        report([folders[0], tmp_path / "later"], tmp_path / "out", paired=True)
    assert not (tmp_path / "out").exists()
