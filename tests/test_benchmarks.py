import subprocess
import sys

import pytest

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, MONTHS, Benchmark, Step, get_benchmark

YEARLY = "2014-2016 2017 2018 2019 2020 2021 2022"
EMOJI = "2014 2015 2016 2017-2018 2019 2020 2021-2025"


def test_the_102_months_of_datacomp():
    count = {year: sum(month.startswith(str(year)) for month in MONTHS) for year in range(2014, 2024)}
    assert count == {2014: 8, 2015: 10, 2016: 9, **dict.fromkeys(range(2017, 2022), 12), 2022: 9, 2023: 6}
    assert list(MONTHS) == sorted(set(MONTHS))
    assert not {"201405", "201509", "201603", "201611", "202202", "202204", "202307"} & set(MONTHS)
    assert {"201403", "201511", "201602", "201612", "202201", "202205", "202306"} <= set(MONTHS)


def test_datacomp_merges_its_first_three_years_for_training_only():
    benchmark = get_benchmark("datacomp")
    assert benchmark.periods == tuple(str(year) for year in range(2014, 2023))
    assert benchmark.steps[0].splits == benchmark.steps[0].periods == ("2014", "2015", "2016")
    assert (benchmark.steps[0].cutoff, benchmark.steps[1].cutoff) == (201612, 201712)
    assert benchmark.tasks == {"retrieval": "retrieval", "datacompnet": "classification"}


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


def test_a_step_name_is_used_once():
    twice = (Step(name="2014", splits=("a",), periods=("a",)),) * 2
    with pytest.raises(AssertionError, match="twice"):
        Benchmark(name="x", dataset="x", cadence="yearly", title="X", steps=twice, tasks={}, prepare_with="")


def test_as_a_program_it_prints_the_steps():
    done = subprocess.run([sys.executable, "-m", "tic_clip.benchmarks", "emoji"], capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", EMOJI.split())
