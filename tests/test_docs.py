"""The documents: their code does what they say."""

import re
from fractions import Fraction
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT

from tic_clip import weights
from tic_clip.storage import write_json
from tic_clip.training import losses, methods, step
from tic_clip.training.config import Config
from tic_clip.training.plan import make_plan

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_method.md").read_text(), re.DOTALL)


@pytest.fixture
def added():
    with patch.dict(methods.METHODS), patch.dict(step.FINISH), patch.dict(losses.TERMS):
        names = {}
        for example in EXAMPLES:
            exec(example, names)
        yield methods.METHODS


def test_an_ending_as_the_document_adds_it(added, tmp_path):
    for step_name, value in (("a", 1.0), ("b", 4.0)):
        state = {"state_dict": {"w": torch.tensor([value])}, "tic": {"step": step_name}}
        weights.write(state, tmp_path / f"{step_name}/checkpoints/epoch_2.pt")
    for start, expected in ((None, 4), (str(tmp_path / "a/checkpoints/epoch_2.pt"), 2.5)):
        facts = step.FINISH["midway"]({"checkpoints": 2, "start": start}, tmp_path / "b")
        path = str(tmp_path / "b" / facts["checkpoint"])
        assert weights.load(path)["w"].item() == expected
        assert weights.record(path) == {"step": "b"}


def test_a_term_of_the_loss_as_the_document_adds_it(added, tmp_path):
    weights.write({"state_dict": {"w": torch.tensor([1.0, 4.0])}}, tmp_path / "last.pt")
    plan = {"method": "pull", "teacher": None, "loss_weight": 0.5, "start": str(tmp_path / "last.pt")}
    loss = losses.method_loss(lambda **_: {"contrastive_loss": 1}, plan, {"w": torch.tensor([2.0, 2.0])})
    assert loss() == {"contrastive_loss": 1, "pull_loss": 2.5}  # 0.5 · (1 + 4)
    assert losses.method_loss("stock", plan | {"start": None}, {}) == "stock"


def test_another_mixture_as_the_document_adds_it(added):
    data = methods.METHODS["last-two"].data
    assert [data([10, 20, 30][: t + 1], Fraction(1)) for t in range(3)] == [[10], [10, 20], [0, 20, 30]]


def test_a_method_that_is_added_is_planned_and_trained_by_its_name(added, tmp_path):
    """Through the plan: the table is looked up by name everywhere."""
    for year in ("2014", "2015", "2016"):
        write_json(tmp_path / "tic/emoji/yearly/train" / year / "sizes.json", {"00000000.tar": 100})
    names = {"benchmark": "emoji", "scale": "tic_tiny", "step": "2016", "data_dir": str(tmp_path), "output_dir": "out"}
    plan = make_plan(Config(method="last-two", **names))
    assert [source["name"] for source in plan["sources"]] == ["2015", "2016"]
    plan = make_plan(Config(method="midway", **names))
    assert plan["start"] == "out/2015/checkpoints/epoch_2.pt"
    assert "coefficient" not in plan
    assert make_plan(Config(method="pull", loss_weight=2.0, **names))["loss_weight"] == 2
    assert [source["used"] for source in plan["sources"]] == [100, 100, 100]


def test_the_rows_fields_are_those_of_the_document():
    text = (ROOT / "docs/adding_a_method.md").read_text()
    fields = re.findall(r"^\| `(\w+)`", text, re.MULTILINE)
    assert fields == [name for name in methods.Method.__dataclass_fields__ if name != "name"]
