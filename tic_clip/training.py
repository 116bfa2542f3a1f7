"""One step: the plan, OpenCLIP's arguments, and the markers that make a step restartable.

``O/{step}/`` holds ``plan.json`` (written first: sources, samples of each, start, seed, command, pins),
``checkpoints/``, ``out.log``, ``params.txt`` and ``done.json`` (written last). A step with ``done.json`` is skipped;
one without goes on from its own newest checkpoint, and from the last step's model only if it has none.
"""

import importlib.metadata
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.methods import Method, get_method
from tic_clip.sampling import apportion
from tic_clip.scales import Scale, get_scale
from tic_clip.shards import split_sizes
from tic_clip.storage import read_json, write_json
from tic_clip.timeline import Benchmark, get_benchmark

OPEN_CLIP_COMMIT = "73fa7f03a33da53653f61841eb6d69aef161e521"
PINNED = ("tic-clip", "torch", "torchvision", "open_clip_torch", "webdataset", "numpy")
MODEL_CONFIGS = Path(__file__).parent / "model_configs"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to train: names as in the tables, folders, and what overrides the scale's row."""

    benchmark: str
    method: str
    scale: str
    step: str
    data_dir: str
    output_dir: str
    resampled: bool = False
    seed: int = 0
    model: str | None = None
    samples_per_step: int | None = None
    workers: int | None = None


def pins() -> dict[str, str]:
    """Versions of the packages that a number depends on."""
    return {name: importlib.metadata.version(name) for name in PINNED} | {"open_clip": OPEN_CLIP_COMMIT}


def make_plan(request: Request, world_size: int = 1) -> dict[str, Any]:
    """All that a step does, from the tables and the sizes of the splits; nothing is written or trained.

    Raises:
        TicError: an unknown name, a split that is missing or unfinished, a budget under one batch a checkpoint, a batch
            that does not divide among the processes, or a seed or a number of workers that can't be.
    """
    benchmark, method, scale = get_benchmark(request.benchmark), get_method(request.method), get_scale(request.scale)
    t = benchmark.step_index(request.step)
    if not 0 <= request.seed < 2**32:
        raise TicError(f"a seed is from 0 to 2**32 - 1, not {request.seed}")
    if (request.workers or 0) < 0:
        raise TicError(f"{request.workers} workers: at least 0")
    if scale.batch_size % world_size:
        raise TicError(f"the batch of {scale.batch_size} does not divide among {world_size} processes")
    budget = scale.samples_per_step if request.samples_per_step is None else request.samples_per_step
    iterations = [_iterations(method.samples(i, budget), scale) for i in range(t + 1)]
    samples = iterations[t] * scale.batch_size
    before = method.starts_from(t)
    return {
        "benchmark": benchmark.name,
        "method": method.name,
        "scale": scale.name,
        "step": request.step,
        "model": request.model or scale.model,
        "sampling": "resampled" if request.resampled else "exact",
        "sources": _sources(benchmark, method, t, request.data_dir, samples),
        "start": None
        if before is None
        else str(_folder(request, benchmark.steps[before].name) / _last(scale.checkpoints)),
        "seed": request.seed,
        "batch_size": scale.batch_size,
        "iterations": iterations[t],
        "checkpoints": scale.checkpoints,
        "samples": samples,
        "samples_seen": sum(iterations) * scale.batch_size,
        "learning_rate": scale.learning_rate,
        "warmup": scale.warmup if before is None else scale.next_warmup,
        "weight_decay": scale.weight_decay,
        "beta2": scale.beta2,
        "command": sys.argv,
        "pins": pins(),
    }


def _iterations(samples: int, scale: Scale) -> int:
    """Whole batches in ``samples``, the same number for each checkpoint."""
    smallest = scale.batch_size * scale.checkpoints
    if samples < smallest:
        raise TicError(
            f"a step of {samples} samples is less than {scale.checkpoints} checkpoints × a batch of "
            f"{scale.batch_size} = {smallest}; give more samples per step"
        )
    return samples // smallest * scale.checkpoints


def _sources(benchmark: Benchmark, method: Method, t: int, data_dir: str, samples: int) -> list[dict[str, Any]]:
    """The splits that a step reads and the samples of each: in proportion to their sizes."""
    names = [split for i in method.steps(t) for split in benchmark.steps[i].splits]
    splits = {name: f"{data_dir.rstrip('/')}/{benchmark.root}/train/{name}" for name in names}
    sizes = {name: sum(split_sizes(split).values()) for name, split in splits.items()}
    shares = apportion(sizes.values(), samples)
    return [
        {"name": name, "split": splits[name], "size": size, "samples": share, "repeats": round(share / size, 4)}
        for (name, size), share in zip(sizes.items(), shares, strict=True)
    ]


def _folder(request: Request, step: str) -> Path:
    return Path(request.output_dir) / step


def _last(checkpoints: int) -> Path:
    """The last checkpoint of a step, in its folder; OpenCLIP counts checkpoints from 1."""
    return Path("checkpoints") / f"epoch_{checkpoints}.pt"


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What must be the same to go on with a step: all but the command, the versions and where the folders are."""
    sources = {source["name"]: f"{source['samples']} of {source['size']}" for source in plan["sources"]}
    start = "/".join(Path(plan["start"]).parts[-3:]) if plan["start"] else "random weights"  # step/checkpoints/epoch
    kept = {key: value for key, value in plan.items() if key not in ("command", "pins", "sources", "start")}
    return {**kept, "sources": sources, "start": start}


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a step under another plan.

    Raises:
        TicError: a setting differs; the message shows it.
    """
    if not isinstance(old, dict) or not {"sources", "start"} <= old.keys():
        raise TicError(f"{folder}/plan.json is damaged: delete the step to train it again")
    before, now = identity(old), identity(new)
    for key in now:
        if before.get(key) != now[key]:
            raise TicError(
                f"{folder} was begun with {key} {before.get(key)}, now it is {now[key]}: "
                "use the old setting, another output folder, or delete the step"
            )


def describe(plan: dict[str, Any]) -> str:
    """The plan of a step as lines of text."""
    start = plan["start"] or "random weights"
    lines = [
        f"{plan['step']}: {plan['method']} at {plan['scale']}, {plan['model']} from {start}, "
        f"{plan['sampling']} sampling",
        f"  {plan['samples']:,} samples = {plan['iterations']:,} × {plan['batch_size']:,}, "
        f"{plan['checkpoints']} checkpoints, warm-up {plan['warmup']}, seed {plan['seed']}; "
        f"{plan['samples_seen']:,} samples seen after it",
    ]
    for source in plan["sources"]:
        share = source["samples"] / plan["samples"]
        lines.append(
            f"  {source['name']}: {share:.1%}, {source['samples']:,} samples of {source['size']:,} "
            f"({source['repeats']:.2f} each)"
        )
    return "\n".join(lines)


def open_clip_arguments(plan: dict[str, Any], request: Request, world_size: int, cuda: bool) -> list[str]:
    """The command line of OpenCLIP's ``training.main`` for a step; it is passed in process, so it may be long."""
    scale = get_scale(plan["scale"])
    flags = {
        "model": plan["model"],
        "logs": request.output_dir,
        "name": plan["step"],
        "epochs": plan["checkpoints"],
        "train-num-samples": plan["samples"] // plan["checkpoints"],
        "batch-size": plan["batch_size"] // world_size,
        "workers": scale.workers if request.workers is None else request.workers,
        "lr": plan["learning_rate"],
        "warmup": plan["warmup"],
        "wd": plan["weight_decay"],
        "beta1": 0.9,
        "beta2": plan["beta2"],
        "eps": 1e-6,
        "seed": plan["seed"],
        "save-frequency": 1,
        "precision": "amp" if cuda else "fp32",
        "dist-backend": "nccl" if cuda else "gloo",
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    arguments += ["--new-run", "--fused-adamw", "--local-loss", "--gather-with-grad"]
    arguments += ["--grad-checkpointing"] * scale.grad_checkpointing
    arguments += ["--delete-previous-checkpoint"] * (not scale.keep_all)
    arguments += ["--resume", plan["start"]] if plan["start"] else []
    return arguments + _data_arguments(plan, request)


def _data_arguments(plan: dict[str, Any], request: Request) -> list[str]:
    if plan["sampling"] == "exact":
        return ["--dataset-type", "exact", "--train-data", str(_folder(request, plan["step"]) / "plan.json")]
    shards = [shard for source in plan["sources"] for shard in split_sizes(source["split"])]
    return ["--dataset-type", "webdataset", "--dataset-resampled", "--train-data", "::".join(shards)]


def run_step(request: Request, *, rank: int, world_size: int) -> bool:
    """Train one step, or go on with it; False if it was done already.

    Raises:
        TicError: as ``make_plan`` and ``check_same``; or OpenCLIP ended without the step's last checkpoint.
    """
    plan = make_plan(request, world_size)
    folder = _folder(request, plan["step"])
    begun, done = folder / "plan.json", folder / "done.json"
    if done.exists() or (begun.exists() and any(folder.glob("checkpoints/*.pt"))):
        check_same(read_json(begun), plan, folder)
    if done.exists():
        read_done(done)
        return False
    if plan["start"] and not (Path(plan["start"]).parents[1] / "done.json").exists():
        raise TicError(f"{plan['step']} starts from {plan['start']}, but that step is not done: train it first")
    if rank == 0:
        write_json(begun, plan)
    started = time.monotonic()
    train(plan, request, world_size)
    if rank == 0:
        checkpoint = _last(plan["checkpoints"])
        if not (folder / checkpoint).exists():
            raise TicError(f"OpenCLIP ended without {folder / checkpoint}; see {folder / 'out.log'}")
        facts = {
            "checkpoint": str(checkpoint),
            "samples_seen": plan["samples_seen"],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "plan": plan,
        }
        write_json(done, facts)
    return True


def read_done(path: object) -> dict[str, Any]:
    """The facts in a step's ``done.json``: its plan, its checkpoint, the samples seen.

    Raises:
        TicError: it is damaged.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or not {"plan", "checkpoint"} <= facts.keys():
        raise TicError(f"{path} is damaged: delete the step to train it again")
    return facts


def train(plan: dict[str, Any], request: Request, world_size: int) -> None:
    """Run OpenCLIP's ``main`` in this process on a plan."""
    warnings.simplefilter("ignore", FutureWarning)  # of what the pinned OpenCLIP calls, at import and later
    import open_clip
    import torch
    import torch.distributed
    from training import main as openclip_main

    from tic_clip.loader import get_data_with_progress

    open_clip.add_model_config(MODEL_CONFIGS)
    if plan["model"] not in open_clip.list_models():
        raise TicError(f"OpenCLIP has no model {plan['model']!r}; `open_clip.list_models()` names those it has")
    openclip_main.setup_logging = log_to_file
    openclip_main.get_data = get_data_with_progress
    arguments = open_clip_arguments(plan, request, world_size, torch.cuda.is_available())
    try:
        openclip_main.main(arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def log_to_file(path: str | None, level: int, include_host: bool = False) -> None:
    """OpenCLIP's logging, with only warnings on the console, where the progress bar is."""
    from training.logger import setup_logging

    setup_logging(path, level, include_host)
    loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
