import pytest

from tic_clip import TicError
from tic_clip.training.plan import blocks_of
from tic_clip.training.scales import POLICIES, SCALES, get_policy, get_scale

TABLE = """
tic_debug   ViT-B-32   1,024   1,000      1,024,000  1e-4     500
tic_medium  ViT-B-16   4,096   4,500     18,432,000  5e-4     500
tic_large   ViT-B-16   8,192  22,500    184,320,000  5e-4     500
tic_xlarge  ViT-B-16  90,112  20,500  1,847,296,000  1e-3  10,000
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_the_table_of_the_benchmark(row):
    name, model, batch, iterations, samples, lr, warmup = row.replace(",", "").split()
    scale = get_scale(name)
    assert scale.model == model
    assert scale.batch_size == int(batch)
    assert scale.samples_per_step == int(samples) == int(batch) * int(iterations)
    assert scale.learning_rate == float(lr)
    assert (scale.warmup, scale.policy) == (int(warmup), "scripts")
    assert (scale.weight_decay, scale.beta2, scale.checkpoints) == (0.2, 0.98, 5)
    assert scale.grad_checkpointing
    assert scale.max_kept >= scale.checkpoints


def test_the_embedded_default():
    scale = get_scale("tic_tiny")
    assert (scale.model, scale.batch_size, scale.samples_per_step) == ("ViT-Tiny-8-48", 64, 120 * 64)
    assert (scale.learning_rate, scale.weight_decay, scale.warmup, scale.policy) == (1e-3, 0.1, 30, "tiny")


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_samples_are_whole_batches(scale):
    assert scale.samples_per_step % scale.batch_size == 0
    assert scale.samples_per_step >= scale.batch_size * scale.checkpoints
    assert scale.warmup < scale.samples_per_step // scale.batch_size


def test_an_unknown_scale_lists_the_valid_ones():
    with pytest.raises(TicError, match=r"'medium'.*tic_tiny, tic_debug, tic_medium, tic_large, tic_xlarge"):
        get_scale("medium")


def test_the_policies_after_the_first_step():
    rows = {name: (policy.warmup, policy.optimizer) for name, policy in POLICIES.items()}
    assert rows == {"scripts": (0, "fresh"), "released": (2000, "fresh"), "kept": (0, "kept"), "tiny": (15, "fresh")}
    with pytest.raises(TicError, match=r"unknown policy 'warm'; the policies are scripts, released, kept, tiny"):
        get_policy("warm")


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_blocks_of_the_tables_lose_no_iteration(scale):
    interval = scale.samples_per_step // scale.batch_size // scale.checkpoints
    number, size = blocks_of(interval, scale.block, max(1, scale.workers))
    assert number * size == interval
    assert scale.block / 2 <= size <= 2 * scale.block
