"""Name, check and load the models that OpenCLIP can make; count their MACs."""

import contextlib
import difflib
import hashlib
import logging
import sys
import warnings
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tic_clip import TicError, lookup, package_file
from tic_clip.benchmarks import get_benchmark
from tic_clip.storage import read_json

HUB = "hf-hub:"
NEWER = Path(__file__).parents[1] / "open_clip_models"  # a later OpenCLIP, of setup.sh --models
MODEL_CONFIGS = Path(__file__).parent / "model_configs"
RELEASED_ARCH = "ViT-B-16"
RELEASED = {
    f"{filtered}-{method}": f"apple/TiC-CLIP-{filtered}-{method}"
    for filtered in ("basic", "bestpool")
    for method in ("cumulative", "sequential", "oracle")
}
"""Filter of the training data and method -> repository; its files are ``checkpoints/{year}.pt``."""

MACS = {
    "ViT-Tiny-8-48": 41_149_440,
    "ViT-Tiny-12-48": 24_314_880,
    "ViT-B-32": 7_388_581_888,
    "ViT-B-16": 20_543_223_808,
    "ViT-L-14": 87_662_610_432,
}
"""What ``count_macs`` returns for common architectures. A dry run of others takes seconds more, to import OpenCLIP."""

NO_WEIGHTS = ("text.transformer.embeddings.position_ids", "input_resolution", "context_length", "vocab_size")
"""Entries of older checkpoints and of OpenAI's archives that are not weights."""

warnings.filterwarnings("ignore", "Importing from timm.models", FutureWarning)  # raised by the pinned OpenCLIP


def prefer_newer() -> None:
    """Let this process import the later OpenCLIP if it is installed; training needs the patched one."""
    if NEWER.is_dir() and "open_clip" not in sys.modules:
        sys.path.insert(0, str(NEWER))


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model to evaluate: an OpenCLIP architecture and its weights.

    ``weights`` is a checkpoint file or a pretrained tag, or empty if ``arch`` is a model of the hub, ``hf-hub:…``.
    """

    name: str
    arch: str
    weights: str
    about: dict[str, Any] = field(default_factory=dict)  # copied into each result: benchmark, method, step, …

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 of the checkpoint file, or the architecture and the tag."""
        if not Path(self.weights).is_file():
            return f"{self.arch} {self.weights}".strip()
        with open(self.weights, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def named_model(text: str, benchmark: str) -> Model:
    """Return the model ``ARCH FILE``, ``ARCH TAG`` or ``hf-hub:OWNER/NAME``; raise a TicError if it does not exist.

    Its family, for figures, is the tag up to the first ``_`` (openai, laion2b), the hub's owner, or the architecture.
    """
    arch, weights = [*text.split(maxsplit=1), "", ""][:2]
    weights = weights.strip()
    if not weights and not (arch.startswith(HUB) and "/" in arch):
        kinds = '"ARCH FILE", "ARCH TAG" as in "ViT-B-16 openai", or "hf-hub:OWNER/NAME"'
        raise TicError(f"a model is {kinds}, not {text!r}")
    check_model(arch, weights)
    owner, tag = arch.removeprefix(HUB).partition("/")[0], weights.partition("_")[0]
    family = arch if Path(weights).is_file() else tag or owner
    return Model(name=text.strip(), arch=arch, weights=weights, about={"benchmark": benchmark, "family": family})


def released_models(folder: str) -> list[Model]:
    """Return the checkpoints in a folder made by ``scripts/fetch_models.sh``, in order of time."""
    path = Path(folder)
    name = lookup({f"TiC-CLIP-{model}": model for model in RELEASED}, "released model", path.name)
    filtered, _, method = name.partition("-")
    about = {"benchmark": "datacomp", "method": method, "filter": filtered, "scale": "released"}
    models = [
        Model(name=f"{name} {step.name}", arch=RELEASED_ARCH, weights=str(file), about=about | {"step": step.name})
        for step in get_benchmark("datacomp").steps
        if (file := path / f"checkpoints/{step.cutoff // 100}.pt").is_file()
    ]
    if not models:
        raise TicError(f"{folder} has no checkpoints/{{year}}.pt: run scripts/fetch_models.sh first")
    return models


def check_model(arch: str, weights: str) -> None:
    """Raise a TicError if OpenCLIP has no such architecture, or ``weights`` is neither a file nor a tag of it."""
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
    """Return ``make_model`` with the weights of a checkpoint file or a tag, or of the hub if they are empty."""
    from tic_clip.weights import load, mismatch

    check_model(arch, weights)
    if not Path(weights).is_file():
        return make_model(arch, device, tag=weights or None)
    model, *rest = make_model(arch, device)
    state = adapt(load(weights), model)
    if difference := mismatch(state, model.state_dict()):
        raise TicError(f"checkpoint {weights} is not of {arch}: {difference}")
    model.load_state_dict(state)
    return model, *rest


def adapt(state: dict[str, Any], model: Any) -> dict[str, Any]:
    """Adapt a state dict to ``model`` as OpenCLIP's ``load_checkpoint`` does.

    Rename the text tower's weights if the model has a separate one, resize position embeddings to its image size and
    context length, and drop SigLIP's bias if it has none.
    """
    import torch
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    wanted, dropped = model.state_dict(), ("logit_bias", *NO_WEIGHTS)  # the bias shifts all similarities alike
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state = {name: value for name, value in state.items() if name in wanted or name not in dropped}
    if "logit_bias" in wanted and "logit_scale" in state:
        state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
    with contextlib.suppress(RuntimeError, AssertionError, AttributeError):  # another architecture, see ``mismatch``
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    return state


def check_pretrained(text: str, arch: str) -> None:
    """Raise a TicError if the model ``text`` (see ``named_model``) is not an ``arch``."""
    model = named_model(text, "")
    if model.arch.startswith(HUB):
        return
    if model.arch != arch:
        raise TicError(f"{text} is a {model.arch}, not a {arch}")
    if fault := quickgelu_fault(arch, model.weights):
        raise TicError(fault)


def quickgelu_fault(arch: str, weights: str) -> str | None:
    """Return a message if ``weights`` were trained with QuickGELU but ``arch`` has GELU, else None."""
    quick = f"{arch}-quickgelu"
    if not weights or Path(weights).is_file():
        return None
    import open_clip

    is_known = open_clip.get_pretrained_cfg(arch, weights).get("quick_gelu")  # make_model handles it
    if is_known or weights not in open_clip.list_pretrained_tags_by_model(quick):
        return None
    return f"the weights {weights} of {arch} were trained with QuickGELU: say {quick} {weights}"


def save_pretrained(text: str, arch: str, path: str) -> None:
    """Download the model ``text`` and save it as a checkpoint of ``arch``; raise a TicError if it is another one."""
    from tic_clip import weights

    check_pretrained(text, arch)
    model = named_model(text, "")
    state = load_model(model.arch, model.weights, "cpu")[0].state_dict()
    if difference := weights.mismatch(state, make_model(arch, "cpu")[0].state_dict()):
        raise TicError(f"{text} is not a {arch}: {difference}; set --model to its architecture")
    weights.write({"state_dict": state, "tic": {"init": text}}, path)


def make_model(arch: str, device: str, tag: str | None = None) -> tuple[Any, Any, Any]:
    """Return (model in evaluation mode, image transform, tokenizer), with random or pretrained (``tag``) weights."""
    import open_clip

    open_clip.add_model_config(MODEL_CONFIGS)
    quick = open_clip.get_pretrained_cfg(arch, tag or "").get("quick_gelu", False)  # OpenCLIP 3 does not set it itself
    options = {"pretrained": tag, "device": device, "pretrained_hf": False, "force_quick_gelu": quick}
    options["require_pretrained"] = bool(tag) or arch.startswith(HUB)
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # OpenCLIP also logs what it raises
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(arch, **options)
        return model.eval(), preprocess, open_clip.get_tokenizer(arch)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TicError(f"{' '.join(filter(None, (arch, tag)))} can't be loaded: {reason}") from error
    finally:
        logging.disable(disabled)


def download_from_hub(model_id: str, filename: str, **options: Any) -> str:
    """Download a file of a model of the hub; fall back to the safetensors file if there are no .bin weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(model_id, filename, **options)
    except EntryNotFoundError:
        if not filename.startswith("open_clip_pytorch_model"):
            raise
        return hf_hub_download(model_id, "open_clip_model.safetensors", **options)


def check_architecture(model: str) -> None:
    """Raise a TicError with similar names if OpenCLIP has no such architecture, without importing it."""
    names = list_architectures()
    if model not in names:
        lower = {name.lower(): name for name in names}
        similar = ", ".join(lower[name] for name in difflib.get_close_matches(model.lower(), lower)) or "none"
        later = "" if NEWER.exists() else "; bash setup.sh --models lets scripts/evaluate.py have later ones"
        all_of_them = "open_clip.list_models() has all"
        raise TicError(f"OpenCLIP has no model {model!r}; similar ones are {similar}, {all_of_them}{later}")


def list_architectures() -> dict[str, Path]:
    """Return architecture -> configuration file."""
    folders = package_file("open_clip", "model_configs"), MODEL_CONFIGS
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def has_logit_bias(model: str) -> bool:
    """Return whether an architecture is a SigLIP, whose loss has a bias."""
    return "init_logit_bias" in read_json(list_architectures()[model])


def macs_per_sample(model: str) -> int:
    """Return the MACs of a forward pass on one image and one text."""
    return MACS.get(model) or count_macs(model)


@cache
def count_macs(model: str) -> int:
    """Count the MACs of a forward pass with torch."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    open_clip.add_model_config(MODEL_CONFIGS)
    net = open_clip.create_model(model, device="meta").requires_grad_(False)  # else SigLIP's pooling fails
    size = net.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    tokens = torch.zeros(1, net.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, height, width, device="meta"), tokens)
    return counter.get_total_flops() // 2
