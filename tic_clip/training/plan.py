"""The plan of a step: all that it does, computed from the settings, the tables and the sizes of the splits.

plan.json is this plan: training reads it, a restart compares with it, a dry run prints it.
"""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tic_clip import TicError, lookup
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.data.split import split_sizes
from tic_clip.models import check_architecture, check_pretrained, macs_per_sample
from tic_clip.runs import RUN, last_checkpoint, read_done, versions
from tic_clip.storage import NotFoundError, read_bytes, read_json
from tic_clip.training.config import Config, Scale, init_path, scale_of, to_flags
from tic_clip.training.methods import Method, get_method, new_data
from tic_clip.training.patching import PATCHED, held_out
from tic_clip.training.sampling import apportion

Mixture = dict[str, dict[str, Annotated[float, msgspec.Meta(ge=0)]]]
NOT_COMPARED = ("command", "pins", "keep", "macs", "macs_seen", "validation", "start_content")
SETTINGS = {"buffer": "replay", "block": "resume_every"}  # keys of a plan that are not called as their settings


def make_plan(config: Config, world_size: int = 1) -> dict[str, Any]:
    """Return all that a step does; nothing is written or trained."""
    benchmark, method, scale = get_benchmark(config.benchmark), get_method(config.method), scale_of(config)
    t, first = (benchmark.step_index(name) for name in (config.step, steps_of(config)[0]))
    if t < first:
        raise TicError(f"step {config.step} is before the first step to train, {config.first_step}")
    if scale.batch_size % world_size:
        raise TicError(f"the batch of {scale.batch_size} does not divide among {world_size} processes")
    check_settings(config, benchmark, method)
    check_architecture(scale.model)
    step, selection = benchmark.steps[t], config.filter or next(iter(benchmark.filters))
    root = f"{config.data_dir.rstrip('/')}/{benchmark.root}/{lookup(benchmark.filters, 'filter', selection)}"
    start = find_start(config, benchmark, method, scale, first, t)
    length = plan_length(config, method, scale, first, t)
    return {
        "benchmark": benchmark.name,
        "filter": selection,
        "method": method.name,
        "scale": scale.name,
        "step": step.name,
        "cutoff": step.cutoff,
        "model": scale.model,
        "sampling": "resampled" if config.resampled else "exact",
        **plan_data(config, benchmark, method, root, first, t, length["samples"]),
        "start": start,
        "teacher": start if method.teacher else None,
        "seed": config.seed,
        **length,
        "learning_rate": scale.learning_rate,
        "warmup": scale.next_warmup if start else scale.warmup,
        "optimizer": "kept" if start and config.keep_optimizer else "fresh",
        "weight_decay": scale.weight_decay,
        "beta2": scale.beta2,
        "keep": {"max_kept": scale.max_kept}
        | {name: getattr(config, name) for name in ("save_every", "save_minutes", "remote")},
        "command": ["python", "scripts/train.py", *to_flags(config)],
        "pins": versions(),
    }


def check_settings(config: Config, benchmark: Benchmark, method: Method) -> None:
    """Raise a TicError for settings that exclude each other or that the method does not have."""
    if config.budget and len(config.budget) != len(benchmark.steps):
        raise TicError(f"--budget has {len(config.budget)} numbers, {benchmark.name} has {len(benchmark.steps)} steps")
    if config.replay is not None and not method.has_replay:
        raise TicError(f"{method.name} does not replay old data: --replay is for cumulative-exp and cumulative-equal")
    if config.replay is not None and config.mixture:
        raise TicError("--replay and --mixture both say how much old data is read: give one of them")
    if config.coefficient is not None and not method.hold_out:
        raise TicError(f"{method.name} does not interpolate weights: --coefficient is for patching")
    if config.coefficient is None and method.hold_out and config.resampled:
        raise TicError("sampling with replacement holds out no data to choose on: give --coefficient or --resampled 0")
    if config.keep_optimizer and method.start == "last patched":
        raise TicError("a patched model has no optimizer state: --keep_optimizer is not for patching")
    if config.first_step and not config.init and method.start != "random":
        raise TicError(f"--first_step {config.first_step} needs --init: {method.name} starts from the model before it")


def steps_of(config: Config) -> Sequence[str]:
    """Return the names of the steps that a run trains, in order."""
    benchmark = get_benchmark(config.benchmark)
    first = benchmark.step_index(config.first_step) if config.first_step else 0
    return [step.name for step in benchmark.steps[first:]]


def step_folder(config: Config, step: str) -> Path:
    """Return the folder of a step in the run's folder."""
    return Path(config.output_dir) / step


def find_start(config: Config, benchmark: Benchmark, method: Method, scale: Scale, first: int, t: int) -> str | None:
    """Return the checkpoint that step ``t`` starts from, or None for random weights."""
    if t == first or method.start == "random":
        return init_path(config)
    last = PATCHED if method.start == "last patched" else last_checkpoint(scale.checkpoints)
    return str(step_folder(config, benchmark.steps[t - 1].name) / last)


def plan_length(config: Config, method: Method, scale: Scale, first: int, t: int) -> dict[str, int]:
    """Return how much is trained in step ``t``, and in the run up to it; raise a TicError if a step is too short."""
    iterations, smallest = [], scale.batch_size * scale.checkpoints
    for i in range(first, t + 1):
        factor = config.budget[i] if config.budget else i + 1 if method.budget == "growing" else 1
        samples = int(scale.samples_per_step * Fraction(str(factor)))
        if samples < smallest:
            raise TicError(
                f"a step of {samples} samples is less than {scale.checkpoints} checkpoints × a batch of "
                f"{scale.batch_size} = {smallest}: give more --samples_per_step"
            )
        # OpenCLIP rounds an epoch of sampling with replacement up to a multiple of its loader workers.
        multiple = max(1, scale.workers) if config.resampled else 1
        blocks, block = choose_block(samples // smallest, scale.resume_every, multiple)
        iterations.append(scale.checkpoints * blocks * block)
    distilled = iterations[0 if config.init else 1 :] if method.teacher else []
    return {
        "batch_size": scale.batch_size,
        "iterations": iterations[-1],
        "checkpoints": scale.checkpoints,
        "block": block,
        "samples": iterations[-1] * scale.batch_size,
        "samples_seen": sum(iterations) * scale.batch_size,
        "samples_distilled": sum(distilled) * scale.batch_size,
    }


def choose_block(interval: int, wanted: int, multiple: int = 1) -> tuple[int, int]:
    """Return (number, size) of blocks of about ``wanted``, a multiple of ``multiple``, that fill ``interval`` best."""
    if interval < multiple:
        raise TicError(f"{interval} batches a checkpoint are less than one for each of {multiple} loader workers")
    about = max(1, round(interval / wanted))
    sizes = {number: interval // number // multiple * multiple for number in range(max(1, about // 2), 2 * about + 1)}
    number = min((n for n in sizes if sizes[n]), key=lambda n: (interval - n * sizes[n], abs(n - about)), default=1)
    return number, sizes.get(number) or interval // multiple * multiple


def plan_data(
    config: Config, benchmark: Benchmark, method: Method, root: str, first: int, t: int, samples: int
) -> dict[str, Any]:
    """Return what step ``t`` reads: splits below ``root``, the samples that it uses of each, and how many it takes."""
    is_chosen = method.hold_out and config.coefficient is None
    oldest = 0 if method.data is not new_data or config.mixture else first if is_chosen else t
    sizes = [
        {name: read_size(f"{root}/{name}", benchmark, config) for name in step.splits}
        for step in benchmark.steps[oldest : t + 1]
    ]
    size = {name: n for step in sizes for name, n in step.items()}
    trainable = [{name: n - held_out(n) * is_chosen for name, n in step.items()} for step in sizes]
    replay = 1.0 if config.replay is None else config.replay
    mixture = read_mixture(config.mixture, benchmark, t) if config.mixture else None
    if mixture:
        used = {name: n for step in trainable for name, n in step.items() if mixture.get(name)}
    else:
        used = use_samples(method, trainable, Fraction(str(replay)))
    shares = apportion([(mixture or used)[name] for name in used], samples)
    if config.resampled:
        used = {name: size[name] for name in used}  # whole shards are drawn, with a source's share as their weight
    sources = [
        {
            "name": name,
            "split": f"{root}/{name}",
            "size": size[name],
            "used": count,
            "samples": share,
            "share": round(share / samples, 6),
            "repeats": round(share / count, 4),
        }
        for (name, count), share in zip(used.items(), shares, strict=True)
        if share
    ]
    facts = {"buffer": replay} if method.has_replay else {}
    if method.hold_out:
        facts["coefficient"] = "chosen" if is_chosen else config.coefficient
    if is_chosen:
        facts["validation"] = plan_validation(root, sizes[first - oldest : -1])
    return {"sources": sources, **facts}


def read_size(split: str, benchmark: Benchmark, config: Config) -> int:
    """Return the number of samples of a split; the TicError for a missing one says how to make it."""
    try:
        return sum(split_sizes(split).values())
    except NotFoundError:
        raise TicError(benchmark.missing_data_message(split, config.data_dir)) from None


def use_samples(method: Method, sizes: list[dict[str, int]], replay: Fraction) -> dict[str, int]:
    """Return how many samples a method uses of each split, of ``sizes`` by step."""
    used: dict[str, int] = {}
    for step, total in zip(sizes, method.data([sum(step.values()) for step in sizes], replay), strict=True):
        used.update(zip(step, apportion(step.values(), total), strict=True))
    return used


def read_mixture(path: str, benchmark: Benchmark, t: int) -> dict[str, Fraction] | None:
    """Return the user's share of each split at step ``t``, or None if the file does not name the step."""
    try:
        table = msgspec.json.decode(read_bytes(path), type=Mixture)
    except msgspec.DecodeError as error:
        raise TicError(f'{path} is not {{"step": {{"split": share, …}}, …}}: {error}') from None
    for name in table:
        benchmark.step_index(name)
    step, known = benchmark.steps[t].name, [name for step in benchmark.steps[: t + 1] for name in step.splits]
    if step not in table:
        return None
    for name in table[step].keys() - set(known):
        raise TicError(f"{path}: {name} is not data of step {step}; those are {', '.join(known)}")
    if abs(sum(table[step].values()) - 1) > 1e-6:
        raise TicError(f"{path}: the shares of step {step} sum to {sum(table[step].values())}, not to 1")
    return {name: Fraction(str(share)) for name, share in table[step].items()}


def plan_validation(root: str, sizes: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Return the splits of earlier steps, of whose held-out samples patching chooses its coefficient; or a TicError."""
    splits = {name: n for step in sizes for name, n in step.items()}
    if splits and not any(map(held_out, splits.values())):
        found = ", ".join(f"{n} of {name}" for name, n in splits.items())
        raise TicError(f"patching holds out a twentieth to choose its coefficient on; of {found}: give a --coefficient")
    return [{"name": name, "split": f"{root}/{name}", "size": n, "held_out": held_out(n)} for name, n in splits.items()]


def add_macs(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan with the MACs of the step, and of the run up to it.

    They are those of the forward passes, as in DataComp, and stand for training steps of three times as many; so a
    teacher's forward passes count 1/3.
    """
    each, distilled = macs_per_sample(plan["model"]), plan["samples"] if plan["teacher"] else 0
    macs = each * (plan["samples"] + distilled // 3)
    return {**plan, "macs": macs, "macs_seen": each * (plan["samples_seen"] + plan["samples_distilled"] // 3)}


def difference(old: dict[str, Any], new: dict[str, Any], keys: Sequence[str] = ()) -> str | None:
    """Return the first difference of two plans in what makes the model, or in ``keys``: "seed 0, now it is 1"; or None.

    A key that only one of them has is left out: plans of other versions can be compared.
    """
    before, now = comparable(old), comparable(new)
    for key in keys or now:
        if key in before and key in now and before[key] != now[key]:
            return f"{SETTINGS.get(key, key)} {before[key]}, now it is {now[key]}"
    return None


def comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what makes the model, which the place of the folders does not."""
    kept = {key: value for key, value in plan.items() if key not in NOT_COMPARED}
    paths = {key: shorten(plan[key]) for key in ("start", "teacher") if key in plan}
    counts = {}
    for source in plan.get("sources", ()):
        used = source.get("used", source["size"])
        counts[f"samples of {source['name']}"] = f"{source['samples']:,} of {used:,} of {source['size']:,}"
    return {**kept, **paths, "sources": [source["name"] for source in plan.get("sources", ())], **counts}


def shorten(checkpoint: str | None) -> str:
    """Return STEP/checkpoints/NAME."""
    return "/".join(Path(checkpoint).parts[-3:]) if checkpoint else "random weights"


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise a TicError that shows in what a new plan differs from the one in the step's folder."""
    if not isinstance(old, dict) or not {"sources", "start"} <= old.keys():
        raise TicError(f"{folder}/plan.json is damaged: delete the step to train it again")
    if found := difference(old, new):
        solutions = "use the old setting, another output folder, or delete the step"
        raise TicError(f"{folder} was begun with {found}: {solutions}")


def check_run(before: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise a TicError that shows in what the run of the step before differs from the plan's."""
    expected = {**plan, "samples_seen": plan["samples_seen"] - plan["samples"]}
    if found := difference(before, expected, (*RUN, "samples_seen")):
        where = f"{plan['step']} starts from {before.get('step')}, which was trained"
        raise TicError(f"{where} with {found}: use the old setting or another output folder")


def check_step(config: Config, plan: dict[str, Any], dry_run: bool = False) -> bool:
    """Return whether a step is done.

    Raises:
        TicError: it was begun with other settings; the step before is not done (except in a ``dry_run``), of another
            run, or its checkpoint was deleted; the model that it starts from has seen later data.
    """
    folder, start = step_folder(config, plan["step"]), plan["start"]
    is_done = (folder / "done.json").exists()
    if is_done or ((folder / "plan.json").exists() and any(folder.glob("checkpoints/*.pt"))):
        check_same(read_json(folder / "plan.json"), plan, folder)
    if is_done:
        read_finished(folder)
    if is_done or start is None:
        return is_done
    before = Path(start).parents[1]
    if start != init_path(config) and (before / "done.json").exists():
        check_run(read_finished(before)["plan"], plan)
    elif start == init_path(config) != config.init and not Path(start).exists():
        check_pretrained(config.init, plan["model"])
        return False
    elif start != init_path(config):
        if dry_run:
            return False
        raise TicError(f"{plan['step']} starts from {start}, but that step is not done: train it first")
    from tic_clip import weights
    from tic_clip.training.checkpoint import check_cutoff

    check_cutoff(weights.record(start), start, plan)
    return False


def read_finished(folder: Path) -> dict[str, Any]:
    """Return a step's done.json; raise a TicError if its checkpoint was deleted."""
    facts = read_done(folder / "done.json")
    checkpoint = folder / facts["checkpoint"]
    if not checkpoint.exists():
        raise TicError(f"{checkpoint} is missing, but its step is done: restore it or delete the step")
    return facts


def describe(plans: Sequence[dict[str, Any]]) -> str:
    """Return a line for a run and a table with a line for each of its steps."""
    plan = plans[-1]
    facts = [plan[key] for key in ("benchmark", "filter", "method", "scale", "model")]
    facts += [f"{plan['sampling']} sampling", f"{plan['checkpoints']} checkpoints a step", f"seed {plan['seed']}"]
    facts += [f"{SETTINGS.get(key, key)} {plan[key]}" for key in ("buffer", "coefficient") if key in plan]
    facts += [f"{plan['samples_seen']:,} samples", f"{plan['macs_seen']:.2e} MACs"]
    columns = ("step", "samples", "iterations × batch", "MACs", "warm-up", "start", "trained on")
    rows = [columns, *map(describe_step, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([", ".join(facts), *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])


def describe_step(plan: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a step's line."""
    sources = [f"{source['name']} {source['share']:.1%}" for source in plan["sources"]]
    if len(sources) > 4:
        sources = [f"{len(sources)} splits: {sources[0]}", sources[1], "…", sources[-1]]
    return (
        plan["step"],
        f"{plan['samples']:,}",
        f"{plan['iterations']:,} × {plan['batch_size']:,}",
        f"{plan['macs']:.2e}",
        f"{plan['warmup']:,}" + " (longer than the step)" * (plan["warmup"] > plan["iterations"]),
        shorten(plan["start"]) + " with its optimizer" * (plan["optimizer"] == "kept"),
        ", ".join(sources),
    )
