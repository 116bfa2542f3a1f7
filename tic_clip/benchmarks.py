"""Steps, periods and tasks of each benchmark, as frozen tables.

    python -m tic_clip.benchmarks emoji        # print the names of its training steps, one a line

A benchmark's data are in ``{data_dir}/tic/{dataset}/{cadence}/``: ``train/{split}/`` and ``eval/{task}/{period}/``.
"""

import re
from dataclasses import dataclass, field, replace

from tic_clip import TicError, lookup
from tic_clip.cli import Parser, run_main


def cutoff(name: str) -> int | None:
    """Return the last month of ``name`` (2020, 201603, 2017-2018) as YYYYMM, or None if it is not a date."""
    found = re.fullmatch(r"(?:\d{4}-)?(\d{4})(0[1-9]|1[0-2])?", name)
    return int(found[1] + (found[2] or "12")) if found else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One time step: the training splits that are new in it, and its evaluation periods."""

    name: str
    splits: tuple[str, ...]
    periods: tuple[str, ...]

    @property
    def cutoff(self) -> int:
        """Return the last month of its data as YYYYMM: 202012 for 2020, 201812 for 2017-2018."""
        return cutoff(self.name)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset split by time.

    ``tasks`` maps a task's folder to its kind (retrieval or classification), ``filters`` the name of a selection of the
    training data to its folder, the default first. ``prepare_with`` names the scripts that prepare the data.
    """

    name: str
    title: str
    steps: tuple[Step, ...]
    tasks: dict[str, str]
    prepare_with: str
    dataset: str
    cadence: str = "yearly"
    filters: dict[str, str] = field(default_factory=lambda: {"all": "train"})

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        assert len(set(names)) == len(names), f"{self.name}: a step's name is used twice"

    @property
    def root(self) -> str:
        """Return the benchmark's folder below ``data_dir``."""
        return f"tic/{self.dataset}/{self.cadence}"

    @property
    def periods(self) -> tuple[str, ...]:
        """Return all evaluation periods in order of time."""
        return tuple(period for step in self.steps for period in step.periods)

    def missing_data_message(self, folder: str, data_dir: str) -> str:
        """Return the error message for a data folder that is missing in ``data_dir``."""
        is_filtered = any(f"/{name}/" in folder for name in list(self.filters.values())[1:])
        reshard = "dataset_creation/reshard.py with lists that DataComp's baselines.py has filtered"
        script = reshard if is_filtered else self.prepare_with
        return f"{folder} is missing: run {script}, or set DATA_DIR (now {data_dir}) to the folder of {self.root}/"

    def step_index(self, name: str) -> int:
        """Return the index of the step called ``name``; the TicError for an unknown one lists the valid names."""
        names = [step.name for step in self.steps]
        if name not in names:
            raise TicError(f"unknown step {name!r} of {self.name}; the steps are {', '.join(names)}")
        return names.index(name)


def _single(*names: str) -> tuple[Step, ...]:
    return tuple(Step(name=name, splits=(name,), periods=(name,)) for name in names)


MONTHS = tuple(
    f"{year}{month:02d}"
    for year, months in {
        2014: (3, 4, 7, 8, 9, 10, 11, 12),
        2015: (1, 2, 3, 4, 5, 6, 7, 8, 10, 11),
        2016: (2, 4, 5, 6, 7, 8, 9, 10, 12),
        **dict.fromkeys((2017, 2018, 2019, 2020, 2021), range(1, 13)),
        2022: (1, 5, 6, 7, 8, 9, 10, 11, 12),
        2023: (1, 2, 3, 4, 5, 6),
    }.items()
    for month in months
)
"""The 102 months of TiC-DataComp. They are crawl dumps, so some calendar months do not exist."""


def _packed(name: str, title: str, source: str, *steps: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        steps=_single(*steps),
        tasks={"retrieval": "retrieval"},
        prepare_with=f"dataset_creation/tic-{source}/create_splits.py and dataset_creation/create_tars.py",
        dataset=name,
    )


_FIRST = Step(name="2014-2016", splits=("2014", "2015", "2016"), periods=("2014", "2015", "2016"))
_DATACOMP = Benchmark(
    name="datacomp",
    title="TiC-DataComp",
    steps=(_FIRST, *_single("2017", "2018", "2019", "2020", "2021", "2022")),
    tasks={"retrieval": "retrieval", "datacompnet": "classification"},
    prepare_with="dataset_creation/tic-datacomp/build_tic_datacomp.sh",
    dataset="datacomp",
    filters={"basic": "train", "bestpool": "train_bestpool"},
)
_MONTHLY = {"name": "datacomp_monthly", "title": "TiC-DataComp (monthly)", "cadence": "monthly"}
_TABLE = (
    _DATACOMP,
    replace(_DATACOMP, **_MONTHLY, steps=_single(*MONTHS)),
    _packed("yfcc15m", "TiC-YFCC15M", "yfcc15m", "2004-2008", "2009-2010", "2011-2012", "2013-2014"),
    _packed("yfcc15m_2011", "TiC-YFCC15M (2008-2011 first)", "yfcc15m", "2008-2011", "2012", "2013", "2014"),
    _packed("redcaps", "TiC-RedCaps", "redcaps", "2011-2017", "2018", "2019", "2020"),
    Benchmark(
        name="emoji",
        title="TiC-Emoji",
        steps=_single("2014", "2015", "2016", "2017-2018", "2019", "2020", "2021-2025"),
        tasks={"retrieval": "retrieval", "emojinet": "classification"},
        prepare_with="scripts/run_emoji_cumulative.sh",
        dataset="emoji",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark called ``name``; the ``TicError`` for an unknown one lists the valid names."""
    return lookup(BENCHMARKS, "benchmark", name)


def main() -> None:
    """Print the names of a benchmark's steps."""
    parser = Parser(__doc__)
    parser.add_argument("benchmark", help=f"one of {', '.join(BENCHMARKS)}")
    parser.add_argument("--first", help="the first step to print (default: all)")
    args = parser.parse_args()
    benchmark = get_benchmark(args.benchmark)
    first = benchmark.step_index(args.first) if args.first else 0
    print(*(step.name for step in benchmark.steps[first:]), sep="\n")


if __name__ == "__main__":
    run_main(main)
