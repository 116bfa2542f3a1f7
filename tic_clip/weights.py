"""Weights: atomic saving, safe loading, comparison with a model."""

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
"""What makes a NumPy number of bytes, all that is safe in a pickle beside tensors: the learning rate of OpenCLIP."""


def write(checkpoint: dict[str, Any], path: object) -> None:
    """Save ``checkpoint`` with ``torch.save``, atomically; a TicError names a file that can't be written."""
    try:
        with atomic_open(path) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # what torch makes of the disk's OSError
        raise TicError(f"{path} could not be written: {error.__context__ or error}".splitlines()[0]) from None


def load(path: str) -> dict[str, torch.Tensor]:
    """Return the weights in a training checkpoint or a bare state dict without DDP's prefix; run no code of it."""
    return state_dict(read(path, weights_only=True), path)


def read(path: str, reader: Callable = torch.load, **options: Any) -> Any:
    """Return what is in a checkpoint, or in a safetensors file; ``reader`` is ``torch.load`` or OpenCLIP's for URLs."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file

        return read_safely(load_file, path)
    return read_safely(reader, path, map_location="cpu", **options)


def record(path: str) -> dict[str, Any] | None:
    """Return what a checkpoint of ours records of its making, or None for one from elsewhere."""
    mmap = zipfile.is_zipfile(path)  # torch's old format can't be
    checkpoint = read(path, weights_only=True, mmap=mmap)
    return checkpoint.get("tic") if isinstance(checkpoint, dict) else None


def read_safely(reader: Callable, path: str, **options: Any) -> Any:
    """Return what ``reader`` (a ``torch.load`` that runs no code, or OpenCLIP's for URLs) makes of a checkpoint."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
            warnings.simplefilter("ignore")  # torch's remarks on a pickle that it then refuses
            return reader(path, **options)
    except FileNotFoundError:
        raise TicError(f"checkpoint {path} is missing") from None
    except Exception as error:  # noqa: BLE001  torch raises RuntimeError, UnpicklingError, EOFError, ... for a bad file
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        if "TorchScript" in reason:
            reason = "a TorchScript archive holds code; torch.save its state_dict() where you trust it"
        raise TicError(f"{path} is not a checkpoint that can be loaded safely: {reason}") from None


def state_dict(checkpoint: Any, path: str) -> dict[str, torch.Tensor]:
    """Return the state dict in what ``torch.load`` gave, without DDP's ``module.`` prefix."""
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise TicError(f"{path} holds no state dict")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def mismatch(weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str | None:
    """Return how ``weights`` differ from a model's state dict ``wanted`` in names or shapes, or None if they fit."""
    if names := [name for name in dict.fromkeys([*wanted, *weights]) if (name in weights) != (name in wanted)]:
        return f"{names[0]} is only in {'the model' if names[0] in wanted else 'the checkpoint'}"
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            return f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(value.shape)}"
    return None


def check_finite(weights: dict[str, torch.Tensor], when: str) -> None:
    """Raise a TicError that names the first weights that are NaN or infinite, and ``when``."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TicError(f"the weights {name} are NaN or infinite {when}: no checkpoint of them is written")
