"""The table of scales, and the flags that settings are made of."""

from dataclasses import asdict

import pytest

from tic_clip import TicError
from tic_clip.cli import Parser
from tic_clip.training.config import SCALES, Config, add_flags, config_from, get_scale, to_flags
from tic_clip.training.plan import choose_block

TABLE = """
tic_tiny    ViT-Tiny-12-48     64     100          6,400  1e-3      30  15
tic_debug   ViT-B-32        1,024   1,000      1,024,000  1e-4     500   0
tic_medium  ViT-B-16        4,096   4,500     18,432,000  5e-4     500   0
tic_large   ViT-B-16        8,192  22,500    184,320,000  5e-4     500   0
tic_xlarge  ViT-B-16       90,112  20,500  1,847,296,000  1e-3  10,000   0
tic_yfcc15m ViT-B-16        1,024  30,000     30,720,000  5e-4   2,000   0
tic_redcaps ViT-B-16        1,024  24,000     24,576,000  5e-4   2,000   0
"""


@pytest.mark.parametrize("row", TABLE.strip().splitlines())
def test_the_scales(row):
    name, model, *numbers = row.replace(",", "").split()
    scale = SCALES[name]
    batch, iterations, samples, learning_rate, warmup, next_warmup = map(float, numbers)
    assert (scale.model, scale.batch_size, scale.learning_rate) == (model, batch, learning_rate)
    assert scale.samples_per_step == samples == batch * iterations
    assert (scale.warmup, scale.next_warmup) == (warmup, next_warmup)
    assert scale.max_kept >= scale.checkpoints
    interval = iterations // scale.checkpoints
    assert scale.checkpoints * interval == iterations
    number, size = choose_block(int(interval), scale.resume_every)  # no iteration is lost
    assert number * size == interval
    if name != "tic_tiny":
        assert (scale.weight_decay, scale.beta2, scale.checkpoints, scale.grad_checkpointing) == (0.2, 0.98, 5, True)


def test_a_scale_of_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 64\nsamples_per_step: 6400\nwarmup: 3\nlearning_rate: 1e-4\nmodel: ViT-B-32\n")
    scale = get_scale(str(file))
    assert (scale.batch_size, scale.learning_rate, scale.model) == (64, 1e-4, "ViT-B-32")
    assert (scale.beta2, scale.checkpoints) == (0.98, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples_per_step: 1\nwarmup: 1", "missing required field `batch_size`"),
        ("batch_size: 0\nsamples_per_step: 1\nwarmup: 1", "`int` >= 1 - at `$.batch_size`"),
        ("batch_size: 1\nsamples_per_step: 1\nwarmup: 1\nlearning_rate: fast", "at `$.learning_rate`"),
        ("batch: 64", "unknown field `batch`; the keys are batch_size, samples_per_step, "),
        ("- 64", "Expected `object`, got `array`"),
        ("a: [1", "line 1: expected ',' or ']'"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_key(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(TicError) as error:
        get_scale(str(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


NAMES = ["--method", "lwf", "--scale", "tic_tiny", "--step", "2014", "--data_dir", "d", "--output_dir", "o"]


def config(*words):
    parser = Parser(None)
    add_flags(parser)
    return config_from(parser.parse_args([*NAMES, *words]))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("", {"replay": None, "seed": 0}),
        ("--budget 1,1/2,1.5", {"budget": (1, 0.5, 1.5)}),
        ("--next_warmup 0 --keep_optimizer --resampled", {"next_warmup": 0, "keep_optimizer": True, "resampled": True}),
        ("--keep_optimizer no --resampled 0", {"keep_optimizer": False, "resampled": False}),
        ("--report_to tensorboard,wandb --remote s3://b/x", {"report_to": "tensorboard,wandb", "remote": "s3://b/x"}),
        ("--mixture x --replay 0.5 --resume_every 7", {"mixture": "x", "replay": 0.5, "resume_every": 7}),
        ("--lr 5e-4,1e-4 --warmup 5,0 --schedule wsd", {"lr": (5e-4, 1e-4), "warmup": (5, 0), "schedule": "wsd"}),
    ],
)
def test_flags_are_fields(words, value):
    """What is not given has the default of the field."""
    found = config(*words.split())
    names = {"method": "lwf", "scale": "tic_tiny", "step": "2014", "data_dir": "d", "output_dir": "o"}
    assert asdict(found) == asdict(Config(**names)) | value
    assert config(*to_flags(found)) == found


@pytest.mark.parametrize(
    ("flag", "values", "message"),
    [
        ("batch_size", ("0", "-64", "1.5", "many"), "is not a whole number from 1"),
        ("seed", ("-1",), "is not a whole number from 0"),
        ("save_minutes", ("-1", "nan", "inf"), "is not a number from 0"),
        ("coefficient", ("1.5",), "is not a number from 0 to 1"),
        ("budget", ("1,,2", "a", "", "nan", "1/0", "1e400", "1,0"), "is not a list of numbers above 0"),
        ("lr", ("0", "5e-4,", "fast"), "is not a list of numbers above 0"),
        ("warmup", ("-1", "1.5", "5,", "5,-1"), "is not a whole number from 0, or a list of them"),
        ("cooldown", ("1", "-0.1", "nan"), "is not a number from 0, less than 1"),
        ("resampled", ("maybe",), "is not one of 0, 1, no, yes"),
        ("image_backend", ("opencv",), "'opencv' is not torchvision or pil"),
        ("report_to", ("paper",), "is not tensorboard, wandb or both"),
        ("data_dir", ("",), "is not a folder or a URL"),
        ("model", ("--",), "'--' is not a value"),
        ("output_dir", ("", "s3://b/run"), "is not a local folder; --remote gets copies"),
        ("remote", ("s3://", "ftp://x/y"), "is neither a local path nor the URL of an s3://"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_flag_and_value(flag, values, message):
    for value in values:
        with pytest.raises(SystemExit) as ended:
            config(f"--{flag}={value}")
        assert str(ended.value).startswith(f"error: argument --{flag}: ")
        assert value in ended.value.code
        assert message in ended.value.code
        assert "\n" not in ended.value.code
