"""Interpolation and the choice of its coefficient; tests/test_training.py trains with it."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tic_clip import TicError, weights
from tic_clip.data.tar import write_shard
from tic_clip.storage import write_json
from tic_clip.training import patching
from tic_clip.training.patching import CANDIDATES, held_out, interpolate, patch, scores


@pytest.mark.parametrize(("size", "held"), [(0, 0), (19, 0), (20, 1), (702, 35), (40_000, 2_000), (10**9, 2_000)])
def test_a_twentieth_is_held_out_and_at_most_2000(size, held):
    assert held_out(size) == held


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


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (i, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def validation(tmp_path):
    """Two splits of 40 and 25 samples in shards of 15 and 10; a sample's number is its colour and its caption."""
    entries, number = [], 0
    for name, shards in (("2014", [15, 25]), ("2015", [10, 15])):
        for shard, size in enumerate(shards):
            content = []
            for _ in range(size):
                content.append((f"{number:032x}-0", {"png": picture(number), "txt": str(number).encode()}))
                number += 1
            write_shard(tmp_path / name / f"{shard:08d}.tar", content)
        write_json(tmp_path / name / "sizes.json", {f"{i:08d}.tar": size for i, size in enumerate(shards)})
        entries.append({"name": name, "split": str(tmp_path / name), "size": sum(shards), "held_out": 4})
    return entries


def numbers(entry, size=256):
    pairs = patching.batches(
        entry, lambda image: torch.tensor(image.getpixel((0, 0))[0]), lambda t: [torch.tensor(int(t))], size
    )
    return [[tuple(pair) for pair in zip(images.tolist(), texts.tolist(), strict=True)] for images, texts in pairs]


def test_the_tails_of_the_shards_are_held_out(validation):
    """4 of 40 in proportion to 15 and 25: heads of 13.5 and 22.5, the first rounded up, leave 1 and 3."""
    assert numbers(validation[0]) == [[(i, i) for i in (14, 37, 38, 39)]]
    assert [len(batch) for batch in numbers(validation[1], size=3)] == [3, 1]
    trained = {i for i in range(40)} - {14, 37, 38, 39}
    assert len(trained) == validation[0]["size"] - validation[0]["held_out"]


def test_training_never_reads_what_is_held_out(validation):
    from tic_clip.training.sampling import sources_of

    entry = validation[0]
    plan = {"sources": [{**entry, "used": entry["size"] - entry["held_out"], "samples": 99}]}
    (source,) = sources_of(plan)
    assert source.sizes.tolist() == [14, 22]  # 14 and 37, 38, 39 lie behind these


class Net:
    """Features that are right for an image the more, the nearer its weight is to ``best``."""

    best = 0.3

    def load_state_dict(self, state):
        self.error = abs(float(state["w"]) - self.best)

    def encode_image(self, batch, normalize):
        return torch.nn.functional.one_hot(batch.long(), 128).float()

    def encode_text(self, batch, normalize):
        wrong = batch.clone()
        count = min(len(batch), round(self.error * 10))
        wrong[:count] = batch[:count].roll(1) if count > 1 else batch[:count] + 1
        return torch.nn.functional.one_hot(wrong.long(), 128).float()


@pytest.fixture
def net(monkeypatch):
    from tic_clip import models

    def make(*_):
        return Net(), lambda image: torch.tensor(image.getpixel((0, 0))[0]), lambda t: [torch.tensor(int(t))]

    monkeypatch.setattr(models, "make_model", make)


def test_the_coefficient_is_the_one_with_the_best_mean_retrieval(net, validation):
    plan = {"model": "M", "validation": validation}
    found = scores(plan, {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)})
    assert list(found) == list(CANDIDATES)
    assert max(found, key=found.get) == 0.3
    assert found[0.3] == 1.0
    assert found[0.5] == pytest.approx(np.mean([0.5, 0.5]))  # two of four captions are wrong, in both splits


def make_run(tmp_path, **plan):
    for step, value in (("2014", 0.0), ("2015", 1.0)):
        state = {"state_dict": {"w": torch.tensor(value)}, "tic": {"step": step}}
        weights.write(state, tmp_path / step / "checkpoints/epoch_2.pt")
    start = str(tmp_path / "2014/checkpoints/epoch_2.pt")
    return {"model": "M", "checkpoints": 2, "start": start, "coefficient": "chosen", "validation": [], **plan}


def read(tmp_path):
    path = str(tmp_path / "2015/checkpoints/patched.pt")
    return float(weights.load(path)["w"]), weights.record(path)


def test_the_chosen_coefficient_and_all_scores_are_recorded(net, tmp_path, validation):
    facts = patch(make_run(tmp_path, validation=validation), tmp_path / "2015")
    assert (facts["checkpoint"], facts["coefficient"]) == ("checkpoints/patched.pt", 0.3)
    assert len(facts["mean_retrieval"]) == len(CANDIDATES)
    assert read(tmp_path) == (pytest.approx(0.3), {"step": "2015"})


def test_a_given_coefficient_is_taken(tmp_path):
    assert patch(make_run(tmp_path, coefficient=0.75), tmp_path / "2015")["coefficient"] == 0.75
    assert read(tmp_path)[0] == 0.75


def test_the_first_steps_model_is_the_trained_one(tmp_path):
    assert patch(make_run(tmp_path, start=None), tmp_path / "2015")["coefficient"] == 1
    assert read(tmp_path)[0] == 1


def test_nothing_to_choose_on_is_one_line(net, tmp_path, validation):
    for entry in validation:
        entry["held_out"] = 0
    with pytest.raises(TicError, match="no held-out sample to choose the coefficient on: give a --coefficient"):
        patch(make_run(tmp_path, validation=validation), tmp_path / "2015")
    assert not Path(tmp_path / "2015/checkpoints/patched.pt").exists()
