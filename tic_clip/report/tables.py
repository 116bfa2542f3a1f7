"""The tables of a report: comparison, published numbers, static tasks, forgetting, models, evaluation data."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from tic_clip import TicError
from tic_clip.report.compare import ABOUT, FORGETTING, SHIFTS, Compared, count_results, list_settings
from tic_clip.report.frame import DATA, Results
from tic_clip.report.matrices import common_tables, matrix_tables
from tic_clip.report.table import MARK, MISSING, NEAR, Table, number, percent, write

FORGETTING_LEGEND = """average accuracy: of each step's model on the periods up to its own; last model: over all \
periods; BWT: how a period's result has changed since its own step, in points; forgetting: its best earlier result - \
the last; over compute: the area under the mean over all periods against compute"""


def headline_tables(results: Results, compared: Compared, reference: str | None = None) -> dict[str, list[Table]]:
    """Return the tables of a report by kind: the matrices of a single run, the comparison, and others."""
    is_compared = bool(results.runs or results.static_keys)
    others = common_tables(results)
    others += [reference_table(results, compared, reference)] if reference else []
    others += [static_table(results, compared)] if results.static_keys else []
    others += [models_table(results, compared)] if any(one.tasks for one in results.models) else []
    matrices = matrix_tables(results.single, results) if results.single else []
    is_needed = is_compared and (len(results.subjects) > 1 or not matrices)
    return {
        "matrices": matrices,
        "summary": [comparison_table(results, compared)] if is_needed else [],
        "others": others,
        "forgetting": forgetting_tables(results, compared),
    }


def describe(results: Results) -> str:
    """Return a sentence about what was run."""
    if not results.single:
        counts = ((len(results.runs), "run"), (len(results.models), "other model"))
        said = " and ".join(f"{count} {word}{'s' * (count > 1)}" for count, word in counts if count)
        return f"{said}; their settings, commands and versions are at the end of the page."
    run = results.single
    seen = run.spent["samples_seen"].dropna()
    settings = [f"{head} {write(value)}" for head, value in run.settings.items() if not pd.isna(value)]
    done = f"{len(seen)} of {len(run.steps)} steps, {number(seen.max())} samples seen"
    seeds = ", ".join(str(one.about["seed"]) for one in run.members if one.about["seed"] is not None)
    ends = [f"{head} {value}" for head, value in (("seed", seeds), ("finished", run.plan.get("finished"))) if value]
    return f"{run.about['method']}: {', '.join([*settings, done, *ends])}."


def read_cards(results: Results, compared: Compared) -> dict[str, str]:
    """Return head -> figure of a single run, with its deviation over seeds or its error."""
    row = compared.table.iloc[0]
    heads = [head for head in compared.heads["figures"] if results.single and not pd.isna(row[head])]
    spread = {head: row[f"{head} sd"] if row["runs"] > 1 else row[f"{head} error"] for head in heads}
    return {head: percent(row[head], spread[head]) for head in heads}


def metric_notes(results: Results) -> list[str]:
    """Return the metric of each task, as "retrieval = mean_recall@1"."""
    return [f"{label} = {task.metric}" for label, task in results.tasks.items()]


def comparison_csv(compared: Compared) -> str:
    """Return the comparison in full precision, as shares of 1."""
    heads = [column for head in compared.heads["figures"] for column in (head, f"{head} sd")]
    more = [head for part in ("spans", "forgetting", "relative") for head in compared.heads[part]]
    table = compared.table[[*ABOUT[:-1], *heads, *more, "settings"]].rename(
        columns=lambda head: head.replace("\n", " ")
    )
    return table.to_csv(index_label="run", lineterminator="\n")


def _write_figures(table: pd.DataFrame, head: str, form: str = ".1f") -> list[str]:
    deviations = table.get(f"{head} sd", pd.Series(np.nan, table.index))
    return [percent(value, deviation, form) for value, deviation in zip(table[head], deviations, strict=True)]


def mark_best(compared: pd.DataFrame, head: str) -> list[str]:
    """Return the figures in per cent, marking the best of each group of settings and those within noise."""
    marks = pd.Series("", index=compared.index)
    groups = compared["settings"] if compared["settings"].nunique() > 1 else pd.Series("", index=compared.index)
    for _, group in compared.groupby(groups, dropna=False):
        if len(group) == 1 < len(compared):  # nothing to compare with
            continue
        values, errors = group[head], group[f"{head} error"]
        best = values.map(percent) == percent(values.max())
        noise = np.hypot(errors, errors.get(values.idxmax()) if values.notna().any() else np.nan)
        marks[group.index[values.max() - values <= noise]] = NEAR
        marks[group.index[best & values.notna()]] = MARK
    return [text + mark for text, mark in zip(_write_figures(compared, head), marks, strict=True)]


def comparison_table(results: Results, compared: Compared) -> Table:
    """Return the comparison in per cent, with the best of each column marked."""
    heads, notes = compared.heads["figures"], [f"{MARK}: the best of its column"]
    compared = compared.table[[one.is_run or bool(len(one.static.columns)) for one in results.rows]]
    cells = compared[["method"]].assign(**{"samples\nseen": compared["samples seen"].map(number)})
    if compared["settings"].nunique() > 1:
        cells.insert(1, "settings", compared["settings"].fillna(MISSING))
        told = list_settings(results, compared["settings"])
        notes = [f"{MARK}: the best of its column among runs with equal settings", *told]
    if any(head.startswith("shifts (") for head in heads):
        notes.append(f"shifts: mean of {', '.join(SHIFTS)}")
    if results.static_keys:
        notes.append("average: mean of all static tasks")
    if compared["MACs"].notna().any():
        cells["MACs"] = [number(count, ".1e") for count in compared["MACs"]]
        notes.append("MACs are those of the forward passes")
    if sizes := sorted(set(compared["runs"]) - {1}):
        notes.append(f"±: standard deviation over n = {' or '.join(map(str, sizes))} runs with different seeds")
    if (compared["results"] != "all").any():
        cells["results"] = compared["results"]
    for head in heads:
        cells["\n".join(head.rsplit(" ", 1))] = mark_best(compared, head)
    if any(cells[column].str.endswith(NEAR).any() for column in cells):
        notes.insert(1, f"{NEAR}: within noise of it, by the 95 % intervals")
    title = f"{results.title}: {', '.join([*metric_notes(results), 'in per cent'])}"
    return Table(title, cells.reset_index(names="run"), "; ".join(notes), text=2)


def reference_table(results: Results, compared: Compared, path: str) -> Table:
    """Return ours, published and difference for each number in the CSV ``path``, in per cent."""
    try:
        published = pd.read_csv(path, index_col="method", skipinitialspace=True, encoding="utf-8-sig").astype(float)
    except ValueError as error:  # not CSV, no column "method", a text
        raise TicError(f"{path} is not a table of method and numbers in per cent: {error}") from None
    heads, compared = compared.heads["figures"], compared.table
    methods = [*compared["method"], *compared.index]
    for kind, used, valid in (("method", published.index, methods), ("column", published.columns, heads)):
        if len(wrong := used.difference(valid)):
            raise TicError(f"{path}: unknown {kind} {wrong[0]!r}; there are: {', '.join(dict.fromkeys(valid))}")
    rows = []
    for run, method in compared["method"].items():
        for (label, head), theirs in published.stack().items():
            if label in (run, method):
                ours = 100 * compared.loc[run, head]
                numbers = number(ours, ".1f"), number(theirs, ".1f"), number(ours - theirs, "+.1f")
                rows.append([run, label, head, *numbers])
    cells = pd.DataFrame(rows, columns=["run", "method", "figure", "ours", "published", "difference"])
    title = f"Beside the numbers of {Path(path).name}, in per cent"
    return Table(title, cells, "differences are ours - published, in points", text=3)


def static_table(results: Results, compared: Compared) -> Table:
    """Return the static tasks, a row each; columns are the steps of a single run, or runs and models."""
    if results.single and len(results.runs) == 1:
        cells, legend = results.single.static.dropna(how="all").map(percent).T, "of each step's model"
    else:
        some = compared.table.dropna(subset=results.static_keys, how="all")
        cells = pd.DataFrame({key: _write_figures(some, key) for key in results.static_keys}, index=some.index).T
        legend = "of a run, the model of its last step"
    cells = cells.reset_index(names="task", allow_duplicates=True)
    return Table("Static tasks, main metric in per cent", cells, legend)


def forgetting_tables(results: Results, compared: Compared) -> list[Table]:
    """Return the forgetting measures of each task, a row for each run."""
    tables = []
    for label, task in results.tasks.items():
        heads = compared.heads["forgetting"] + compared.heads["relative"]
        heads = [head for head in heads if head.startswith(f"{label}\n")]
        some = compared.table.dropna(subset=heads, how="all")
        heads = list(some[heads].dropna(axis="columns", how="all"))
        cells = {"run": list(some.index), "method": list(some["method"])}
        forms = {head: "+.1f" if head.endswith(FORGETTING["bwt"]) else ".1f" for head in heads}
        cells |= {head.removeprefix(f"{label}\n"): _write_figures(some, head, form) for head, form in forms.items()}
        title = f"{task.benchmark.title}: forgetting, {label}, in per cent"
        tables += [Table(title, pd.DataFrame(cells), FORGETTING_LEGEND, text=2)] if len(some) else []
    return tables


def models_table(results: Results, compared: Compared) -> Table:
    """Return the models that are not runs, on old and new data."""
    some = compared.table.loc[[one.name for one in results.models if one.tasks]]
    cells = {"model": list(some.index), "family": list(some["method"])}
    counts = [count_results(results, [one]) for one in results.models if one.tasks]
    cells |= {"results": counts} if set(counts) != {"all"} else {}
    cells |= {head: list(map(percent, some[head])) for head in compared.heads["spans"]}
    legend = f"means over the periods named; {', '.join(metric_notes(results))}"
    return Table(f"{results.title}: models by the time of the data, in per cent", pd.DataFrame(cells), legend, text=2)


def data_tables(summaries: dict[str, dict]) -> list[Table]:
    """Return how many samples were scored and dropped; no table if results do not say."""
    rows = []
    for name, one in summaries.items():
        for task, data in one.get("data", {}).items():
            facts, reasons = pd.DataFrame.from_dict(data, orient="index").reindex(columns=DATA), Counter()
            for period in data.values():
                reasons.update(period.get("dropped", {}) | {"features not finite": period.get("nonfinite", 0)})
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "0"
            samples, coverage = facts["num_samples"].sum(min_count=1), facts["coverage"].min()
            rows.append([name, task, number(samples, ",.0f"), number(coverage, ".2%"), left_out])
    columns = ["run", "task", "samples", "coverage", "left out"]
    cells = pd.DataFrame(rows, columns=columns).groupby(columns[1:], sort=False)["run"]
    cells = cells.agg(lambda names: "all" if len(names) == len(summaries) > 3 else ", ".join(names))
    legend = "samples: over all periods; coverage: the least share of a period's list of UIDs that is there"
    table = Table("Evaluation data", cells.reset_index()[columns], legend, text=2)
    return [table] if rows else []


def about_table(results: Results, summaries: dict[str, dict]) -> Table:
    """Return settings, progress, date, command and versions, a column for each run."""
    columns = {}
    for one in results.subjects:
        seen, plan = one.spent["samples_seen"].dropna(), one.plan
        about = {
            "method": one.about["method"],
            "family": one.about["family"],
            **one.settings,
            "seed": one.about["seed"],
        }
        about |= {"samples seen": seen.max(), "steps": f"{len(seen)} of {len(one.steps)}" if one.is_run else None}
        about |= {"finished": plan.get("finished"), "command": " ".join(plan.get("command", [])) or None}
        about["trained at commit"] = plan.get("pins", {}).get("tic_clip")
        pins = summaries[one.name]["pins"].items()
        columns[one.name] = about | {"versions": ", ".join(f"{name} {version}" for name, version in pins) or None}
    cells = pd.DataFrame(columns, dtype=object).dropna(how="all")
    cells = cells.map(lambda value: MISSING if pd.isna(value) else write(value))
    return Table("What was run", cells.reset_index(names=""), text=1 + len(columns))
