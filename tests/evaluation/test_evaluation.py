"""The numbers are clip_benchmark's own, whatever the batches; what is evaluated anew; models; the script."""

import io
import json
import re
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import Bomb, call_script
from hub import using_hub
from miniature import write_split
from PIL import Image
from tiny import both, cut, evaluate, lines, refused, run, scaled, task, write_classes

from tic_clip import models
from tic_clip.data.decode import decode_image
from tic_clip.data.split import SIZES
from tic_clip.data.uids import UID
from tic_clip.evaluation import encode
from tic_clip.evaluation.evaluate import RESULTS
from tic_clip.evaluation.results import read_hits
from tic_clip.evaluation.tasks import static_task
from tic_clip.metrics import METRIC_VERSION
from tic_clip.models import Model
from tic_clip.storage import write_json

checkpoint, content, data, model, net = tiny.FIXTURES

# --- The numbers ---


def test_numbers_are_those_of_clip_benchmark(net, content, model, data, tmp_path, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    class Loader(list):
        dataset = SimpleNamespace(classes=tiny.CLASSES)

    found = {len(metrics): metrics for metrics in run([model], both(data), tmp_path)}
    images = torch.stack([net[1](Image.open(io.BytesIO(data["png"])).convert("RGB")) for _, data in content])
    captions = [data["txt"].decode().splitlines() for _, data in content]
    peer = zeroshot_retrieval.evaluate(net[0], [(images, captions)], net[2], "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert len(set(peer.values())) > 2, "a model that finds nothing or everything shows nothing"
    means = dict.fromkeys(
        ("mean_recall@1", "main_metric"), (peer["image_retrieval_recall@1"] + peer["text_retrieval_recall@1"]) / 2
    )
    assert found[8] == pytest.approx(peer | means, abs=1e-6)
    # Its `accuracy` calls float() on an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(zeroshot_classification, "float", lambda value: np.asarray(value).item(), raising=False)
    loader = Loader([(images, torch.tensor([int(data["cls"]) for _, data in content]))])
    peer = zeroshot_classification.evaluate(net[0], loader, net[2], tiny.CLASSES, tiny.TEMPLATES, "cpu", amp=False)
    assert found[4] == pytest.approx({**peer, "main_metric": peer["mean_per_class_recall"]}, abs=1e-6)
    assert 0 < peer["acc5"] < 1


FIELDS = (
    "key dataset metrics num_samples benchmark method scale step samples_seen ci95 chance coverage dropped nonfinite"
)
FIELDS += " precision device batch_size metric_version model data pins"


def test_a_line_has_the_documented_fields(model, data, tmp_path):
    np.save(Path(task(data).folder) / "sample_ids.npy", np.zeros(2 * tiny.NUM_SAMPLES, dtype=UID))
    assert evaluate([model], both(data), tmp_path) == 2
    first, second = lines(tmp_path)
    assert first.keys() == set(FIELDS.split())
    assert second.keys() == first.keys() | {"constant_guess"}
    assert "time" in json.loads((tmp_path / RESULTS).read_text().splitlines()[0])
    assert (first["chance"], second["chance"]) == (1 / tiny.NUM_SAMPLES, 1 / len(tiny.CLASSES))
    assert (first["key"], second["key"]) == ("tic/emoji/retrieval/yearly/2014", "tic/emoji/emojinet/yearly/2014")
    assert (first["dataset"], second["dataset"]) == ("TiC-Emoji-Retrieval-Yearly-2014", "TiC-EmojiNet-Yearly-2014")
    assert {name: first[name] for name in model.about} == model.about
    assert first["model"] == {"name": "cumulative 2014", "arch": tiny.ARCH, "sha256": model.fingerprint}
    assert (first["precision"], first["device"], first["metric_version"]) == ("fp32", "cpu", METRIC_VERSION)
    assert (first["coverage"], second["coverage"]) == (0.5, None)
    low, high = first["ci95"]
    assert 0 <= low < first["metrics"]["main_metric"] < high <= 1
    assert first["pins"]["torch"] == torch.__version__.split("+")[0]
    for line in (first, second):
        hits = read_hits(tmp_path, "cumulative 2014", line["key"])
        assert len(hits) == line["num_samples"] == tiny.NUM_SAMPLES
        assert hits.mean() == pytest.approx(line["metrics"]["main_metric"], abs=1e-3)


def test_batches_shards_and_workers_change_nothing(content, model, data, tmp_path):
    folder = tmp_path / "other/tic/emoji/yearly/eval/emojinet"
    write_split(folder / "2014", *cut(content, 5))
    write_classes(folder / "2014")  # here in the split itself
    retrieval = folder.parent / "retrieval/2014"
    write_split(retrieval, *cut(content, 11), names="{}.tar")  # 0.tar … 10.tar, as clip_benchmark's
    (retrieval / SIZES).unlink()
    (retrieval / "nshards.txt").write_text("11")
    usual = run([model], both(data), tmp_path / "a", batch_size=256)
    unusual = run([model], both(tmp_path / "other"), tmp_path / "b", batch_size=7, workers=1)
    usual, unusual = (sorted(metrics, key=len) for metrics in (usual, unusual))  # the larger folder is the first
    assert unusual == [pytest.approx(metrics, abs=1e-6) for metrics in usual]


# --- What is skipped and what is not ---


def test_again_appends_nothing_and_a_killed_evaluation_resumes(model, data, tmp_path, capfd):
    assert evaluate([model], both(data), tmp_path) == 2
    before = (tmp_path / RESULTS).read_text()
    capfd.readouterr()
    assert evaluate([model], both(data), tmp_path) == 0
    assert (tmp_path / RESULTS).read_text() == before
    assert capfd.readouterr() == ("", "")
    (tmp_path / RESULTS).write_text(before[:-100])  # killed while it wrote the second line
    assert evaluate([model], both(data), tmp_path) == 1
    last, again = (json.loads(text.splitlines()[-1]) for text in (before, (tmp_path / RESULTS).read_text()))
    assert again == last | {"time": again["time"]}


CHANGES = {
    "samples": lambda folder, content: write_split(folder, content[:-1]),
    "uids": lambda folder, content: np.save(folder / "sample_ids.npy", np.zeros(tiny.NUM_SAMPLES)),
    "classnames": lambda folder, content: write_classes(folder.parent, [*tiny.CLASSES[1:], "violin"]),
    "templates": lambda folder, content: write_classes(folder, templates=["{c}!"]),
    "bytes": lambda folder, content: (write_split(folder, *cut(content[:-3], 3)), (folder / SIZES).unlink()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_data_are_evaluated_anew(change, content, model, data, tmp_path):
    chosen = task(data, "emojinet")
    if change == "bytes":  # of a folder that has neither sizes nor UIDs
        Path(chosen.folder, SIZES).unlink()
    evaluate([model], [chosen], tmp_path)
    CHANGES[change](Path(chosen.folder), content)
    assert evaluate([model], [chosen], tmp_path) == 1
    first, second = lines(tmp_path)
    assert first["data"] != second["data"]


def test_a_result_is_of_its_weights_precision_and_metric_version(net, model, data, tmp_path):
    """The matrix takes a step's last line, so that must be of the weights that are there now."""
    (usual,), tasks = run([model], [task(data)], tmp_path), [task(data)]
    other = scaled(net, 1.1, tmp_path / "other.pt")
    for now in (Model(name=model.name, arch=tiny.ARCH, weights=other.weights, about=model.about), model):
        assert evaluate([now], tasks, tmp_path) == 1
    first, second, third = lines(tmp_path)
    assert first == third
    assert first["model"]["sha256"] != second["model"]["sha256"]
    for change in ({"metric_version": METRIC_VERSION - 1}, {}):
        old = {name: value for name, value in first.items() if name != "metric_version"} | change
        (tmp_path / RESULTS).write_text(json.dumps(old) + "\n")
        assert evaluate([model], tasks, tmp_path) == 1
    assert evaluate([model], tasks, tmp_path, since=time.time()) == 1
    assert lines(tmp_path)[1:] == [first, first]
    assert [evaluate([model], tasks, tmp_path, precision="amp_bf16") for _ in range(2)] == [1, 0]
    assert lines(tmp_path)[-1]["precision"] == "amp_bf16"
    assert lines(tmp_path)[-1]["metrics"] == pytest.approx(usual, abs=0.25)


# --- What a model makes of it ---


class Net:
    """Encodes as ``net`` does and remembers in what batches; runs out of memory, or gives a NaN, if told to."""

    def __init__(self, net, most=None, fault=None):
        self.net, self.most, self.fault, self.seen = net, most, fault, {"image": [], "text": []}
        self.encode_image, self.encode_text = partial(self.encode, "image"), partial(self.encode, "text")

    def encode(self, part, batch, normalize):
        if self.most and len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        self.seen[part].append(len(batch))
        features = getattr(self.net, f"encode_{part}")(batch, normalize=normalize)
        if part == self.fault:
            features[0] = float("nan")
        return features


@pytest.fixture
def with_net(monkeypatch, model, net):
    """Replace the model by a ``Net``."""

    def make(**options):
        made = Net(net[0], **options)
        monkeypatch.setattr(encode, "load_model", lambda *_: (made, *net[1:]))
        return made

    return make


def test_each_image_and_each_different_text_is_encoded_once(content, with_net, model, data, tmp_path):
    doubled = [(f"{key}{copy}", members) for copy in "ab" for key, members in content]
    write_split(Path(task(data).folder), doubled)
    write_classes(Path(task(data).folder))
    tasks = [*both(data), static_task("static", {"folder": task(data).folder}, "")]  # the first one's folder
    net = with_net()
    evaluate([model], tasks, tmp_path, batch_size=16)
    captions = {line for _, members in content for line in members["txt"].decode().splitlines()}
    assert sum(net.seen["image"]) == 2 * tiny.NUM_SAMPLES + tiny.NUM_SAMPLES
    assert sum(net.seen["text"]) == len(captions) + len(tiny.CLASSES) * len(tiny.TEMPLATES)
    found = {line["key"]: line for line in lines(tmp_path)}
    assert found["static"]["num_samples"] == 2 * tiny.NUM_SAMPLES
    ours = found[tasks[1].key]["metrics"]
    assert found["static"]["metrics"] == ours | {"main_metric": ours["acc1"]}  # all samples twice
    assert "text_retrieval_recall@1" in found[tasks[0].key]["metrics"]


def test_a_batch_that_is_too_large_for_the_memory_is_halved(with_net, model, data, tmp_path):
    with_net()
    usual = run([model], both(data), tmp_path / "a")
    net = with_net(most=5)
    assert run([model], both(data), tmp_path / "b", batch_size=32) == [pytest.approx(each) for each in usual]
    assert max(net.seen["image"] + net.seen["text"]) == 4
    assert {line["batch_size"] for line in lines(tmp_path / "b")} == {4}
    with_net(most=0.5)
    assert "out of memory, even for one sample" in refused([model], [task(data)], tmp_path)


@pytest.mark.parametrize("part", ["image", "text"])
def test_features_that_are_not_numbers_are_counted(part, with_net, model, data, tmp_path):
    with_net(fault=part)
    evaluate([model], both(data), tmp_path, batch_size=10)
    retrieval, classification = lines(tmp_path)
    assert retrieval["nonfinite"] > 1
    assert classification["nonfinite"] > 0
    assert all(np.isfinite(value) for line in lines(tmp_path) for value in line["metrics"].values())


def test_models_of_one_architecture_share_what_is_decoded(net, model, data, tmp_path, monkeypatch):
    several, decoded = [model, scaled(net, 1.1, tmp_path / "other.pt")], []
    evaluate(several, both(data), tmp_path / "apart", models_at_once=1, batch_size=8)
    monkeypatch.setattr(encode, "decode_image", lambda data: decoded.append(1) or decode_image(data))
    evaluate(several, both(data), tmp_path / "shared", batch_size=8)
    assert len(decoded) == 2 * tiny.NUM_SAMPLES
    apart, shared = (sorted(map(json.dumps, lines(tmp_path / name))) for name in ("apart", "shared"))
    assert apart == shared


def test_a_device_that_is_not_there_is_one_line(net, data, tmp_path, capfd):
    fit = scaled(net, 1, tmp_path / "fit.pt")
    assert refused([fit], [task(data)], tmp_path, device="cuda:9").startswith(f"{tiny.ARCH} can't be loaded: ")
    assert capfd.readouterr() == ("", ""), "the error is to be the only line: no progress bar before it"


# --- The script ---


def outcome(*arguments):
    done = call_script(tiny.SCRIPT, *arguments)
    return done.returncode, done.stdout, done.stderr


def test_the_script_is_quiet_and_says_what_it_did_and_what_is_odd(data, content, checkpoint, tmp_path):
    run_dir, tasklist, net = tmp_path / "run", tmp_path / "tasklist.yml", task(data, "emojinet")
    plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": "2014", "model": tiny.ARCH}
    plan |= {"samples_seen": 64, "samples": 64, "checkpoints": 2}
    shutil.copytree(checkpoint.parent, run_dir / "2014/checkpoints")
    write_json(run_dir / "2014/done.json", {"plan": plan, "checkpoint": "checkpoints/model.pt"})
    write_split(Path(net.folder), [("bad", content[0][1] | {"png": b"?"}), content[0]])
    tasklist.write_text("".join(f"{each.key}: {{}}\n" for each in both(data)))
    arguments = ("--train_output_dir", run_dir, "--data_dir", data, "--tasklist", tasklist, "--skip_bad")
    arguments += ("--imagenet_val", net.folder)
    expected = [f"oracle 2014: {tiny.ARCH} {run_dir}/2014/checkpoints/model.pt"]
    expected += [f"  {each.key}  {each.folder}" for each in both(data)] + [f"  imagenet1k  {net.folder}"]
    said = "".join(f"{line}\n" for line in expected)
    assert outcome(*arguments, "--dry_run", "--models_at_once", 2) == (0, said, "")
    assert not (run_dir / RESULTS).exists()
    status, stdout, stderr = outcome(*arguments)
    assert (status, stdout) == (0, f"3 new results in {run_dir}\n")
    said = [f"oracle 2014 on {name}: 1 samples left out: bad image" for name in (net.name, "ImageNet 1k")]
    assert [line for line in stderr.splitlines() if not re.match(r"(evaluate: .*batch.*)?$", line)] == said
    assert outcome(*arguments) == (0, f"0 new results in {run_dir}, 3 were there already\n", "")
    check = ("--check", "--data_dir", data, "--tasklist", tasklist)
    assert outcome(*check) == (0, "", "")
    write_split(Path(net.folder), [])
    assert outcome(*check) == (1, "", f"error: {net.folder} holds no sample\n")


def test_a_model_of_the_hub_and_weights_of_quickgelu(checkpoint, data, tmp_path):
    """Its configuration and weights come from there; what a checkpoint of there would run is not run."""
    config = {"model_cfg": json.loads((models.MODEL_CONFIGS / f"{tiny.ARCH}.json").read_text())}
    config["preprocess_cfg"] = {"mean": models.make_model(tiny.ARCH, "cpu")[0].visual.image_mean}
    config = {"open_clip_config.json": json.dumps(config).encode()}
    (tmp_path / "list.yml").write_text("tic/emoji/retrieval/yearly/2014:")
    torch.save({"state_dict": Bomb(tmp_path / "witness")}, tmp_path / "bad.bin")
    weights = {"me/model": checkpoint, "me/bad": tmp_path / "bad.bin"}
    files = {name: config | {"open_clip_pytorch_model.bin": path.read_bytes()} for name, path in weights.items()}
    flags = ("--data_dir", data, "--output_dir", tmp_path, "--tasklist", tmp_path / "list.yml", "--use_model")
    with using_hub(files, tmp_path / "cache"):
        assert outcome(*flags, "hf-hub:me/model")[:2] == (0, f"1 new results in {tmp_path}\n")
        error = outcome(*flags, "hf-hub:me/bad")[2]
    assert re.match(r"error: hf-hub:me/bad can't be loaded: \S+ is not a checkpoint that can be loaded safely: ", error)
    assert not (tmp_path / "witness").exists()
    (line,) = lines(tmp_path)
    assert line["benchmark"] == "emoji"  # that of the task list, so that report.py shows it
    assert line["model"] == dict.fromkeys(("name", "arch", "sha256"), "hf-hub:me/model")
    (usual,) = run([Model(name="x", arch=tiny.ARCH, weights=str(checkpoint))], [task(data)], tmp_path / "usual")
    assert line["metrics"] == pytest.approx(usual)
    said = "warning: the weights cc12m of RN50 were trained with QuickGELU: say RN50-quickgelu cc12m\n"
    status, _, stderr = outcome(*flags, "RN50 cc12m", "RN50 openai", "RN50-quickgelu cc12m", "--dry_run")
    assert (status, stderr) == (0, said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "--batch_size", "0"), "error: --batch_size and --models_at_once must be at least 1"),
        (("--use_model", "RN50 openai", "--output_dir", "{tmp}"), "error: no data for tic/datacomp/retrieval/yearly/"),
        (("--use_model", f"{tiny.ARCH} x.pt"), "error: --use_model and --released need an --output_dir"),
        (("--use_model", "A b", "--benchmark", "laion", "--output_dir", "{tmp}"), "error: unknown benchmark 'laion'"),
        (("--check", "--tasklist", "{tmp}/none.yml"), "error: {tmp}/none.yml: No such file"),
        (("--use_model", "RN50 openai", "--train_output_dir", "x"), "error: argument --train_output_dir: not allowed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    code, stdout, stderr = outcome(*(text.format(tmp=tmp_path) for text in arguments), "--data_dir", tmp_path)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(message.format(tmp=tmp_path))
