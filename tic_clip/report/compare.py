"""The figures of each run and model side by side: mean, deviation over seeds and error, as shares of 1."""

from string import ascii_uppercase

import numpy as np
import pandas as pd

from tic_clip.metrics import seed_error, transfer_errors
from tic_clip.report.frame import SPENT, Results, Subject, Task

IMAGENET, FLICKR = "imagenet1k", "retrieval/flickr_1k_test_image_text_retrieval"
SHIFTS = ["imagenetv2", "imagenet-a", "imagenet-r", "imagenet_sketch", "imagenet-o", "objectnet"]
"""ImageNet's distribution shifts, as DataComp's list of tasks calls them; the paper averages them."""
TRANSFERS = {"backward": "backward", "id": "ID", "forward": "forward"}
ABOUT = ["method", "runs", "samples seen", "MACs", "results"]
MISSING = "–"


def compare(results: Results) -> pd.DataFrame:
    """Return a row for each group of runs that differ in their seed only, and for each model.

    Columns: ``ABOUT``, ``settings`` (a letter for those that can be compared), and for each figure and static task its
    mean, a share of 1, its standard deviation, "… sd", and the half-width of its 95 % interval, "… error".
    """
    about = {}
    for one in results.rows:
        spent = [one.spent[column].dropna().max() for column in SPENT]
        method = one.about["method"] or one.about["family"] or MISSING
        about[one.name] = [method, len(one.members), *spent, count_results(results, one.members)]
    compared = pd.DataFrame.from_dict(about, orient="index", columns=ABOUT, dtype=object)
    compared["settings"] = group_settings(results)
    figures = {one.name: pd.DataFrame([_read_figures(results, each) for each in one.members]) for one in results.rows}
    columns = {}
    for head in next(iter(figures.values())):
        parts = [frame[head].astype(float) for frame in figures.values()]
        errors = [_read_errors(results, one).get(head, np.nan) for one in results.rows]
        columns[head] = [part.mean(skipna=False) for part in parts]
        columns[f"{head} sd"] = deviations = [part.std(skipna=False) for part in parts]
        columns[f"{head} error"] = [
            seed_error(deviation, len(part)) if len(part) > 1 else error
            for deviation, part, error in zip(deviations, parts, errors, strict=True)
        ]
    return compared.join(pd.DataFrame(columns, index=compared.index))


def _read_figures(results: Results, one: Subject) -> dict[str, float]:
    """Return the figures of a run or model by their heads, its static tasks, and its last model on old and new data."""
    static, keys = one.static.loc[one.last_step], results.static_keys
    groups = {"ImageNet": [IMAGENET], f"shifts ({len(SHIFTS)})": SHIFTS, "Flickr30k": [FLICKR]}
    groups[f"average ({len(keys)})"] = sorted(keys)
    figures = {head: static.reindex(part).to_numpy().mean() for head, part in groups.items() if set(part) & set(keys)}
    for label in results.tasks:
        transfers = one.transfer(label)
        figures |= {f"{label} {head}": transfers[key] for key, head in TRANSFERS.items()}
    figures |= static.reindex(keys).to_dict()
    for label, task in results.tasks.items() if results.models else ():
        spans = old_and_new(task)
        means = one.mean_over(label, spans.values())[one.steps.index(one.last_step)]
        figures |= {f"{label}\n{head}": mean for head, mean in zip(spans, means, strict=True)}
    return figures


def _read_errors(results: Results, one: Subject) -> dict[str, float]:
    """Return the half-widths of the 95 % intervals of a run's transfers, from those of its cells."""
    errors = {label: transfer_errors(one.square_widths(label)) for label in one.tasks if one.is_run}
    return {f"{label} {head}": part[key] for label, part in errors.items() for key, head in TRANSFERS.items()}


def group_settings(results: Results) -> pd.Series:
    """Return a letter for each row that is a run, the same if all that is known of both settings is equal."""
    known = pd.DataFrame({one.name: one.settings for one in results.groups}, dtype=object).T.dropna(axis="columns")
    alike = known.astype(str).agg("\n".join, axis=1) if known.size else pd.Series("", index=known.index)
    return pd.Series([ascii_uppercase[i % 26] for i in pd.factorize(alike)[0]], index=known.index, dtype=object)


def list_settings(results: Results, letters: pd.Series) -> list[str]:
    """Return what differs between the settings of each letter: "A: batch 64, samples a step 7,680"."""
    known = pd.DataFrame({one.name: one.settings for one in results.groups}, dtype=object).T.dropna(axis="columns")
    known = known.loc[:, known.astype(str).nunique() > 1].map(
        lambda value: f"{value:,}" if isinstance(value, int) else value
    )
    rows = known.groupby(letters.dropna()).first().to_dict("index")
    return [f"{letter}: " + ", ".join(f"{head} {value}" for head, value in row.items()) for letter, row in rows.items()]


def count_results(results: Results, group: list[Subject]) -> str:
    """Return "15 of 49" results, or "all"."""
    parts = [one.matrix(task) for one in group for task in results.tasks]
    parts += [one.static.loc[one.last_step].reindex(results.static_keys) for one in group if len(one.static.columns)]
    found, total = sum(int(part.notna().sum(axis=None)) for part in parts), sum(part.size for part in parts)
    return f"{found:,} of {total:,}" if found < total else "all"


def old_and_new(task: Task) -> dict[str, list[str]]:
    """Return the first step's periods, the last two, and all: 2014 to 2016, 2021 and 2022 of TiC-DataComp."""
    spans = [list(task.benchmark.steps[0].periods), task.periods[-2:]]
    return {span[0] if len(span) == 1 else f"{span[0]} to {span[-1]}": span for span in spans} | {"all": task.periods}
