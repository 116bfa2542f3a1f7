"""Model, batch, learning rate, samples and warm-up of each scale, as frozen tables. Samples are per time step."""

from dataclasses import dataclass
from typing import Literal

from tic_clip import lookup


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How one step is trained; ``batch_size`` is the global batch, ``warmup`` and ``next_warmup`` are iterations."""

    name: str
    model: str
    batch_size: int
    samples_per_step: int
    learning_rate: float
    warmup: int  # of the first step, and of every step that starts from random weights
    policy: str = "scripts"  # of POLICIES, for a step that starts from a trained model
    weight_decay: float = 0.2
    beta2: float = 0.98
    checkpoints: int = 5  # a step
    max_kept: int = 7  # checkpoints of a step on the disk: these five and the two newest in between
    block: int = 300  # iterations, about: training can be cut off between two blocks and lose nothing
    log_every: int = 100  # iterations
    grad_checkpointing: bool = True
    workers: int = 4


SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            name="tic_tiny",
            model="ViT-Tiny-8-48",
            batch_size=64,
            samples_per_step=7_680,
            learning_rate=1e-3,
            warmup=30,
            policy="tiny",
            weight_decay=0.1,
            checkpoints=2,
            max_kept=2,
            block=20,
            log_every=10,
            grad_checkpointing=False,
            workers=0,
        ),
        Scale(
            name="tic_debug",
            model="ViT-B-32",
            batch_size=1024,
            samples_per_step=1_024_000,
            learning_rate=1e-4,
            warmup=500,
            block=100,
        ),
        Scale(
            name="tic_medium",
            model="ViT-B-16",
            batch_size=4096,
            samples_per_step=18_432_000,
            learning_rate=5e-4,
            warmup=500,
        ),
        Scale(
            name="tic_large",
            model="ViT-B-16",
            batch_size=8192,
            samples_per_step=184_320_000,
            learning_rate=5e-4,
            warmup=500,
        ),
        Scale(
            name="tic_xlarge",
            model="ViT-B-16",
            batch_size=90_112,
            samples_per_step=1_847_296_000,
            learning_rate=1e-3,
            warmup=10_000,
            block=100,
        ),
        # TiC-CLIP's own settings for these two are not known: about eight passes over a quarter of the data, in
        # batches that one GPU holds.
        Scale(
            name="tic_yfcc15m",
            model="ViT-B-16",
            batch_size=1024,
            samples_per_step=30_720_000,
            learning_rate=5e-4,
            warmup=2_000,
        ),
        Scale(
            name="tic_redcaps",
            model="ViT-B-16",
            batch_size=1024,
            samples_per_step=24_576_000,
            learning_rate=5e-4,
            warmup=2_000,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a step that starts from a trained model begins: iterations of warm-up, and what becomes of the optimizer."""

    name: str
    warmup: int
    optimizer: Literal["fresh", "kept"] = "fresh"


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(name="scripts", warmup=0),  # the benchmark's scripts
        Policy(name="released", warmup=2_000),  # the released xlarge models
        Policy(name="kept", warmup=0, optimizer="kept"),
        Policy(name="tiny", warmup=15),
    )
}


def get_policy(name: str) -> Policy:
    """The policy called ``name``; a ``TicError`` names those that exist."""
    return lookup(POLICIES, "policy", name, plural="policies")


def get_scale(name: str) -> Scale:
    """The scale called ``name``; a ``TicError`` names those that exist."""
    return lookup(SCALES, "scale", name)
