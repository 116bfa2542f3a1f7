"""The models that are evaluated: a run of ours, released checkpoints, or anything that OpenCLIP can load."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import cutoff, get_benchmark
from tic_clip.data.released import ARCH, MODELS
from tic_clip.macs import MODEL_CONFIGS, check_architecture
from tic_clip.plans import RUN
from tic_clip.training import read_done

HUB = "hf-hub:"
SETTINGS = tuple(name for name in RUN if name != "seed")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to evaluate: an OpenCLIP architecture, its weights, and what is known of it.

    ``weights`` is a checkpoint file or a pretrained tag; it is empty for an ``arch`` of the hub, ``hf-hub:…``.
    """

    name: str
    arch: str
    weights: str
    about: dict[str, Any] = field(default_factory=dict)  # goes into each result: benchmark, method, step, …

    def fingerprint(self) -> str:
        """The SHA-256 of the checkpoint file, or the architecture and the tag."""
        from tic_clip.weights import fingerprint

        return fingerprint(self.weights) if Path(self.weights).is_file() else f"{self.arch} {self.weights}".strip()


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


def released_models(folder: str) -> list[Model]:
    """The checkpoints of a released TiC-CLIP model, as ``scripts/fetch_models.sh`` lays them out, in order of time.

    Raises:
        TicError: the folder is not called as a released model, or has no checkpoint of a step.
    """
    path = Path(folder)
    name = path.name.removeprefix("TiC-CLIP-")
    if name not in MODELS or name == path.name:
        names = ", ".join(f"TiC-CLIP-{model}" for model in MODELS)
        raise TicError(f"{folder} is not called as a released model; they are {names}")
    filtered, _, method = name.partition("-")
    about = {"benchmark": "datacomp", "method": method, "filter": filtered, "scale": "released"}
    models = [
        Model(name=f"{name} {step.name}", arch=ARCH, weights=str(file), about=about | {"step": step.name})
        for step in get_benchmark("datacomp").steps
        if (file := path / f"checkpoints/{step.cutoff // 100}.pt").is_file()
    ]
    if not models:
        raise TicError(f"{folder} has no checkpoints/{{year}}.pt: run scripts/fetch_models.sh first")
    strange = [file.name for file in (path / "checkpoints").glob("*.pt") if cutoff(file.stem) is None]
    if strange:
        raise TicError(f"{folder}/checkpoints has {sorted(strange)[0]}, which is of no year")
    return models


def named_model(text: str, benchmark: str) -> Model:
    """The model that ``--use_model`` names: ``ARCH FILE``, ``ARCH TAG``, or ``hf-hub:OWNER/NAME``.

    Its family in figures is its tag up to the first ``_`` (openai, laion2b), the hub's owner, or the architecture.

    Raises:
        TicError: there is no such architecture, file or tag.
    """
    arch, _, weights = text.strip().partition(" ")
    weights = weights.strip()
    if not weights and not (arch.startswith(HUB) and "/" in arch):
        kinds = '"ARCH FILE", "ARCH TAG" as in "ViT-B-16 openai", or "hf-hub:OWNER/NAME"'
        raise TicError(f"a model is {kinds}, not {text!r}")
    check_model(arch, weights)
    family = weights.partition("_")[0] if not Path(weights).is_file() else arch
    if not weights:
        family = arch.removeprefix(HUB).partition("/")[0]
    return Model(name=text.strip(), arch=arch, weights=weights, about={"benchmark": benchmark, "family": family})


def check_model(arch: str, weights: str) -> None:
    """Whether OpenCLIP has such a model, without loading it.

    Raises:
        TicError: it has no such architecture, or ``weights`` is neither a file nor a tag of it.
    """
    if arch.startswith(HUB):
        if weights:
            raise TicError(f"{arch} has its own weights, so there is nothing to load from {weights}")
        return
    check_architecture(arch)
    if Path(weights).is_file():
        return
    import open_clip

    if weights not in (tags := open_clip.list_pretrained_tags_by_model(arch)):
        known = f" ({', '.join(tags)})" if tags else ""
        raise TicError(f"{weights} is neither a checkpoint file nor a pretrained tag of {arch}{known}")


def load_model(arch: str, weights: str, device: str) -> tuple[Any, Any, Any]:
    """(model in evaluation mode, image transform, tokenizer) of an architecture with a checkpoint file, a tag, or "".

    No code of a checkpoint is run: files are loaded by ``weights.load``, and torch's own safety stays on for the rest.

    Raises:
        TicError: OpenCLIP knows neither, the weights can't be fetched, or the file does not fit the architecture.
    """
    from tic_clip.weights import load, mismatch

    check_model(arch, weights)
    if not Path(weights).is_file():
        return make_model(arch, device, tag=weights or None)
    model, *rest = make_model(arch, device)
    state = load(weights)
    difference = mismatch(state, model.state_dict())
    if difference:
        raise TicError(f"checkpoint {weights} is not of {arch}: {difference}")
    model.load_state_dict(state)
    return model, *rest


@cache
def _get_tokenizer(arch: str) -> Any:
    """The tokenizer of an architecture, one for all models of it."""
    import open_clip

    return open_clip.get_tokenizer(arch)


def make_model(arch: str, device: str, tag: str | None = None) -> tuple[Any, Any, Any]:
    """(model in evaluation mode, image transform, tokenizer) of an architecture, random or with a pretrained tag.

    Raises:
        TicError: it can't be made, or its weights can't be fetched.
    """
    import open_clip

    open_clip.add_model_config(MODEL_CONFIGS)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=tag, device=device)
        return model.eval(), preprocess, _get_tokenizer(arch)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TicError(f"{' '.join(filter(None, (arch, tag)))} can't be loaded: {reason}") from error
