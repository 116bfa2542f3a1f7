"""Real training: what a step leaves, restart after kill -9 at any block, two ranks, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tic_clip import TicError
from tic_clip.evaluation import models_of
from tic_clip.plans import Request, make_plan
from tic_clip.shards import read_sizes
from tic_clip.storage import read_json, write_json
from tic_clip.tarshard import write_shard
from tic_clip.timeline import get_benchmark
from tic_clip.training import open_clip_arguments, run_step

ROOT = Path(__file__).parent.parent
SIZES = {"2014": 300, "2015": 100, "2016": 100, "2017-2018": 500}


def fake_split(folder, size):
    write_json(folder / "sizes.json", {"00000000.tar": size})


@pytest.fixture
def fake_data(tmp_path):
    """Tables without shards: all that a plan looks at."""
    read_sizes.cache_clear()
    for step, size in SIZES.items():
        fake_split(tmp_path / "data/tic/emoji/yearly/train" / step, size)
    return str(tmp_path / "data")


def request(fake_data, **changes):
    settings = {"benchmark": "emoji", "method": "cumulative", "scale": "tic_tiny", "step": "2016"}
    return Request(**{**settings, "data_dir": fake_data, "output_dir": "out", "samples_per_step": 1280, **changes})


def test_a_step_needs_the_one_that_it_starts_from(fake_data, tmp_path):
    with pytest.raises(TicError, match="that step is not done: train it first"):
        run_step(request(fake_data, output_dir=str(tmp_path / "out")), rank=0, world_size=1)
    assert not (tmp_path / "out").exists()


def test_arguments_of_open_clip(fake_data):
    plan = make_plan(request(fake_data))
    words = open_clip_arguments(plan, request(fake_data), 2, False)
    assert words[words.index("--batch-size") + 1] == "32"
    assert words[words.index("--train-data") + 1] == "out/2016/plan.json"
    assert words[words.index("--dist-backend") + 1] == "gloo"
    assert "--delete-previous-checkpoint" in words
    assert "--grad-checkpointing" not in words
    resampled = request(fake_data, resampled=True)
    words = open_clip_arguments(make_plan(resampled), resampled, 1, True)
    assert words[words.index("--train-num-samples") + 1] == "640"
    assert words[words.index("--precision") + 1] == "amp"
    assert "--dataset-resampled" in words
    shards = words[words.index("--train-data") + 1].split("::")
    assert [Path(shard).parent.name for shard in shards] == ["2014", "2015", "2016"]


def test_what_cannot_be_trained_is_refused_before_anything_is_written(fake_data, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(TicError, match="the batch of 64 does not divide among 3 processes"):
        run_step(request(fake_data, step="2014", output_dir=out), rank=0, world_size=3)
    for change, message in (
        ({"seed": -1}, "a seed is from 0"),
        ({"seed": 2**32}, "a seed is from 0"),
        ({"workers": -1}, "at least 0"),
    ):
        with pytest.raises(TicError, match=message):
            run_step(request(fake_data, step="2014", output_dir=out, **change), rank=0, world_size=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "null", "half a"])
def test_a_damaged_done_json_is_named(fake_data, tmp_path, text):
    wanted = request(fake_data, step="2014", output_dir=str(tmp_path))
    write_json(tmp_path / "2014/plan.json", make_plan(wanted))
    (tmp_path / "2014/done.json").write_text(text)
    with pytest.raises(TicError, match=r"2014/done.json is (damaged|not valid JSON)"):
        run_step(wanted, rank=0, world_size=1)
    with pytest.raises(TicError, match=r"2014/done.json is (damaged|not valid JSON)"):
        models_of(str(tmp_path))


# Real training, a few batches of noise pictures; each launch costs about ten seconds, most of it imports.

FLAGS = ["--benchmark", "emoji", "--method", "cumulative", "--scale", "tic_tiny", "--samples_per_step", "384"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for step, count in (("2014", 90), ("2015", 70)):
        split = folder / get_benchmark("emoji").root / "train" / step
        content = []
        for i in range(count):
            Image.fromarray(noise.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / "picture.png")
            caption = f"picture {i} of {step}"
            content.append((f"{i:032x}-0", {"png": (folder / "picture.png").read_bytes(), "txt": caption.encode()}))
        write_shard(split / "00000000.tar", content)
        write_json(split / "sizes.json", {"00000000.tar": count})
    return folder


def command(data, out, step, *more, launcher=()):
    script = [str(ROOT / "scripts/train.py"), *FLAGS, "--data_dir", str(data), "--output_dir", str(out)]
    return [sys.executable, *launcher, *script, "--step", step, *more]


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, cwd=ROOT)


def weights(out, step):
    return torch.load(out / step / "checkpoints/epoch_2.pt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done = train(data, out, "2014")
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_step_leaves_its_plan_one_checkpoint_and_done(undisturbed):
    out, done = undisturbed
    facts = read_json(out / "2014/done.json")
    assert facts["plan"] == read_json(out / "2014/plan.json")
    assert facts["samples_seen"] == 384
    assert facts["plan"]["pins"]["open_clip_torch"] == "2.24.0"
    assert [file.name for file in (out / "2014/checkpoints").iterdir()] == ["epoch_2.pt"]  # tic_tiny keeps the last
    assert "train 2014, 2 of 2: 100%" in done.stderr
    assert "INFO" not in done.stderr
    assert "Warning" not in done.stderr


def test_a_step_that_is_done_is_skipped_before_anything_is_loaded(undisturbed, data):
    out, _ = undisturbed
    before = (out / "2014/done.json").stat().st_mtime_ns
    done = train(data, out, "2014")
    assert (done.returncode, done.stdout) == (0, "2014: done already\n")
    assert (out / "2014/done.json").stat().st_mtime_ns == before
    refused = train(data, out, "2014", "--seed", "1")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "was begun with seed 0, now it is 1" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_killed_after_a_checkpoint_it_ends_with_the_same_weights(undisturbed, data, tmp_path):
    out, _ = undisturbed
    process = subprocess.Popen(
        command(data, tmp_path, "2014"), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (tmp_path / "2014/checkpoints/epoch_1.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "2014/done.json").exists()
    assert train(data, tmp_path, "2014").returncode == 0
    log = (tmp_path / "2014/out.log").read_text()
    assert "resuming checkpoint" in log.rsplit("Running with a single process", 1)[1]
    expected, found = weights(out, "2014"), weights(tmp_path, "2014")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_ranks_train_the_next_step_from_the_last_model(undisturbed, data):
    """gloo on the CPU; the weights stay those of one model, and both ranks take the same number of batches."""
    out, _ = undisturbed
    port = 29500 + os.getpid() % 1000
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    done = train(data, out, "2015", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    log = (out / "2015/out.log").read_text()
    assert "loaded checkpoint" in log
    assert "epoch 0" in log
    assert "Start epoch 1" in log
    assert read_json(out / "2015/done.json")["plan"]["start"] == str(out / "2014/checkpoints/epoch_2.pt")
    first, second = weights(out, "2014"), weights(out, "2015")
    assert any(not torch.equal(first[name], second["module." + name]) for name in first)


def test_sampling_with_replacement_has_a_progress_bar_too(data, tmp_path):
    done = train(data, tmp_path, "2014", "--dataset_resampled", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "train 2014, 2 of 2: 100%" in done.stderr
    assert read_json(tmp_path / "2014/done.json")["plan"]["sampling"] == "resampled"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples_per_step", "abc"], "invalid int value: 'abc' (--help shows the flags)"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--scale", "tic_huge"], "unknown scale 'tic_huge'"),
        (["--step", "1999"], "unknown step '1999'"),
        (["--data_dir", "/nowhere"], "/nowhere/tic/emoji/yearly/train/2014 is missing"),
        (["--samples_per_step", "1"], "less than 2 checkpoints"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(data, tmp_path, more, message):
    done = train(data, tmp_path / "out", "2014", *more)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(data, tmp_path):
    done = train(data, tmp_path / "out", "2015", "--dry_run")
    assert "2014: 56.2%, 216 samples of 90 (2.40 each)" in done.stdout
    assert not (tmp_path / "out").exists()


def test_plans_are_json(undisturbed):
    assert json.loads((undisturbed[0] / "2014/plan.json").read_text())["sampling"] == "exact"
