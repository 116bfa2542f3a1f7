"""Save checkpoints atomically, load them safely, compare them with a model."""

import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tic_clip import TicError
from tic_clip.storage import atomic_open

_NUMPY = [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_NUMPY += [np.dtype, *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]}]
"""Types that unpickle a NumPy number, which OpenCLIP's checkpoints have as their learning rate; all else is refused."""


def write(checkpoint: dict[str, Any], path: object) -> None:
    """Save a checkpoint atomically; raise a TicError if it can't be written."""
    try:
        with atomic_open(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # torch hides the OSError
        raise TicError(f"{path} could not be written: {error.__context__ or error}".splitlines()[0]) from None


def load(path: str) -> dict[str, torch.Tensor]:
    """Return the weights of a training checkpoint or bare state dict, without DDP's prefix; run none of its code."""
    return state_dict(read(path, weights_only=True), path)


def read(path: str, reader: Callable = torch.load, **options: Any) -> Any:
    """Return the content of a checkpoint or safetensors file; ``reader`` is ``torch.load`` or OpenCLIP's for URLs."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return read_safely(load_file, path)
    return read_safely(reader, path, map_location="cpu", **options)


def record(path: str) -> dict[str, Any] | None:
    """Return the record that our checkpoints have under "tic", or None for other checkpoints."""
    mmap = zipfile.is_zipfile(path)  # torch's old format can't be mapped
    checkpoint = read(path, weights_only=True, mmap=mmap)
    return checkpoint.get("tic") if isinstance(checkpoint, dict) else None


def read_safely(reader: Callable, path: str, **options: Any) -> Any:
    """Call ``reader`` on a checkpoint without running code from it; raise a one-line TicError if that fails."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
            warnings.simplefilter("ignore")  # warnings about a pickle that torch then refuses
            return reader(path, **options)
    except FileNotFoundError:
        raise TicError(f"checkpoint {path} is missing") from None
    except Exception as error:  # noqa: BLE001  torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        if "TorchScript" in reason:
            reason = "a TorchScript archive holds code; torch.save its state_dict() where you trust it"
        raise TicError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from None


def state_dict(checkpoint: Any, path: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a loaded checkpoint, without DDP's ``module.`` prefix."""
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise TicError(f"{path} holds no state dict")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def mismatch(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str | None:
    """Return the first difference in names or shapes between ``weights`` and a model's state dict, or None."""
    if names := [name for name in dict.fromkeys([*wanted, *weights]) if (name in weights) != (name in wanted)]:
        return f"{names[0]} is only in {'the model' if names[0] in wanted else 'the checkpoint'}"
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(value.shape)}"
    return None


def check_finite(weights: dict[str, torch.Tensor], when: str) -> None:
    """Raise a TicError that names the first weights with NaN or infinite values."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TicError(f"the weights {name} are NaN or infinite {when}: no checkpoint of them is written")
