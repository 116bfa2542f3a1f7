"""Each figure shows the numbers that it should: read from its lines and bars."""

import io
import itertools

import made_results
import numpy as np
import pytest
from made_results import CUMULATIVE, SEQUENTIAL, STEPS, write_log, write_models, write_run, write_static
from PIL import Image

from tic_clip.report import figures
from tic_clip.report.compare import compare
from tic_clip.report.frame import load_results

runs = made_results.runs


def labels(figure):
    return [line.get_label() for line in figure.axes[0].lines]


def test_compute_is_beside_the_papers_points_where_there_is_imagenet(tmp_path, runs):
    assert figures.draw_compute(load_results(runs)) is None  # no MACs
    run = write_run(tmp_path / "no_imagenet", CUMULATIVE, macs_seen=4.0)
    (line,) = figures.draw_compute(load_results([run])).axes[0].lines  # the mean over all periods
    assert (line.get_xdata().tolist(), line.get_ydata()) == ([4.0] * 4, pytest.approx([20, 27.5, 35, 47.5]))
    run = write_static(write_run(tmp_path / "run", CUMULATIVE))
    line, *paper = figures.draw_compute(load_results([run, runs[1]])).axes[0].lines
    assert (line.get_label(), line.get_xdata().tolist()) == ("run", [2e18])
    assert line.get_ydata() == pytest.approx([100 * (0.5 + 1.5) / 7])
    names = [f"TiC-CLIP paper, Fig. 1, {name} (read off, ± 0.3)" for name in figures.FIGURE_1]
    assert [each.get_label() for each in paper] == names
    assert (paper[1].get_xdata()[-1], paper[1].get_ydata()[-1]) == (10.5 * 5e18, 45.6)


def test_curves_are_of_models_or_steps_and_robustness_has_a_line_for_each_family(tmp_path, runs):
    results = load_results([write_models(tmp_path / "models"), *runs])
    curves = figures.draw_curves(results)
    assert labels(curves) == ["cumulative", "sequential", "a one", "a two", "b", "c"]
    assert curves.axes[0].lines[0].get_ydata() == pytest.approx([40, 40, 40, 70])
    assert labels(figures.draw_curves(load_results(runs[:1]))) == STEPS
    figure = figures.draw_robustness(results)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    assert lines["a"].tolist() == [pytest.approx([30, 20]), pytest.approx([50, 40])]
    assert lines["b"].tolist() == [pytest.approx([50, 80])]
    assert "c" not in lines  # lacks a new period
    assert lines["cumulative"][3].tolist() == pytest.approx([40, 55])
    (fitted,) = [points for label, points in lines.items() if label.startswith("_child")]  # family a's; b has one model
    assert fitted == pytest.approx(np.array([[30, 20], [50, 40]]))


def test_names_are_not_formulas_and_not_hidden(tmp_path):
    """Matplotlib ends in an error at a formula such as $^c$, and leaves names with _ out of a legend."""
    folders = [write_run(tmp_path / name, CUMULATIVE) for name in ("a$^$c", "_hidden")]
    figure = figures.draw_curves(load_results(folders))
    figure.savefig(io.BytesIO())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a\\$^\\$c", "\u200a_hidden"]


def test_training_shows_the_log_of_each_step_and_twenty_runs_are_told_apart(tmp_path):
    run = write_run(tmp_path / "run", CUMULATIVE)
    assert figures.draw_training(load_results([run])) is None
    write_log(run / "2009-2010", [(200, 2.0)])
    write_log(run / "2004-2008", [(100, 4.0), (150, 3.0)], tail='{"step": 3, "sam')
    line, *borders = figures.draw_training(load_results([run])).axes[0].lines
    assert line.get_xydata().tolist() == [[100, 4], [150, 3], [200, 2]]
    assert [border.get_xdata()[0] for border in borders] == [150, 200]
    assert len({(style["color"], style["marker"]) for style in itertools.islice(figures.SERIES, 20)}) == 20


def test_a_hundred_steps_have_a_heat_map_of_sensible_size_and_eight_curves(tmp_path):
    values = np.linspace(0, 1, 102 * 102).reshape(102, 102).tolist()
    results, file = load_results([write_run(tmp_path / "run", values, "datacomp_monthly")]), io.BytesIO()
    figures.draw_heatmap(results).savefig(file)
    with Image.open(file) as image:
        assert all(300 < side < 3000 for side in image.size)
        assert len(image.getcolors(1 << 20)) > 50
    curves = labels(figures.draw_curves(results))
    assert (len(curves), curves[0], curves[-1]) == (8, "201403", "202306")
    assert len(figures.draw_curves(results).axes[0].lines[0].get_xdata()) == 102


def test_bars_have_a_group_a_figure_and_a_bar_a_run(tmp_path):
    runs = [write_run(tmp_path / "a", CUMULATIVE, ci95=[0.4, 0.5], num_samples=50)]
    runs.append(write_run(tmp_path / "b", SEQUENTIAL, method="sequential"))
    results = load_results(runs)
    panel = figures.draw_bars(results, compare(results)).axes[0]
    heights = [bar.get_height() for bar in panel.patches]
    assert heights == pytest.approx([40, 55, 10, 140 / 6, 50, 20])
    assert [line.get_ydata()[0] for line in panel.lines if line.get_label() == "chance"] == [2]
    assert figures.draw_bars(load_results(runs[:1]), compare(results)) is None
    figures.draw_bars(results, compare(results)).savefig(io.BytesIO())
