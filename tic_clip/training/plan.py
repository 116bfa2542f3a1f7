"""The plan of a step: all that it does, from the tables and the sizes of the splits, before anything is written.

``plan.json`` is this plan; training reads it, a restart compares with it, ``DRY_RUN=1`` prints it.
"""

import hashlib
import math
import os
import shlex
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup
from tic_clip.benchmarks import Benchmark, get_benchmark
from tic_clip.data.split import split_sizes
from tic_clip.models import check_architecture, macs_per_sample
from tic_clip.runs import RUN, last_checkpoint, versions
from tic_clip.storage import NotFoundError, is_remote, read_json, to_path
from tic_clip.training.methods import Method, get_method, new_only
from tic_clip.training.patching import PATCHED, held_out
from tic_clip.training.sampling import apportion
from tic_clip.training.scales import Scale, get_policy, get_scale


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train: names as in the tables, folders, and what overrides the scale's and the method's rows.

    The fields after ``coefficient`` change nothing in the model: a step may go on with others.
    """

    benchmark: str
    method: str
    scale: str
    step: str
    data_dir: str
    output_dir: str
    filter: str | None = None
    resampled: bool = False
    seed: int = 0
    model: str | None = None
    samples_per_step: int | None = None
    batch_size: int | None = None  # the global batch
    budget: tuple[float, ...] | None = None  # of each step of the benchmark, in units of samples_per_step
    buffer: float | None = None  # of cumulative-exp and -equal, in units of the step's new data
    weights: str | None = None  # JSON: step -> split -> share of the samples
    init: str | None = None  # a checkpoint in place of random weights
    first_step: str | None = None
    policy: str | None = None
    block: int | None = None  # iterations, about
    coefficient: float | None = None  # of patching; chosen on held-out data if not given
    workers: int | None = None
    max_kept: int | None = None
    save_every: int | None = None  # samples
    save_minutes: float = 10
    report_to: str = ""
    remote: str | None = None


def make_plan(request: Request, world_size: int = 1) -> dict[str, Any]:
    """All that a step does; nothing is written or trained. ``macs.add`` adds what the model costs.

    Raises:
        TicError: an unknown name, a split that is missing or unfinished, a share that can't be had, a budget under one
            batch a checkpoint, a batch that does not divide among the processes, a setting that can't be or that the
            method does not have.
    """
    benchmark, method, scale = get_benchmark(request.benchmark), get_method(request.method), get_scale(request.scale)
    if request.batch_size:
        scale = replace(scale, batch_size=request.batch_size)
    t, first = benchmark.step_index(request.step), benchmark.step_index(request.first_step or benchmark.steps[0].name)
    _check(request, method, scale, world_size, len(benchmark.steps))
    if t < first:
        raise TicError(f"step {request.step} is before the first step to train, {request.first_step}")
    workers = scale.workers if request.workers is None else request.workers
    spent = [_iterations(request, method, scale, i, workers) for i in range(first, t + 1)]
    iterations, block = spent[-1]
    samples = iterations * scale.batch_size
    start = _start(request, benchmark, method, scale, t, first)
    policy = get_policy(request.policy or scale.policy)
    check_architecture(request.model or scale.model)
    step = benchmark.steps[t]
    distilled = spent[0 if request.init else 1 :] if method.teacher else []
    return {
        "benchmark": benchmark.name,
        "filter": request.filter or next(iter(benchmark.filters)),
        "method": method.name,
        "scale": scale.name,
        "step": step.name,
        "cutoff": step.cutoff,
        "model": request.model or scale.model,
        "sampling": "resampled" if request.resampled else "exact",
        "sources": _sources(request, benchmark, method, t, samples),
        **({"buffer": _buffer(request)} if method.has_buffer else {}),
        **_coefficient(request, benchmark, method, t, first),
        "start": start,
        "start_content": content_of(start),
        "teacher": start if method.teacher else None,
        "seed": request.seed,
        "batch_size": scale.batch_size,
        "iterations": iterations,
        "checkpoints": scale.checkpoints,
        "block": block,
        "samples": samples,
        "samples_seen": sum(count for count, _ in spent) * scale.batch_size,
        "samples_distilled": sum(count for count, _ in distilled) * scale.batch_size,
        "learning_rate": scale.learning_rate,
        "warmup": scale.warmup if start is None else policy.warmup,
        "optimizer": "fresh" if start is None else policy.optimizer,
        "weight_decay": scale.weight_decay,
        "beta2": scale.beta2,
        "keep": {
            "max_kept": scale.max_kept if request.max_kept is None else request.max_kept,
            "save_every": request.save_every,
            "save_minutes": request.save_minutes,
            "remote": request.remote,
        },
        "command": command(step.name),
        "pins": versions(),
    }


def command(step: str) -> list[str]:
    """The words that train ``step``: those of this process, for that step; a launcher's are in ``LAUNCH``."""
    words = [word for word in sys.argv if word != "--dry_run"]
    if "--step" in words[:-1]:
        words[words.index("--step") + 1] = step
    return shlex.split(os.environ.get("LAUNCH", "python")) + words


def _check(request: Request, method: Method, scale: Scale, world_size: int, steps: int) -> None:
    """Refuse what can't be, whatever the data."""
    positive = ("samples_per_step", "batch_size", "block", "max_kept", "save_every", "save_minutes")
    for name in positive:
        value = getattr(request, name)
        if value is not None and not 0 < value < math.inf:
            raise TicError(f"--{name} is {value}: it must be more than 0")
    if not 0 <= request.seed < 2**32:
        raise TicError(f"a seed is from 0 to 2**32 - 1, not {request.seed}")
    if (request.workers or 0) < 0:
        raise TicError(f"{request.workers} workers: at least 0")
    if scale.batch_size % world_size:
        raise TicError(f"the batch of {scale.batch_size} does not divide among {world_size} processes")
    if request.budget is not None and len(request.budget) != steps:
        raise TicError(f"--budget has {len(request.budget)} numbers, {request.benchmark} has {steps} steps")
    if request.budget is not None and not all(0 < number < math.inf for number in request.budget):
        raise TicError(f"--budget {','.join(map(str, request.budget))}: each number must be more than 0")
    if request.buffer is not None and not method.has_buffer:
        raise TicError(f"{method.name} has no buffer of old data: --buffer is of cumulative-exp and cumulative-equal")
    if request.buffer is not None and not 0 <= request.buffer < math.inf:
        raise TicError(f"--buffer is {request.buffer}: it must be at least 0")
    if request.buffer is not None and request.weights is not None:
        raise TicError("--buffer and --weights both say what is read of the old data: give one of them")
    if request.coefficient is not None and not method.hold_out:
        raise TicError(f"{method.name} does not interpolate weights: --coefficient is of patching")
    if request.coefficient is not None and not 0 <= request.coefficient <= 1:
        raise TicError(f"--coefficient is {request.coefficient}: it must be from 0 to 1")
    if method.start == "last patched" and request.policy == "kept":
        raise TicError("a patched model has no optimizer to go on with: --policy kept is not for patching")
    if set(filter(None, request.report_to.split(","))) - {"tensorboard", "wandb", "all"}:
        raise TicError(f"--report_to is {request.report_to}: it must be tensorboard, wandb or tensorboard,wandb")
    if method.hold_out and request.coefficient is None and request.resampled:
        raise TicError(
            "patching chooses its coefficient on data that it holds out, which sampling with replacement "
            "does not spare: give a --coefficient, or sample exactly (RESAMPLED=0)"
        )
    if not (request.data_dir and request.output_dir):
        raise TicError("--data_dir (DATA_DIR) and --output_dir must not be empty")
    if is_remote(request.output_dir):
        out = request.output_dir
        raise TicError(f"{out}: a run writes to a local folder; --remote {out} gets copies")
    if is_remote(request.remote or ""):
        to_path(request.remote)
    if request.init is not None and not Path(request.init).is_file():
        raise TicError(f"--init {request.init} is missing: it must be a file on this disk")
    if request.first_step is not None and request.init is None and method.start != "random":
        raise TicError(f"--first_step {request.first_step} needs --init: {method.name} goes on from a model before it")


def _iterations(request: Request, method: Method, scale: Scale, t: int, workers: int) -> tuple[int, int]:
    """(iterations of step ``t``, iterations of a block): whole blocks, the same number for each checkpoint."""
    per_step = scale.samples_per_step if request.samples_per_step is None else request.samples_per_step
    factor = Fraction(str(request.budget[t])) if request.budget else method.budget_of(t)
    samples = int(per_step * factor)
    smallest = scale.batch_size * scale.checkpoints
    if samples < smallest:
        raise TicError(
            f"a step of {samples} samples is less than {scale.checkpoints} checkpoints × a batch of "
            f"{scale.batch_size} = {smallest}; give more samples per step"
        )
    multiple = max(1, workers) if request.resampled else 1  # OpenCLIP rounds an epoch up to its loader workers
    blocks, block = blocks_of(samples // smallest, request.block or scale.block, multiple)
    return scale.checkpoints * blocks * block, block


def blocks_of(interval: int, wanted: int, multiple: int = 1) -> tuple[int, int]:
    """(number, size) of equal blocks of about ``wanted`` that fill as much of ``interval`` as can be.

    Raises:
        TicError: a size must be a multiple of more than the interval.
    """
    if interval < multiple:
        raise TicError(f"{interval} batches a checkpoint are less than one for each of {multiple} loader workers")
    about = max(1, round(interval / wanted))
    sizes = {number: interval // number // multiple * multiple for number in range(max(1, about // 2), 2 * about + 1)}
    number = min((n for n in sizes if sizes[n]), key=lambda n: (interval - n * sizes[n], abs(n - about)), default=1)
    return number, sizes.get(number) or interval // multiple * multiple


def _start(request: Request, benchmark: Benchmark, method: Method, scale: Scale, t: int, first: int) -> str | None:
    before = method.starts_from(t) if t > first else None
    if before is None:
        return request.init
    last = PATCHED if method.start == "last patched" else last_checkpoint(scale.checkpoints)
    return str(step_folder(request, benchmark.steps[before].name) / last)


def content_of(checkpoint: str | None) -> str | None:
    """A fingerprint of a checkpoint that is on this disk: of the checksums in torch's zip, or of the whole file."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return None
    if not zipfile.is_zipfile(checkpoint):
        with open(checkpoint, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    with zipfile.ZipFile(checkpoint) as archive:
        parts = [f"{entry.filename.split('/', 1)[-1]} {entry.CRC}" for entry in archive.infolist()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _buffer(request: Request) -> float:
    return 1.0 if request.buffer is None else request.buffer


def _split(request: Request, benchmark: Benchmark, name: str) -> str:
    folder = lookup(benchmark.filters, "filter", request.filter or next(iter(benchmark.filters)))
    return f"{request.data_dir.rstrip('/')}/{benchmark.root}/{folder}/{name}"


def _sizes(request: Request, benchmark: Benchmark, i: int) -> dict[str, int]:
    """Samples of each split that is new at step ``i``."""
    return {name: _size(request, benchmark, _split(request, benchmark, name)) for name in benchmark.steps[i].splits}


def _size(request: Request, benchmark: Benchmark, split: str) -> int:
    try:
        return sum(split_sizes(split).values())
    except NotFoundError:
        raise TicError(benchmark.missing_data_message(split, request.data_dir)) from None


def _sources(request: Request, benchmark: Benchmark, method: Method, t: int, samples: int) -> list[dict[str, Any]]:
    """The splits that a step reads, the samples that it uses of each, and how many it takes."""
    steps = range(t if method.data is new_only and not request.weights else 0, t + 1)
    sizes = [_sizes(request, benchmark, i) for i in steps]
    used = [_spare(request, method, split) for split in sizes]
    weights = _weights(request, benchmark, t) if request.weights else None
    if weights is None:
        wanted = method.data([sum(split.values()) for split in used], Fraction(str(_buffer(request))))
        used = [
            dict(zip(split, apportion(split.values(), count), strict=True))
            for split, count in zip(used, wanted, strict=True)
        ]
    size = {name: count for split in sizes for name, count in split.items()}
    use = {name: count for split in used for name, count in split.items() if weights is None or weights.get(name)}
    if weights is None:
        weights = use
    shares = apportion([weights[name] for name in use], samples)
    if request.resampled:
        use = {name: size[name] for name in use}  # whole shards are drawn, with a source's share as their weight
    return [
        {
            "name": name,
            "split": _split(request, benchmark, name),
            "size": size[name],
            "used": count,
            "samples": share,
            "share": round(share / samples, 6),
            "repeats": round(share / count, 4),
        }
        for (name, count), share in zip(use.items(), shares, strict=True)
        if share
    ]


def _spare(request: Request, method: Method, split: dict[str, int]) -> dict[str, int]:
    """What may be trained on: all, or what is not held out for the choice of patching's coefficient."""
    choose = method.hold_out and request.coefficient is None
    return {name: size - held_out(size) if choose else size for name, size in split.items()}


def _weights(request: Request, benchmark: Benchmark, t: int) -> dict[str, Fraction] | None:
    """The user's share of each split at step ``t``, or None where the file does not name the step.

    Raises:
        TicError: it is no such file, names an unknown step or split or one from later than the step, or the shares
            are no numbers from 0 or do not sum to 1.
    """
    table = read_json(request.weights)
    if not all(isinstance(row, dict) for row in table.values()):
        raise TicError(f'{request.weights} must be {{"step": {{"split": share, …}}, …}}')
    for name in table:
        benchmark.step_index(name)
    row = table.get(benchmark.steps[t].name)
    if row is None:
        return None
    known = [name for step in benchmark.steps[: t + 1] for name in step.splits]
    for name, share in row.items():
        if name not in known:
            raise TicError(
                f"{request.weights}: {name} is no data of step {benchmark.steps[t].name}; those are {', '.join(known)}"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise TicError(f"{request.weights}: the share of {name} is {share!r}, not a number from 0")
    if abs(sum(row.values()) - 1) > 1e-6:
        raise TicError(f"{request.weights}: the shares of step {benchmark.steps[t].name} sum to {sum(row.values())}")
    return {name: Fraction(str(share)) for name, share in row.items()}


def _coefficient(request: Request, benchmark: Benchmark, method: Method, t: int, first: int) -> dict[str, Any]:
    """The coefficient of patching, or the data of the steps before to choose it on.

    Raises:
        TicError: there are none.
    """
    if not method.hold_out:
        return {}
    if request.coefficient is not None:
        return {"coefficient": request.coefficient}
    splits = [(name, size) for i in range(first, t) for name, size in _sizes(request, benchmark, i).items()]
    if splits and not any(held_out(size) for _, size in splits):
        sizes = ", ".join(f"{size} of {name}" for name, size in splits)
        raise TicError(f"patching holds out a twentieth to choose its coefficient on; of {sizes}: give a --coefficient")
    return {
        "coefficient": "chosen",
        "validation": [
            {"name": name, "split": _split(request, benchmark, name), "size": size, "held_out": held_out(size)}
            for name, size in splits
        ],
    }


def step_folder(request: Request, step: str) -> Path:
    """``O/{step}``."""
    return Path(request.output_dir) / step


NO_IDENTITY = ("command", "pins", "keep", "macs", "macs_seen", "validation")


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to go on with a step: all that makes the model, but not where the folders are."""
    sources = {source["name"]: f"{source['samples']} of {_used(source)}" for source in plan["sources"]}
    kept = {key: value for key, value in plan.items() if key not in NO_IDENTITY}
    return {**kept, "sources": sources, "start": _short(plan["start"]), "teacher": _short(plan.get("teacher"))}


def _used(source: dict[str, Any]) -> str:
    """``300``, or ``50 of 300`` where a source is not used whole."""
    size, used = source["size"], source.get("used", source["size"])
    return f"{size:,}" if used == size else f"{used:,} of {size:,}"


def _short(path: str | None) -> str:
    return "/".join(Path(path).parts[-3:]) if path else "random weights"  # step/checkpoints/epoch


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing in which two plans make different models, as "key old, now it is new"; None if none."""
    before, now = identity(old), identity(new)
    for key in {**now, **before}:
        unknown = key == "start_content" and None in (before.get(key), now.get(key))
        if before.get(key) != now.get(key) and not unknown:
            return f"{key} {before.get(key)}, now it is {now.get(key)}"
    return None


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a step under another plan.

    Raises:
        TicError: a setting differs; the message shows it.
    """
    if not isinstance(old, dict) or not {"sources", "start"} <= old.keys():
        raise TicError(f"{folder}/plan.json is damaged: delete the step to train it again")
    found = difference(old, new)
    if found:
        raise TicError(
            f"{folder} was begun with {found}: use the old setting, another output folder, or delete the step"
        )


def check_run(before: dict[str, Any], plan: dict[str, Any]) -> None:
    """Refuse to go on from a step of another run than the plan's: other settings, or other samples seen until there.

    Raises:
        TicError: they differ; the message shows in what.
    """
    for key in RUN:
        if before.get(key) != plan.get(key):
            raise TicError(
                f"{plan['step']} goes on from {before.get('step')}, which was trained with {key} {before.get(key)}, "
                f"now it is {plan.get(key)}: use the old setting or another output folder"
            )
    seen = plan["samples_seen"] - plan["samples"]
    if before.get("samples_seen") != seen:
        raise TicError(
            f"{plan['step']} goes on from {before.get('step')}, after which {before.get('samples_seen'):,} samples had "
            f"been seen; these settings give {seen:,}: use the old ones or another output folder"
        )


def describe(plan: dict[str, Any]) -> str:
    """The plan of a step as lines of text."""
    start = plan["start"] or "random weights"
    too_long = " (longer than the step)" if plan["warmup"] > plan["iterations"] else ""
    lines = [
        f"{plan['step']}: {plan['method']} at {plan['scale']}, {plan['model']} from {start}, "
        f"{plan['sampling']} sampling",
        f"  {plan['samples']:,} samples = {plan['iterations']:,} × {plan['batch_size']:,}, "
        f"{plan['checkpoints']} checkpoints, warm-up {plan['warmup']}{too_long}, {plan['optimizer']} optimizer, "
        f"seed {plan['seed']}; {plan['samples_seen']:,} samples seen after it",
    ]
    if plan.get("macs") is not None:
        lines.append(f"  {plan['macs']:.2e} MACs, {plan['macs_seen']:.2e} after it")
    if plan["teacher"]:
        lines.append(f"  distilled from {plan['teacher']}")
    if "buffer" in plan:
        what = "of old data" if plan["sampling"] == "exact" else "as the share of all old data"
        lines.append(f"  a buffer of {plan['buffer']:g} D {what}, new data not counted")
    if "coefficient" in plan:
        lines.append(f"  patched with coefficient {plan['coefficient']}" + _validation(plan))
    lines += [_source_line(source, plan["samples"]) for source in plan["sources"]]
    return "\n".join([*lines, f"  {shlex.join(plan['command'])}"])


def _validation(plan: dict[str, Any]) -> str:
    if not plan.get("validation"):
        return ""
    return " on " + ", ".join(f"{entry['held_out']:,} of {entry['name']}" for entry in plan["validation"])


def _source_line(source: dict[str, Any], samples: int) -> str:
    return (
        f"  {source['name']}: {source['samples'] / samples:.1%}, {source['samples']:,} samples of {_used(source)} "
        f"({source['repeats']:.2f} each)"
    )


def parse_budget(text: str) -> tuple[float, ...]:
    """The numbers of ``1,1,1.5``.

    Raises:
        TicError: one is no number.
    """
    try:
        return tuple(float(Fraction(word.strip())) for word in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise TicError(f"--budget {text!r} is no list of numbers such as 1,1,1.5") from None


def steps_of(request: Request) -> Sequence[str]:
    """The names of the steps that a run trains, in order."""
    benchmark = get_benchmark(request.benchmark)
    first = benchmark.step_index(request.first_step) if request.first_step else 0
    return [step.name for step in benchmark.steps[first:]]


def add_macs(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan with ``macs`` of the step and ``macs_seen`` of the run up to it.

    They are those of the forward passes, as DataComp gives them (its small scale, 12.8 M samples of ViT-B/32, is
    9.5e16), and stand for training steps of three times as many; so a teacher's forward pass alone counts a third.
    """
    each = macs_per_sample(plan["model"])
    distilled = plan["samples"] if plan["teacher"] else 0
    return {
        **plan,
        "macs": each * (plan["samples"] + distilled // 3),
        "macs_seen": each * (plan["samples_seen"] + plan["samples_distilled"] // 3),
    }
