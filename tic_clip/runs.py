"""What a run's folder holds: a folder a step with plan.json, done.json, checkpoints and logs; and the models in it."""

import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.models import Model
from tic_clip.storage import read_json

LOG = "train.log.jsonl"
OPEN_CLIP_COMMIT = "73fa7f03a33da53653f61841eb6d69aef161e521"
PINNED = ("torch", "torchvision", "webdataset", "numpy")
RUN = ("benchmark", "filter", "method", "scale", "model", "sampling", "seed", "batch_size", "buffer", "coefficient")
SETTINGS = tuple(name for name in RUN if name != "seed")


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on."""
    return {name: importlib.metadata.version(name) for name in PINNED} | {"open_clip": OPEN_CLIP_COMMIT}


def last_checkpoint(checkpoints: int) -> Path:
    """The last checkpoint of a step, in its folder; they are counted from 1."""
    return Path("checkpoints") / f"epoch_{checkpoints}.pt"


def run_name(plan: dict[str, Any]) -> str:
    """What a run is called in TensorBoard and wandb: benchmark, scale, filter, method and step."""
    return "-".join(plan[part] for part in ("benchmark", "scale", "filter", "method", "step"))


def read_done(path: object) -> dict[str, Any]:
    """The facts in a step's ``done.json``: its plan, its checkpoint, the samples seen.

    Raises:
        TicError: it is damaged.
    """
    try:
        facts = read_json(path)
    except TicError as error:
        raise TicError(f"{error}: delete the step to train it again") from None
    if not isinstance(facts, dict) or not {"plan", "checkpoint"} <= facts.keys():
        raise TicError(f"{path} is damaged: delete the step to train it again")
    return facts


def models_of(run: str, *, every: bool = False) -> list[Model]:
    """The last checkpoint of each finished step of a run of ours, in the order of its steps.

    ``every``: also those inside a step that are there (``epoch_{k}.pt``), before it, marked as not ``final``.

    Raises:
        TicError: no step of it is finished.
    """
    done = [read_done(path) for path in sorted(Path(run).glob("*/done.json"))]
    if not done:
        raise TicError(f"{run} has no finished step (no STEP/done.json): run scripts/train.py first")
    steps = get_benchmark(done[0]["plan"]["benchmark"]).step_index
    done.sort(key=lambda entry: steps(entry["plan"]["step"]))
    return [model for entry in done for model in _models_of_step(run, entry, every)]


def _models_of_step(run: str, entry: dict[str, Any], every: bool) -> list[Model]:
    plan = entry["plan"]
    folder = Path(run) / plan["step"]
    final = folder / entry["checkpoint"]
    fields = ("benchmark", "method", "filter", "scale", "step", "seed", "samples_seen", "macs_seen")
    about = {name: plan.get(name) for name in fields} | {"settings": _settings(plan)}
    name = f"{plan['method']} {plan['step']}"
    models = [Model(name=name, arch=plan["model"], weights=str(final), about=about)]
    for path in sorted((folder / "checkpoints").glob("epoch_*.pt"), key=_epoch, reverse=True) if every else ():
        if path != final:
            inside = about | {"final": False} | _spent(plan, _epoch(path))
            models.insert(0, Model(name=f"{name} {path.stem}", arch=plan["model"], weights=str(path), about=inside))
    return models


def _epoch(path: Path) -> int:
    found = re.fullmatch(r"epoch_(\d+)", path.stem)
    return int(found[1]) if found else 0


def _spent(plan: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Samples and MACs of a run up to a checkpoint inside a step."""
    left = (plan["checkpoints"] - epoch) / plan["checkpoints"]
    macs = plan.get("macs_seen")
    return {
        "samples_seen": round(plan["samples_seen"] - left * plan["samples"]),
        "macs_seen": None if macs is None else round(macs - left * plan["macs"]),
    }


def _settings(plan: dict[str, Any]) -> str:
    """A short name for what is the same in all steps of a run, but the seed: runs that share it can be averaged."""
    return hashlib.sha256(json.dumps({name: plan.get(name) for name in SETTINGS}).encode()).hexdigest()[:12]
