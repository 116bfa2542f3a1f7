"""The models of a run, released ones, and what OpenCLIP can load."""

from contextlib import nullcontext

import pytest

from tic_clip import TicError, models
from tic_clip.models import check_pretrained, named_model, released_models
from tic_clip.runs import models_of
from tic_clip.storage import write_json

ARCH = "ViT-Tiny-8-48"


def finish(run, step, checkpoint="checkpoints/epoch_2.pt", **plan):
    plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": step, "samples_seen": 64} | plan
    (run / step).mkdir(parents=True)
    write_json(run / step / "done.json", {"plan": {"model": ARCH, **plan}, "checkpoint": checkpoint})


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("ViT-B-32 laion2b_s34b_b79k", None),
        ("ViT-B-32-quickgelu openai", "is a ViT-B-32-quickgelu, not a ViT-B-32"),
        ("ViT-B-32 openai", "were trained with QuickGELU: say ViT-B-32-quickgelu openai"),
        ("ViT-B-32 nope", "nope is neither a checkpoint file nor a pretrained tag of ViT-B-32"),
        ("hf-hub:me/model", None),
    ],
)
def test_weights_that_training_can_start_from(init, message):
    with pytest.raises(TicError, match=message) if message else nullcontext():
        check_pretrained(init, "ViT-B-32")


def test_models_of_a_run_in_the_order_of_its_steps(tmp_path):
    (tmp_path / "2019").mkdir()  # begun and not finished
    with pytest.raises(TicError, match=r"no STEP/done.json"):
        models_of(str(tmp_path))
    months = {"benchmark": "datacomp", "model": "ViT-B-16"}
    for step in ("2018", "2014-2016"):  # from before plans had MACs
        finish(tmp_path, step, **months)
    finish(tmp_path, "2017", macs_seen=123, **months)
    first, second, third = models_of(str(tmp_path))
    assert [first.name, second.name, third.name] == ["oracle 2014-2016", "oracle 2017", "oracle 2018"]
    assert second.weights == str(tmp_path / "2017" / "checkpoints" / "epoch_2.pt")
    assert second.arch == "ViT-B-16"
    about = {"benchmark": "datacomp", "method": "oracle", "scale": "tic_tiny", "samples_seen": 64, "seed": None}
    about |= {"filter": None, "settings": second.about["settings"]}
    assert second.about == {**about, "step": "2017", "macs_seen": 123}
    assert first.about == {**about, "step": "2014-2016", "macs_seen": None}


@pytest.mark.parametrize("text", ["{}", "null", "half a"])
def test_a_damaged_done_json_is_named(tmp_path, text):
    finish(tmp_path, "2014")
    (tmp_path / "2014/done.json").write_text(text)
    with pytest.raises(TicError, match=r"2014/done.json is (damaged|not )"):
        models_of(str(tmp_path))


def test_runs_that_differ_in_the_seed_only_have_the_same_settings(tmp_path):
    changes = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 1, "buffer": 2}, "d": {"filter": "bestpool"}}
    for name, change in changes.items():
        finish(tmp_path / name, "2014", **change)
    a, b, c, d = (models_of(str(tmp_path / name))[0].about["settings"] for name in changes)
    assert a == b
    assert len({a, c, d}) == 3


def test_the_checkpoints_inside_a_step(tmp_path):
    sizes = {"checkpoints": 3, "samples": 300, "samples_seen": 500, "macs": 3e6, "macs_seen": 5e6}
    finish(tmp_path, "2015", "checkpoints/epoch_3.pt", **sizes)
    for name in ("epoch_1", "epoch_2", "epoch_3", "iteration_7"):
        write_json(tmp_path / f"2015/checkpoints/{name}.pt", {})
    first, second, last = models_of(str(tmp_path), every=True)
    assert [first.name, second.name, last.name] == ["oracle 2015 epoch_1", "oracle 2015 epoch_2", "oracle 2015"]
    assert first.weights.endswith("2015/checkpoints/epoch_1.pt")
    seen = [(each.about["samples_seen"], each.about["macs_seen"], each.about.get("final")) for each in (first, second)]
    assert seen == [(300, 3e6, False), (400, 4e6, False)]
    assert (last.about["samples_seen"], "final" in last.about) == (500, False)
    assert models_of(str(tmp_path)) == [last]


def test_released_models(tmp_path):
    folder = tmp_path / "TiC-CLIP-bestpool-oracle"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("TiC-CLIP-basic", "basic-oracle", "run"):
        with pytest.raises(TicError, match="the released models are TiC-CLIP-basic-cumulative, "):
            released_models(str(tmp_path / name))
    with pytest.raises(TicError, match="has no checkpoints"):
        released_models(str(folder))
    for year in (2022, 2016, 2019):
        (folder / f"checkpoints/{year}.pt").touch()
    models = released_models(f"{folder}/")
    steps = ["2014-2016", "2019", "2022"]
    assert [model.name for model in models] == [f"bestpool-oracle {step}" for step in steps]
    about = {"benchmark": "datacomp", "method": "oracle", "filter": "bestpool", "scale": "released"}
    assert [model.about for model in models] == [{**about, "step": step} for step in steps]
    assert models[0].weights == f"{folder}/checkpoints/2016.pt"
    assert {model.arch for model in models} == {"ViT-B-16"}


def test_models_by_name(tmp_path):
    (tmp_path / "my_model.pt").touch()
    texts = {
        "ViT-B-16 openai": ("ViT-B-16", "openai", "openai"),
        "ViT-B-32  laion2b_s34b_b79k ": ("ViT-B-32", "laion2b_s34b_b79k", "laion2b"),
        f"{ARCH} {tmp_path}/my_model.pt": (ARCH, f"{tmp_path}/my_model.pt", ARCH),
        "hf-hub:apple/CLIP-x": ("hf-hub:apple/CLIP-x", "", "apple"),
    }
    for text, (arch, weights, family) in texts.items():
        model = named_model(text, "emoji")
        assert (model.arch, model.weights, model.name) == (arch, weights, text.strip())
        assert model.about == {"benchmark": "emoji", "family": family}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'a model is "ARCH FILE", "ARCH TAG" as in "ViT-B-16 openai", or "hf-hub:OWNER/NAME", not \'\''),
        ("ViT-B-16", "a model is"),
        ("hf-hub:apple", "a model is"),
        ("ViT-Z openai", "OpenCLIP has no model 'ViT-Z'"),
        ("ViT-b-16 openai", "OpenCLIP has no model 'ViT-b-16'; similar ones are ViT-B-16,"),
        ("RN50 laion2b", r"neither a checkpoint file nor a pretrained tag of RN50 \(openai, yfcc15m, cc12m\)"),
        ("hf-hub:apple/x openai", "hf-hub:apple/x has its own weights"),
        ("ViT-B-16-SigLIP2 webli", "'ViT-B-16-SigLIP2'; .* bash setup.sh --models lets scripts/evaluate.py have"),
    ],
)
def test_models_that_cannot_be(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "NEWER", tmp_path / "none")  # no later OpenCLIP
    with pytest.raises(TicError, match=message):
        named_model(text, "datacomp")


def test_weights_of_another_architecture_are_not_saved_to_start_from(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_: models.make_model("ViT-Tiny-8-48", "cpu"))
    with pytest.raises(TicError, match=r"hf-hub:me/model is not a ViT-B-32: .*; set --model to its architecture"):
        models.save_pretrained("hf-hub:me/model", "ViT-B-32", str(tmp_path / "x.pt"))
    assert not list(tmp_path.iterdir())
