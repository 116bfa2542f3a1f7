"""OpenCLIP's own flags, precision, and a batch in several passes: what they train, and what is refused."""

from itertools import chain, pairwise

import pytest
import real
import torch
from real import call, curve, kill_at, read_log, train, weights
from test_config import config as parse_words
from test_plans import config as config

from tic_clip import TicError
from tic_clip.models import MODEL_CONFIGS
from tic_clip.storage import read_json, write_json
from tic_clip.training.flags import OURS, PLANNED
from tic_clip.training.plan import make_plan
from tic_clip.training.step import choose_precision, open_clip_arguments

data, undisturbed = real.data, real.undisturbed


def parse(text, *more):
    return parse_words(f"--openclip_flags={text}", *more)


@pytest.mark.parametrize(
    ("text", "flags", "settings"),
    [
        ("", "", {}),
        ("--torchcompile --grad-clip-norm=1", "--grad-clip-norm 1 --torchcompile", {}),
        ("--grad-clip-norm 2 --grad-clip-norm 1 --torchcompile", "--grad-clip-norm 1 --torchcompile", {}),
        ("--aug-cfg scale='(0.5, 1)' color_jitter=0.1", "--aug-cfg 'scale=(0.5, 1)' color_jitter=0.1", {}),
        ("--lock-image --accum-freq 8", "--lock-image", {"accum_freq": 8}),
        ("--precision amp_bf16 --grad-checkpointing", "", {"precision": "amp_bf16", "grad_checkpointing": True}),
    ],
)
def test_flags_of_openclip_in_one_order_and_those_that_are_settings(text, flags, settings):
    found = parse(text)
    assert found.openclip_flags == flags
    assert {name: getattr(found, name) for name in OURS.values() if getattr(found, name) is not None} == settings
    assert parse(flags).openclip_flags == flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--grad-clip 1", "argument --openclip_flags: unrecognized arguments: --grad-clip"),  # no abbreviations
        ("--siglip -h", "unrecognized arguments: -h"),
        ("1", "unrecognized arguments: 1"),
        ("--grad-clip-norm much", "argument --grad-clip-norm: invalid float value: 'much'"),
        ("--aug-cfg scale", "is not a list of OpenCLIP's flags"),
        ("--name 'a", "is not a list of OpenCLIP's flags"),
        ("--force-image-size 32", "--force-image-size makes another model than --model names"),
        ("--train-data 1", "OpenCLIP's --train-data is set by the plan"),
        ("--accum-freq 0", "OpenCLIP's --accum-freq: '0' is not a whole number from 1"),  # a setting of ours
        ("--precision pure_bf16", "OpenCLIP's --precision: 'pure_bf16' is not fp32, amp or amp_bf16"),
    ],
)
def test_flags_that_cannot_be_are_one_line(text, message):
    with pytest.raises((SystemExit, TicError)) as ended:
        parse(text)
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_setting_is_given_once():
    with pytest.raises(TicError, match="--accum_freq is 4, and 2 among OpenCLIP's flags: give one"):
        parse("--accum-freq 2", "--accum_freq", "4")


def test_all_that_the_plan_sets_is_known_as_such(config):
    """Else a user's flag would silently win."""
    settings = {"method": "lwf", "init": "init", "keep_optimizer": True, "resampled": True, "workers": 0}
    plans = [make_plan(config(**settings, first_step="2016")), make_plan(config()), {"model": "ViT-B-16-SigLIP"}]
    words = [open_clip_arguments({**plans[1], **plan}, config(), 1, False) for plan in plans]
    flags = {word[2:] for word in chain.from_iterable(words) if str(word).startswith("--")}
    assert flags - PLANNED == {*OURS, "siglip"} - {"grad-checkpointing", "lr-scheduler"}


@pytest.mark.parametrize(
    ("batch", "settings", "ranks", "passes"),
    [
        (4096, {}, 1, 1),
        (4096, {"max_batch": 256}, 8, 2),
        (4096, {"max_batch": 255}, 8, 4),
        (90_112, {"max_batch": 1000}, 64, 2),  # 1,408 samples a rank
        (4096, {"accum_freq": 8}, 4, 8),
    ],
)
def test_the_largest_batch_that_fits_chooses_the_passes(config, batch, settings, ranks, passes):
    plan = make_plan(config(batch_size=batch, samples_per_step=10 * batch, **settings), ranks)
    assert plan["layout"] == {"ranks": ranks, "accum_freq": passes, "grad_checkpointing": False}
    words = open_clip_arguments(plan, config(), ranks, False)
    given = dict(pairwise(words))
    assert int(given["--batch-size"]) * passes * ranks == batch
    assert int(given["--accum-freq"]) == passes


def test_the_precision_is_the_runs_and_else_the_devices(tmp_path, monkeypatch):
    step = tmp_path / "2015"
    assert choose_precision(step) == {"precision": "fp32"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, supported in (("amp_bf16", True), ("amp", False)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported, **_: supported)
        assert choose_precision(step) == {"precision": name}
    write_json(step / "plan.json", {"precision": "amp"})  # nothing was trained
    write_json(tmp_path / "2014/plan.json", {"precision": "fp32"})
    write_json(tmp_path / "2014/done.json", {})
    assert choose_precision(step) == {"precision": "fp32"}
    write_json(step / "checkpoints/iteration_1.pt", {})
    assert choose_precision(step) == {"precision": "amp"}
    write_json(step / "plan.json", {})  # of an earlier version
    assert choose_precision(step) == {}


# --- Real training, of six iterations of 64 samples, each a block ---


def losses(out, step="2014"):
    return [line[2] for line in curve(out, step)]


def is_close(first, second):
    """Whether weights are equal but for rounding; OpenCLIP counts the temperature's gradient once a pass."""
    near = {name: 1e-4 if name == "logit_scale" else 2e-5 for name in first}
    return all(torch.allclose(value, second[name], rtol=0, atol=near[name]) for name, value in first.items())


def test_a_batch_in_passes_is_the_whole_batch(undisturbed, data, tmp_path):
    """Killed in between, it goes on with two ranks, in other passes and less memory; the samples of an update stay."""
    kill_at("iteration_2.pt", data, tmp_path, "2014", "--", "--accum-freq", "4", "--grad-clip-norm", "100")
    assert read_json(tmp_path / "2014/plan.json")["layout"]["accum_freq"] == 4
    assert not any("data_wait" in line for line in read_log(tmp_path, "2014"))
    message = call(data, tmp_path, "2014", "--accum_freq", "2")
    assert "was begun with openclip_flags ['--grad-clip-norm', '100'], now it is []" in message
    other = ("--max_batch", "16", "--grad_checkpointing", "--openclip_flags=--grad-clip-norm 100")
    done = train(data, tmp_path, "2014", *other, ranks=2)
    assert "Warning" not in done.stderr
    facts = read_json(tmp_path / "2014/done.json")
    assert facts["read"] == {"2014": {"read": 384}}
    assert (facts["plan"]["layout"]["ranks"], facts["plan"]["layout"]["accum_freq"]) == (2, 2)
    whole, _ = undisturbed
    assert [line[:2] for line in curve(tmp_path, "2014")] == [line[:2] for line in curve(whole, "2014")]
    assert losses(tmp_path)[:2] == pytest.approx(losses(whole)[:2], rel=1e-4)
    assert is_close(weights(tmp_path, "2014"), weights(whole, "2014"))


def test_bfloat16_on_a_cpu(data, tmp_path):
    """Its features have eight bits: the first loss is float32's to three digits and not to seven."""
    more = ("--batch_size", "2", "--samples_per_step", "4", "--", "--lr-scheduler=rsqrt", "--precision")
    for precision in ("fp32", "amp_bf16"):
        assert "Warning" not in train(data, tmp_path / precision, "2014", *more, precision).stderr
    first, second = (losses(tmp_path / precision) for precision in ("fp32", "amp_bf16"))
    assert (len(second), 1e-6 < abs(first[0] - second[0]) < 2e-2) == (2, True)
    assert {value.dtype for value in weights(tmp_path / "amp_bf16", "2014").values()} == {torch.float32}
    assert read_json(tmp_path / "amp_bf16/2014/done.json")["plan"]["precision"] == "amp_bf16"


def test_siglip_architectures_get_siglips_loss_alone_and_on_two_ranks(data, tmp_path):
    """A small one; two ranks make the weights of one."""
    tiny = read_json(MODEL_CONFIGS / "ViT-Tiny-8-48.json") | {"init_logit_bias": -10, "custom_text": True}
    write_json(tmp_path / "models/Tiny-SigLIP.json", tiny)
    before = f"import pathlib\nfrom tic_clip import models\nmodels.MODEL_CONFIGS = pathlib.Path('{tmp_path}/models')"
    for ranks in (1, 2):
        train(data, tmp_path / str(ranks), "2014", "--model", "Tiny-SigLIP", ranks=ranks, before=before)
    one, two = (weights(tmp_path / ranks, "2014") for ranks in "12")
    assert "logit_bias" in one
    assert is_close(one, two)
    assert losses(tmp_path / "1")[0] > losses(tmp_path / "1")[-1]
