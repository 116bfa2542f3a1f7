"""Interpolation and the choice of its coefficient; tests/test_training.py trains with it."""

from itertools import count, islice

import pytest
import torch
from conftest import make_png
from miniature import write_split

from tic_clip import TicError, models, weights
from tic_clip.training.loader import read_sources
from tic_clip.training.methods import held_out
from tic_clip.training.patching import CANDIDATES, interpolate, patch, read_held_out


def test_a_twentieth_is_held_out_and_at_most_2000():
    cases = {0: 0, 19: 0, 20: 1, 702: 35, 40_000: 2_000, 10**9: 2_000}
    assert {size: held_out(size) for size in cases} == cases


def test_interpolation_is_in_float32_by_hand():
    old = {"w": torch.tensor([1.0, 3.0], dtype=torch.float16), "n": torch.tensor(1)}
    new = {"w": torch.tensor([2.0, 5.0], dtype=torch.float16), "n": torch.tensor(7)}
    mixed = interpolate(old, new, 0.25)
    assert mixed["w"].tolist() == [1.25, 3.5]
    assert mixed["w"].dtype == torch.float32
    assert mixed["n"] == 7
    assert torch.equal(interpolate(old, new, 0)["w"], old["w"].float())
    assert torch.equal(interpolate(old, new, 1)["w"], new["w"].float())
    with pytest.raises(TicError, match="the models to interpolate differ: x is only in the model"):
        interpolate({**old, "x": torch.ones(1)}, new, 0.5)


@pytest.fixture
def validation(tmp_path):
    """Two splits of 40 and 25 samples in two shards each; a sample's number is its colour and its caption."""
    entries, numbers = [], count()
    for name, shards in (("2014", [15, 25]), ("2015", [10, 15])):
        content = [(f"{i:032x}-0", {"png": make_png(i), "txt": b"%d" % i}) for i in islice(numbers, sum(shards))]
        split = write_split(tmp_path / name, content[: shards[0]], content[shards[0] :])
        entries.append({"name": name, "split": split, "size": sum(shards), "held_out": 4})
    return entries


def read_colour(image):
    return torch.tensor(image.getpixel((0, 0))[0])


def read_number(text):
    return [torch.tensor(int(text))]


def test_the_tails_of_the_shards_are_held_out_and_never_trained_on(validation):
    """4 of 40 in proportion to 15 and 25: heads of 13.5 and 22.5, the first rounded up, leave 1 and 3."""
    entry = validation[0]
    pairs = [(int(image), int(text)) for image, text in read_held_out(entry, read_colour, read_number)]
    assert pairs == [(i, i) for i in (14, 37, 38, 39)]
    (source,) = read_sources({"step": "2015", "seed": 0, "sources": [{**entry, "used": 36, "samples": 99}]})
    assert source.sizes.tolist() == [14, 22]  # 14 and 37, 38, 39 lie behind these


class Net:
    """Features that are right for an image the more, the nearer its weight is to 0.3."""

    def state_dict(self):
        return {"w": None}

    def load_state_dict(self, state):
        self.error = abs(float(state["w"]) - 0.3)

    def encode_image(self, batch, normalize):
        return torch.nn.functional.one_hot(batch.long(), 128).float()

    def encode_text(self, batch, normalize):
        wrong = batch.clone()
        count = min(len(batch), round(self.error * 10))
        wrong[:count] = batch[:count].roll(1) if count > 1 else batch[:count] + 1
        return torch.nn.functional.one_hot(wrong.long(), 128).float()


@pytest.fixture
def run_patch(tmp_path, monkeypatch):
    """A function that patches 2015 (weight 1) with 2014 (weight 0): its facts, and the patched weight."""
    monkeypatch.setattr(models, "make_model", lambda *_: (Net(), read_colour, read_number))
    for step, value in (("2014", 0.0), ("2015", 1.0)):
        state = {"state_dict": {"w": torch.tensor(value)}, "tic": {"step": step}}
        weights.write(state, tmp_path / step / "checkpoints/epoch_2.pt")
    plan = {"model": "M", "checkpoints": 2, "start": str(tmp_path / "2014/checkpoints/epoch_2.pt")}
    plan |= {"coefficient": "chosen", "validation": []}

    def run(**settings):
        facts, path = patch(plan | settings, tmp_path / "2015"), str(tmp_path / "2015/checkpoints/patched.pt")
        assert facts["checkpoint"] == "checkpoints/patched.pt"
        assert weights.record(path) == {"step": "2015"}
        return facts, float(weights.load(path)["w"])

    return run


def test_the_coefficient_is_the_one_with_the_best_mean_retrieval(run_patch, validation):
    facts, weight = run_patch(validation=validation)
    assert facts["coefficient"] == 0.3
    assert weight == pytest.approx(0.3)
    by_coefficient = facts["mean_retrieval"]
    assert list(by_coefficient) == [str(a) for a in CANDIDATES]
    assert by_coefficient["0.3"] == 1.0
    assert by_coefficient["0.5"] == 0.5  # two of four captions are wrong, in both splits


@pytest.mark.parametrize(
    ("settings", "coefficient"), [({"coefficient": 0.75}, 0.75), ({"start": None}, 1), ({"validation": []}, 1)]
)
def test_a_given_coefficient_is_taken_and_the_first_steps_model_is_the_trained_one(run_patch, settings, coefficient):
    facts, weight = run_patch(**settings)
    assert facts == {"checkpoint": "checkpoints/patched.pt", "coefficient": coefficient}
    assert weight == coefficient


def test_nothing_to_choose_on_is_one_line(run_patch, tmp_path, validation):
    empty = [entry | {"held_out": 0} for entry in validation]
    with pytest.raises(TicError, match=r"no held-out sample to choose the coefficient on .*: give a --coeff"):
        run_patch(validation=empty)
    assert not (tmp_path / "2015/checkpoints/patched.pt").exists()
