"""The plan of a step, computed from the settings, the tables and the sizes of the splits.

Training reads it from plan.json, a restart compares with it, a dry run prints it.
"""

import shlex
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tic_clip import TicError, lookup
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.data.split import check_cache, list_fingerprint, split_sizes
from tic_clip.models import check_architecture, check_pretrained, has_logit_bias, macs_per_sample
from tic_clip.runs import LATER, RUN, check_benchmark, last_checkpoint, read_done, versions
from tic_clip.storage import NotFoundError, read_bytes, read_json
from tic_clip.timeline import cutoff
from tic_clip.training.config import Config, Scale, init_path, scale_of, to_flags
from tic_clip.training.losses import count_fisher, plan_loss
from tic_clip.training.methods import METHODS, PATCHED, Method, held_out, new_data
from tic_clip.training.sampling import apportion
from tic_clip.training.schedule import BRANCH, DEFAULT, SCHEDULES, check_rate, cooldown_blocks, plan_rate

Mixture = dict[str, dict[str, Annotated[float, msgspec.Meta(ge=0)]]]
NOT_COMPARED = ("command", "pins", "lists", "keep", "layout", "macs", "macs_seen", "validation", "settings")
NOT_COMPARED += ("teacher", "anchor")
"""What does not make the model, or is said by another key: teacher and anchor are the last model."""
CHANGES = ("lr", "warmup", "next_warmup", "schedule", "cooldown", "keep_optimizer", "loss_weight", "temperature")
"""Settings that a plan has as they were given, so that runs that share them can be averaged."""
UNLOCKED = ("--lock-image-unlocked-groups", "--lock-text-unlocked-layers")
SETTINGS = {"buffer": "replay", "block": "resume_every", "learning_rate": "lr"}
"""Keys of a plan that are not called as their settings."""


def make_plan(config: Config, world_size: int = 1) -> dict[str, Any]:
    """Return the plan of a step; write and train nothing."""
    benchmark, scale = get_benchmark(config.benchmark), scale_of(config)
    method = lookup(METHODS, "method", config.method)
    t, first = (benchmark.step_index(name) for name in (config.step, steps_of(config)[0]))
    if t < first:
        raise TicError(f"step {config.step} is before the first step to train, {config.first_step}")
    check_architecture(scale.model)
    layout = plan_layout(config, scale, world_size)
    check_settings(config, method, scale, layout["accum_freq"])
    check_rate(config, benchmark, method)
    step, selection = benchmark.steps[t], config.filter or next(iter(benchmark.filters))
    root = f"{config.data_dir.rstrip('/')}/{benchmark.root}/{lookup(benchmark.filters, 'filter', selection)}"
    length = plan_length(config, method, scale, first, t)
    start = teacher = init_path(config)
    if t > first and method.start != "random":
        before = Path(config.output_dir, benchmark.steps[t - 1].name)
        teacher = str(before / (PATCHED if method.start == "last patched" else last_checkpoint(scale.checkpoints)))
        start = str(before / BRANCH) if length["trunk"] and length["cooldown"] else teacher
    return {
        "benchmark": benchmark.name,
        "filter": selection,
        "method": method.name,
        "scale": Path(config.scale).stem,
        "step": step.name,
        "cutoff": step.cutoff,
        "model": scale.model,
        "sampling": "resampled" if config.resampled else "exact",
        "image_backend": scale.image_backend,
        **plan_data(config, benchmark, method, root, first, t, length["samples"]),
        "start": start,
        "teacher": teacher if method.teacher else None,
        **plan_loss(config, method, teacher if t > first else None),
        "seed": config.seed,
        **length,
        **plan_rate(config, scale, first, t, start),
        "openclip_flags": shlex.split(config.openclip_flags),
        "weight_decay": scale.weight_decay,
        "beta2": scale.beta2,
        **({"precision": config.precision} if config.precision else {}),
        "layout": layout,
        "keep": {"max_kept": scale.max_kept}
        | {name: getattr(config, name) for name in ("save_every", "save_minutes", "remote", "cache", "cache_gb")},
        "command": ["python", "scripts/train.py", *to_flags(config)],
        "pins": versions(),
        "settings": {name: value for name in CHANGES if (value := getattr(config, name)) is not None},
    }


def check_settings(config: Config, method: Method, scale: Scale, passes: int) -> None:
    """Raise a TicError for settings that exclude each other or that the method does not use."""
    if config.replay is not None and (config.mixture or not method.has_replay):
        raise TicError("--replay is for cumulative-exp and cumulative-equal, which replay old data, without --mixture")
    if config.coefficient is not None and not method.hold_out:
        raise TicError(f"{method.name} does not interpolate weights: --coefficient is for patching")
    if config.coefficient is None and method.hold_out and config.resampled:
        raise TicError("sampling with replacement holds out no data to choose on: give --coefficient or --resampled 0")
    if config.keep_optimizer and method.start == "last patched":
        raise TicError("a patched model has no optimizer state: --keep_optimizer is not for patching")
    if bool(config.cache) != bool(config.cache_gb):
        raise TicError("--cache and --cache_gb go together: a folder, and the most GB of shards that it holds")
    if config.first_step and not config.init and method.start != "random":
        raise TicError(f"--first_step {config.first_step} needs --init: {method.name} starts from the model before it")
    if method.all_checkpoints and scale.max_kept < scale.checkpoints:
        raise TicError(f"{method.name} is of all {scale.checkpoints} checkpoints of a step: --max_kept is below that")
    if config.loss_weight is not None and method.weight is None:
        raise TicError(f"{method.name} has no term of the loss for the last model: --loss_weight is for lwf and ewc")
    if config.temperature is not None and not method.teacher:
        raise TicError(f"{method.name} distils no model: --temperature is for lwf")
    siglip = has_logit_bias(scale.model) or "--siglip" in config.openclip_flags
    reasons = {"CoCa": "coca" in scale.model.lower(), "SigLIP's loss": siglip, "accumulation": passes > 1}
    if method.teacher and (found := [name for name, is_so in reasons.items() if is_so]):
        raise TicError(f"{method.name} is OpenCLIP's distillation, which can't be used with {found[0]}")


def plan_layout(config: Config, scale: Scale, world_size: int) -> dict[str, Any]:
    """Return how a batch is divided among the hardware (ranks, passes, memory), which does not change the model."""
    batch, rest = divmod(scale.batch_size, world_size)
    if rest:
        raise TicError(f"the batch of {scale.batch_size} does not divide among {world_size} processes")
    if config.accum_freq and config.max_batch:
        raise TicError("--max_batch chooses the number of passes, --accum_freq is this number: give one of them")
    limit = config.max_batch or batch
    passes = config.accum_freq or next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= limit)
    if batch % passes:
        raise TicError(f"--accum_freq {passes} does not divide the {batch} samples of a process's batch")
    for flag in UNLOCKED if scale.grad_checkpointing else ():
        if flag in config.openclip_flags:
            raise TicError(f"the layers of {flag} get no gradient with gradient checkpointing: --grad_checkpointing 0")
    return {"ranks": world_size, "accum_freq": passes, "grad_checkpointing": scale.grad_checkpointing}


def steps_of(config: Config) -> Sequence[str]:
    """Return the names of the steps that a run trains, in order."""
    benchmark = get_benchmark(config.benchmark)
    first = benchmark.step_index(config.first_step) if config.first_step else 0
    return [step.name for step in benchmark.steps[first:]]


def plan_length(config: Config, method: Method, scale: Scale, first: int, t: int) -> dict[str, int]:
    """Return how much step ``t``, and the run up to it, trains."""
    schedule, smallest = SCHEDULES[config.schedule or DEFAULT], scale.batch_size * scale.checkpoints
    cooldown = schedule.cooldown if config.cooldown is None else config.cooldown
    iterations, cooldowns = [], []
    for i in range(first, t + 1):
        factor = config.budget[i] if config.budget else i + 1 if method.budget == "growing" else 1
        samples = int(scale.samples_per_step * Fraction(str(factor)))
        if samples < smallest:
            least = f"{scale.checkpoints} checkpoints × a batch of {scale.batch_size} = {smallest}"
            raise TicError(f"a step of {samples} samples is less than {least}: give more --samples_per_step")
        blocks, block = choose_block(samples // smallest, scale.resume_every)
        if cooldown and scale.checkpoints * blocks == 1:
            raise TicError("a step of one block can't cool down in its last one: give a smaller --resume_every")
        iterations.append(scale.checkpoints * blocks * block)
        cooldowns.append(block * cooldown_blocks(cooldown, scale.checkpoints * blocks))
    distilled = iterations[0 if config.init else 1 :] if method.teacher else []
    fisher = [count_fisher(number * scale.batch_size, scale.batch_size) for number in iterations]
    return {
        "batch_size": scale.batch_size,
        "iterations": iterations[-1],
        "checkpoints": scale.checkpoints,
        "block": block,
        "samples": iterations[-1] * scale.batch_size,
        "samples_seen": sum(iterations) * scale.batch_size,
        "samples_distilled": sum(distilled) * scale.batch_size,
        **({"fisher_samples": fisher[-1], "fisher_samples_seen": sum(fisher)} if method.anchor else {}),
        "cooldown": cooldowns[-1],
        "trunk": sum(iterations[:-1]) - sum(cooldowns[:-1]) if schedule.continues else 0,
    }


def choose_block(interval: int, wanted: int) -> tuple[int, int]:
    """Return (number, size) of blocks of about ``wanted`` that fill ``interval`` best."""
    about = max(1, round(interval / wanted))
    numbers = range(max(1, about // 2), min(2 * about, interval) + 1)
    number = min(numbers, key=lambda n: (interval % n, abs(n - about)))
    return number, interval // number


def plan_data(
    config: Config, benchmark: Benchmark, method: Method, root: str, first: int, t: int, samples: int
) -> dict[str, Any]:
    """Return the sources of step ``t``: splits below ``root``, the samples used of each, and how many are drawn."""
    is_chosen = method.hold_out and config.coefficient is None
    oldest = 0 if method.data is not new_data or config.mixture else first if is_chosen else t
    steps = benchmark.steps[oldest : t + 1]
    size = {name: read_size(f"{root}/{name}", benchmark, config) for step in steps for name in step.splits}
    free = {name: n - held_out(n) * is_chosen for name, n in size.items()}
    replay = 1.0 if config.replay is None else config.replay
    mixture = read_mixture(config.mixture, benchmark, t) if config.mixture else None
    if mixture:
        used = {name: n for name, n in free.items() if mixture.get(name)}
    else:
        sizes = [[free[name] for name in step.splits] for step in steps]
        totals = method.data(list(map(sum, sizes)), Fraction(str(replay)))
        used = dict(zip(free, chain.from_iterable(map(apportion, sizes, totals)), strict=True))
    shares = apportion([(mixture or used)[name] for name in used], samples)
    if config.resampled:
        used = {name: size[name] for name in used}  # whole shards are drawn
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
        earlier = {name: size[name] for step in benchmark.steps[first:t] for name in step.splits}
        facts["validation"] = plan_validation(root, earlier)
    lists = {source["name"]: list_fingerprint(source["split"]) for source in sources}
    return {"sources": sources, "lists": lists, **facts}


def read_size(split: str, benchmark: Benchmark, config: Config) -> int:
    """Return the number of samples of a split."""
    try:
        return sum(split_sizes(split).values())
    except NotFoundError:
        raise TicError(benchmark.missing_data_message(split, config.data_dir)) from None


def read_mixture(path: str, benchmark: Benchmark, t: int) -> dict[str, Fraction] | None:
    """Return the user's share of each split at step ``t``, or None if the file does not have the step."""
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


def plan_validation(root: str, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Return the splits of earlier steps on whose held-out samples patching chooses its coefficient."""
    if sizes and not any(map(held_out, sizes.values())):
        found = ", ".join(f"{n} of {name}" for name, n in sizes.items())
        raise TicError(f"patching holds out a twentieth to choose its coefficient on; of {found}: give a --coefficient")
    return [{"name": name, "split": f"{root}/{name}", "size": n, "held_out": held_out(n)} for name, n in sizes.items()]


def add_macs(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan with the MACs (of forward passes, as in DataComp) of the step and of the run so far.

    A training step costs three times as much, so a teacher's passes count 1/3; Fisher information counts as training.
    """
    each, distilled = macs_per_sample(plan["model"]), plan["samples"] if plan["teacher"] else 0
    samples = plan["samples"] + distilled // 3 + plan.get("fisher_samples", 0)
    seen = plan["samples_seen"] + plan["samples_distilled"] // 3 + plan.get("fisher_samples_seen", 0)
    return {**plan, "macs": each * samples, "macs_seen": each * seen}


def difference(old: dict[str, Any], new: dict[str, Any], keys: Sequence[str] = ()) -> str | None:
    """Return the first difference of two plans in what makes the model, or in ``keys``: "seed 0, now it is 1"; or None.

    Keys that only one of them has are ignored, so that plans of other versions can be compared.
    """
    before, now = comparable(old), comparable(new)
    for key in keys or now:
        if key in before and key in now and before[key] != now[key]:
            return f"{SETTINGS.get(key, key)} {before[key]}, now it is {now[key]}"


def comparable(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a plan that determine the model, with paths shortened."""
    defaults = {"image_backend": "pil", "openclip_flags": [], "schedule": DEFAULT}  # of plans from before they were
    defaults |= {"loss_weight": 1.0, "temperature": 1.0}
    kept = {key: value for key, value in plan.items() if key not in NOT_COMPARED}
    counts = {
        f"samples of {source['name']}": f"{source['samples']:,} of {source['used']:,} of {source['size']:,}"
        for source in plan["sources"]
    }
    names = [source["name"] for source in plan["sources"]]
    return {**defaults, **kept, "start": shorten(plan["start"]), "sources": names, **counts}


def shorten(checkpoint: str | None) -> str:
    """Return a checkpoint's path as STEP/checkpoints/NAME."""
    return "/".join(Path(checkpoint).parts[-3:]) if checkpoint else "random weights"


def check_same(old: dict[str, Any], new: dict[str, Any], begun: str, keys: Sequence[str] = ()) -> None:
    """Raise a TicError if two plans differ; ``begun`` is the start of its message."""
    if found := difference(old, new, keys):
        raise TicError(f"{begun} with {found}: use the old setting, another output folder, or delete the step")


def check_step(config: Config, plan: dict[str, Any], dry_run: bool = False) -> bool:
    """Return whether a step is done; raise a TicError if it can't be trained with its plan.

    In a ``dry_run`` the previous step may be unfinished.
    """
    check_benchmark(config.output_dir, get_benchmark(config.benchmark))
    check_cache([source["split"] for source in plan["sources"]], config.cache_gb)
    folder, start = Path(config.output_dir, plan["step"]), plan["start"]
    is_done = (folder / "done.json").exists()
    if is_done or ((folder / "plan.json").exists() and any(folder.glob("checkpoints/*.pt"))):
        check_same(read_json(folder / "plan.json"), plan, f"{folder} was begun")
    if is_done:
        read_finished(folder)
    if is_done or start is None:
        return is_done
    if start == init_path(config):
        if start != config.init and not Path(start).exists():  # a model that OpenCLIP fetches
            check_pretrained(config.init, plan["model"])
            return False
    else:
        before = Path(start).parents[1]
        if (before / "done.json").exists():
            expected = {**plan, "samples_seen": plan["samples_seen"] - plan["samples"]}
            begun = f"{plan['step']} starts from {before.name}, which was trained"
            check_same(read_finished(before)["plan"], expected, begun, (*RUN, *LATER, "schedule", "samples_seen"))
        elif dry_run:
            return False
        else:
            raise TicError(f"{plan['step']} starts from {start}, but that step is not done: train it first")
    from tic_clip import weights

    seen = (weights.record(start) or {}).get("cutoff") or cutoff(Path(start).stem)  # a released model is called 2019.pt
    if seen and seen > plan["cutoff"]:
        raise TicError(f"{start} has seen data up to {seen}, after those of step {plan['step']}, {plan['cutoff']}")
    return False


def read_finished(folder: Path) -> dict[str, Any]:
    """Return a step's done.json; raise a TicError if its checkpoint was deleted."""
    facts = read_done(folder / "done.json")
    checkpoint = folder / facts["checkpoint"]
    if not checkpoint.exists():
        raise TicError(f"{checkpoint} is missing, but its step is done: restore it or delete the step")
    return facts
