"""Method-specific losses, and the Fisher information that EWC needs.

EWC's term is the sum of F · (weight − last weight)²; F is the Fisher information of the last model, the mean over
samples of the squared gradient of its loss.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tic_clip.cli import progress
from tic_clip.runs import last_checkpoint
from tic_clip.training.config import Config
from tic_clip.training.methods import Method
from tic_clip.training.sampling import source_counts

FISHER = Path("checkpoints/fisher.pt")  # in a step's folder
BATCH, MAX_SAMPLES = 64, 20_000


def plan_loss(config: Config, method: Method, last: str | None) -> dict[str, Any]:
    """Return the part of a plan about the loss's term for the ``last`` step's model, if the method has one."""
    facts: dict[str, Any] = {"anchor": last} if method.anchor else {}
    if method.weight is not None:
        facts["loss_weight"] = method.weight if config.loss_weight is None else config.loss_weight
    if method.teacher:
        facts["temperature"] = config.temperature or 1.0
    return facts


def method_loss(loss: Any, plan: dict[str, Any], parameters: Mapping[str, Any], passes: int = 1) -> Callable:
    """Return OpenCLIP's ``loss`` with the method's term; ``passes`` is how often it is called per batch."""
    weight, temperature = plan.get("loss_weight", 1), plan.get("temperature", 1)
    if plan["teacher"] and (weight, temperature) != (1, 1):
        stock, factor = loss.dist_loss, weight * temperature**2  # the square keeps the size of the gradient
        loss.dist_loss = lambda teacher, student: factor * stock(teacher / temperature, student / temperature)
    term = TERMS[plan["method"]](plan, parameters) if plan["method"] in TERMS else None
    if term is None:
        return loss
    name = f"{plan['method']}_loss"
    return lambda *args, **options: {**loss(*args, **options), name: weight / passes * term()}


def ewc(plan: dict[str, Any], parameters: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return a function that computes EWC's term from the current parameters; None in a first step."""
    from tic_clip import weights

    if plan["anchor"] is None:
        return None
    anchor, fisher = weights.load(plan["anchor"]), weights.load(str(Path(plan["anchor"]).parents[1] / FISHER))
    held = {name: value for name, value in parameters.items() if name in fisher}
    parts = [(value, anchor[name].to(value), fisher[name].to(value)) for name, value in held.items()]
    return lambda: sum((f * (now - before).square()).sum() for now, before, f in parts)


TERMS = {"ewc": ewc}
"""What a method adds to the loss: maps the plan and the parameters by name to a function that returns it, or None."""


def count_fisher(samples: int, batch_size: int) -> int:
    """Return how many of a step's ``samples`` the Fisher information uses: a twentieth, in whole batches."""
    batch = min(BATCH, batch_size)
    return max(1, min(samples // 20, MAX_SAMPLES) // batch) * batch


def save_fisher(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the Fisher information of a step's model, computed on the first samples it reads of each source."""
    import torch

    from tic_clip import weights
    from tic_clip.models import load_model
    from tic_clip.training.loader import image_functions, make_batches, read_samples, read_sources

    trained = str(folder / last_checkpoint(plan["checkpoints"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, preprocess, tokenizer = load_model(plan["model"], trained, device)
    size, count = min(BATCH, plan["batch_size"]), plan["fisher_samples"]
    ranges = [range(n) for n in source_counts([source["samples"] for source in plan["sources"]], count)]
    load, _ = image_functions("pil", preprocess)
    items = read_samples(read_sources(plan), ranges, (load, tokenizer), defaultdict(Counter))
    batches = progress(make_batches(items, size), "Fisher information", count // size, "batch")
    fisher = estimate_fisher(net, batches, device)
    weights.write({"state_dict": fisher, "tic": weights.record(trained)}, folder / FISHER)
    return {"fisher": str(FISHER)}


def estimate_fisher(net: Any, batches: Any, device: str) -> dict[str, Any]:
    """Return each weight's mean over batches of batch size · squared gradient.

    The gradient of a batch is the mean of its samples', so its square is about 1 / (batch size) of theirs.
    """
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    parameters, count = dict(net.named_parameters()), 0
    fisher = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for images, texts in batches:
        images, texts = images.to(device), texts.to(device)
        features = net.encode_image(images, normalize=True), net.encode_text(texts, normalize=True)
        scale, bias = net.logit_scale.exp(), getattr(net, "logit_bias", None)
        loss = ClipLoss()(*features, scale) if bias is None else SigLipLoss()(*features, scale, bias)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                fisher[name] += len(images) * gradient.square()
        count += 1
    return {name: value.div_(count).cpu() for name, value in fisher.items()}
