"""What stands behind a report's numbers: the samples that were scored, and the results that are missing; as tables."""

from typing import Any

from tic_clip.markup import MAX_NUMBERED, MISSING, Table, thousands
from tic_clip.paper import IMAGENET, SHIFTS
from tic_clip.summary import Summaries, last_step, periods_matrix, static_value

SHOWN = 4
"""So many phrases say what is missing; then how many more there are."""
REMARKS = {"dropped": "{} samples left out ({})", "nonfinite": "{} features of a model are no numbers"}


def coverage(found: Summaries) -> list[Table]:
    """Tables of the evaluation data, where something is known of them, and of missing results, where there are any."""
    return [*_data_table(found), *_missing_table(found)]


def _data_table(found: Summaries) -> list[Table]:
    """Samples of each period of each task; a row more where runs were scored on different ones."""
    known = {name: one["data"] for name, one in found.everything.items() if one.get("data")}
    periods = found.benchmark.periods
    groups: dict[tuple, list[str]] = {}
    for task in found.tasks:
        for name, data in known.items():
            if task in data:
                amounts = tuple(_amount(data[task].get(period)) for period in periods)
                groups.setdefault((task, amounts), []).append(name)
    if not known:
        return []
    tasks = [task for task, _ in groups]
    differ = len(tasks) > len(set(tasks))
    shares = [facts.get("coverage") for data in known.values() for each in data.values() for facts in each.values()]
    partly = any(share is not None and share < 1 for share in shares)
    return [
        Table(
            title="Evaluation data: samples that were scored"
            + ", and the share of the list of UIDs that is there" * partly,
            header=["task", *periods],
            rows=[
                [task if tasks.count(task) == 1 else f"{task}: {_list(names)}", *amounts]
                for (task, amounts), names in groups.items()
            ],
            marked=set(),
            legend="; ".join(["not all were scored on the same samples"] * differ + _remarks(known))
            or "no sample was left out",
            wide=len(periods) > MAX_NUMBERED,
        )
    ]


def _amount(facts: dict[str, Any] | None) -> str:
    if not facts:
        return MISSING
    share = facts.get("coverage")
    return thousands(facts.get("num_samples")) + (f" ({_share(share)} %)" if share is not None and share < 1 else "")


def _share(share: float) -> str:
    """In per cent, rounded down, so that 100 is all."""
    return f"{int(1000 * share + 1e-6) / 10:g}"


def _remarks(known: dict[str, dict]) -> list[str]:
    """What was left out of the data, and where a model gave no numbers: a phrase a task and reason."""
    seen: dict[tuple[str, str, str], tuple[dict[str, int], dict[str, None]]] = {}  # (count by period, names)
    for name, data in known.items():
        for task, periods in data.items():
            for period, facts in periods.items():
                counts = {("dropped", reason): count for reason, count in facts.get("dropped", {}).items()}
                counts |= {("nonfinite", ""): facts["nonfinite"]} if facts.get("nonfinite") else {}
                for kind, count in counts.items():
                    counted, names = seen.setdefault((task, *kind), ({}, {}))
                    counted[period] = max(count, counted.get(period, 0))
                    names[name] = None
    remarks = []
    for (task, kind, reason), (counts, names) in seen.items():
        some = f" of {_list(list(names))}" if len(names) < len(known) else ""
        said = REMARKS[kind].format(thousands(sum(counts.values())), reason)
        remarks.append(f"{task} {_list(list(counts))}{some}: {said}")
    return remarks


def _missing_table(found: Summaries) -> list[Table]:
    """How many results each run or model lacks, and which."""
    alike: dict[tuple, list[str]] = {}
    for name, one in found.everything.items():
        alike.setdefault(tuple(_lacking(one, found).items()), []).append(name)
    rows = [
        [_list(names), _list([phrase for phrase, _ in lacks], separator="; "), thousands(sum(n for _, n in lacks))]
        for lacks, names in alike.items()
        if lacks
    ]
    legend = "a figure that needs a missing result is missing as well"
    head = ["run", "which", "missing\neach"]
    return [Table(title="Missing results", header=head, rows=rows, marked=set(), legend=legend, text=2)] if rows else []


def _lacking(one: dict[str, Any], found: Summaries) -> dict[str, int]:
    """What a run or model lacks of what there is of another, in phrases, and how many results each is."""
    lacks = {}
    periods = found.benchmark.periods
    for name in found.tasks:
        task = one["tasks"].get(name)
        if "steps" not in one:
            rows = {"": task["periods"].values() if task else [None] * len(periods)}
        else:
            values = periods_matrix(task) if task else [[None] * len(periods)] * len(one["steps"])
            rows = dict(zip(one["steps"], values, strict=True))
        lacks |= _lacking_rows(name, rows, periods)
    keys = {key for each in found.everything.values() for key in each.get("static", {})}
    keys = [key for key in (IMAGENET, *SHIFTS) if key in keys] + sorted(keys - {IMAGENET, *SHIFTS})
    gone = [key for key in keys if static_value(one, key) is None] if one.get("static") else []
    step = f" of {one['steps'][last_step(one)]}" if "steps" in one else ""
    return lacks | ({f"static tasks{step}: {_list(gone, 6)}": len(gone)} if gone else {})


def _lacking_rows(task: str, rows: dict[str, Any], periods: tuple[str, ...]) -> dict[str, int]:
    """``rows``: step (or "" for a model that has none) -> values on the periods."""
    gone = {step: [p for p, value in zip(periods, row, strict=True) if value is None] for step, row in rows.items()}
    empty = [step for step, each in gone.items() if len(each) == len(periods)]
    some = {step: each for step, each in gone.items() if 0 < len(each) < len(periods)}
    lacks = {f"{task}{f', {step}' * bool(step)} on {_list(each)}": len(each) for step, each in some.items()}
    if empty and empty == list(rows):
        return {f"all of {task}": len(rows) * len(periods)}
    return lacks | ({f"{task}, all of {_list(empty)}": len(empty) * len(periods)} if empty else {})


def _list(names: list[str], shown: int = SHOWN, separator: str = ", ") -> str:
    return separator.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
