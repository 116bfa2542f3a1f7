"""The folder of a run: plan.json, done.json, checkpoints and logs of each step, and a user's own benchmark.yaml."""

import hashlib
import importlib.metadata
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import Benchmark, get_benchmark, read_benchmark
from tic_clip.models import Model
from tic_clip.storage import exists, read_json, to_path, write_text

LOG, BENCHMARK_FILE = "train.log.jsonl", "benchmark.yaml"
OPEN_CLIP_COMMIT = "73fa7f03a33da53653f61841eb6d69aef161e521"
PINNED = ("torch", "torchvision", "webdataset", "numpy")
RUN = ("benchmark", "filter", "method", "scale", "model", "sampling", "seed", "batch_size", "buffer", "coefficient")
LATER = ("precision", "openclip_flags", "settings")  # settings that older plans lack
SETTINGS = tuple(name for name in RUN if name != "seed")


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, and the commit of this checkout."""
    packages = {name: importlib.metadata.version(name) for name in PINNED}
    later = [found.version for found in importlib.metadata.distributions(name="open_clip_torch")]  # setup.sh --models
    return packages | {"open_clip": later[0] if later else OPEN_CLIP_COMMIT} | _own_commit()


@cache
def _own_commit() -> dict[str, str]:
    """Return the commit of this checkout, with -dirty if files differ; {} without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return {"tic_clip": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return {}


def last_checkpoint(checkpoints: int) -> Path:
    """Return the path of a step's last checkpoint, relative to its folder."""
    return Path("checkpoints") / f"epoch_{checkpoints}.pt"


def run_name(plan: dict[str, Any]) -> str:
    """Return the run's name in TensorBoard and wandb: benchmark, scale, filter, method and step."""
    return "-".join(plan[part] for part in ("benchmark", "scale", "filter", "method", "step"))


def run_id(plan: dict[str, Any], folder: object) -> str:
    """Return an id for wandb that differs between settings, seeds and folders."""
    settings = json.dumps([settings_of(plan, RUN), str(Path(folder).absolute())])
    return f"{run_name(plan)}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def settings_of(plan: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return a plan's settings called ``names``, and those of ``LATER`` that are set."""
    return {name: plan.get(name) for name in names} | {name: plan[name] for name in LATER if plan.get(name)}


def keep_benchmark(folder: object, benchmark: Benchmark) -> None:
    """Copy a user's own benchmark into a folder of results, so that these can be read without the original."""
    if benchmark.text:
        check_benchmark(folder, benchmark)
        write_text(to_path(folder) / BENCHMARK_FILE, benchmark.text)


def check_benchmark(folder: object, benchmark: Benchmark) -> None:
    """Raise a TicError if a folder has results of a benchmark with other steps; new steps at the end are fine."""
    path = to_path(folder) / BENCHMARK_FILE
    if benchmark.text and exists(path):
        old = read_benchmark(str(path))
        if old.root != benchmark.root or old.steps != benchmark.steps[: len(old.steps)]:
            steps = ", ".join(step.name for step in old.steps[:4]) + ", …" * (len(old.steps) > 4)
            raise TicError(
                f"{folder} is of a benchmark in {old.root} with the steps {steps}: give another output folder"
            )


def find_benchmark(folder: object, name: str) -> Benchmark:
    """Return the benchmark of a folder of results: its own copy, or the one called ``name``."""
    path = to_path(folder) / BENCHMARK_FILE
    return get_benchmark(str(path) if exists(path) else name)


def read_done(path: object) -> dict[str, Any]:
    """Read a step's ``done.json``; raise a TicError if it is damaged."""
    try:
        facts = read_json(path)
    except TicError as error:
        raise TicError(f"{error}: delete the step to train it again") from None
    if not isinstance(facts, dict) or not {"plan", "checkpoint"} <= facts.keys():
        raise TicError(f"{path} is damaged: delete the step to train it again")
    return facts


def read_plan(run: object, steps: list[str]) -> dict[str, Any]:
    """Return the plan of a run's first finished step, and when its last step ``finished``; {} if there is none."""
    paths = [to_path(run) / step / "done.json" for step in steps]
    found = [read_done(path) for path in paths if exists(path)]
    return found[0]["plan"] | {"finished": found[-1].get("finished")} if found else {}


def models_of(run: str, *, every: bool = False) -> list[Model]:
    """Return the model of each finished step of a run, in order; raise a TicError if no step is finished.

    ``every``: also the earlier checkpoints of each step, marked as not ``final``.
    """
    done = [read_done(path) for path in sorted(Path(run).glob("*/done.json"))]
    if not done:
        raise TicError(f"{run} has no finished step (no STEP/done.json): run scripts/train.py first")
    step_index = find_benchmark(run, done[0]["plan"]["benchmark"]).step_index
    done.sort(key=lambda facts: step_index(facts["plan"]["step"]))
    return [model for facts in done for model in _models_of_step(run, facts, every)]


def _models_of_step(run: str, facts: dict[str, Any], every: bool) -> list[Model]:
    plan = facts["plan"]
    folder = Path(run) / plan["step"]
    last = folder / facts["checkpoint"]
    fields = ("benchmark", "method", "filter", "scale", "step", "seed", "samples_seen", "macs_seen")
    settings = json.dumps(settings_of(plan, SETTINGS))
    about = {name: plan.get(name) for name in fields}
    about |= {"settings": hashlib.sha256(settings.encode()).hexdigest()[:12]}  # runs that share it can be averaged
    name, arch = f"{plan['method']} {plan['step']}", plan["model"]
    models = []
    for path in sorted((folder / "checkpoints").glob("epoch_*.pt"), key=_epoch) if every else ():
        if path != last:
            inside = about | {"final": False} | _spent(plan, _epoch(path))
            models.append(Model(name=f"{name} {path.stem}", arch=arch, weights=str(path), about=inside))
    return [*models, Model(name=name, arch=arch, weights=str(last), about=about)]


def _epoch(path: Path) -> int:
    found = re.fullmatch(r"epoch_(\d+)", path.stem)
    return int(found[1]) if found else 0


def _spent(plan: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Return the samples and MACs that a run has spent up to a checkpoint inside a step."""
    left = (plan["checkpoints"] - epoch) / plan["checkpoints"]
    macs = plan.get("macs_seen")
    return {
        "samples_seen": round(plan["samples_seen"] - left * plan["samples"]),
        "macs_seen": None if macs is None else round(macs - left * plan["macs"]),
    }
