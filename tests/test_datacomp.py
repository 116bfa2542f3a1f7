"""DataComp's commands in its patched checkout, on a tiny pool; without a hunk of datacomp.patch one of these fails.

Where there is no datacomp/ (``bash setup.sh --datacomp`` makes it) those that need it skip.
"""

import argparse
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, call

import datasets
import numpy as np
import pytest
import torch
import yaml
from cloudpathlib import S3Path
from conftest import ROOT, read_tars
from datasets.arrow_writer import ArrowWriter
from forked import Script
from miniature import make_image
from PIL import Image

from tic_clip import datacomp
from tic_clip.data.reshard import reshard
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import CLASS_ROW, parse_uids, save_uids
from tic_clip.datacomp import load_info
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import evaluate
from tic_clip.evaluation.tasks import task_of
from tic_clip.models import make_model, named_model
from tic_clip.storage import write_json
from tic_clip.training import hooks

ARCH = "ViT-Tiny-8-48"
CONFIG = {"batch_size": 10, "train_num_samples": 99, "warmup": 500}
TINY = ["--scale", "tic_tiny", "--precision", "fp32", "--workers", "0", "--num_checkpoints", "2"]
checkout = pytest.mark.skipif(not (ROOT / "datacomp").exists(), reason="needs datacomp/: bash setup.sh --datacomp")


def run(script, *arguments, code=0):
    """What a script of the checkout prints; it runs there, as its users run it."""
    done = Script(ROOT / "datacomp" / script, *arguments, folder=ROOT / "datacomp").wait()
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture
def pool(make_pool):
    """120 images in two shards of DataComp's format."""
    return make_pool((60, 60))


@pytest.fixture
def subset(pool, tmp_path):
    """Every second UID of the pool, one of them twice."""
    save_uids(tmp_path / "subset.npy", parse_uids([*pool.uids[::2], pool.uids[0]]))
    return tmp_path / "subset.npy"


@pytest.fixture
def split(pool, subset, tmp_path):
    """A training split of ours."""
    reshard(pool.path, str(tmp_path / "split"), str(subset))
    return tmp_path / "split"


def members(folder):
    """Every (name, bytes) of the shards in a folder."""
    return sorted((f"{key}.{suffix}", data) for key, sample in read_tars(folder) for suffix, data in sample.items())


@checkout
def test_the_resharder_gives_classes_and_otherwise_what_ours_gives(pool, subset, tmp_path):
    out, classes = tmp_path / "new/folder", tmp_path / "classes.npy"
    rows = [(*uid, i % 6) for i, uid in enumerate(parse_uids(pool.uids[2::2]).tolist())]
    save_uids(classes, np.array(rows, CLASS_ROW))
    printed = run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, "-c", classes, "-j", "2")
    assert "output 61 images" in printed
    reshard(pool.path, str(tmp_path / "ours"), str(subset), classes=str(classes))
    assert members(out) == members(tmp_path / "ours")
    assert sum(name.endswith(".cls") for name, _ in members(out)) == 59
    refused = run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, code=1)
    assert "refusing to overwrite non-empty directory" in refused
    failing = "resharder.ResharderPipe('exit 3', mode='r', shell=True, stderr=-1).wait_for_child()"
    (tmp_path / "fail.py").write_text(f"import sys; sys.path.insert(0, '.')\nimport resharder; {failing}")
    assert "exit 3 (read)" in run(tmp_path / "fail.py")
    refused = run("resharder.py", "-i", pool.path, "-o", f"{out}/../../pool", "-s", subset, "--overwrite", code=1)
    assert "is the pool: give another output folder" in refused
    (out / "99999999.tar").write_text("of an earlier run")
    for flags in ("--dry-run",), ():
        run("resharder.py", "-i", pool.path, "-o", out, "-s", subset, "-j", "1", "--overwrite", *flags)
        assert (out / "99999999.tar").exists() == bool(flags)
    assert [name for name, _ in members(out) if name.endswith(".cls")] == []
    assert len(members(out)) == 3 * 61


@checkout
def test_training_exactly_and_then_the_next_step(split, tmp_path):
    size = ["--train_num_samples", "256", "--warmup", "2", "--log_every_n_steps", "1"]
    printed = run("train.py", *TINY, *size, "--data_dir", split, "--output_dir", tmp_path / "out", "--exp_name", "a")
    assert printed.count("Train Epoch") == 4
    plan = json.loads((tmp_path / "out/a_plan.json").read_text())
    assert plan["sources"] == [{"name": str(split), "split": str(split), "size": 61, "used": 61, "samples": 256}]
    latest = tmp_path / "out/a/checkpoints/epoch_latest.pt"
    info = load_info(tmp_path / "out/a/info.pkl")
    assert (info["scale"], info["checkpoint"]) == ("tic_tiny", latest)
    assert info["scale_config"]["train_num_samples"] == 256
    assert {"warmup: 2", "dataset_resampled: False"} <= set((tmp_path / "out/a/params.txt").read_text().splitlines())
    arguments = ("--data_dir", f"{split}::{split}", "--output_dir", tmp_path / "out", "--exp_name", "b")
    run("train.py", *TINY, *size, *arguments, "--data_weights", "3::1", "--new_run", "--resume", latest)
    samples = [source["samples"] for source in json.loads((tmp_path / "out/b_plan.json").read_text())["sources"]]
    assert samples == [192, 64]
    first, second = (torch.load(tmp_path / f"out/{name}/checkpoints/epoch_latest.pt") for name in "ab")
    assert (first["epoch"], second["epoch"]) == (2, 2)  # a new run, not one that goes on from epoch 2
    assert any((first["state_dict"][name] != value).any() for name, value in second["state_dict"].items())


@checkout
def test_a_checkpoint_that_does_not_fit_is_one_line(split, tmp_path):
    torch.save({"logit_scale": torch.ones(1)}, tmp_path / "x.pt")
    arguments = ("--data_dir", split, "--output_dir", tmp_path / "out", "--new_run", "--resume", tmp_path / "x.pt")
    printed = run("train.py", *TINY, *arguments, code=1)
    assert printed.splitlines()[-1].startswith(f"error: checkpoint {tmp_path}/x.pt is not of ViT-Tiny-12-48: ")


@pytest.fixture
def model(tmp_path):
    """Random weights, large enough that images fall into different classes."""
    torch.manual_seed(0)
    net = make_model(ARCH, "cpu")[0]
    for name, value in net.state_dict().items():
        value *= 3 if "visual" in name and value.ndim > 1 else 1
    torch.save(net.state_dict(), tmp_path / "model.pt")
    return f"{ARCH} {tmp_path / 'model.pt'}"


def write_set(folder, names="{:08d}.tar", fields=1):
    """Thirty images with a caption, one of six classes and metadata each, in three shards."""
    rows = np.random.default_rng(0).integers(0, 2, (30, fields))
    content = []
    for i, row in enumerate(rows):
        np.save(file := io.BytesIO(), row)
        about = {"txt": f"picture {i}".encode(), "cls": b"%d" % (i % 6), "npy": file.getvalue()}
        content.append((f"{i:04d}", {"jpg": make_image(str(i)), **about}))
    counts = {names.format(i): write_shard(folder / names.format(i), content[10 * i : 10 * i + 10]) for i in range(3)}
    place = folder.parent if folder.name == "test" else folder
    (folder / "nshards.txt").write_text("3")
    write_json(folder / "sizes.json", counts)
    (place / "classnames.txt").write_text("\n".join("abcdef"))
    (place / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}")


def write_hub(data, name, features, rows):
    """A data set of the hub as datasets 2.8, DataComp's, has left it in its cache; ``features`` as it wrote them."""
    folder = data / f"hf_cache/nlphuji___{name}/TEST/1.1.0/0123abcd"
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features.from_dict(features))
    writer = ArrowWriter(path=str(folder / f"{name}-test.arrow"), features=table.features)
    writer.write_table(table.data.table)
    writer.finalize()
    version = {"version_str": "1.1.0", "description": None, "major": 1, "minor": 1, "patch": 0}
    splits = {"test": {"name": "test", "num_bytes": 1, "num_examples": len(table), "dataset_name": name}}
    about = {"builder_name": name, "config_name": "TEST", "version": version, "splits": splits}
    write_json(folder / "dataset_info.json", {"features": features, **about})


def write_suite(data):
    """Data of the tasks whose numbers are checked."""
    write_set(data / "wds_cifar10_test/test", "{}.tar")
    write_set(data / "wds_wilds-iwildcam_test/test", "{}.tar", fields=9)
    text, image = ({"dtype": "string", "id": None, "_type": "Value"}, {"decode": True, "id": None, "_type": "Image"})
    captions = [[f"picture {i}", f"thing {i}"] for i in range(30)]
    rows = {"image": [{"bytes": make_image(str(i)), "path": None} for i in range(30)], "caption": captions}
    write_hub(data, "flickr_1k_test_image_text_retrieval", {"image": image, "caption": [text]}, rows)


def expected(model):
    """The numbers of DataComp's own tasks on that suite, worked out slowly: key -> {metric: value}."""
    arch, path = model.split()
    net, preprocess, tokenizer = make_model(arch, "cpu")
    net.load_state_dict(torch.load(path))

    @torch.no_grad()
    def texts(some):
        return net.encode_text(tokenizer(some), normalize=True).numpy()

    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(io.BytesIO(make_image(str(i))))) for i in range(30)])
        images = net.encode_image(images, normalize=True).numpy()
    means = [texts([f"a {name}", f"the {name}"]).mean(axis=0) for name in "abcdef"]
    ranks = np.argsort([[-image @ mean / np.linalg.norm(mean) for mean in means] for image in images])
    labels = np.arange(30) % 6
    best = ranks[:, 0]
    right, among_5 = best == labels, (ranks[:, :5] == labels[:, None]).any(axis=1)
    f1 = [2 * (right & (labels == c)).sum() / ((best == c).sum() + (labels == c).sum()) for c in range(6)]
    scores = texts([f"{word} {i}" for i in range(30) for word in ("picture", "thing")]) @ images.T
    nearest = {"image": np.argsort(-scores), "text": np.argsort(-scores.T) // 2}
    own = {"image": np.arange(60) // 2, "text": np.arange(30)}
    recall = {
        f"{name}_retrieval_recall@{k}": np.mean([i in some[:k] for i, some in zip(own[name], ranks, strict=True)])
        for name, ranks in nearest.items()
        for k in (1, 5, 10)
    }
    return {
        "cifar10": {"acc1": right.mean(), "acc5": among_5.mean(), "mean_per_class_recall": right.mean()},
        "retrieval/flickr_1k_test_image_text_retrieval": recall,
        "wilds/iwildcam": {"acc1": right.mean(), "F1-macro_all": np.mean(f1)},
    }


EVALUATE = """
import runpy, sys
from tic_clip.datacomp import evaluate_model

for key, weights in {cases}:
    try:
        evaluate_model(key, {{"scale_config": {{"model": {arch!r}}}, "checkpoint": weights}}, "nowhere", None)
    except SystemExit as error:
        print(error)
sys.argv = ["evaluate.py", *{arguments}]
runpy.run_path("evaluate.py", run_name="__main__")
"""


@checkout
def test_tic_tasks_beside_the_standard_suite(model, tmp_path):
    """A task of every kind, with the main metric that DataComp's list names; tic/ tasks as scripts/evaluate.py.

    On a GPU DataComp's own tasks are in half precision. Before them, those that can't be: one line each.
    """
    data, slow = tmp_path / "data", expected(model)
    emoji = {"retrieval": "mean_recall@1", "emojinet": "mean_per_class_recall"}
    keys = {f"tic/emoji/{task}/yearly/2014": metric for task, metric in emoji.items()}
    for key in keys:
        write_set(data / f"tic/emoji/yearly/eval/{key.split('/')[2]}/2014")
    write_suite(data)
    theirs = yaml.safe_load((ROOT / "datacomp/tasklist.yml").read_text())
    tasks = {key: {"main_metric": metric, "size": 30} for key, metric in keys.items()}
    tasks |= {key: theirs[key] | {"size": 30} for key in slow}
    copy = shutil.copytree(ROOT / "datacomp", tmp_path / "datacomp", ignore=shutil.ignore_patterns(".git", "figs"))
    (copy / "tasklist.yml").write_text(yaml.safe_dump(tasks, sort_keys=False))
    torch.save({"state_dict": {"x": np.ones(1)}}, tmp_path / "unsafe.pt")
    good, bad, none = model.split()[1], f"{tmp_path}/unsafe.pt", f"{tmp_path}/none.pt"
    cases = {
        ("cifar10", none): f"error: {none} is neither a checkpoint file nor a pretrained tag of {ARCH}",
        ("cifar10", bad): f"error: {bad} is not a checkpoint that can be loaded safely: ",
        ("mnist", good): "error: nowhere/wds_mnist_test/test/nshards.txt: No such file or directory",
        ("misc/winogavil", good): "error: ",
        ("tic/emoji/retrieval/yearly/2014", good): "error: no data for tic/emoji/retrieval/yearly/2014: ",
        ("tic/emoji/retrieval/yearly/1999", good): "error: unknown evaluation task 'tic/emoji/retrieval/yearly/1999'",
    }
    folders = {"data_dir": data, "train_output_dir": tmp_path, "output_dir": tmp_path}
    arguments = ["--use_model", model, "--batch_size=4", *(f"--{name}={path}" for name, path in folders.items())]
    code = EVALUATE.format(cases=list(cases), arch=ARCH, arguments=arguments)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # which count when all is imported
    options = {"cwd": copy, "capture_output": True, "text": True, "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    for error, message in zip(errors, cases.values(), strict=True):
        assert error.startswith(message)
    assert "=== Final results ===" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "eval_results.jsonl").open()]
    assert [line["key"] for line in lines] == [*keys, *slow]
    results = {line["key"]: line["metrics"] for line in lines}
    for key, numbers in slow.items():
        assert {name: results[key][name] for name in numbers} == pytest.approx(numbers, abs=1e-6), key
        assert results[key]["main_metric"] == results[key][theirs[key].get("main_metric", "acc1")]
    models, mine = [named_model(model, "emoji")], [task_of(key, str(data)) for key in keys]
    for result in evaluate(models, mine, str(tmp_path / "ours"), Settings(device="cpu")):
        assert results[result["key"]] == pytest.approx(result["metrics"], abs=1e-6)


@checkout
def test_no_pickle_from_outside_is_run(tmp_path):
    """Neither the one of the training nor that of an earlier evaluation."""
    bad, good = (tmp_path / name / "info.pkl" for name in ("bad", "good"))
    info = {"scale_config": {"model": ARCH}, "checkpoint": "x"}
    for path, content in (bad, Malicious(tmp_path / "witness")), (good, info):
        path.parent.mkdir()
        path.write_bytes(pickle.dumps(content))
    for training, evaluation in (bad, good), (good, bad):
        arguments = ("--train_output_dir", training.parent, "--output_dir", evaluation.parent)
        printed = run("evaluate.py", *arguments, code=1)
        assert printed.splitlines()[-1].startswith(f"error: {bad} is not what train.py writes: it holds ")
        assert not (tmp_path / "witness").exists()


class Malicious(str):
    def __reduce__(self):
        return (open, (str(self), "w"))


OTHERS = ({"checkpoint": Malicious("/nowhere/x")}, [1], {"checkpoint": "x", "scale_config": {}})


@pytest.mark.parametrize("content", [*map(pickle.dumps, OTHERS), b"text", b""])
def test_info_that_train_py_has_not_written(content, tmp_path):
    (tmp_path / "info.pkl").write_bytes(content)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/info.pkl is not what train.py writes: "):
        load_info(tmp_path / "info.pkl")


@pytest.mark.parametrize("data_dir", [Path("a::b"), S3Path("s3://bucket/a::s3://bucket/b")])
def test_info_as_train_py_writes_it(tmp_path, data_dir):
    info = {"scale_config": {"model": ARCH, "beta2": None}, "checkpoint": tmp_path / "x.pt", "data_dir": data_dir}
    (tmp_path / "info.pkl").write_bytes(pickle.dumps(info))
    expected = info if isinstance(data_dir, Path) else info | {"data_dir": str(data_dir)}
    assert load_info(tmp_path / "info.pkl") == expected


def flags(tmp_path, **changes):
    """train.py's, for two splits of 100 and 300 samples."""
    for name, size in (("a", 100), ("b", 300)):
        write_json(tmp_path / name / "sizes.json", {"00000000.tar": size})
    given = {"data_dir": Path(f"{tmp_path}/a::{tmp_path}/b"), "data_weights": None, "num_checkpoints": 2, "workers": 4}
    given |= {"accum_freq": 1, "exp_name": None, "scale": "tic_tiny", "seed": 3, "warmup": None, "resume": "latest"}
    given |= {"train_num_samples": None, "new_run": False, "dataset_resampled": False, "output_dir": tmp_path / "out"}
    return argparse.Namespace(**given | changes)


def planned(tmp_path, **changes):
    return datacomp.exact_plan(flags(tmp_path, **changes), CONFIG)


def test_the_plan_of_exact_sampling(tmp_path):
    plan = planned(tmp_path)
    assert (plan["block"], plan["iterations"], plan["batch_size"], plan["seed"]) == (4, 8, 10, 3)
    assert [(source["size"], source["samples"]) for source in plan["sources"]] == [(100, 20), (300, 60)]
    assert planned(tmp_path, data_weights="1::3.0", accum_freq=2) == plan
    write_json(tmp_path / "plan.json", plan)  # OpenCLIP gets the batch of a pass
    args = argparse.Namespace(batch_size=5, accum_freq=2, world_size=1, rank=0, workers=0, device="cpu")
    args.train_data = tmp_path / "plan.json"
    assert hooks.get_exact_dataset(args, None, True).dataloader.num_batches == 8
    assert [source["samples"] for source in planned(tmp_path, data_weights="1::1")["sources"]] == [40, 40]


def test_splits_in_a_bucket(s3, tmp_path):
    """train.py makes a path of --data_dir, and so one slash of a URL's two."""
    for name, size in (("a", 100), ("b", 300)):
        write_json(f"{s3}/{name}/sizes.json", {"00000000.tar": size})
    sources = planned(tmp_path, data_dir=Path(f"{s3}/a::{s3}/b"))["sources"]
    assert [(source["split"], source["samples"]) for source in sources] == [(f"{s3}/a", 20), (f"{s3}/b", 60)]


def test_what_the_flags_of_training_come_to(tmp_path):
    args = flags(tmp_path, warmup=0)
    plan = f"{tmp_path}/out/tic_tiny_scale_plan.json"
    exact = ["--dataset-type", "exact", "--train-data", plan]
    assert datacomp.configure_training(CONFIG, args, 1) == (CONFIG | {"warmup": 0}, exact)
    assert not Path(plan).exists()  # the first rank writes it
    datacomp.configure_training(CONFIG, args, 0)
    assert Path(plan).exists()
    args = flags(tmp_path, dataset_resampled=True, train_num_samples=80, new_run=True, resume="s3://bucket/x.pt")
    found = (CONFIG | {"train_num_samples": 80}, ["--new-run", "--dataset-resampled"])
    assert datacomp.configure_training(CONFIG, args, 0) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_checkpoints": 10}, "99 samples are less than a batch of 10 for each of the checkpoints"),
        ({"data_dir": Path("nowhere")}, "nowhere is missing"),
        ({"data_dir": Path("bare")}, "bare has no sizes.json: finish reshard.py, or count shards "),
        ({"new_run": True}, "--new_run takes the weights of a checkpoint: give one with --resume"),
    ],
)
def test_training_that_cannot_be(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(SystemExit, match=re.escape(message)):
        datacomp.configure_training(CONFIG, flags(tmp_path, **change), 0)
    assert not (tmp_path / "out").exists()


def test_a_table_of_classes_is_looked_at_first(tmp_path):
    table = np.array([(2, 0, 0), (1, 0, 0)], CLASS_ROW)
    for name, content in (("unsorted", table), ("good", table[::-1]), ("uids", np.zeros(2, dtype="u8,u8"))):
        np.save(tmp_path / f"{name}.npy", content)
    parser = argparse.ArgumentParser()
    datacomp.add_class_flag(parser)
    assert parser.parse_args(["-c", f"{tmp_path}/good.npy"]).cls_file == f"{tmp_path}/good.npy"
    for name, message in (("none", "is missing"), ("unsorted", "is not sorted"), ("uids", "has dtype")):
        with pytest.raises(SystemExit, match=f"error: {tmp_path}/{name}.npy {message}"):
            parser.parse_args(["--cls-file", f"{tmp_path}/{name}.npy"])


def test_a_data_set_that_is_a_script_comes_as_parquet():
    load = Mock(side_effect=[RuntimeError("Dataset scripts are no longer supported, but found x.py"), "rows"])
    assert datacomp._load_dataset(load, "a/b", split="test") == "rows"
    assert load.mock_calls == [call("a/b", split="test"), call("a/b", revision="refs/convert/parquet", split="test")]
