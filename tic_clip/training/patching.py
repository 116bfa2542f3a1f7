"""Interpolate weights: averaging of a step's checkpoints, and patching.

A patched model is (1 - a) · the last patched model + a · the newly trained one.
The coefficient a is given, or chosen by mean retrieval on the steps before, on samples that no step trains on: the tail
of each shard of the training data. The test set has no part in it.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.metrics import MAIN_METRIC, retrieval
from tic_clip.runs import last_checkpoint
from tic_clip.training.methods import PATCHED
from tic_clip.training.sampling import Slice, apportion

CANDIDATES = tuple(i / 10 for i in range(1, 11))
BATCH_SIZE = 256
AVERAGE = Path("checkpoints/average.pt")  # in a step's folder


def interpolate(old: dict[str, Any], new: dict[str, Any], coefficient: float) -> dict[str, Any]:
    """Return (1 - a) · old + a · new in float32; tensors that are not floating-point are the new ones."""
    from tic_clip import weights

    if difference := weights.mismatch(new, old):
        raise TicError(f"the models to interpolate differ: {difference}")
    floats = [name for name, value in new.items() if value.is_floating_point()]
    return new | {name: (1 - coefficient) * old[name].float() + coefficient * new[name].float() for name in floats}


def average(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the mean of a step's checkpoints, in float32."""
    from tic_clip import weights

    paths = [str(folder / last_checkpoint(number)) for number in range(1, plan["checkpoints"] + 1)]
    model = weights.load(paths[0])
    for number, path in enumerate(paths[1:], 2):
        model = interpolate(model, weights.load(path), 1 / number)
    weights.write({"state_dict": model, "tic": weights.record(paths[-1])}, folder / AVERAGE)
    return {"checkpoint": str(AVERAGE)}


def patch(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the step's patched model (the trained one in the first step); return facts for ``done.json``."""
    from tic_clip import weights

    trained = str(folder / last_checkpoint(plan["checkpoints"]))
    model = weights.load(trained)
    facts: dict[str, Any] = {"checkpoint": str(PATCHED), "coefficient": 1.0}
    if plan["start"]:
        old = weights.load(plan["start"])
        if plan["coefficient"] != "chosen":
            facts["coefficient"] = plan["coefficient"]
        elif plan["validation"]:
            by_coefficient = scores(plan, old, model)
            facts["coefficient"] = max(by_coefficient, key=by_coefficient.get)
            facts["mean_retrieval"] = {str(a): score for a, score in by_coefficient.items()}
        model = interpolate(old, model, facts["coefficient"])
    weights.write({"state_dict": model, "tic": weights.record(trained)}, folder / PATCHED)
    return facts


def scores(plan: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[float, float]:
    """Return the mean retrieval of each candidate over the held-out samples of the plan's ``validation``."""
    import torch

    from tic_clip.models import adapt, make_model
    from tic_clip.training.loader import make_batches

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, preprocess, tokenizer = make_model(plan["model"], device)
    values: dict[float, list[float]] = {a: [] for a in CANDIDATES}
    for entry in progress(plan["validation"], "coefficient", len(plan["validation"]), "split"):
        batches = list(make_batches(read_held_out(entry, preprocess, tokenizer), BATCH_SIZE))
        for a in CANDIDATES if batches else ():
            net.load_state_dict(adapt(interpolate(old, new, a), net))
            values[a].append(retrieval(*encode(net, batches, device))[0][MAIN_METRIC["retrieval"]])
    if not values[1.0]:
        raise TicError("no held-out sample to choose the coefficient on can be decoded: give a --coefficient")
    return {a: float(np.mean(numbers)) for a, numbers in values.items()}


def encode(net: Any, batches: list[Any], device: str) -> list[np.ndarray]:
    """Return the normalised features (N, D) of the images and of the texts of N pairs."""
    import torch

    features = []
    with torch.inference_mode():
        for method, part in zip((net.encode_image, net.encode_text), zip(*batches, strict=True), strict=True):
            rows = [method(tensors.to(device), normalize=True).float() for tensors in part]
            features.append(torch.cat(rows).cpu().numpy())
    return features


def read_held_out(entry: dict[str, Any], preprocess: Any, tokenizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the image and tokens of a split's held-out samples; skip undecodable ones."""
    from tic_clip.data.split import split_sizes
    from tic_clip.data.tar import UNUSABLE
    from tic_clip.training.loader import decode, image_functions, read_slice

    load, _ = image_functions("pil", preprocess)
    sizes = split_sizes(entry["split"])
    used = apportion(sizes.values(), entry["size"] - entry["held_out"])
    for i, (path, first) in enumerate(zip(sizes, used, strict=True)):
        for sample in read_slice(path, Slice(0, i, first, sizes[path]), (0,)) if first < sizes[path] else ():
            with suppress(*UNUSABLE):
                yield decode(sample, load, tokenizer)
