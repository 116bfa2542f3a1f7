"""One tiny model with random weights, some forty random images, and clip_benchmark's own evaluation of the same."""

import io
import json
import os
import re
import runpy
import shutil
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Script
from hub import serving_hub
from huggingface_hub import constants
from PIL import Image

from tic_clip import TicError, models
from tic_clip.data.clip_benchmark import imagenet_texts
from tic_clip.data.decode import decode_image
from tic_clip.data.split import HOW_TO_MAKE, SIZES, read_sizes
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import UID
from tic_clip.evaluation import encode
from tic_clip.evaluation import evaluate as evaluation
from tic_clip.evaluation.data import read_classes
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import RESULTS, check_tasks
from tic_clip.evaluation.results import read_hits
from tic_clip.evaluation.tasks import static_task, task_of
from tic_clip.metrics import METRIC_VERSION
from tic_clip.models import Model
from tic_clip.storage import upload, write_json

ARCH = "ViT-Tiny-8-48"
SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"
WORDS = ["red", "blue", "round", "happy", "sad", "cat", "dog", "tree", "house", "ship", "moon", "sun", "star", "hand"]
CLASSES, TEMPLATES = WORDS[:6], ["a picture of a {c}.", "the {c}", "{c}"]
NUM_SAMPLES = 41


def png(rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)).resize((60, 48)).save(file, "png")
    return file.getvalue()


def write_split(folder, content, num_shards=2, names="{:08d}.tar", sizes=True):
    parts = [content[i * len(content) // num_shards : (i + 1) * len(content) // num_shards] for i in range(num_shards)]
    counts = {names.format(i): write_shard(folder / names.format(i), part) for i, part in enumerate(parts)}
    if sizes:
        write_json(folder / SIZES, counts)
    read_sizes.cache_clear()  # a process of its own would read the new table


def write_classes(folder, classes=CLASSES, templates=TEMPLATES):
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")


@pytest.fixture(scope="module")
def content():
    """(key, members) of images with one caption each (the third with two) and a class id."""
    rng, samples = np.random.default_rng(0), []
    for i in range(NUM_SAMPLES):
        caption = " ".join(rng.choice(WORDS, size=4)) + ("\nand another" if i == 2 else "")
        label = str(rng.integers(len(CLASSES) - 1))
        samples.append((f"s-{i}", {"png": png(rng), "txt": caption.encode(), "cls": label.encode()}))
    return samples


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return models.make_model(ARCH, "cpu")


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(net[0].state_dict(), path)
    return path


@pytest.fixture(scope="module")
def load_once():
    return cache(models.load_model)


@pytest.fixture
def model(checkpoint, load_once, monkeypatch):
    monkeypatch.setattr(encode, "load_model", load_once)  # the same few models in most tests
    about = {"benchmark": "emoji", "method": "cumulative", "scale": "tic_tiny", "step": "2014", "samples_seen": 9984}
    return Model(name="cumulative 2014", arch=ARCH, weights=str(checkpoint), about=about)


@pytest.fixture
def data(content, tmp_path):
    """The data of both tasks of TiC-Emoji for 2014."""
    root = tmp_path / "data" / "tic" / "emoji" / "yearly" / "eval"
    write_split(root / "retrieval" / "2014", content)
    write_split(root / "emojinet" / "2014", content, num_shards=3)
    write_classes(root / "emojinet")
    return tmp_path / "data"


def task(data, name="retrieval"):
    return task_of(f"tic/emoji/{name}/yearly/2014", str(data))


def both(data):
    return [task(data), task(data, "emojinet")]


def lines(output_dir):
    results = [json.loads(line) for line in (output_dir / RESULTS).read_text().splitlines()]
    return [{name: value for name, value in result.items() if name != "time"} for result in results]


def evaluate(models, tasks, output_dir, **options):
    """How many results are new."""
    return len(evaluation.evaluate(models, tasks, str(output_dir), Settings(**options)))


def run(models, tasks, output_dir, **options):
    """The metrics of each result of a fresh evaluation."""
    evaluate(models, tasks, output_dir, **options)
    return [line["metrics"] for line in lines(output_dir)]


def scaled(net, factor, path):
    """A model of the same architecture with other weights."""
    torch.save({name: value * factor for name, value in net[0].state_dict().items()}, path)
    return Model(name=path.stem, arch=ARCH, weights=str(path))


# --- The numbers ---


def images(net, content):
    return torch.stack([net[1](Image.open(io.BytesIO(data["png"])).convert("RGB")) for _, data in content])


def peer_classification(net, content, monkeypatch, classes=CLASSES):
    from clip_benchmark.metrics import zeroshot_classification as peer

    class Loader(list):
        dataset = SimpleNamespace(classes=classes)

    # Its `accuracy` calls float() on an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(peer, "float", lambda value: np.asarray(value).item(), raising=False)
    loader = Loader([(images(net, content), torch.tensor([int(data["cls"]) for _, data in content]))])
    return peer.evaluate(net[0], loader, net[2], classes, TEMPLATES, "cpu", amp=False)


def test_retrieval_is_that_of_clip_benchmark(net, content, model, data, tmp_path):
    from clip_benchmark.metrics import zeroshot_retrieval

    (metrics,) = run([model], [task(data)], tmp_path)
    loader = [(images(net, content), [data["txt"].decode().splitlines() for _, data in content])]
    peer = zeroshot_retrieval.evaluate(net[0], loader, net[2], "cpu", amp=False, recall_k_list=[1, 5, 10])
    assert {name: metrics[name] for name in peer} == pytest.approx(peer, abs=1e-6)
    assert len(set(peer.values())) > 2, "a model that finds nothing or everything shows nothing"
    assert metrics["mean_recall@1"] == metrics["main_metric"]


def test_classification_is_that_of_clip_benchmark(net, content, model, data, tmp_path, monkeypatch):
    (metrics,) = run([model], [task(data, "emojinet")], tmp_path)
    peer = peer_classification(net, content, monkeypatch)
    assert metrics == pytest.approx({**peer, "main_metric": peer["mean_per_class_recall"]}, abs=1e-6)
    assert 0 < peer["acc5"] < 1


def test_a_line_has_the_documented_fields(model, data, tmp_path):
    np.save(Path(task(data).folder) / "sample_ids.npy", np.zeros(2 * NUM_SAMPLES, dtype=UID))
    assert evaluate([model], both(data), tmp_path) == 2
    first, second = lines(tmp_path)
    fields = {"key", "dataset", "metrics", "num_samples", "benchmark", "method", "scale", "step", "samples_seen"}
    fields |= {
        "ci95",
        "chance",
        "coverage",
        "dropped",
        "nonfinite",
        "precision",
        "device",
        "batch_size",
        "metric_version",
    }
    fields |= {"model", "data", "pins"}
    assert (set(first), set(second)) == (fields, fields | {"constant_guess"})
    assert "time" in json.loads((tmp_path / RESULTS).read_text().splitlines()[0])
    assert (first["chance"], second["chance"]) == (1 / NUM_SAMPLES, 1 / len(CLASSES))
    assert (first["key"], second["key"]) == ("tic/emoji/retrieval/yearly/2014", "tic/emoji/emojinet/yearly/2014")
    assert (first["dataset"], second["dataset"]) == ("TiC-Emoji-Retrieval-Yearly-2014", "TiC-EmojiNet-Yearly-2014")
    assert {name: first[name] for name in model.about} == model.about
    assert first["num_samples"] == second["num_samples"] == NUM_SAMPLES
    assert first["model"] == {"name": "cumulative 2014", "arch": ARCH, "sha256": model.fingerprint}
    assert (first["precision"], first["device"], first["metric_version"]) == ("fp32", "cpu", METRIC_VERSION)
    assert (first["coverage"], second["coverage"]) == (0.5, None)
    low, high = first["ci95"]
    assert 0 <= low < first["metrics"]["main_metric"] < high <= 1
    assert first["pins"]["torch"] == torch.__version__.split("+")[0]
    assert (first["chance"], second["chance"]) == (1 / NUM_SAMPLES, 1 / len(CLASSES))
    for line in (first, second):
        hits = read_hits(tmp_path, "cumulative 2014", line["key"])
        assert len(hits) == NUM_SAMPLES
        assert hits.mean() == pytest.approx(line["metrics"]["main_metric"], abs=1e-3)


def test_batches_shards_and_workers_change_nothing(content, model, data, tmp_path):
    folder = tmp_path / "other/tic/emoji/yearly/eval/emojinet"
    write_split(folder / "2014", content, num_shards=5)
    write_classes(folder / "2014")  # here in the split itself
    retrieval = folder.parent / "retrieval/2014"
    write_split(retrieval, content, num_shards=11, names="{}.tar", sizes=False)  # 0.tar … 10.tar, as clip_benchmark's
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
    "uids": lambda folder, content: np.save(folder / "sample_ids.npy", np.zeros(NUM_SAMPLES)),
    "classnames": lambda folder, content: write_classes(folder.parent, [*CLASSES[1:], "violin"]),
    "templates": lambda folder, content: write_classes(folder, templates=["{c}!"]),
    "bytes": lambda folder, content: write_split(folder, content[:-3], num_shards=3, sizes=False),
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
    for now in (Model(name=model.name, arch=ARCH, weights=other.weights, about=model.about), model):
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


# --- What is wrong with the data ---


def refused(models, tasks, tmp_path, *, also_by_check=False, **options):
    """The one line of an evaluation without a result, which the check before a training says as well."""
    with pytest.raises(TicError) as caught:
        evaluate(models, tasks, tmp_path / "refused", **options)
    assert not (tmp_path / "refused" / RESULTS).exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    if also_by_check:
        with pytest.raises(TicError, match=re.escape(message)):
            check_tasks(tasks, Settings(**options))
    return message


refused_before_training = partial(refused, also_by_check=True)


def test_missing_empty_and_miscounted_folders(model, data, tmp_path):
    check_tasks(both(data))
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        classes = Path(task(data, "emojinet").folder).parent / name
        text = classes.read_text()
        classes.unlink()
        message = refused_before_training([model], [task(data, "emojinet")], tmp_path)
        assert message.endswith(f"emojinet/2014 has no {name}, and neither has the folder above it")
        classes.write_text(text)
    write_classes(Path(task(data, "emojinet").folder), templates=["{c}", "a {}"])
    message = refused_before_training([model], [task(data, "emojinet")], tmp_path)
    assert message.endswith("emojinet/2014: the template 'a {}' has no {c}, which stands for the class name")
    chosen, folder = task(data), Path(task(data).folder)
    write_json(folder / SIZES, {"00000000.tar": 20, "00000001.tar": 22})
    read_sizes.cache_clear()
    assert refused([model], [chosen], tmp_path).endswith("00000001.tar holds 21 samples, its sizes.json says 22")
    write_json(folder / SIZES, {"00000000.tar": 0, "00000001.tar": 0})
    read_sizes.cache_clear()
    assert refused_before_training([model], [chosen], tmp_path) == f"{folder} holds no sample"
    shutil.rmtree(folder)
    missing = refused_before_training([model], [task(data, "emojinet"), chosen], tmp_path)
    assert missing.startswith(
        f"no data for {chosen.key}: {folder} is missing: run scripts/run_emoji_cumulative.sh, or "
    )
    folder.mkdir()
    assert refused_before_training([model], [chosen], tmp_path) == f"{folder} holds no .tar file: {HOW_TO_MAKE}"
    write_shard(folder / "0.tar", [])
    assert refused_before_training([model], [chosen], tmp_path) == f"{folder} holds no sample"


def one_sample(data, name, **members):
    """Replace a task's data by one sample whose members are given, and a good one."""
    folder = Path(task(data, name).folder)
    shutil.rmtree(folder)
    good = {"png": png(np.random.default_rng(0)), "txt": b"a cat", "cls": b"0"}
    bad = {suffix: value for suffix, value in {**good, **members}.items() if value is not None}
    write_split(folder, [("bad", bad), ("good", good)], num_shards=1)


BAD = [
    ("retrieval", {"png": None}, "no image"),
    ("retrieval", {"txt": None}, "no txt"),
    ("emojinet", {"cls": None}, "no cls"),
    ("retrieval", {"png": b"no picture"}, "bad image: cannot identify image"),
    ("retrieval", {"txt": b"\xff\xfe"}, "bad txt: 'utf-8'"),
    ("retrieval", {"txt": b" \n"}, "empty caption"),
    ("emojinet", {"cls": b"cat"}, "bad cls: invalid literal for int"),
    ("emojinet", {"cls": b"6"}, "unknown class id: 6, there are 6 class names"),
]


@pytest.mark.parametrize(("name", "members", "message"), BAD)
def test_a_bad_sample_is_named_or_counted(name, members, message, model, data, tmp_path):
    one_sample(data, name, **members)
    shard, reason = Path(task(data, name).folder) / "00000000.tar", message.split(":")[0]
    options = {"workers": int(reason == "bad image" and name == "retrieval")}  # one error comes from a worker
    refuse = refused if reason == "bad image" else refused_before_training
    assert refuse([model], [task(data, name)], tmp_path, **options).startswith(f"{shard}: sample bad: {message}")
    check_tasks([task(data, name)], Settings(skip_bad=True))
    evaluate([model], [task(data, name)], tmp_path, skip_bad=True, **options)
    (line,) = lines(tmp_path)
    assert (line["num_samples"], line["dropped"]) == (1, {reason: 1})
    if name == "retrieval":
        assert line["metrics"]["mean_recall@1"] == 1


def test_samples_that_are_left_out_change_nothing_else(content, model, data, tmp_path):
    """Also in a batch of nothing else."""
    usual = run([model], both(data), tmp_path / "a")
    bad = [("x", {**content[5][1], "png": b"?"}), ("y", {**content[6][1], "png": b""})]
    for each in both(data):
        write_split(Path(each.folder), [*content[:5], *bad, *content[5:]])
    found = run([model], both(data), tmp_path / "b", skip_bad=True, batch_size=1)
    assert found == [pytest.approx(metrics) for metrics in usual]
    assert [line["dropped"] for line in lines(tmp_path / "b")] == [{"bad image": 2}] * 2


def test_nothing_but_bad_samples(model, data, tmp_path):
    folder = Path(task(data).folder)
    write_split(folder, [("a", {"txt": b"x"})], num_shards=1)
    message = refused_before_training([model], [task(data)], tmp_path, skip_bad=True)
    assert message == f"{folder} holds no sample that can be used"
    write_split(folder, [("a", {"png": b"x", "txt": b"x"})], num_shards=1)
    assert refused([model], [task(data)], tmp_path, skip_bad=True) == f"{folder} holds no image that can be decoded"
    write_split(folder, [("a", {"png": b"x", "txt": b"x"})], num_shards=1)
    (folder / "00000000.tar").write_bytes((folder / "00000000.tar").read_bytes()[:1000])
    assert refused_before_training([model], [task(data)], tmp_path).startswith(f"{folder}/00000000.tar: truncated")


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
    assert sum(net.seen["image"]) == 2 * NUM_SAMPLES + NUM_SAMPLES
    assert sum(net.seen["text"]) == len(captions) + len(CLASSES) * len(TEMPLATES)
    found = {line["key"]: line for line in lines(tmp_path)}
    assert found["static"]["num_samples"] == 2 * NUM_SAMPLES
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
    several = [model, scaled(net, 1.1, tmp_path / "other.pt")]
    for count in (1, 2):
        evaluate(several, both(data), tmp_path / str(count), models_at_once=count, batch_size=8)
    apart, shared = (sorted(map(json.dumps, lines(tmp_path / name))) for name in ("1", "2"))
    assert apart == shared
    decoded = []
    monkeypatch.setattr(encode, "decode_image", lambda data: decoded.append(1) or decode_image(data))
    evaluate(several, both(data), tmp_path / "3")
    assert len(decoded) == 2 * NUM_SAMPLES


def test_data_in_a_cloud(s3, model, data, content, tmp_path):
    write_images(data / "set", content[:20], "abcde")
    write_classes(data / "set", CLASSES[:5])
    usual = run([model], [*both(data), static_task("x", {"folder": "set"}, str(data))], tmp_path / "a")
    for path in Path(data).rglob("*"):
        if path.is_file():
            upload(path, f"{s3}/{path.relative_to(data)}")
    tasks = [*both(s3), static_task("x", {"folder": "set"}, s3)]
    check_tasks(tasks)
    found = run([model], tasks, tmp_path / "b", batch_size=8, workers=1)
    assert found == [pytest.approx(metrics, abs=1e-6) for metrics in usual]
    assert [line["data"] for line in lines(tmp_path / "a")] == [line["data"] for line in lines(tmp_path / "b")]


# --- Static tasks ---


def test_a_webdataset_of_clip_benchmark(content, net, model, tmp_path, monkeypatch):
    folder = tmp_path / "wds_my-set_test"
    write_split(folder / "test", content, num_shards=11, names="{}.tar", sizes=False)
    write_classes(folder)
    (folder / "test/nshards.txt").write_text("11\n")
    chosen = static_task("my/set", {"size": NUM_SAMPLES, "main_metric": "acc5"}, str(tmp_path))
    (metrics,) = run([model], [chosen], tmp_path)
    peer = peer_classification(net, content, monkeypatch)
    assert metrics == pytest.approx({**peer, "main_metric": peer["acc5"]}, abs=1e-6)
    (line,) = lines(tmp_path)
    assert (line["key"], line["dataset"], line["ci95"]) == ("my/set", "my/set", None)
    more = static_task("my/set", {"size": 50}, str(tmp_path))
    assert refused([model], [more], tmp_path) == f"{folder} has {NUM_SAMPLES} samples, the list of tasks says 50"
    (folder / "test/nshards.txt").write_text("12\n")
    message = refused_before_training([model], [chosen], tmp_path)
    assert message == f"{folder}/test has 11 shards, its nshards.txt says 12"


def write_images(folder, content, names):
    for number, (key, members) in enumerate(content):
        parent = folder / names[int(members["cls"])]
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{key}.{'PNG' if number % 2 else 'png'}").write_bytes(members["png"])
        (parent / "notes.txt").write_text("not an image")


def test_images_in_folders(content, net, model, tmp_path, monkeypatch):
    write_images(tmp_path / "set", content, "abcde")
    write_classes(tmp_path / "set", CLASSES[:5])
    chosen = static_task("x", {"folder": "set"}, str(tmp_path))
    (metrics,) = run([model], [chosen], tmp_path)
    peer = peer_classification(net, content, monkeypatch, CLASSES[:5])
    assert metrics == pytest.approx({**peer, "main_metric": peer["acc1"]}, abs=1e-6)
    check_tasks([chosen])
    assert evaluate([model], [chosen], tmp_path) == 0
    (tmp_path / "set/a/new.png").write_bytes(content[0][1]["png"])
    assert evaluate([model], [chosen], tmp_path) == 1
    for name in ("a/b.gif", "b/b.GIF", "c/d.tiff"):
        (tmp_path / "set" / name).write_bytes(b"not read")
    more = static_task("x", {"folder": "set", "size": NUM_SAMPLES + 4}, str(tmp_path))
    assert evaluate([model], [more], tmp_path) == 1
    line = lines(tmp_path)[-1]
    assert line["dropped"] == {"gif images are not read": 2, "tiff images are not read": 1}
    assert line["num_samples"] == NUM_SAMPLES + 1
    retrieval = static_task("x", {"folder": "set", "kind": "retrieval"}, str(tmp_path))
    assert refused_before_training([model], [retrieval], tmp_path).endswith("for each class, and no captions")
    write_classes(tmp_path / "set", CLASSES[:2])
    message = refused_before_training([model], [chosen], tmp_path)
    assert message == f"{tmp_path}/set has 5 folders of images and 2 class names"


def test_folders_with_imagenets_names(content, tmp_path):
    synsets = ["n01440764", "n01443537", "n01484850", "n02084071", "my_dogs"]  # the fourth is of no class
    write_images(tmp_path / "set", content, synsets)
    classes = read_classes(str(tmp_path / "set"))
    assert classes.names == ("my dogs", "tench", "goldfish", "great white shark", "n02084071")
    assert len(classes.templates) == 80


def test_imagenets_groups_have_an_accuracy_each(content, model, data, tmp_path):
    folder = Path(task(data, "emojinet").folder)
    write_classes(folder, imagenet_texts()["classnames.txt"], ["{c}"])
    labels = [151, 153, 10, 17, 999]  # two dogs, two birds, toilet paper
    write_split(folder, [(str(i), {**content[i][1], "cls": str(label).encode()}) for i, label in enumerate(labels)])
    (metrics,) = run([model], [task(data, "emojinet")], tmp_path)
    groups = {name.partition("/")[2] for name in metrics if name.startswith("acc1/")}
    assert groups == {"dog", "bird", "animal"}


# --- What is wrong with the model ---


def test_a_checkpoint_that_does_not_fit_and_a_device_that_is_not_there(net, data, tmp_path, capfd):
    narrow = net[0].state_dict() | {"text_projection": net[0].state_dict()["text_projection"][:, :64]}
    torch.save(narrow, tmp_path / "narrow.pt")
    message = refused([Model(name="x", arch=ARCH, weights=str(tmp_path / "narrow.pt"))], [task(data)], tmp_path)
    assert f"{tmp_path}/narrow.pt is not of {ARCH}: text_projection is (128, 64)" in message
    fit = scaled(net, 1, tmp_path / "fit.pt")
    assert refused([fit], [task(data)], tmp_path, device="cuda:9").startswith(f"{ARCH} can't be loaded: ")
    assert capfd.readouterr() == ("", ""), "the error is to be the only line: no progress bar before it"


# --- The script ---


@pytest.fixture
def script_here(monkeypatch, capfd):
    """The script as a part of this process, which has imported OpenCLIP already."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return done.value.code, *capfd.readouterr()

    return call


def test_the_script_is_quiet_and_says_what_it_did_and_what_is_odd(data, checkpoint, tmp_path, script_here):
    run_dir, tasklist, net = tmp_path / "run", tmp_path / "tasklist.yml", task(data, "emojinet")
    plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": "2014", "model": ARCH}
    plan |= {"samples_seen": 64, "samples": 64, "checkpoints": 2}
    shutil.copytree(checkpoint.parent, run_dir / "2014/checkpoints")
    write_json(run_dir / "2014/done.json", {"plan": plan, "checkpoint": "checkpoints/model.pt"})
    one_sample(data, "emojinet", png=b"?")
    tasklist.write_text("".join(f"{each.key}: {{}}\n" for each in both(data)))
    arguments = ("--train_output_dir", run_dir, "--data_dir", data, "--tasklist", tasklist, "--skip_bad")
    arguments += ("--imagenet_val", net.folder)
    status, stdout, stderr = script_here(*arguments, "--dry_run", "--models_at_once", 2)
    assert (status, stderr) == (None, "")
    expected = [f"oracle 2014: {ARCH} {run_dir}/2014/checkpoints/model.pt"]
    expected += [f"  {each.key}  {each.folder}" for each in both(data)] + [f"  imagenet1k  {net.folder}"]
    assert stdout.splitlines() == expected
    assert not (run_dir / RESULTS).exists()
    status, stdout, stderr = script_here(*arguments)
    assert (status, stdout) == (None, f"3 new results in {run_dir}\n")
    said = [f"oracle 2014 on {name}: 1 samples left out: bad image" for name in (net.name, "ImageNet 1k")]
    assert [line for line in stderr.splitlines() if not re.match(r"(evaluate: .*batch.*)?$", line)] == said
    said = f"0 new results in {run_dir}, 3 were there already\n"
    assert script_here(*arguments) == (None, said, "")
    check = ("--check", "--data_dir", data, "--tasklist", tasklist)
    assert script_here(*check) == (None, "", "")
    write_split(Path(net.folder), [])
    assert script_here(*check) == (f"error: {net.folder} holds no sample", "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small /dev/shm takes root")
def test_a_small_shared_memory_is_one_line(data, checkpoint, tmp_path):
    (tmp_path / "list.yml").write_text("tic/emoji/retrieval/yearly/2014:")
    flags = ("--use_model", f"{ARCH} {checkpoint}", "--data_dir", data, "--output_dir", tmp_path / "out")
    done = Script(SCRIPT, *flags, "--tasklist", tmp_path / "list.yml", "--workers", 1, shm="128k").wait()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm, 0.125 MB, is too small for the batches")
    assert "Traceback" not in done.stderr


def test_weights_of_quickgelu_are_said(data, tmp_path, script_here):
    (tmp_path / "list.yml").write_text("tic/emoji/retrieval/yearly/2014:")
    flags = ("--data_dir", data, "--output_dir", tmp_path, "--tasklist", tmp_path / "list.yml", "--dry_run")
    status, _, stderr = script_here("--use_model", "RN50 cc12m", "RN50 openai", "RN50-quickgelu cc12m", *flags)
    said = "warning: the weights cc12m of RN50 were trained with QuickGELU: say RN50-quickgelu cc12m\n"
    assert (status, stderr) == (None, said)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_model_of_the_hub(checkpoint, data, tmp_path, script_here, monkeypatch):
    """Its configuration and weights come from there; what a checkpoint of there would run is not run."""
    config = {"model_cfg": json.loads((models.MODEL_CONFIGS / f"{ARCH}.json").read_text())}
    config["preprocess_cfg"] = {"mean": models.make_model(ARCH, "cpu")[0].visual.image_mean}
    config = {"open_clip_config.json": json.dumps(config).encode()}
    (tmp_path / "list.yml").write_text("tic/emoji/retrieval/yearly/2014:")
    torch.save({"state_dict": Malicious(tmp_path / "witness")}, tmp_path / "bad.bin")
    weights = {"me/model": checkpoint, "me/bad": tmp_path / "bad.bin"}
    files = {name: config | {"open_clip_pytorch_model.bin": path.read_bytes()} for name, path in weights.items()}
    arguments = ("--data_dir", data, "--output_dir", tmp_path, "--tasklist", tmp_path / "list.yml")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving_hub(files) as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        status, stdout, _ = script_here("--use_model", "hf-hub:me/model", *arguments)
        assert (status, stdout) == (None, f"1 new results in {tmp_path}\n")
        assert lines(tmp_path)[0]["benchmark"] == "emoji"  # that of the task list, so that report.py shows it
        error, _, _ = script_here("--use_model", "hf-hub:me/bad", *arguments)
    assert re.match(r"error: hf-hub:me/bad can't be loaded: \S+ is not a checkpoint that can be loaded safely: ", error)
    assert not (tmp_path / "witness").exists()
    (line,) = lines(tmp_path)
    assert line["model"] == dict.fromkeys(("name", "arch", "sha256"), "hf-hub:me/model")
    (usual,) = run([Model(name="x", arch=ARCH, weights=str(checkpoint))], [task(data)], tmp_path / "usual")
    assert line["metrics"] == pytest.approx(usual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--check", "--batch_size", "0"), "error: --batch_size and --models_at_once must be at least 1"),
        (("--use_model", "RN50 openai", "--output_dir", "{tmp}"), "error: no data for tic/datacomp/retrieval/yearly/"),
        (("--use_model", f"{ARCH} x.pt"), "error: --use_model and --released need an --output_dir"),
        (("--use_model", "A b", "--benchmark", "laion", "--output_dir", "{tmp}"), "error: unknown benchmark 'laion'"),
        (("--check", "--tasklist", "{tmp}/none.yml"), "error: {tmp}/none.yml: No such file"),
        (("--use_model", "RN50 openai", "--train_output_dir", "x"), "error: argument --train_output_dir: not allowed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, script_here):
    code, stdout, stderr = script_here(*(text.format(tmp=tmp_path) for text in arguments), "--data_dir", tmp_path)
    assert (stdout, stderr) == ("", "")
    assert len(code.splitlines()) == 1
    assert code.startswith(message.format(tmp=tmp_path))
