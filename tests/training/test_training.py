"""Real training: what a step leaves, restart after kill -9 at any block, two ranks, bad input."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Script
from hub import serving_hub
from PIL import Image
from safetensors.torch import save_file

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.data.tar import write_shard
from tic_clip.models import MODEL_CONFIGS, macs_per_sample
from tic_clip.runs import OPEN_CLIP_COMMIT, models_of
from tic_clip.storage import read_json, write_json
from tic_clip.training.patching import CANDIDATES
from tic_clip.training.step import check_shares

ROOT = Path(__file__).parents[2]
STEPS = [step.name for step in get_benchmark("emoji").steps]
FLAGS = ["--benchmark", "emoji", "--scale", "tic_tiny", "--samples_per_step", "384", "--resume_every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for step, count in zip(STEPS, (90, 70, 20, 20, 20, 20, 20), strict=True):
        split = folder / get_benchmark("emoji").root / "train" / step
        content = []
        for i in range(count):
            Image.fromarray(noise.integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(folder / "picture.png")
            caption = f"picture {i} of {step}"
            content.append((f"{i:032x}-0", {"png": (folder / "picture.png").read_bytes(), "txt": caption.encode()}))
        write_shard(split / "00000000.tar", content)
        write_json(split / "sizes.json", {"00000000.tar": count})
    return folder


def start(data, out, step, *more, **options):
    method = [] if "--method" in more else ["--method", "cumulative"]
    flags = [*FLAGS, *method, "--data_dir", data, "--output_dir", out, "--step", step, *more]
    return Script(ROOT / "scripts/train.py", *flags, **options)


def train(*args, **options):
    return start(*args, **options).wait()


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
    assert facts["macs_seen"] == facts["plan"]["macs"] == 384 * macs_per_sample("ViT-Tiny-12-48")
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


def test_all_steps_in_one_process_are_the_steps_one_by_one(data, undisturbed, tmp_path):
    """Killed in the second one and started again; each step has a log of its own."""
    one_by_one, together = tmp_path / "one by one", tmp_path / "together"
    last = ("--init", undisturbed[0] / "2014/checkpoints/epoch_2.pt", "--first_step", "2020")
    for step in STEPS[-2:]:
        assert train(data, one_by_one, step, *last).returncode == 0
    script = start(data, together, "all", *last)
    while not (together / STEPS[-1] / "checkpoints/epoch_1.pt").exists():
        assert script.processes[0].is_alive()
        time.sleep(0.005)
    script.kill()
    done = train(data, together, "all", *last)
    assert (done.returncode, done.stdout) == (0, "2020: done already\n"), done.stderr
    assert same(weights(together, STEPS[-1]), weights(one_by_one, STEPS[-1]))
    assert curve(together, STEPS[-1]) == curve(one_by_one, STEPS[-1])
    assert [read_json(together / step / "done.json")["samples_seen"] for step in STEPS[-2:]] == [384, 768]
    logs = [(together / step / "out.log").read_text() for step in STEPS[-2:]]
    assert [log.count("Running with a single process") for log in logs] == [1, 2]


def kill_at(checkpoint, data, out, step, *more):
    """Start a step that writes a checkpoint after each block, and kill it when it has written this one."""
    script = start(data, out, step, "--save_every", "64", "--max_kept", "9", *more)
    while not (out / step / "checkpoints" / checkpoint).exists():
        assert script.processes[0].is_alive()
        time.sleep(0.005)
    script.kill()
    assert not (out / step / "done.json").exists()


@pytest.mark.parametrize("checkpoint", ["iteration_2.pt", "epoch_1.pt"])
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
    done = train(data, tmp_path, "2014", "--workers", "1", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "iteration_4.pt is damaged" in done.stderr
    assert "it is passed over for the one before" in done.stderr
    assert done.stderr.count("iteration_4.pt is damaged") == 1
    assert read_json(tmp_path / "2014/done.json")["read"] == {"2014": {"read": 384}}
    assert [line[0] for line in curve(tmp_path, "2014")] == [1, 2, 3, 4, 5, 6]


def test_several_ranks_do_not_train_what_is_done_elsewhere(data, undisturbed, tmp_path):
    """Its copy is fetched by one rank, which tells the others."""
    shutil.copytree(undisturbed[0], tmp_path / "copy")
    done = train(data, tmp_path / "run", "2014", "--remote", tmp_path / "copy", ranks=2)
    assert (done.returncode, done.stdout) == (0, "2014: done already\n")
    assert same(weights(tmp_path / "run", "2014"), weights(undisturbed[0], "2014"))


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


@pytest.mark.parametrize(
    ("flag", "found"),
    [
        ("--accum-freq", "accum_freq 2, now it is 1"),
        ("--grad-clip-norm", "openclip_flags ['--grad-clip-norm', '2'], now it is ['--grad-clip-norm', '1']"),
    ],
)
def test_ranks_that_disagree_are_told_how(data, tmp_path, flag, found):
    """Each rank makes its own plan; here the first one is given 1, the second one 2."""
    script, train_py = tmp_path / "train.py", str(ROOT / "scripts/train.py")
    code = f"import os, runpy, sys\nsys.argv += ['--', {flag!r}, str(int(os.environ['RANK']) + 1)]\n"
    code += f"sys.path.insert(0, os.path.dirname({train_py!r}))\nrunpy.run_path({train_py!r}, "
    script.write_text(f"{code}run_name='__main__')\n")
    flags = [*FLAGS, "--method", "cumulative", "--data_dir", data, "--output_dir", tmp_path / "out", "--step", "2014"]
    done = Script(script, *flags, ranks=2).wait()
    assert done.returncode != 0
    assert f"rank 1 has another plan than rank 0: {found}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_tasks_of_srun_are_ranks(data, tmp_path):
    """Slurm's names in place of torchrun's, but the port, which is a free one here."""
    script, train_py = tmp_path / "train.py", str(ROOT / "scripts/train.py")
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    code = f"import os, runpy, sys\nsys.path.insert(0, os.path.dirname({train_py!r}))\n"
    code += f"for name, slurm in {names}.items():\n    os.environ[slurm] = os.environ.pop(name)\n"
    script.write_text(f"{code}del os.environ['MASTER_ADDR']\nrunpy.run_path({train_py!r}, run_name='__main__')\n")
    flags = [*FLAGS, "--method", "cumulative", "--data_dir", data, "--output_dir", tmp_path / "out", "--step", "2014"]
    job = {"SLURM_STEP_NODELIST": "127.0.0.[1-2]", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    done = Script(script, *flags, ranks=2, **job).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_json(tmp_path / "out/2014/done.json")["read"] == {"2014": {"read": 384}}
    assert "world_size: 2" in (tmp_path / "out/2014/params.txt").read_text()


def test_lwf_is_distilled_from_the_last_model_on_two_ranks(data, tmp_path, undisturbed):
    """From half-precision safetensors, as models elsewhere are; both ranks take the same number of batches."""
    last = tmp_path / "2014.safetensors"
    save_file({name: value.half() for name, value in weights(undisturbed[0], "2014").items()}, last)
    done = train(data, tmp_path, "2015", "--method", "lwf", "--first_step", "2015", "--init", last, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded checkpoint" in (tmp_path / "2015/out.log").read_text()
    facts = read_json(tmp_path / "2015/done.json")
    assert facts["plan"]["start"] == facts["plan"]["teacher"] == str(last)
    assert facts["read"] == {"2015": {"read": 384}}
    assert facts["macs_seen"] == macs_per_sample("ViT-Tiny-12-48") * (384 + 128)
    first = json.loads((tmp_path / "2015/train.log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["contrastive_loss"] + first["distill_loss"])
    assert first["distill_loss"] > 0
    assert not same(weights(undisturbed[0], "2014"), weights(tmp_path, "2015"))


def test_ewc_is_held_to_the_last_model_by_its_fisher_information(data, tmp_path, undisturbed):
    start = ("--first_step", "2020", "--init", undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    done = train(data, tmp_path, "all", "--method", "ewc", *start, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    fisher = weights(tmp_path, "2020", "fisher.pt")
    assert fisher.keys() == weights(tmp_path, "2020").keys() - {"attn_mask"}
    assert all((value >= 0).all() for value in fisher.values())
    first, last = ((tmp_path / step / "train.log.jsonl").read_text().splitlines() for step in STEPS[-2:])
    assert "ewc_loss" not in json.loads(first[0])  # no step before it
    terms = [json.loads(line)["ewc_loss"] for line in last]
    assert terms[0] == 0
    assert terms[-1] > 0
    facts = read_json(tmp_path / STEPS[-1] / "done.json")
    assert facts["macs_seen"] == macs_per_sample("ViT-Tiny-12-48") * 2 * (384 + 64)


def test_averaging_leaves_the_mean_of_a_steps_checkpoints(data, tmp_path):
    assert train(data, tmp_path, "2014", "--method", "averaging").returncode == 0
    parts = [weights(tmp_path, "2014", f"epoch_{k}.pt") for k in (1, 2)]
    mean = weights(tmp_path, "2014", "average.pt")
    assert all(torch.allclose(mean[n], (parts[0][n] + parts[1][n]) / 2, atol=1e-6) for n in mean)
    assert models_of(str(tmp_path))[0].weights == str(tmp_path / "2014/checkpoints/average.pt")


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


def test_a_step_can_keep_the_optimizer_and_report_to_tensorboard_and_wandb(data, second, tmp_path):
    out, more = second("kept"), ("--keep_optimizer", "--report_to", "tensorboard,wandb")
    done = train(data, out, "2015", *more, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    optimizer = torch.load(out / "2015/checkpoints/epoch_2.pt", weights_only=True)["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {12}  # six of each step
    assert {group["fused"] for group in optimizer["param_groups"]} == {True}
    assert list((out / "2015/tensorboard").glob("events.out.tfevents.*"))
    (run,) = tmp_path.glob("wandb/offline-run-*-emoji-tic_tiny-all-cumulative-2015-*")
    assert list(run.glob("*.wandb"))


def test_wsd_goes_on_from_before_the_cool_down(data, tmp_path):
    """Two steps without their cool-downs are one line of training; killed between, it ends the same."""
    flags = ("--schedule", "wsd", "--lr", "1e-3", "--warmup", "2", "--cooldown", "0.3")
    script = start(data, tmp_path, "all", *flags)
    while not (tmp_path / "2015/plan.json").exists():
        assert script.processes[0].is_alive()
        time.sleep(0.005)
    script.kill()
    assert train(data, tmp_path, "2015", *flags).returncode == 0
    rates = [[line[3] for line in curve(tmp_path, step)] for step in ("2014", "2015")]
    assert rates == [
        pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 5e-4]),  # of six iterations two cool down
        pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 5e-4]),
    ]
    branch = torch.load(tmp_path / "2014/checkpoints/before_cooldown.pt", weights_only=True)
    assert branch["tic"]["iteration"] == 4
    ends = [torch.load(tmp_path / step / "checkpoints/epoch_2.pt", weights_only=True) for step in ("2014", "2015")]
    updates = [{int(state["step"]) for state in end["optimizer"]["state"].values()} for end in ends]
    assert updates == [{6}, {4 + 6}]
    assert "before_cooldown.pt" in (tmp_path / "2015/out.log").read_text()


def test_a_pretrained_model_starts_the_first_step(data, undisturbed, tmp_path):
    """Training from the hub's model gives the weights that training from its file gives."""
    torch.save({"state_dict": weights(undisturbed[0], "2014")}, tmp_path / "2014.pt")
    config = {"model_cfg": json.loads((MODEL_CONFIGS / "ViT-Tiny-12-48.json").read_text()), "preprocess_cfg": {}}
    files = {"open_clip_config.json": json.dumps(config).encode()}
    files["open_clip_pytorch_model.bin"] = (tmp_path / "2014.pt").read_bytes()
    start = ("--first_step", "2015", "--init")
    with serving_hub({"me/model": files}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
        flags = [
            *FLAGS,
            "--method",
            "cumulative",
            "--step",
            "2015",
            "--data_dir",
            data,
            "--output_dir",
            tmp_path / "out",
        ]
        words = [sys.executable, ROOT / "scripts/train.py", *flags, *start, "hf-hub:me/model"]
        options = {"env": {**os.environ, **settings}, "capture_output": True, "text": True}  # the address is read once
        done = subprocess.run(words, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    usual = train(data, tmp_path / "usual", "2015", *start, str(tmp_path / "2014.pt"))
    assert usual.returncode == 0, usual.stderr[-3000:]
    ours, theirs = weights(tmp_path / "out", "2015"), weights(tmp_path / "usual", "2015")
    assert same(ours, theirs)


def test_sampling_with_replacement_draws_by_the_plan(data, undisturbed, tmp_path):
    """Each split gives its share, as with exact sampling; each batch in two passes."""
    out, init = tmp_path, str(undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    start = ("--first_step", "2015", "--init", init, "--accum_freq", "2", "--image_backend", "torchvision")
    done = train(data, out, "2015", "--method", "cumulative-equal", "--resampled", "--workers", "1", *start)
    assert done.returncode == 0, done.stderr
    assert "train 2015: 100%" in done.stderr
    facts = read_json(out / "2015/done.json")
    shares = {source["name"]: {"read": source["samples"]} for source in facts["plan"]["sources"]}
    plan = facts["plan"]
    assert (plan["sampling"], plan["image_backend"], facts["read"]) == ("resampled", "torchvision", shares)
    assert [line[:2] for line in curve(out, "2015")] == [(i, 64 * i) for i in range(1, 7)]


def test_a_source_that_gave_no_sample_ends_the_step(undisturbed, tmp_path, caplog):
    plan = read_json(undisturbed[0] / "2014/plan.json")
    (source,) = plan["sources"]
    check_shares(plan, {"2014": {"read": 384}})
    check_shares(plan, {})  # an earlier version counted nothing where it sampled with replacement
    assert not caplog.text
    check_shares(plan, {"2014": {"read": 380}})
    assert "2014: 380 samples were read, 384 were planned" in caplog.text
    plan["sources"].append({**source, "name": "2015", "samples": 40})
    with pytest.raises(TicError, match="step 2014 read no sample of 2015, 40 were planned"):
        check_shares(plan, {"2014": {"read": 384}})


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm takes root")
def test_a_small_shared_memory_is_one_line(data, tmp_path):
    done = train(data, tmp_path, "2014", "--workers", "1", shm="128k")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm, 0.125 MB, is too small for the batches")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples_per_step", "abc"], "'abc' is not a whole number from 1"),
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
    plan = json.loads(done.stdout)
    assert [plan["sources"][0][key] for key in ("name", "samples", "used")] == ["2014", 216, 90]
    assert plan["macs"] == 384 * macs_per_sample("ViT-Tiny-12-48")
    assert not (tmp_path / "out").exists()


def test_what_training_leaves_out_is_counted_and_said(data, tmp_path):
    """A tenth of the images can't be decoded."""
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
@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
def test_on_a_gpu_a_killed_step_goes_on_with_its_scaler(data, tmp_path, precision):
    """ViT-B-32, five checkpoints; the losses are equal but for rounding. With bfloat16, the default, in two passes."""
    debug = ("--scale", "tic_debug", "--samples_per_step", "10240", "--workers", "2")
    debug += ("--precision", "amp") if precision == "amp" else ("--max_batch", "512")
    done = train(data, tmp_path / "whole", "2014", *debug)
    assert done.returncode == 0, done.stderr[-3000:]
    kill_at("epoch_2.pt", data, tmp_path / "killed", "2014", *debug)
    checkpoint = torch.load(tmp_path / "killed/2014/checkpoints/epoch_2.pt", weights_only=True)
    assert checkpoint["scaler"]["scale"] > 0 if precision == "amp" else "scaler" not in checkpoint
    done = train(data, tmp_path / "killed", "2014", *debug)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = curve(tmp_path / "whole", "2014"), curve(tmp_path / "killed", "2014")
    assert [line[:2] for line in killed] == [line[:2] for line in whole]
    assert [line[2] for line in killed] == pytest.approx([line[2] for line in whole], rel=0.02)
    facts = read_json(tmp_path / "killed/2014/done.json")
    assert facts["read"] == {"2014": {"read": 10240}}
    assert facts["plan"]["precision"] == precision
