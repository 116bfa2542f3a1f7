"""What a model costs: multiply-accumulate operations (MACs) of a forward pass, counted by torch on shapes alone."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from tic_clip import TicError

MODEL_CONFIGS = Path(__file__).parent / "model_configs"


def check_architecture(model: str) -> None:
    """Whether OpenCLIP has such an architecture; nothing of it is imported, its list is that of its files.

    Raises:
        TicError: it has none; the message names those with a similar name.
    """
    from tic_clip.data.eval_uids import package_file

    folders = package_file("open_clip", "model_configs"), MODEL_CONFIGS
    names = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    if model not in names:
        lower = {name.lower(): name for name in names}
        close = [lower[name] for name in difflib.get_close_matches(model.lower(), lower)]
        hint = f"similar ones are {', '.join(close)}" if close else "ViT-B-16 is one that it has"
        raise TicError(f"OpenCLIP has no model {model!r}; {hint}, `open_clip.list_models()` names all")


@cache
def macs_per_sample(model: str) -> int:
    """MACs of one forward pass of an OpenCLIP architecture on one image and one text.

    Raises:
        TicError: OpenCLIP has no such model.
    """
    check_architecture(model)
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    open_clip.add_model_config(MODEL_CONFIGS)
    net = open_clip.create_model(model, device="meta")
    size = net.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    tokens = torch.zeros(1, net.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, height, width, device="meta"), tokens)
    return counter.get_total_flops() // 2


def add(plan: dict[str, Any]) -> dict[str, Any]:
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
