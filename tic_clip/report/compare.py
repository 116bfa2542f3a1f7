"""Compare runs and models: each figure with its standard deviation over seeds and its error, as shares of 1."""

from string import ascii_uppercase
from typing import NamedTuple

import numpy as np
import pandas as pd

from tic_clip.metrics import forgetting, mean_over_compute, seed_error, transfer_errors
from tic_clip.report.frame import SPENT, Results, Subject, Task
from tic_clip.report.table import MISSING, write

IMAGENET, FLICKR = "imagenet1k", "retrieval/flickr_1k_test_image_text_retrieval"
SHIFTS = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"]
"""ImageNet's distribution shifts, as DataComp's list of tasks calls them; the paper averages them."""
TRANSFERS = {"backward": "backward", "id": "ID", "forward": "forward"}
ABOUT = ["method", "runs", "samples seen", "MACs", "results"]
FORGETTING = {"average": "average accuracy", "last": "last model", "bwt": "BWT", "forgetting": "forgetting"}
FORGETTING |= {"area": "over compute"}


class Compared(NamedTuple):
    """A row for each group of runs that differ only in their seed, and for each model.

    ``table``: ``ABOUT``, ``settings`` (the same letter for comparable runs), and for each head its mean, its standard
    deviation "… sd", and the half-width of its 95 % interval "… error". ``heads``: the heads by kind.
    """

    table: pd.DataFrame
    heads: dict[str, list[str]]


def compare(results: Results) -> Compared:
    """Return the comparison of all rows of a report."""
    about = {}
    for one in results.rows:
        spent = [one.spent[column].dropna().max() for column in SPENT]
        method = one.about["method"] or one.about["family"] or MISSING
        about[one.name] = [method, len(one.members), *spent, count_results(results, one.members)]
    table = pd.DataFrame.from_dict(about, orient="index", columns=ABOUT, dtype=object)
    table["settings"] = group_settings(results)
    read = {one.name: [_read_figures(results, each) for each in one.members] for one in results.rows}
    heads = {kind: list(figures) for kind, figures in next(iter(read.values()))[0].items()}
    errors = [_read_errors(one) for one in results.rows]
    columns = {}
    for kind, head in ((kind, head) for kind, listed in heads.items() for head in listed):
        parts = [pd.Series([each[kind][head] for each in members], dtype=float) for members in read.values()]
        columns[head] = [values.mean(skipna=False) for values in parts]
        columns[f"{head} sd"] = deviations = [values.std(skipna=False) for values in parts]
        columns[f"{head} error"] = [
            seed_error(deviation, len(values)) if len(values) > 1 else error.get(head, np.nan)
            for deviation, values, error in zip(deviations, parts, errors, strict=True)
        ]
    table = table.join(pd.DataFrame(columns, index=table.index))
    relative = _relate_to_oracle(results, table)
    return Compared(table.join(relative), heads | {"relative": list(relative)})


def _relate_to_oracle(results: Results, table: pd.DataFrame) -> pd.DataFrame:
    """Return each transfer divided by that of the first oracle run with the same settings; no column without one."""
    has_others = table["settings"].duplicated(keep=False) & table["settings"].notna()
    oracles = table[(table["method"] == "oracle") & has_others].drop_duplicates("settings")
    if oracles.empty:
        return pd.DataFrame(index=table.index)
    own = oracles.set_index("settings").reindex(table["settings"]).set_index(table.index)
    heads = [(label, head) for label in results.tasks for head in TRANSFERS.values()]
    return pd.DataFrame(
        {f"{label}\n{head} / oracle": table[f"{label} {head}"] / own[f"{label} {head}"] for label, head in heads}
    )


def _read_figures(results: Results, one: Subject) -> dict[str, dict[str, float]]:
    """Return what a run or model has by kind and head: figures, static tasks, spans (old and new data), forgetting."""
    static, keys = one.static.loc[one.last_step], results.static_keys
    groups = {"ImageNet": [IMAGENET], f"shifts ({len(SHIFTS)})": SHIFTS, "Flickr30k": [FLICKR]}
    groups[f"average ({len(keys)})"] = sorted(keys)
    figures = {head: static.reindex(part).to_numpy().mean() for head, part in groups.items() if set(part) & set(keys)}
    others: dict[str, float] = {}
    spans: dict[str, float] = {}
    for label, task in results.tasks.items():
        transfers = one.transfer(label)
        figures |= {f"{label} {head}": transfers[key] for key, head in TRANSFERS.items()}
        more = forgetting(one.square_matrix(label)) if one.is_run else {}
        compute = one.spent["macs_seen" if one.spent["macs_seen"].notna().all() else "samples_seen"].to_numpy(
            dtype=float
        )
        more |= {"area": mean_over_compute(compute, one.mean_over(label, [task.periods])[:, 0])}
        others |= {f"{label}\n{head}": more.get(key, np.nan) for key, head in FORGETTING.items()}
        periods = old_and_new(task) if results.models else {}
        means = one.mean_over(label, periods.values())[one.steps.index(one.last_step)] if periods else []
        spans |= {f"{label}\n{head}": mean for head, mean in zip(periods, means, strict=True)}
    return {"figures": figures, "static": static.reindex(keys).to_dict(), "spans": spans, "forgetting": others}


def _read_errors(one: Subject) -> dict[str, float]:
    """Return the half-widths of the 95 % intervals of a run's transfers."""
    errors = {label: transfer_errors(one.square_widths(label)) for label in one.tasks if one.is_run}
    return {f"{label} {head}": part[key] for label, part in errors.items() for key, head in TRANSFERS.items()}


def _known_settings(results: Results) -> pd.DataFrame:
    """Return the settings that are known for all runs, a row each."""
    return pd.DataFrame({one.name: one.settings for one in results.groups}, dtype=object).T.dropna(axis="columns")


def group_settings(results: Results) -> pd.Series:
    """Return a letter for each run; runs with equal known settings share it."""
    known = _known_settings(results)
    alike = known.astype(str).agg("\n".join, axis=1) if known.size else pd.Series("", index=known.index)
    return pd.Series([ascii_uppercase[i % 26] for i in pd.factorize(alike)[0]], index=known.index, dtype=object)


def list_settings(results: Results, letters: pd.Series) -> list[str]:
    """Return the settings that differ between letters: "A: batch 64, samples a step 7,680"."""
    known = _known_settings(results)
    known = known.loc[:, known.astype(str).nunique() > 1].map(write)
    rows = known.groupby(letters.dropna()).first().to_dict("index")
    return [f"{letter}: " + ", ".join(f"{head} {value}" for head, value in row.items()) for letter, row in rows.items()]


def count_results(results: Results, group: list[Subject]) -> str:
    """Return how many results are there, as "15 of 49" or "all"."""
    parts = [one.matrix(task) for one in group for task in results.tasks]
    parts += [one.static.loc[one.last_step].reindex(results.static_keys) for one in group if len(one.static.columns)]
    found, total = sum(int(part.notna().sum(axis=None)) for part in parts), sum(part.size for part in parts)
    return f"{found:,} of {total:,}" if found < total else "all"


def old_and_new(task: Task) -> dict[str, list[str]]:
    """Return the first step's periods, the last two, and all, by name ("2014 to 2016", "2021 to 2022", "all")."""
    spans = [list(task.benchmark.steps[0].periods), task.periods[-2:]]
    return {span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}": span for span in spans} | {"all": task.periods}
