"""Real training: what a step leaves, restart after kill -9 at any block, two ranks, bad input."""

import json
import os
import shutil
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
from tic_clip.benchmarks import get_benchmark
from tic_clip.data.tar import write_shard
from tic_clip.models import macs_per_sample
from tic_clip.runs import OPEN_CLIP_COMMIT, models_of
from tic_clip.storage import read_json, write_json
from tic_clip.training.patching import CANDIDATES
from tic_clip.training.plan import Request, make_plan
from tic_clip.training.step import open_clip_arguments, run_step

ROOT = Path(__file__).parent.parent
SIZES = {"2014": 300, "2015": 100, "2016": 100, "2017-2018": 500}


def fake_split(folder, size):
    write_json(folder / "sizes.json", {"00000000.tar": size})


@pytest.fixture
def fake_data(tmp_path):
    """Tables without shards: all that a plan looks at."""
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


def arguments(fake_data, cuda=False, world_size=1, **changes):
    wanted = request(fake_data, **changes)
    return open_clip_arguments(make_plan(wanted, world_size), wanted, world_size, cuda)


def value(words, flag):
    return words[words.index(flag) + 1]


def test_arguments_of_open_clip(fake_data):
    words = arguments(fake_data, world_size=2, samples_per_step=7680)
    assert value(words, "--batch-size") == "32"
    assert value(words, "--train-data") == "out/2016/plan.json"
    assert (value(words, "--epochs"), value(words, "--train-num-samples")) == ("6", "1280")  # blocks
    assert (value(words, "--dist-backend"), value(words, "--precision")) == ("gloo", "fp32")
    assert value(words, "--dataset-type") == "exact"
    assert value(words, "--resume") == "out/2015/checkpoints/epoch_2.pt"
    assert value(words, "--report-to") == ""
    assert not {"--grad-checkpointing", "--keep-optimizer", "--distill-model", "--dataset-resampled"} & set(words)


def test_arguments_of_sampling_with_replacement(fake_data):
    words = arguments(fake_data, resampled=True, cuda=True)
    assert (value(words, "--dataset-type"), value(words, "--train-data")) == ("webdataset", "out/2016/plan.json")
    assert value(words, "--precision") == "amp"
    assert "--dataset-resampled" in words


def test_arguments_of_distillation_and_of_an_optimizer_that_is_kept(fake_data):
    words = arguments(fake_data, method="lwf", policy="kept", report_to="tensorboard")
    assert value(words, "--distill-model") == "ViT-Tiny-8-48"
    assert value(words, "--distill-pretrained") == value(words, "--resume") == "out/2015/checkpoints/epoch_2.pt"
    assert value(words, "--report-to") == "tensorboard"
    assert "--keep-optimizer" in words


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


# Real training, six iterations of noise pictures; each launch costs about ten seconds, most of it imports.

FLAGS = ["--benchmark", "emoji", "--scale", "tic_tiny", "--samples_per_step", "384", "--block", "1"]


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
    method = [] if "--method" in more else ["--method", "cumulative"]
    script = [str(ROOT / "scripts/train.py"), *FLAGS, *method, "--data_dir", str(data), "--output_dir", str(out)]
    return [sys.executable, *launcher, *script, "--step", step, *more]


def train(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, cwd=ROOT)


def two_ranks():
    """gloo on the CPU."""
    return ("-m", "tic_clip.launch", "--nproc-per-node", "2", "--master-port", str(29500 + os.getpid() % 1000))


def weights(out, step, name="epoch_2.pt"):
    state = torch.load(out / step / "checkpoints" / name, weights_only=True)["state_dict"]
    return {name.removeprefix("module."): value for name, value in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def curve(out, step):
    lines = [json.loads(line) for line in (out / step / "train.log.jsonl").read_text().splitlines()]
    return [(line["step"], line["samples_seen"], line["loss"], line["lr"]) for line in lines]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    done = train(data, out, "2014")
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_step_leaves_its_plan_checkpoints_log_and_done(undisturbed):
    out, done = undisturbed
    facts = read_json(out / "2014/done.json")
    assert facts["plan"] == read_json(out / "2014/plan.json")
    assert facts["samples_seen"] == 384
    assert facts["read"] == {"2014": {"read": 384}}
    assert facts["macs_seen"] == facts["plan"]["macs"] == 384 * macs_per_sample("ViT-Tiny-8-48")
    assert facts["plan"]["pins"]["open_clip"] == OPEN_CLIP_COMMIT
    assert [file.name for file in sorted((out / "2014/checkpoints").iterdir())] == ["epoch_1.pt", "epoch_2.pt"]
    assert [line[:2] for line in curve(out, "2014")] == [(i, 64 * i) for i in range(1, 7)]
    assert "train 2014: 100%" in done.stderr
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


def kill_at(checkpoint, *args):
    """Start a step that writes a checkpoint after each block, and kill it when it has written this one."""
    process = subprocess.Popen(
        command(*args, "--save_every", "64", "--max_kept", "9"),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    out, step = args[1:3]
    while not (out / step / "checkpoints" / checkpoint).exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / step / "done.json").exists()


@pytest.mark.parametrize("checkpoint", ["iteration_2.pt", "epoch_1.pt", "iteration_4.pt"])
def test_killed_anywhere_it_ends_with_the_same_losses_and_weights(undisturbed, data, tmp_path, checkpoint):
    out, _ = undisturbed
    kill_at(checkpoint, data, tmp_path, "2014")
    assert train(data, tmp_path, "2014").returncode == 0
    log = (tmp_path / "2014/out.log").read_text()
    assert "resuming checkpoint" in log.rsplit("Running with a single process", 1)[1]
    assert curve(tmp_path, "2014") == curve(out, "2014")
    assert same(weights(tmp_path, "2014"), weights(out, "2014"))
    assert read_json(tmp_path / "2014/done.json")["read"] == {"2014": {"read": 384}}
    assert not list((tmp_path / "2014/checkpoints").glob("iteration_*"))


def test_killed_it_goes_on_with_other_ranks_and_workers_from_the_checkpoint_that_is_whole(data, tmp_path):
    """The newest one is damaged: that is said, and each sample is read as often all the same."""
    kill_at("iteration_4.pt", data, tmp_path, "2014")
    for path in (tmp_path / "2014/checkpoints").glob("iteration_[45].pt"):
        path.write_bytes(path.read_bytes()[:1000])
    done = train(data, tmp_path, "2014", "--workers", "1", launcher=two_ranks())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration_4.pt is damaged" in done.stderr
    assert "it is passed over for the one before" in done.stderr
    assert done.stderr.count("iteration_4.pt is damaged") == 1
    assert read_json(tmp_path / "2014/done.json")["read"] == {"2014": {"read": 384}}
    assert [line[0] for line in curve(tmp_path, "2014")] == [1, 2, 3, 4, 5, 6]


def test_several_ranks_do_not_train_what_is_done_elsewhere(data, undisturbed, tmp_path):
    """Its copy is fetched by one rank; the others must not wait for it in vain."""
    shutil.copytree(undisturbed[0], tmp_path / "copy")
    copy = ("--remote", str(tmp_path / "copy"))
    done = train(data, tmp_path / "run", "2014", *copy, launcher=two_ranks())
    assert done.returncode != 0
    assert f"2014 is done, by its copy in {tmp_path}/copy, which is here now: start again" in done.stderr
    assert train(data, tmp_path / "run", "2014", *copy, launcher=two_ranks()).stdout == "2014: done already\n"
    assert train(data, tmp_path / "checked", "2014", *copy, "--check").returncode == 0  # what scripts/loop.sh does
    assert (tmp_path / "checked/2014/done.json").exists()


def test_a_damaged_model_is_not_started_from(data, second):
    out = second("damaged")
    path = out / "2014/checkpoints/epoch_2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = train(data, out, "2015")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}, which 2015 starts from, is damaged: wrong checksum of ")
    assert done.stderr.count("\n") == 1
    (out / "2014/done.json").write_text('{"half')
    assert "delete the step to train it again" in train(data, out, "2015").stderr


def test_a_lost_disk_is_made_good_from_the_remote_copy(undisturbed, data, tmp_path):
    out, copy = tmp_path / "run", ("--remote", str(tmp_path / "copy"))
    kill_at("iteration_4.pt", data, out, "2014", *copy)
    shutil.rmtree(out)
    refused = train(data, out, "2014", *copy, "--seed", "1")
    assert "was begun with seed 0, now it is 1" in refused.stderr
    assert train(data, out, "2014", *copy).returncode == 0
    assert "resuming checkpoint" in (out / "2014/out.log").read_text()
    assert curve(out, "2014") == curve(undisturbed[0], "2014")
    assert same(weights(out, "2014"), weights(undisturbed[0], "2014"))
    there = (tmp_path / "copy/2014").glob("**/[!.]*.*")  # a killed copy leaves a hidden one
    left = sorted(str(path.relative_to(tmp_path / "copy/2014")) for path in there)
    assert left == ["checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt", "done.json", "plan.json", "train.log.jsonl"]
    shutil.rmtree(out)
    assert train(data, out, "2014", *copy).stdout == "2014: done already\n"  # and the next step can start from it
    assert same(weights(out, "2014"), weights(undisturbed[0], "2014"))


@pytest.fixture(scope="module")
def second(undisturbed, data, tmp_path_factory):
    """The first step of ``undisturbed``, copied, for a second one to go on from."""

    def copy(name, method="cumulative"):
        out = tmp_path_factory.mktemp(name)
        shutil.copytree(undisturbed[0] / "2014", out / "2014")
        return out

    return copy


def test_two_ranks_train_the_next_step_from_the_last_model(undisturbed, data, second):
    """The weights stay those of one model, and both ranks take the same number of batches."""
    out = second("ranks")
    done = train(data, out, "2015", launcher=two_ranks())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded checkpoint" in (out / "2015/out.log").read_text()
    facts = read_json(out / "2015/done.json")
    assert facts["plan"]["start"] == str(out / "2014/checkpoints/epoch_2.pt")
    assert facts["read"] == {"2014": {"read": 216}, "2015": {"read": 168}}  # 384 by the sizes 90 and 70
    assert not same(weights(out, "2014"), weights(out, "2015"))


def test_ranks_that_disagree_are_told_how(data, tmp_path):
    """Each rank makes its own plan; here the second one is given another seed."""
    script = tmp_path / "train.py"
    train_py = ROOT / "scripts/train.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv[0] = 'train.py'\n"
        "sys.argv += ['--seed', os.environ['RANK']]\n"
        f"runpy.run_path({str(train_py)!r}, run_name='__main__')\n"
    )
    words = command(data, tmp_path / "out", "2014", launcher=two_ranks())
    words[words.index(str(train_py))] = str(script)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "rank 1 has another plan than rank 0: seed 1, now it is 0" in done.stderr
    assert not (tmp_path / "out/2014/done.json").exists()


@pytest.mark.parametrize("launcher", [(), two_ranks()], ids=["alone", "two ranks"])
def test_lwf_is_distilled_from_the_last_model(data, tmp_path, undisturbed, launcher):
    assert train(data, tmp_path, "2014", "--method", "lwf").returncode == 0
    assert same(weights(tmp_path, "2014"), weights(undisturbed[0], "2014"))  # the first step has no teacher
    done = train(data, tmp_path, "2015", "--method", "lwf", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = read_json(tmp_path / "2015/done.json")
    each = macs_per_sample("ViT-Tiny-8-48")
    assert facts["macs_seen"] == each * (384 + 384 + 128)
    first = json.loads((tmp_path / "2015/train.log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["contrastive_loss"] + first["distill_loss"])
    assert first["distill_loss"] > 0


def test_patching_interpolates_with_the_last_patched_model(data, tmp_path):
    """A given coefficient is taken, another one is chosen on what no step trains on."""
    assert train(data, tmp_path, "2014", "--method", "patching").returncode == 0
    assert same(weights(tmp_path, "2014"), weights(tmp_path, "2014", "patched.pt"))
    assert train(data, tmp_path, "2015", "--method", "patching").returncode == 0
    facts = read_json(tmp_path / "2015/done.json")
    assert facts["checkpoint"] == "checkpoints/patched.pt"
    assert facts["read"] == {"2015": {"read": 384}}
    assert [entry["held_out"] for entry in facts["plan"]["validation"]] == [4]  # of 90
    assert facts["coefficient"] == max(CANDIDATES, key=lambda a: facts["mean_retrieval"][str(a)])
    old, new = weights(tmp_path, "2014", "patched.pt"), weights(tmp_path, "2015")
    a = facts["coefficient"]
    patched = weights(tmp_path, "2015", "patched.pt")
    assert all(torch.allclose(patched[n], (1 - a) * old[n] + a * new[n], atol=1e-6) for n in new)
    model = models_of(str(tmp_path))[1]
    assert model.weights == str(tmp_path / "2015/checkpoints/patched.pt")


def test_a_step_can_keep_the_optimizer_and_report_to_tensorboard_and_wandb(data, second, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(second("wandb")))
    out = second("kept")
    done = train(data, out, "2015", "--policy", "kept", "--report_to", "tensorboard,wandb")
    assert done.returncode == 0, done.stderr[-3000:]
    moments = torch.load(out / "2015/checkpoints/epoch_2.pt", weights_only=True)["optimizer"]["state"]
    assert {int(state["step"]) for state in moments.values()} == {12}  # six of each step
    assert list((out / "2015/tensorboard").glob("events.out.tfevents.*"))
    (run,) = Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*-emoji-tic_tiny-all-cumulative-2015")
    assert list(run.glob("*.wandb"))


def test_a_model_from_elsewhere_starts_a_later_step(data, undisturbed, tmp_path):
    """A bare state dict, as released models are; one with a later name is refused."""
    for year in ("2014", "2016"):
        torch.save(weights(undisturbed[0], "2014"), tmp_path / f"{year}.pt")
    refused = train(data, tmp_path / "out", "2015", "--first_step", "2015", "--init", str(tmp_path / "2016.pt"))
    assert refused.stderr == (
        f"error: {tmp_path}/2016.pt has seen data up to 201612, after those of step 2015, 201512\n"
    )
    assert not (tmp_path / "out").exists()
    done = train(data, tmp_path / "out", "2015", "--first_step", "2015", "--init", str(tmp_path / "2014.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "out/2015/done.json")["samples_seen"] == 384


def test_a_step_refuses_to_start_from_a_checkpoint_of_later_data(data, undisturbed, tmp_path):
    checkpoint = str(undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "tic": {**state["tic"], "cutoff": 202012}}, tmp_path / "model.pt")
    refused = train(data, tmp_path / "out", "2014", "--init", str(tmp_path / "model.pt"))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {tmp_path}/model.pt has seen data up to 202012")


def test_sampling_with_replacement_draws_by_the_plan(data, undisturbed, tmp_path):
    """Its shards come from plan.json, so they may be many; a progress bar is there too."""
    out, init = tmp_path, str(undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    start = ("--first_step", "2015", "--init", init)
    done = train(data, out, "2015", "--method", "cumulative-equal", "--dataset_resampled", "--workers", "1", *start)
    assert done.returncode == 0, done.stderr
    assert "train 2015: 100%" in done.stderr
    facts = read_json(out / "2015/done.json")
    assert (facts["plan"]["sampling"], facts["read"]) == ("resampled", {})
    assert "train_data: " + str(out / "2015/plan.json") in (out / "2015/params.txt").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples_per_step", "abc"], "invalid int value: 'abc' (--help shows the flags)"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--scale", "tic_huge"], "unknown scale 'tic_huge'"),
        (["--step", "1999"], "unknown step '1999'"),
        (["--step", "all"], "--step all is for --dry_run"),
        (["--data_dir", "/nowhere"], "/nowhere/tic/emoji/yearly/train/2014 is missing"),
        (["--samples_per_step", "1"], "less than 2 checkpoints"),
        (["--budget", "1,2"], "--budget has 2 numbers, emoji has 7 steps"),
        (["--model", "ViT-X"], "OpenCLIP has no model 'ViT-X'"),
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
    assert f"  {384 * macs_per_sample('ViT-Tiny-8-48'):.2e} MACs, " in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_training_leaves_out_is_counted_and_said(data, tmp_path):
    """A tenth of the pictures can't be decoded."""
    content = []
    split = tmp_path / "data/tic/emoji/yearly/train/2014"
    for i in range(90):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "picture.png")
        picture = b"no picture" if i % 10 == 0 else (tmp_path / "picture.png").read_bytes()
        content.append((f"{i:032x}-0", {"png": picture, "txt": b"a caption"}))
    write_shard(split / "00000000.tar", content)
    write_json(split / "sizes.json", {"00000000.tar": 90})
    done = train(tmp_path / "data", tmp_path / "out", "2014")
    assert done.returncode == 0, done.stderr
    read = read_json(tmp_path / "out/2014/done.json")["read"]["2014"]
    assert read["read"] == 384
    assert read["undecodable"] >= 36  # four passes and more over nine of them
    assert f"2014: left out and replaced: {read['undecodable']} undecodable of 384 read" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_killed_step_goes_on_with_its_scaler(data, tmp_path):
    """ViT-B-32 in mixed precision, five checkpoints; there the losses are equal but for rounding."""
    debug = ("--scale", "tic_debug", "--samples_per_step", "10240", "--workers", "2")
    done = train(data, tmp_path / "whole", "2014", *debug)
    assert done.returncode == 0, done.stderr[-3000:]
    kill_at("epoch_2.pt", data, tmp_path / "killed", "2014", *debug)
    scaler = torch.load(tmp_path / "killed/2014/checkpoints/epoch_2.pt", weights_only=True)["scaler"]
    assert scaler["scale"] > 0
    done = train(data, tmp_path / "killed", "2014", *debug)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = curve(tmp_path / "whole", "2014"), curve(tmp_path / "killed", "2014")
    assert [line[:2] for line in killed] == [line[:2] for line in whole]
    assert [line[2] for line in killed] == pytest.approx([line[2] for line in whole], rel=0.02)
    assert read_json(tmp_path / "killed/2014/done.json")["read"] == {"2014": {"read": 10240}}
