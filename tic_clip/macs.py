"""What a model costs: multiply-accumulate operations (MACs) of a forward pass, counted by torch on shapes alone."""

from functools import cache
from pathlib import Path
from typing import Any

from tic_clip import TicError

MODEL_CONFIGS = Path(__file__).parent / "model_configs"


@cache
def macs_per_sample(model: str) -> int:
    """MACs of one forward pass of an OpenCLIP architecture on one image and one text.

    Raises:
        TicError: OpenCLIP has no such model.
    """
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    open_clip.add_model_config(MODEL_CONFIGS)
    if model not in open_clip.list_models():
        raise TicError(f"OpenCLIP has no model {model!r}; `open_clip.list_models()` names those it has")
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
