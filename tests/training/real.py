"""Training of a tiny model on a few images, as the script does it: what several files of tests use."""

import json
import time
from functools import cache

import pytest
import torch
from conftest import ROOT, call_script
from forked import Script
from miniature import make_image, write_split

from tic_clip.benchmarks import get_benchmark

STEPS = [step.name for step in get_benchmark("emoji").steps]
SCRIPT = ROOT / "scripts/train.py"


@cache
def write_data(folder):
    """Write the training splits of TiC-Emoji."""
    for step, count in zip(STEPS, (90, 70, 20, 20, 20, 20, 20), strict=True):
        split, content = folder / get_benchmark("emoji").root / "train" / step, []
        for i in range(count):
            caption = f"picture {i} of {step}"
            content.append((f"{i:032x}-0", {"png": make_image(caption, "PNG"), "txt": caption.encode()}))
        write_split(split, content)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.getbasetemp() / "emoji")  # once for all files of tests


def flags_of(data, out, step, *more):
    """Six iterations of 64 samples, each a block; two checkpoints."""
    words = ["--benchmark", "emoji", "--scale", "tic_tiny", "--samples_per_step", "384", "--resume_every", "1"]
    words += [] if "--method" in more else ["--method", "cumulative"]
    return [*words, "--data_dir", data, "--output_dir", out, "--step", step, *more]


def start(data, out, step, *more, **options):
    return Script(SCRIPT, *flags_of(data, out, step, *more), **options)


def train(*args, code=0, **options):
    done = start(*args, **options).wait()
    assert done.returncode == code, done.stderr[-3000:]
    return done


def call(*args):
    """Run the script in this process, which is to train nothing; its output, or its one line of an error."""
    done = call_script(SCRIPT, *flags_of(*args))
    assert done.stderr.count("\n") == done.returncode, done.stderr
    assert done.stderr.startswith("error: " * done.returncode)
    return done.stderr or done.stdout


def weights(out, step, name="epoch_2.pt"):
    state = torch.load(out / step / "checkpoints" / name, weights_only=True)["state_dict"]
    return {name.removeprefix("module."): value for name, value in state.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def read_log(out, step):
    return [json.loads(line) for line in (out / step / "train.log.jsonl").read_text().splitlines()]


def curve(out, step):
    return [(line["step"], line["samples_seen"], line["loss"], line["lr"]) for line in read_log(out, step)]


@cache
def train_first(data, out):
    return out, train(data, out, "2014")


@pytest.fixture(scope="module")
def undisturbed(data):
    """A run of one step, and what the script has said."""
    return train_first(data, data / "undisturbed")


def kill_when(path, script):
    """Kill a script when it has written a file."""
    while not path.exists():
        assert script.processes[0].is_alive()
        time.sleep(0.005)
    script.kill()


def kill_at(checkpoint, data, out, step, *more):
    """Start a step that writes a checkpoint after each block, and kill it when it has written this one."""
    script = start(data, out, step, "--save_every", "64", "--max_kept", "9", *more)
    kill_when(out / step / "checkpoints" / checkpoint, script)
    assert not (out / step / "done.json").exists()
