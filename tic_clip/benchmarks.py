"""Steps, periods and tasks of each benchmark, from the table here or a user's YAML file (docs/own_data.md).

    python -m tic_clip.benchmarks emoji        # print the names of its training steps

A benchmark's data are in ``{data_dir}/tic/{dataset}/{cadence}/``: ``train/{split}/`` and ``eval/{task}/{period}/``.
"""

import datetime
import re
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import msgspec

from tic_clip import TicError, lookup
from tic_clip.cli import Parser, run_main
from tic_clip.metrics import MAIN_METRIC
from tic_clip.storage import read_bytes
from tic_clip.timeline import cut_spans, cutoff, name_span, span

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Step:
    """A time step: the training splits that it adds, and its evaluation periods."""

    name: str
    splits: tuple[str, ...]
    periods: tuple[str, ...]

    @property
    def cutoff(self) -> int:
        """Return the step's last month as YYYYMM: 202012 for 2020, 201812 for 2017-2018."""
        return cutoff(self.name)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A dataset split by time.

    ``tasks``: task -> kind (retrieval or classification). ``metrics``: task -> main metric, if not its kind's default.
    ``filters``: filter of the training data -> folder, the default first. ``prepare_with``: scripts that make the data.
    """

    name: str
    title: str = field(compare=False)
    steps: tuple[Step, ...]
    tasks: dict[str, str]
    metrics: dict[str, str] = field(default_factory=dict)
    prepare_with: str
    dataset: str
    cadence: str = "yearly"
    filters: dict[str, str] = field(default_factory=lambda: {"all": "train"})
    text: str = field(default="", compare=False)  # the YAML file's, if it is a user's

    @property
    def root(self) -> str:
        """Return the benchmark's folder below ``data_dir``."""
        return f"tic/{self.dataset}/{self.cadence}"

    @property
    def periods(self) -> tuple[str, ...]:
        """Return all evaluation periods in order of time."""
        return tuple(period for step in self.steps for period in step.periods)

    def main_metric(self, task: str) -> str:
        """Return the metric that a task's matrix shows."""
        return self.metrics.get(task, MAIN_METRIC[self.tasks[task]])

    def missing_data_message(self, folder: str, data_dir: str) -> str:
        """Return the error message for a missing data folder."""
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
        metrics={"emojinet": "mean_per_class_recall"},
        prepare_with="scripts/run_emoji_cumulative.sh",
        dataset="emoji",
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _TABLE}


def get_benchmark(name: str) -> Benchmark:
    """Return the benchmark called ``name``, or read it from the YAML file ``name`` and register it.

    Raises a TicError that lists the valid names, or says which key of the file is wrong.
    """
    if not name.endswith((".yaml", ".yml")):
        return lookup(BENCHMARKS, "benchmark", name)
    benchmark = read_benchmark(name)
    if BENCHMARKS.setdefault(benchmark.name, benchmark) != benchmark:
        raise TicError(f"{name}: name: {benchmark.name} is taken by a benchmark with other steps, tasks or folders")
    return BENCHMARKS[benchmark.name]


CADENCES = {"year": "yearly", "quarter": "quarterly", "month": "monthly", None: "steps"}


class _Step(msgspec.Struct, forbid_unknown_fields=True):
    """A step of a YAML file whose splits or periods have other names than the step."""

    name: str | int
    splits: tuple[str | int, ...] = ()
    periods: tuple[str | int, ...] = ()


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A benchmark's YAML file: ``steps``, or ``every`` year from ``first`` to ``last``, or ``boundaries``."""

    name: str
    title: str = ""
    steps: tuple[str | int | _Step, ...] = ()
    every: Literal["year", "quarter", "month"] | None = None
    first: str | int | None = None
    last: str | int | None = None
    boundaries: tuple[datetime.date, ...] = ()
    tasks: dict[str, Literal["retrieval", "classification"]] = msgspec.field(
        default_factory=lambda: {"retrieval": "retrieval"}
    )
    filters: dict[str, str] = msgspec.field(default_factory=lambda: {"all": "train"})
    dataset: str = ""
    cadence: str = ""


def read_yaml(path: object, kind: type[T], *, strict: bool = True) -> T:
    """Read a YAML file into a ``kind``; raise a TicError that says which key or line is wrong."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            for i, (key, _) in enumerate(node.value):
                if key.value in [other.value for other, _ in node.value[:i]]:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            return super().construct_mapping(node, deep)

    data = read_bytes(path)
    try:
        return msgspec.convert(yaml.load(data.decode(), Loader), kind, strict=strict)
    except yaml.MarkedYAMLError as error:
        raise TicError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}") from None
    except (ValueError, yaml.YAMLError) as error:  # a msgspec.ValidationError is a ValueError
        raise TicError(f"{path}: {error}") from None


def read_benchmark(path: str) -> Benchmark:
    """Read a benchmark from a YAML file; raise a TicError that says which key is wrong."""
    file = read_yaml(path, _File)
    try:
        steps = _file_steps(file)
    except ValueError as error:
        raise TicError(f"{path}: {error}") from None
    return Benchmark(
        name=file.name,
        title=file.title or file.name,
        steps=steps,
        tasks=file.tasks,
        prepare_with="dataset_creation/create_splits.py and dataset_creation/create_tars.py",
        dataset=file.dataset or file.name,
        cadence=file.cadence or CADENCES[file.every],
        filters=file.filters,
        text=read_bytes(path).decode(),
    )


def _file_steps(file: _File) -> tuple[Step, ...]:
    """Return the steps of a file; raise a ValueError that names the key that is wrong."""
    for key in ("tasks", "filters"):
        if not getattr(file, key):
            raise ValueError(f"{key}: give one at least")
    names = {"name": [file.name], "dataset": [file.dataset or file.name], "cadence": [file.cadence or "steps"]}
    for key, values in (names | {"tasks": file.tasks, "filters": file.filters.values()}).items():
        for value in values:
            check_name(value, key)
    if sum(map(bool, (file.steps, file.every, file.boundaries))) != 1:
        raise ValueError("give one of the keys steps, every (with first and last) and boundaries")
    if file.every:
        days = [span(str(name)) for name in (file.first, file.last)]
        if None in days or days[0][0] >= days[1][1]:
            raise ValueError(f"first, last: {file.first} and {file.last} are not two dates such as 2014 and 2022")
        names = cut_spans(file.every, days[0][0], days[1][1])
    elif file.boundaries:
        if len(file.boundaries) < 2 or list(file.boundaries) != sorted(set(file.boundaries)):
            raise ValueError("boundaries: give days in order of time: the first of each step, and the day after all")
        names = [name_span(*days) for days in zip(file.boundaries, file.boundaries[1:], strict=False)]
    else:
        names = file.steps
    steps = tuple(
        Step(
            name=str(each.name),
            splits=tuple(map(str, each.splits)) or (str(each.name),),
            periods=tuple(map(str, each.periods)) or (str(each.name),),
        )
        for each in (name if isinstance(name, _Step) else _Step(name) for name in names)
    )
    check_steps([step.name for step in steps])
    for key in ("splits", "periods"):
        check_steps([name for step in steps for name in getattr(step, key)], key)
    return steps


def check_name(text: str, key: str) -> None:
    """Raise a ValueError that begins with ``key`` unless ``text`` can name a folder and not a YAML file."""
    if not re.fullmatch(r"\w[\w.-]*", text) or text.endswith((".yaml", ".yml")):
        raise ValueError(f"{key}: {text!r} is not made of letters, digits, _, . and -, from a letter or digit on")


def check_steps(names: list[str], key: str = "steps") -> None:
    """Raise a ValueError that begins with ``key`` unless all names are dates, in order, and do not overlap."""
    end = datetime.date.min
    for name in names:
        if not (days := span(name)):
            raise ValueError(f"{key}: {name!r} is not a date such as 2020, 2020Q1, 202003, 20200331 or 2017-2018")
        if days[0] < end:
            raise ValueError(f"{key}: {name} begins before the end of the one before it")
        end = days[1]


def main() -> None:
    """Print the names of a benchmark's steps."""
    parser = Parser(__doc__)
    parser.add_argument("benchmark", help=f"one of {', '.join(BENCHMARKS)}, or a path.yaml")
    args = parser.parse_args()
    print(*(step.name for step in get_benchmark(args.benchmark).steps), sep="\n")


if __name__ == "__main__":
    run_main(main)
