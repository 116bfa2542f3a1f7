"""Real training: what a step leaves, restart after kill -9 at any block, two ranks, bad input."""

import json
import os
import shutil

import pytest
import real
import torch
from hub import serving_hub
from miniature import make_image, write_split
from real import STEPS, call, curve, kill_at, kill_when, read_log, same, start, train, weights
from safetensors.torch import save_file

from tic_clip import TicError
from tic_clip.models import MODEL_CONFIGS, macs_per_sample
from tic_clip.runs import OPEN_CLIP_COMMIT, models_of
from tic_clip.storage import read_json
from tic_clip.training.patching import CANDIDATES
from tic_clip.training.step import check_shares

data, undisturbed = real.data, real.undisturbed


def test_a_step_leaves_its_plan_checkpoints_log_and_done(undisturbed, data):
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
    before = (out / "2014/done.json").stat().st_mtime_ns
    assert call(data, out, "2014") == "2014: done already\n"
    assert "was begun with seed 0, now it is 1" in call(data, out, "2014", "--seed", "1")
    assert (out / "2014/done.json").stat().st_mtime_ns == before


def test_bad_input_and_a_dry_run_write_nothing(data, tmp_path):
    for words, message in (
        (["--samples_per_step", "abc"], "'abc' is not a whole number from 1"),
        (["--model", "ViT-X"], "OpenCLIP has no model 'ViT-X'"),
        (["--precision", "amp"], "--precision amp needs a GPU: on a CPU fp32 or amp_bf16 can be trained"),
        (["--", "--torch-compile"], "unrecognized arguments: --torch-compile"),
    ):
        assert message in call(data, tmp_path / "out", "2014", *words)
    plan = json.loads(call(data, tmp_path / "out", "2015", "--dry_run"))
    assert [plan["sources"][0][key] for key in ("name", "samples", "used")] == ["2014", 216, 90]
    assert plan["macs"] == 384 * macs_per_sample("ViT-Tiny-12-48")
    assert not (tmp_path / "out").exists()


# --- Killed ---


def test_all_steps_in_one_process_are_the_steps_one_by_one(data, undisturbed, tmp_path):
    """Killed in the second one and started again; each step has a log of its own."""
    one_by_one, together = tmp_path / "one by one", tmp_path / "together"
    last = ("--init", undisturbed[0] / "2014/checkpoints/epoch_2.pt", "--first_step", "2020")
    kill_when(together / STEPS[-1] / "checkpoints/epoch_1.pt", start(data, together, "all", *last))
    assert train(data, together, "all", *last).stdout == "2020: done already\n"
    shutil.copytree(together / "2020", one_by_one / "2020")
    train(data, one_by_one, STEPS[-1], *last)
    assert same(weights(together, STEPS[-1]), weights(one_by_one, STEPS[-1]))
    assert curve(together, STEPS[-1]) == curve(one_by_one, STEPS[-1])
    assert [read_json(together / step / "done.json")["samples_seen"] for step in STEPS[-2:]] == [384, 768]
    logs = [(together / step / "out.log").read_text() for step in STEPS[-2:]]
    assert [log.count("Running with a single process") for log in logs] == [1, 2]


def test_killed_anywhere_it_ends_with_the_same_losses_and_weights(undisturbed, data, tmp_path):
    """Here at the end of its first interval; other tests do it inside of one, and between two steps."""
    out, _ = undisturbed
    kill_at("epoch_1.pt", data, tmp_path, "2014")
    train(data, tmp_path, "2014")
    log = (tmp_path / "2014/out.log").read_text()
    assert "resuming checkpoint" in log.rsplit("Running with a single process", 1)[1]
    assert curve(tmp_path, "2014") == curve(out, "2014")
    assert same(weights(tmp_path, "2014"), weights(out, "2014"))
    assert read_json(tmp_path / "2014/done.json")["read"] == {"2014": {"read": 384}}
    assert not list((tmp_path / "2014/checkpoints").glob("iteration_*"))


SRUN = """import os
names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
os.environ |= {slurm: os.environ.pop(name) for name, slurm in names.items()}
del os.environ["MASTER_ADDR"]
"""
"""Slurm's names in place of torchrun's, but the port, which is a free one here."""


def test_killed_it_goes_on_as_two_tasks_of_srun_from_the_checkpoint_that_is_whole(data, tmp_path):
    """The newest one is damaged: that is said, and each sample is read as often all the same."""
    kill_at("iteration_4.pt", data, tmp_path, "2014")
    for path in (tmp_path / "2014/checkpoints").glob("iteration_[45].pt"):
        path.write_bytes(path.read_bytes()[:1000])
    job = {"SLURM_STEP_NODELIST": "127.0.0.[1-2]", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    done = train(data, tmp_path, "2014", "--workers", "1", ranks=2, before=SRUN, **job)
    assert done.stderr.count("iteration_4.pt is damaged") == 1
    assert "it is passed over for the one before" in done.stderr
    assert "world_size: 2" in (tmp_path / "2014/params.txt").read_text()
    assert read_json(tmp_path / "2014/done.json")["read"] == {"2014": {"read": 384}}
    assert [line[0] for line in curve(tmp_path, "2014")] == [1, 2, 3, 4, 5, 6]


def test_a_lost_disk_is_made_good_from_the_remote_copy(undisturbed, data, tmp_path):
    """The copy of a finished step is fetched by one rank, which tells the others."""
    out, copy = tmp_path / "run", ("--remote", str(tmp_path / "copy"))
    kill_at("iteration_2.pt", data, out, "2014", *copy)
    shutil.rmtree(out)
    assert "was begun with seed 0, now it is 1" in call(data, out, "2014", *copy, "--seed", "1")
    train(data, out, "2014", *copy)
    assert "resuming checkpoint" in (out / "2014/out.log").read_text()
    assert curve(out, "2014") == curve(undisturbed[0], "2014")
    assert same(weights(out, "2014"), weights(undisturbed[0], "2014"))
    there = (tmp_path / "copy/2014").glob("**/[!.]*.*")  # a killed copy leaves a hidden one
    left = sorted(str(path.relative_to(tmp_path / "copy/2014")) for path in there)
    assert left == ["checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt", "done.json", "plan.json", "train.log.jsonl"]
    shutil.rmtree(out)
    assert train(data, out, "2014", *copy, ranks=2).stdout == "2014: done already\n"  # and the next one can start
    assert same(weights(out, "2014"), weights(undisturbed[0], "2014"))


def test_a_damaged_model_is_not_started_from(data, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0] / "2014", tmp_path / "2014")
    path = tmp_path / "2014/checkpoints/epoch_2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = call(data, tmp_path, "2015")
    assert message.startswith(f"error: {path}, which 2015 starts from, is damaged: wrong checksum of ")
    (tmp_path / "2014/done.json").write_text('{"half')
    assert "delete the step to train it again" in call(data, tmp_path, "2015")


def test_ranks_that_disagree_are_told_how(data, tmp_path):
    """Each rank makes its own plan; here the first one is given 1, the second one 2."""
    before = "import os, sys\nsys.argv += ['--', '--accum-freq', str(int(os.environ['RANK']) + 1)]"
    done = start(data, tmp_path / "out", "2014", ranks=2, before=before).wait()
    assert done.returncode != 0
    assert "rank 1 has another plan than rank 0: accum_freq 2, now it is 1" in done.stderr
    assert not (tmp_path / "out").exists()


# --- Methods and settings ---


def test_lwf_is_distilled_from_the_last_model_on_two_ranks(data, tmp_path, undisturbed):
    """From half-precision safetensors, as models elsewhere are; both ranks take the same number of batches."""
    last = tmp_path / "2014.safetensors"
    save_file({name: value.half() for name, value in weights(undisturbed[0], "2014").items()}, last)
    train(data, tmp_path, "2015", "--method", "lwf", "--first_step", "2015", "--init", last, ranks=2)
    assert "loaded checkpoint" in (tmp_path / "2015/out.log").read_text()
    facts = read_json(tmp_path / "2015/done.json")
    assert facts["plan"]["start"] == facts["plan"]["teacher"] == str(last)
    assert facts["read"] == {"2015": {"read": 384}}
    assert facts["macs_seen"] == macs_per_sample("ViT-Tiny-12-48") * (384 + 128)
    first = read_log(tmp_path, "2015")[0]
    assert first["loss"] == pytest.approx(first["contrastive_loss"] + first["distill_loss"])
    assert first["distill_loss"] > 0
    assert not same(weights(undisturbed[0], "2014"), weights(tmp_path, "2015"))


def test_ewc_is_held_to_the_last_model_by_its_fisher_information(data, tmp_path, undisturbed):
    start = ("--first_step", "2020", "--init", undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    train(data, tmp_path, "all", "--method", "ewc", *start, ranks=2)
    fisher = weights(tmp_path, "2020", "fisher.pt")
    assert fisher.keys() == weights(tmp_path, "2020").keys() - {"attn_mask"}
    assert all((value >= 0).all() for value in fisher.values())
    first, last = (read_log(tmp_path, step) for step in STEPS[-2:])
    assert "ewc_loss" not in first[0]  # no step before it
    terms = [line["ewc_loss"] for line in last]
    assert terms[0] == 0
    assert terms[-1] > 0
    facts = read_json(tmp_path / STEPS[-1] / "done.json")
    assert facts["macs_seen"] == macs_per_sample("ViT-Tiny-12-48") * 2 * (384 + 64)


def test_averaging_leaves_the_mean_of_a_steps_checkpoints(data, tmp_path):
    train(data, tmp_path, "2014", "--method", "averaging")
    parts = [weights(tmp_path, "2014", f"epoch_{k}.pt") for k in (1, 2)]
    mean = weights(tmp_path, "2014", "average.pt")
    assert all(torch.allclose(mean[n], (parts[0][n] + parts[1][n]) / 2, atol=1e-6) for n in mean)
    assert models_of(str(tmp_path))[0].weights == str(tmp_path / "2014/checkpoints/average.pt")


def test_patching_interpolates_with_the_last_patched_model(data, tmp_path):
    """A given coefficient is taken, another one is chosen on what no step trains on."""
    train(data, tmp_path, "2014", "--method", "patching")
    assert same(weights(tmp_path, "2014"), weights(tmp_path, "2014", "patched.pt"))
    train(data, tmp_path, "2015", "--method", "patching")
    facts = read_json(tmp_path / "2015/done.json")
    assert facts["checkpoint"] == "checkpoints/patched.pt"
    assert facts["read"] == {"2015": {"read": 384}}
    assert [entry["held_out"] for entry in facts["plan"]["validation"]] == [4]  # of 90
    a = facts["coefficient"]
    assert a == max(CANDIDATES, key=lambda a: facts["mean_retrieval"][str(a)])
    old, new = weights(tmp_path, "2014", "patched.pt"), weights(tmp_path, "2015")
    patched = weights(tmp_path, "2015", "patched.pt")
    assert all(torch.allclose(patched[n], (1 - a) * old[n] + a * new[n], atol=1e-6) for n in new)
    assert models_of(str(tmp_path))[1].weights == str(tmp_path / "2015/checkpoints/patched.pt")


def test_a_step_can_keep_the_optimizer_and_report_to_tensorboard_and_wandb(data, undisturbed, tmp_path):
    out, more = tmp_path / "out", ("--keep_optimizer", "--report_to", "tensorboard,wandb")
    shutil.copytree(undisturbed[0], out)
    train(data, out, "2015", *more, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    optimizer = torch.load(out / "2015/checkpoints/epoch_2.pt", weights_only=True)["optimizer"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {12}  # six of each step
    assert {group["fused"] for group in optimizer["param_groups"]} == {True}
    assert list((out / "2015/tensorboard").glob("events.out.tfevents.*"))
    (run,) = tmp_path.glob("wandb/offline-run-*-emoji-tic_tiny-all-cumulative-2015-*")
    assert list(run.glob("*.wandb"))


def test_wsd_goes_on_from_before_the_cool_down(data, tmp_path):
    """Two steps without their cool-downs are one line of training; killed between, it ends the same."""
    flags = ("--schedule", "wsd", "--lr", "1e-3", "--warmup", "2", "--cooldown", "0.3")
    kill_when(tmp_path / "2015/plan.json", start(data, tmp_path, "all", *flags))
    train(data, tmp_path, "2015", *flags)
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
        before = f"""from huggingface_hub import constants
constants.HUGGINGFACE_CO_URL_TEMPLATE = "{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.ENDPOINT, constants.HF_HUB_CACHE = "{hub.url}", "{tmp_path}/cache"
"""
        train(data, tmp_path / "out", "2015", *start, "hf-hub:me/model", before=before, NO_PROXY="127.0.0.1")
    train(data, tmp_path / "usual", "2015", *start, str(tmp_path / "2014.pt"))
    assert same(weights(tmp_path / "out", "2015"), weights(tmp_path / "usual", "2015"))


def test_sampling_with_replacement_draws_by_the_plan(data, undisturbed, tmp_path):
    """Each split gives its share, as with exact sampling; each batch in two passes."""
    init = str(undisturbed[0] / "2014/checkpoints/epoch_2.pt")
    start = ("--first_step", "2015", "--init", init, "--accum_freq", "2", "--image_backend", "torchvision")
    done = train(data, tmp_path, "2015", "--method", "cumulative-equal", "--resampled", "--workers", "1", *start)
    assert "train 2015: 100%" in done.stderr
    facts = read_json(tmp_path / "2015/done.json")
    plan = facts["plan"]
    shares = {source["name"]: {"read": source["samples"]} for source in plan["sources"]}
    assert (plan["sampling"], plan["image_backend"], facts["read"]) == ("resampled", "torchvision", shares)
    assert [line[:2] for line in curve(tmp_path, "2015")] == [(i, 64 * i) for i in range(1, 7)]


def test_a_source_that_gave_no_sample_ends_the_step(undisturbed, caplog):
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
    done = train(data, tmp_path, "2014", "--workers", "1", shm="128k", code=1)
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm, 0.125 MB, is too small for the batches")
    assert "Traceback" not in done.stderr


def test_what_training_leaves_out_is_counted_and_said(tmp_path):
    """A tenth of the images can't be decoded."""
    pictures = [make_image(f"{i}", "PNG") if i % 10 else b"no picture" for i in range(90)]
    content = [(f"{i:032x}-0", {"png": picture, "txt": b"a caption"}) for i, picture in enumerate(pictures)]
    write_split(tmp_path / "data/tic/emoji/yearly/train/2014", content)
    done = train(tmp_path / "data", tmp_path / "out", "2014")
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
    train(data, tmp_path / "whole", "2014", *debug)
    kill_at("epoch_2.pt", data, tmp_path / "killed", "2014", *debug)
    checkpoint = torch.load(tmp_path / "killed/2014/checkpoints/epoch_2.pt", weights_only=True)
    assert checkpoint["scaler"]["scale"] > 0 if precision == "amp" else "scaler" not in checkpoint
    train(data, tmp_path / "killed", "2014", *debug)
    whole, killed = curve(tmp_path / "whole", "2014"), curve(tmp_path / "killed", "2014")
    assert [line[:2] for line in killed] == [line[:2] for line in whole]
    assert [line[2] for line in killed] == pytest.approx([line[2] for line in whole], rel=0.02)
    facts = read_json(tmp_path / "killed/2014/done.json")
    assert facts["read"] == {"2014": {"read": 10240}}
    assert facts["plan"]["precision"] == precision
