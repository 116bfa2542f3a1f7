from datetime import date

import pytest
from conftest import call_script

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, MONTHS, Step, get_benchmark
from tic_clip.runs import check_benchmark, find_benchmark, keep_benchmark
from tic_clip.timeline import cutoff, name_span, span

YEARLY = "2014-2016 2017 2018 2019 2020 2021 2022"
EMOJI = "2014 2015 2016 2017-2018 2019 2020 2021-2025"


def test_the_102_months_of_datacomp():
    count = {year: sum(month.startswith(str(year)) for month in MONTHS) for year in range(2014, 2024)}
    assert count == {2014: 8, 2015: 10, 2016: 9, **dict.fromkeys(range(2017, 2022), 12), 2022: 9, 2023: 6}
    assert list(MONTHS) == sorted(set(MONTHS))
    assert {"201403", "201511", "201602", "201612", "202201", "202205", "202306"} <= set(MONTHS)


def test_datacomp_merges_its_first_three_years_for_training_only():
    benchmark = get_benchmark("datacomp")
    assert benchmark.periods == tuple(str(year) for year in range(2014, 2023))
    assert benchmark.steps[0].splits == benchmark.steps[0].periods == ("2014", "2015", "2016")
    assert (benchmark.steps[0].cutoff, benchmark.steps[1].cutoff) == (201612, 201712)


@pytest.mark.parametrize(
    ("name", "steps", "root"),
    [
        ("datacomp", YEARLY, "tic/datacomp/yearly"),
        ("datacomp_monthly", " ".join(MONTHS), "tic/datacomp/monthly"),
        ("yfcc15m", "2004-2008 2009-2010 2011-2012 2013-2014", "tic/yfcc15m/yearly"),
        ("yfcc15m_2011", "2008-2011 2012 2013 2014", "tic/yfcc15m_2011/yearly"),
        ("redcaps", "2011-2017 2018 2019 2020", "tic/redcaps/yearly"),
        ("emoji", EMOJI, "tic/emoji/yearly"),
    ],
)
def test_steps_and_folders(name, steps, root):
    benchmark = BENCHMARKS[name]
    assert [step.name for step in benchmark.steps] == steps.split()
    assert benchmark.root == root
    assert list(benchmark.periods) == sorted(set(benchmark.periods))
    if name != "datacomp":
        assert all(step.splits == step.periods == (step.name,) for step in benchmark.steps)


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(TicError, match=r"'laion'.*datacomp, datacomp_monthly, yfcc15m, yfcc15m_2011, redcaps, emoji"):
        get_benchmark("laion")
    with pytest.raises(TicError, match=r"'2014' of datacomp.* 2014-2016, 2017, 2018, 2019, 2020, 2021, 2022"):
        get_benchmark("datacomp").step_index("2014")
    assert get_benchmark("emoji").step_index("2017-2018") == 3


def test_as_a_program_it_prints_the_steps():
    assert call_script("tic_clip/benchmarks.py", "emoji").stdout.split() == EMOJI.split()


@pytest.mark.parametrize(
    ("name", "first", "after", "last_month"),
    [
        ("2020", (2020, 1, 1), (2021, 1, 1), 202012),
        ("2020Q4", (2020, 10, 1), (2021, 1, 1), 202012),
        ("202002", (2020, 2, 1), (2020, 3, 1), 202002),
        ("20200229", (2020, 2, 29), (2020, 3, 1), 202002),
        ("2017-2018", (2017, 1, 1), (2019, 1, 1), 201812),
        ("20201231-20210103", (2020, 12, 31), (2021, 1, 4), 202101),
    ],
)
def test_names_of_times_are_days(name, first, after, last_month):
    assert span(name) == (date(*first), date(*after))
    assert cutoff(name) == last_month
    assert span(name_span(*span(name))) == span(name)


def test_what_is_not_a_date():
    for name in ("", "x", "20", "202000", "202013", "20210229", "2020Q5", "2018-2017", "1-2-3", "9999"):
        assert (span(name), cutoff(name)) == (None, None)


@pytest.fixture
def read(tmp_path):
    """Give the benchmark of a file with a text, which takes the place of the one before."""

    def read(text):
        BENCHMARKS.pop("mine", None)
        (tmp_path / "mine.yaml").write_text(text)
        return get_benchmark(str(tmp_path / "mine.yaml"))

    return read


@pytest.mark.parametrize(
    ("text", "steps", "root"),
    [
        ("steps: [2014-2016, 2017, 2018Q1]", "2014-2016 2017 2018Q1", "tic/mine/steps"),
        ("every: year\nfirst: 2014\nlast: 2016", "2014 2015 2016", "tic/mine/yearly"),
        ("every: quarter\nfirst: 201404\nlast: 2014", "2014Q2 2014Q3 2014Q4", "tic/mine/quarterly"),
        ("every: month\nfirst: 201411\nlast: 201502", "201411 201412 201501 201502", "tic/mine/monthly"),
        ("boundaries: [2014-01-01, 2017-01-01, 2017-06-01]", "2014-2016 201701-201705", "tic/mine/steps"),
        ("steps: [{name: 2014-2015, splits: [2014, 2015]}, 2016]\ncadence: c\ndataset: d", "2014-2015 2016", "tic/d/c"),
    ],
)
def test_a_benchmark_of_a_file(read, tmp_path, text, steps, root):
    benchmark, path = read(f"name: mine\n{text}"), tmp_path / "mine.yaml"
    assert [step.name for step in benchmark.steps] == steps.split()
    assert (benchmark.root, benchmark.title, benchmark.tasks) == (root, "mine", {"retrieval": "retrieval"})
    assert get_benchmark(str(path)) is benchmark is get_benchmark("mine")


def test_a_file_names_splits_periods_tasks_and_filters(read):
    step = "{name: 2014-2015, splits: [2014, 2015], periods: [2014Q1, 2015Q3]}"
    lists = "tasks: {retrieval: retrieval, labels: classification}\nfilters: {basic: train, best: train_best}"
    benchmark = read(f"name: mine\ntitle: My images\nsteps: [{step}]\n{lists}\n")
    assert benchmark.steps == (Step(name="2014-2015", splits=("2014", "2015"), periods=("2014Q1", "2015Q3")),)
    assert benchmark.tasks == {"retrieval": "retrieval", "labels": "classification"}
    assert (benchmark.title, benchmark.filters) == ("My images", {"basic": "train", "best": "train_best"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expected `object`, got `null`"),
        ("a: [1\nb: 2", "line 2: expected ',' or ']'"),
        ("name: mine\nsteps: [2014]\nname: x", "line 3: name is there twice"),
        ("steps: [2014]", "missing required field `name`"),
        ("name: mine\nstep: [2014]", "unknown field `step`"),
        ("name: mine", "give one of the keys steps, every"),
        ("name: a/b\nsteps: [2014]", "name: 'a/b' is not made of"),
        ("name: emoji\nsteps: [2014]", "name: emoji is taken"),
        ("name: ..\nsteps: [2014]", "name: '..' is not made of"),
        ("name: mine\nsteps: [2014]\ntasks: {../x: retrieval}", "tasks: '../x' is not made of"),
        ("name: mine\nsteps: [2014]\nfilters: {all: ../x}", "filters: '../x' is not made of"),
        ("name: mine\nsteps: [x]", "steps: 'x' is not a date"),
        ("name: mine\nsteps: [2014-2016, 2016]", "steps: 2016 begins before the end of"),
        ("name: mine\nsteps: [{name: 2014, periods: [a]}]", "periods: 'a' is not a date"),
        ("name: mine\nevery: week", "'week' - at `$.every`"),
        ("name: mine\nevery: year\nfirst: 2014", "first, last: 2014 and None are not two dates"),
        ("name: mine\nboundaries: [2014-01-01]", "boundaries: give days in order"),
        ("name: mine\nsteps: [2014]\ntasks: {a: b}", "'b' - at `$.tasks"),
        ("name: mine\nsteps: [2014]\nfilters: {}", "filters: give one at least"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(read, text, message):
    with pytest.raises(TicError) as error:
        read(text)
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_goes_on_with_new_steps_but_not_with_other_ones(read, tmp_path):
    run = tmp_path / "run"
    for text in ("[2020, 2021]", "[2020, 2021, 2022]\ntitle: Mine", "[2020, 2021, 2022]"):
        keep_benchmark(run, read(f"name: mine\nsteps: {text}"))
    for text in ("[2020]", "[2020, 2021-2022]", "[2020, 2021, 2022]\ncadence: c"):
        with pytest.raises(TicError, match="is of a benchmark in tic/mine/steps with the steps 2020, 2021, 2022: give"):
            check_benchmark(run, read(f"name: mine\nsteps: {text}"))
    BENCHMARKS.pop("mine")
    assert find_benchmark(run, "mine").title == "mine"
