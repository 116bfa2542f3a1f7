"""DataComp's commands in its patched checkout, on a tiny pool; without a hunk of datacomp.patch one of these fails.

Where there is no datacomp/ (``bash setup.sh --datacomp`` makes it) those that need it skip.
"""

import argparse
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tic_clip import datacomp
from tic_clip.reshard import reshard
from tic_clip.scales import SCALES
from tic_clip.shards import without_sizes
from tic_clip.storage import write_json
from tic_clip.tarshard import write_shard
from tic_clip.uids import CLASSES, parse_uids, save_uids

ROOT = Path(__file__).parent.parent
ARCH = "ViT-Tiny-8-48"
TINY = ["--scale", "tic_tiny", "--precision", "fp32", "--workers", "0", "--num_checkpoints", "2"]
checkout = pytest.mark.skipif(not (ROOT / "datacomp").exists(), reason="needs datacomp/: bash setup.sh --datacomp")


def run(script, *arguments, folder=ROOT / "datacomp", code=0):
    """What a script of the checkout prints; it runs there, as its users run it."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def load_info(folder):
    with open(folder / "info.pkl", "rb") as file:
        return datacomp.load_info(file)


def jpeg(number):
    picture = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def pool(make_pool):
    """120 pictures in two shards of DataComp's format."""

    def as_jpeg(number, members):
        del members["png"]
        members["jpg"] = jpeg(number)

    return make_pool((60, 60), edit=as_jpeg)


@pytest.fixture
def lists(pool, tmp_path):
    """Every second UID of the pool, one of them twice, and class ids of all but the first."""
    uids = [*pool.uids[::2], pool.uids[0]]
    save_uids(tmp_path / "subset.npy", parse_uids(uids))
    listed = parse_uids(pool.uids[2::2])
    table = np.zeros(len(listed), dtype=CLASSES)
    table["f0"], table["f1"], table["class_id"] = listed["f0"], listed["f1"], np.arange(len(listed)) % 6
    save_uids(tmp_path / "classes.npy", table)
    return tmp_path / "subset.npy", tmp_path / "classes.npy"


@pytest.fixture
def split(pool, lists, tmp_path):
    """A training split of ours."""
    list(reshard(pool.path, str(tmp_path / "split"), str(lists[0])) or ())
    return tmp_path / "split"


def members(folder):
    """Every (name, bytes) of the shards in a folder."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(one.name, tar.extractfile(one).read()) for one in tar]
    return sorted(found)


# resharder.py


@checkout
def test_the_resharder_gives_classes_and_otherwise_what_ours_gives(pool, lists, tmp_path):
    subset, classes = lists
    out = tmp_path / "new/folder"
    printed = run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, "-c", classes, "-j", "2")
    assert "output 61 images" in printed
    list(reshard(pool.path, str(tmp_path / "ours"), str(subset), classes=str(classes)) or ())
    assert members(out) == members(tmp_path / "ours")
    assert sum(name.endswith(".cls") for name, _ in members(out)) == 59
    refused = run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, code=1)
    assert "refusing to overwrite non-empty directory" in refused
    (out / "99999999.tar").write_text("of an earlier run")
    run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, "-j", "1", "--overwrite")
    assert not (out / "99999999.tar").exists()
    assert [name for name, _ in members(out) if name.endswith(".cls")] == []
    assert len(members(out)) == 3 * 61


@checkout
def test_the_resharder_without_a_table_of_classes_that_is_there(pool, lists, tmp_path):
    arguments = ("-i", pool.path, "-o", tmp_path / "out", "-s", lists[0], "-c", tmp_path / "none.npy", "-j", "1")
    assert "none.npy" in run("resharder.py", *arguments)


# train.py


def losses(text):
    return [float(line.rpartition("Loss: ")[2].split()[0]) for line in text.splitlines() if "Train Epoch" in line]


@checkout
def test_training_exactly_and_then_the_next_step(split, tmp_path):
    size = ["--train_num_samples", "256", "--warmup", "2", "--log_every_n_steps", "1"]
    printed = run("train.py", *TINY, *size, "--data_dir", split, "--output_dir", tmp_path / "out", "--exp_name", "a")
    assert len(losses(printed)) == 4
    plan = json.loads((tmp_path / "out/a_plan.json").read_text())
    assert plan["sources"] == [{"name": str(split), "split": str(split), "size": 61, "used": 61, "samples": 256}]
    latest = tmp_path / "out/a/checkpoints/epoch_latest.pt"
    info = load_info(tmp_path / "out/a")
    assert (info["scale"], info["checkpoint"]) == ("tic_tiny", latest)
    assert info["scale_config"]["train_num_samples"] == 256
    assert "warmup: 2\n" in (tmp_path / "out/a/params.txt").read_text()
    assert "dataset_resampled: False\n" in (tmp_path / "out/a/params.txt").read_text()
    folders = f"{split}::{split}"
    arguments = ("--data_dir", folders, "--output_dir", tmp_path / "out", "--exp_name", "b", "--data_weights", "3::1")
    run("train.py", *TINY, *size, *arguments, "--new_run", "--resume", latest)
    samples = [source["samples"] for source in json.loads((tmp_path / "out/b_plan.json").read_text())["sources"]]
    assert samples == [192, 64]
    first, second = (torch.load(tmp_path / f"out/{name}/checkpoints/epoch_latest.pt") for name in "ab")
    assert (first["epoch"], second["epoch"]) == (2, 2)  # a new run, not one that goes on from epoch 2
    assert any((first["state_dict"][name] != value).any() for name, value in second["state_dict"].items())


@checkout
def test_training_with_replacement_is_asked_for(split, tmp_path):
    arguments = ("--data_dir", split, "--output_dir", tmp_path / "out", "--exp_name", "a", "--train_num_samples", "128")
    run("train.py", *TINY, *arguments, "--dataset_resampled")
    assert "dataset_resampled: True\n" in (tmp_path / "out/a/params.txt").read_text()
    assert not (tmp_path / "out/a_plan.json").exists()


@checkout
def test_training_on_data_without_a_table_of_sizes_is_one_line(pool, tmp_path):
    printed = run("train.py", *TINY, "--data_dir", pool.path, "--output_dir", tmp_path / "out", code=1)
    assert printed.splitlines()[-1] == f"error: {without_sizes(pool.path)}"


# evaluate.py


@pytest.fixture
def model(tmp_path):
    from tic_clip.models import make_model

    torch.manual_seed(0)
    torch.save(make_model(ARCH, "cpu")[0].state_dict(), tmp_path / "model.pt")
    return f"{ARCH} {tmp_path / 'model.pt'}"


def write_set(folder, kind, names="{:08d}.tar", sizes=True):
    """Thirty pictures with a caption and a class each."""
    content = [
        (f"{i:04d}", {"jpg": jpeg(i), "txt": f"picture {i}".encode(), "cls": str(i % 6).encode()}) for i in range(30)
    ]
    counts = {names.format(i): write_shard(folder / names.format(i), content[10 * i : 10 * i + 10]) for i in range(3)}
    if sizes:
        write_json(folder / "sizes.json", counts)
    place = folder if sizes else folder.parent
    (place / "classnames.txt").write_text("\n".join("abcdef"))
    (place / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}")


@checkout
def test_tic_tasks_beside_the_standard_suite(model, tmp_path):
    """The same numbers as scripts/evaluate.py has, for a task of DataComp's own as well."""
    data = tmp_path / "data"
    for task in ("retrieval", "emojinet"):
        write_set(data / f"tic/emoji/yearly/eval/{task}/2014", task)
    write_set(data / "wds_cifar10_test/test", "classification", names="{}.tar", sizes=False)
    (data / "wds_cifar10_test/test/nshards.txt").write_text("3")
    keys = ["tic/emoji/retrieval/yearly/2014", "tic/emoji/emojinet/yearly/2014", "cifar10"]
    copy = shutil.copytree(ROOT / "datacomp", tmp_path / "datacomp", ignore=shutil.ignore_patterns(".git", "figs"))
    tasks = [f"{key}:\n  name: {key}\n  main_metric: {'mean_recall@1' if 'ret' in key else 'acc1'}\n" for key in keys]
    (copy / "tasklist.yml").write_text("".join(tasks))
    arguments = ("--use_model", model, "--data_dir", data)
    theirs = ("--train_output_dir", tmp_path / "theirs", "--output_dir", tmp_path / "theirs")
    printed = run("evaluate.py", *arguments, *theirs, folder=copy)
    assert "=== Final results ===" in printed
    (tmp_path / "list.yml").write_text("".join(f"{key}:\n" for key in keys))
    run(
        ROOT / "scripts/evaluate.py", *arguments, "--output_dir", tmp_path / "ours", "--tasklist", tmp_path / "list.yml"
    )
    ours, theirs = (
        {line["key"]: line["metrics"] for line in map(json.loads, (tmp_path / name / "eval_results.jsonl").open())}
        for name in ("ours", "theirs")
    )
    assert list(theirs) == keys
    for key in keys:
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6)
    assert "Skipping cifar10" in run(
        "evaluate.py", *arguments, *("--train_output_dir", tmp_path / "theirs"), folder=copy
    )


@checkout
def test_a_task_without_data_is_one_line(model, tmp_path):
    copy = shutil.copytree(ROOT / "datacomp", tmp_path / "datacomp", ignore=shutil.ignore_patterns(".git", "figs"))
    (copy / "tasklist.yml").write_text("tic/emoji/retrieval/yearly/2014: {main_metric: mean_recall@1}")
    arguments = ("--use_model", model, "--data_dir", tmp_path, "--train_output_dir", tmp_path / "out")
    printed = run("evaluate.py", *arguments, folder=copy, code=1)
    assert printed.splitlines()[-1].startswith("error: no data for tic/emoji/retrieval/yearly/2014: ")


@checkout
def test_no_pickle_from_outside_is_run(tmp_path):
    (tmp_path / "info.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "witness")))
    printed = run("evaluate.py", "--train_output_dir", tmp_path, code=1)
    assert printed.splitlines()[-1].startswith(f"error: {tmp_path}/info.pkl is not what train.py writes: it holds ")
    assert not (tmp_path / "witness").exists()


# Without a checkout.


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"checkpoint": Malicious("/nowhere/x")}), "it holds io.open, which is no path"),
        (pickle.dumps([1]), "is not what train.py writes"),
        (pickle.dumps({"checkpoint": "x"}), "is not what train.py writes"),
        (b"text", "is not what train.py writes"),
        (b"", "is not what train.py writes"),
    ],
)
def test_info_that_train_py_has_not_written(content, message, tmp_path):
    (tmp_path / "info.pkl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        load_info(tmp_path)


def test_info_as_train_py_writes_it(tmp_path):
    info = {"scale_config": {"model": ARCH, "beta2": None}, "checkpoint": tmp_path / "x.pt", "data_dir": Path("a::b")}
    (tmp_path / "info.pkl").write_bytes(pickle.dumps(info))
    assert load_info(tmp_path) == info


def test_the_scales():
    scales = datacomp.scales()
    assert set(scales) == set(SCALES)
    assert scales["tic_medium"] == {
        "batch_size": 4096,
        "learning_rate": 5e-4,
        "train_num_samples": 18_432_000,
        "warmup": 500,
        "model": "ViT-B-16",
        "beta2": 0.98,
    }


def planned(tmp_path, **changes):
    for name, size in (("a", 100), ("b", 300)):
        write_json(tmp_path / name / "sizes.json", {"00000000.tar": size})
    given = {"data_dir": Path(f"{tmp_path}/a::{tmp_path}/b"), "data_weights": None, "num_checkpoints": 2}
    given |= {"accum_freq": 1, "exp_name": None, "scale": "tic_tiny", "seed": 3, **changes}
    return datacomp.exact_plan(argparse.Namespace(**given), {"batch_size": 10, "train_num_samples": 99})


def test_the_plan_of_exact_sampling(tmp_path):
    plan = planned(tmp_path)
    assert (plan["block"], plan["iterations"], plan["batch_size"], plan["seed"]) == (4, 8, 10, 3)
    assert [(source["size"], source["samples"]) for source in plan["sources"]] == [(100, 20), (300, 60)]
    plan = planned(tmp_path, data_weights="1::3.0", accum_freq=2)
    assert (plan["block"], plan["iterations"], plan["batch_size"]) == (8, 16, 5)
    assert [source["samples"] for source in planned(tmp_path, data_weights="1::1")["sources"]] == [40, 40]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_weights": "1"}, "--data_weights 1 must be 2 numbers above 0, joined with ::"),
        ({"data_weights": "1::x"}, "must be 2 numbers above 0"),
        ({"data_weights": "1::-1"}, "must be 2 numbers above 0"),
        ({"num_checkpoints": 10}, "99 samples are less than a batch for each of the checkpoints"),
        ({"data_dir": Path("nowhere")}, "nowhere is missing"),
    ],
)
def test_plans_that_cannot_be(change, message, tmp_path):
    with pytest.raises(Exception, match=message) as error:
        planned(tmp_path, **change)
    assert type(error.value).__name__ in ("TicError", "Missing")


def test_urls_survive_pathlib():
    assert datacomp._urls(Path("s3://bucket/a::s3://bucket/b::/disk/c")) == [
        "s3://bucket/a",
        "s3://bucket/b",
        "/disk/c",
    ]


def test_the_classes_of_a_sample(tmp_path):
    uids = parse_uids(["0" * 31 + digit for digit in "123"])
    table = np.zeros(2, dtype=CLASSES)
    table["f0"], table["f1"], table["class_id"] = uids["f0"][:2], uids["f1"][:2], [7, 999]
    save_uids(tmp_path / "classes.npy", table)
    labels = datacomp.open_classes(tmp_path / "classes.npy")
    assert [labels(uid) for uid in uids] == [{"cls": b"7"}, {"cls": b"999"}, {}]
    assert datacomp.open_classes(None)(uids[0]) == {}
    with pytest.raises(SystemExit, match="missing"):
        datacomp.open_classes(tmp_path / "nothing.npy")


def test_a_command_as_a_file(tmp_path):
    options = {"bufsize": 100, "ignore_status": [], "stderr": subprocess.PIPE, "shell": True}
    with datacomp.Pipe("printf 'one\\ntwo'", mode="rb", **options) as pipe:
        assert (pipe.readline(), pipe.read(), pipe.read()) == (b"one\n", b"two", b"")
    assert pipe.status == 0
    with datacomp.Pipe(f"cat > {tmp_path}/out", mode="wb", **options) as pipe:
        pipe.write(b"text")
    assert (tmp_path / "out").read_text() == "text"


def test_what_is_to_be_blurred_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "img2dataset.blurrer", None)
    blurrer = datacomp.BoundingBoxBlurrer()  # made in each worker, whether there is anything to blur or not
    with pytest.raises(SystemExit, match="--apply-blur needs img2dataset"):
        blurrer(None, None)
