"""Patching: a step's model is (1 - a) · the last patched model + a · the newly trained one.

The coefficient a is given, or chosen by mean retrieval on the steps before, on samples that no step trains on: the tail
of each shard of the training data. The test set has no part in it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.cli import progress
from tic_clip.metrics import MAIN_METRIC, retrieval

PATCHED = Path("checkpoints/patched.pt")
HELD_OUT, MOST = 20, 2_000  # one sample in so many of a split, and at most so many
CANDIDATES = tuple(i / 10 for i in range(1, 11))


def held_out(size: int) -> int:
    """How many of a split's ``size`` samples are kept for the choice of the coefficient."""
    return min(size // HELD_OUT, MOST)


def interpolate(old: dict[str, Any], new: dict[str, Any], coefficient: float) -> dict[str, Any]:
    """(1 - a) · old + a · new, in float32; what is no floating-point tensor is the new one's.

    Raises:
        TicError: the two are not of one architecture.
    """
    from tic_clip.weights import mismatch

    if found := mismatch(new, old):
        raise TicError(f"the models to interpolate differ: {found}")
    mixed = dict(new)
    for name, value in new.items():
        if value.is_floating_point():
            mixed[name] = (1 - coefficient) * old[name].float() + coefficient * value.float()
    return mixed


def patch(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the step's patched model; of the first step it is the trained one.

    Returns:
        Facts for ``done.json``: the file, the coefficient, and the mean retrieval of each candidate.

    Raises:
        TicError: a checkpoint can't be loaded, or there is nothing to choose on.
    """
    from tic_clip import weights
    from tic_clip.training.plan import last_checkpoint

    trained = folder / last_checkpoint(plan["checkpoints"])
    new, record = weights.load(str(trained)), weights.record(str(trained))
    facts: dict[str, Any] = {"checkpoint": str(PATCHED), "coefficient": 1.0}
    if plan["start"]:
        old = weights.load(plan["start"])
        if plan["coefficient"] == "chosen" and plan["validation"]:
            found = scores(plan, old, new)
            facts |= {"coefficient": max(found, key=found.get), "mean_retrieval": {str(a): n for a, n in found.items()}}
        elif plan["coefficient"] != "chosen":
            facts["coefficient"] = plan["coefficient"]
        new = interpolate(old, new, facts["coefficient"])
    weights.write({"state_dict": new, "tic": record}, folder / PATCHED)
    return facts


def scores(plan: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> dict[float, float]:
    """The mean retrieval of each candidate over the held-out samples of the plan's ``validation``.

    Raises:
        TicError: there are none.
    """
    import torch

    from tic_clip.models import make_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, preprocess, tokenizer = make_model(plan["model"], device)
    found: dict[float, list[float]] = {a: [] for a in CANDIDATES}
    for entry in progress(plan["validation"], "coefficient", len(plan["validation"]), "split"):
        pairs = list(batches(entry, preprocess, tokenizer))
        for a in CANDIDATES if pairs else ():
            net.load_state_dict(interpolate(old, new, a))
            found[a].append(retrieval(*features(net, pairs, device))[0][MAIN_METRIC["retrieval"]])
    if not found[CANDIDATES[0]]:
        raise TicError("there is no held-out sample to choose the coefficient on: give a --coefficient")
    return {a: float(np.mean(values)) for a, values in found.items()}


def features(net: Any, pairs: list[tuple[Any, Any]], device: str) -> tuple[np.ndarray, np.ndarray]:
    """The normalised features (N, D) of the images and of the texts of batches."""
    import torch

    with torch.inference_mode():
        images, texts = (
            np.concatenate([encode(batch.to(device), normalize=True).float().cpu().numpy() for batch in part])
            for encode, part in zip((net.encode_image, net.encode_text), zip(*pairs, strict=True), strict=True)
        )
    return images, texts


def batches(entry: dict[str, Any], preprocess: Any, tokenizer: Any, size: int = 256) -> Iterator[tuple[Any, Any]]:
    """(images, tokens) of a split's held-out samples; those that can't be decoded are left out."""
    import torch

    from tic_clip.data.split import split_sizes
    from tic_clip.data.tar import UNUSABLE
    from tic_clip.training.sampling import Slice, decode, heads, read_slice

    sizes = split_sizes(entry["split"])
    firsts = heads(sizes.values(), entry["size"] - entry["held_out"])
    tails = [(path, Slice(0, i, first, sizes[path])) for i, (path, first) in enumerate(zip(sizes, firsts, strict=True))]
    pairs = []
    for path, tail in tails:
        for raw in read_slice(path, tail, (0,)) if tail.start < tail.stop else ():
            try:
                pairs.append(decode(raw, preprocess, tokenizer))
            except UNUSABLE:
                continue
            if len(pairs) == size:
                yield tuple(map(torch.stack, zip(*pairs, strict=True)))
                pairs = []
    if pairs:
        yield tuple(map(torch.stack, zip(*pairs, strict=True)))
