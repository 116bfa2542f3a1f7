"""One tiny model with random weights, some forty random pictures, and clip_benchmark's own evaluation of the same."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub import serving_hub
from PIL import Image

from tic_clip import TicError, models
from tic_clip.benchmarks import get_benchmark
from tic_clip.data import released
from tic_clip.data.clip_benchmark import imagenet_texts
from tic_clip.data.split import HOW_TO_MAKE, SIZES, read_sizes
from tic_clip.data.tar import write_shard
from tic_clip.data.uids import UID
from tic_clip.evaluation import evaluate as evaluation
from tic_clip.evaluation.data import read_classes
from tic_clip.evaluation.evaluate import RESULTS, Settings, decode
from tic_clip.evaluation.results import read_results
from tic_clip.evaluation.tasks import static_task, task_of, tasks_of, without_data
from tic_clip.metrics import METRIC_VERSION
from tic_clip.models import Model
from tic_clip.report import report
from tic_clip.storage import upload, write_json

ARCH = "ViT-Tiny-8-48"
SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate.py"
WORDS = ["red", "blue", "round", "happy", "sad", "cat", "dog", "tree", "house", "ship", "moon", "sun", "star", "hand"]
CLASSES, TEMPLATES = WORDS[:6], ["a picture of a {c}.", "the {c}", "{c}"]
NUM_SAMPLES = 41


def png(rng):
    picture = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).resize((60, 48), Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


def random_samples(seed=0, count=NUM_SAMPLES):
    """(key, members) of pictures with one caption each (the third with two) and a class id."""
    rng = np.random.default_rng(seed)
    content = []
    for i in range(count):
        caption = " ".join(rng.choice(WORDS, size=4)) + ("\nand another" if i == 2 else "")
        label = str(rng.integers(len(CLASSES) - 1))
        content.append((f"{seed}-{i}", {"png": png(rng), "txt": caption.encode(), "cls": label.encode()}))
    return content


def write_split(folder, content, num_shards=2, names="{:08d}.tar", sizes=True):
    parts = [content[i * len(content) // num_shards : (i + 1) * len(content) // num_shards] for i in range(num_shards)]
    counts = {names.format(i): write_shard(folder / names.format(i), part) for i, part in enumerate(parts)}
    if sizes:
        write_json(folder / SIZES, counts)
    read_sizes.cache_clear()  # a process of its own would read the new table


def write_classes(folder, classes=CLASSES):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


@pytest.fixture(scope="module")
def content():
    return random_samples()


@pytest.fixture(scope="module")
def net():
    import open_clip

    open_clip.add_model_config(models.MODEL_CONFIGS)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(ARCH)
    return model.eval(), preprocess, open_clip.get_tokenizer(ARCH)


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
    monkeypatch.setattr(evaluation, "load_model", load_once)  # the same few models in most tests
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
    return [json.loads(line) for line in (output_dir / RESULTS).read_text().splitlines()]


def evaluate(models, tasks, output_dir, **options):
    """How many results are new."""
    return len(evaluation.evaluate(models, tasks, str(output_dir), Settings(**options)))


def run(models, tasks, output_dir, **options):
    """The metrics of each result of a fresh evaluation."""
    evaluate(models, tasks, output_dir, **options)
    return [line["metrics"] for line in lines(output_dir)]


# The numbers.


def pictures(net, content):
    return torch.stack([net[1](Image.open(io.BytesIO(data["png"])).convert("RGB")) for _, data in content])


def peer_retrieval(net, content):
    from clip_benchmark.metrics import zeroshot_retrieval

    loader = [(pictures(net, content), [data["txt"].decode().splitlines() for _, data in content])]
    return zeroshot_retrieval.evaluate(net[0], loader, net[2], "cpu", amp=False, recall_k_list=[1, 5, 10])


def peer_classification(net, content, monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification as peer

    class Loader(list):
        dataset = SimpleNamespace(classes=CLASSES)

    # Its `accuracy` calls float() on an array of one element, which NumPy refuses from 2.4 on.
    monkeypatch.setattr(peer, "float", lambda value: np.asarray(value).item(), raising=False)
    loader = Loader([(pictures(net, content), torch.tensor([int(data["cls"]) for _, data in content]))])
    return peer.evaluate(net[0], loader, net[2], CLASSES, TEMPLATES, "cpu", amp=False)


def test_retrieval_is_that_of_clip_benchmark(net, content, model, data, tmp_path):
    (metrics,) = run([model], [task(data)], tmp_path)
    peer = peer_retrieval(net, content)
    assert len(peer) == 6
    assert {name: metrics[name] for name in peer} == pytest.approx(peer, abs=1e-6)
    assert len(set(peer.values())) > 2, "a model that finds nothing or everything shows nothing"
    assert metrics["mean_recall@1"] == metrics["main_metric"]


def test_classification_is_that_of_clip_benchmark(net, content, model, data, tmp_path, monkeypatch):
    (metrics,) = run([model], [task(data, "emojinet")], tmp_path)
    peer = peer_classification(net, content, monkeypatch)
    assert metrics == pytest.approx({**peer, "main_metric": peer["acc1"]}, abs=1e-6)
    assert 0 < peer["acc5"] < 1


def test_the_classifier_is_that_of_clip_benchmark(net, model, data):
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    encoder = evaluation.Encoder(model, Settings(batch_size=7))
    assert not encoder.net.training
    ours = encoder.classifier(read_classes(task(data, "emojinet").folder))
    peer = zero_shot_classifier(net[0], net[2], CLASSES, TEMPLATES, "cpu", amp=False)
    np.testing.assert_allclose(ours, peer.numpy().T, atol=1e-6)


def test_a_line_has_the_documented_fields(model, data, tmp_path):
    assert evaluate([model], both(data), tmp_path) == 2
    first, second = lines(tmp_path)
    fields = {"key", "dataset", "metrics", "num_samples", "benchmark", "method", "scale", "step", "samples_seen"}
    fields |= {"ci95", "coverage", "dropped", "nonfinite", "precision", "device", "batch_size", "metric_version"}
    assert set(first) == set(second) == fields | {"model", "data", "pins"}
    assert (first["key"], second["key"]) == ("tic/emoji/retrieval/yearly/2014", "tic/emoji/emojinet/yearly/2014")
    assert (first["dataset"], second["dataset"]) == ("TiC-Emoji-Retrieval-Yearly-2014", "TiC-EmojiNet-Yearly-2014")
    assert second["metrics"]["main_metric"] == second["metrics"]["acc1"]
    assert {name: first[name] for name in model.about} == model.about
    assert first["num_samples"] == second["num_samples"] == NUM_SAMPLES
    assert first["model"] == {"name": "cumulative 2014", "arch": ARCH, "sha256": model.fingerprint()}
    assert (first["precision"], first["device"], first["metric_version"]) == ("fp32", "cpu", METRIC_VERSION)
    low, high = first["ci95"]
    assert 0 <= low < first["metrics"]["main_metric"] < high <= 1
    assert first["pins"]["torch"] == torch.__version__.split("+")[0]


def test_batches_shards_and_workers_change_nothing(content, model, data, tmp_path):
    (tmp_path / "other").mkdir()
    folder = tmp_path / "other" / "tic" / "emoji" / "yearly" / "eval" / "emojinet"
    write_split(folder / "2014", content, num_shards=5)
    write_classes(folder / "2014")  # here in the split itself
    write_split(folder.parent / "retrieval" / "2014", content, num_shards=1)
    usual = run([model], both(data), tmp_path / "a", batch_size=256)
    unusual = run([model], both(tmp_path / "other"), tmp_path / "b", batch_size=7, workers=1)
    assert unusual == [pytest.approx(metrics, abs=1e-6) for metrics in usual]


def test_a_folder_in_clip_benchmarks_format_has_no_table_of_sizes(content, model, data, tmp_path):
    usual = run([model], [task(data)], tmp_path / "a")
    folder = Path(task(data).folder)
    shutil.rmtree(folder)
    write_split(folder, content, num_shards=11, names="{}.tar", sizes=False)  # 0.tar … 10.tar
    (folder / "nshards.txt").write_text("11")
    assert run([model], [task(data)], tmp_path / "b") == usual


def test_a_training_checkpoint_gives_the_same(net, model, data, tmp_path):
    state = {f"module.{name}": value for name, value in net[0].state_dict().items()}
    torch.save({"epoch": 2, "state_dict": state, "optimizer": {"lr": 0.1}}, tmp_path / "epoch_2.pt")
    trained = Model(name="x", arch=ARCH, weights=str(tmp_path / "epoch_2.pt"), about={})
    first, second = run([model, trained], [task(data)], tmp_path)
    assert first == second


# What is skipped and what is not.


def test_again_appends_nothing(model, data, tmp_path, capfd):
    assert evaluate([model], both(data), tmp_path) == 2
    before = (tmp_path / RESULTS).read_bytes()
    capfd.readouterr()
    assert evaluate([model], both(data), tmp_path) == 0
    assert (tmp_path / RESULTS).read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_it_goes_on_where_it_was(model, data, tmp_path):
    evaluate([model], both(data), tmp_path)
    whole = (tmp_path / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(whole[:-100])  # killed while it wrote the second line
    assert evaluate([model], both(data), tmp_path) == 1
    assert read_results(tmp_path / RESULTS) == [json.loads(line) for line in whole.splitlines()]


def test_another_checkpoint_is_evaluated(net, model, data, tmp_path):
    other = {name: value + 0.01 for name, value in net[0].state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    models = [model, Model(name="other", arch=ARCH, weights=str(tmp_path / "other.pt"), about={})]
    evaluate([model], [task(data)], tmp_path)
    assert evaluate(models, [task(data)], tmp_path) == 1
    assert [line["model"]["name"] for line in lines(tmp_path)] == ["cumulative 2014", "other"]


def test_weights_that_come_back_are_evaluated_again(net, model, data, tmp_path):
    """The matrix takes a step's last line, so that must be of the weights that are there now."""
    other = {name: value + 0.01 for name, value in net[0].state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    changed = Model(name=model.name, arch=ARCH, weights=str(tmp_path / "other.pt"), about=model.about)
    for now in (model, changed, model):
        assert evaluate([now], [task(data)], tmp_path) == 1
    first, second, third = (line["model"]["sha256"] for line in lines(tmp_path))
    assert first == third != second


@pytest.mark.parametrize("change", ["samples", "uids", "classnames", "templates", "bytes"])
def test_changed_data_are_evaluated_anew(change, content, model, data, tmp_path):
    chosen = task(data, "emojinet")
    folder = Path(chosen.folder)
    if change == "bytes":  # of a folder that has neither sizes nor UIDs
        (folder / SIZES).unlink()
    evaluate([model], [chosen], tmp_path)
    if change == "samples":
        write_split(folder, content[:-1])
    elif change == "uids":
        np.save(folder / "sample_ids.npy", np.zeros(NUM_SAMPLES))
    elif change == "classnames":
        write_classes(folder.parent, [*CLASSES[1:], "violin"])
    elif change == "templates":
        (folder / "zeroshot_classification_templates.txt").write_text("{c}!")
    else:
        write_split(folder, content[:-3], num_shards=3, sizes=False)
    assert evaluate([model], [chosen], tmp_path) == 1
    first, second = lines(tmp_path)
    assert first["data"] != second["data"]


# What is wrong with the data.


def refused(models, tasks, tmp_path, **options):
    with pytest.raises(TicError) as caught:
        evaluate(models, tasks, tmp_path / "refused", **options)
    assert not (tmp_path / "refused" / RESULTS).exists()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_a_wrong_count(content, model, data, tmp_path):
    folder = Path(task(data).folder)
    write_json(folder / SIZES, {"00000000.tar": 20, "00000001.tar": 22})
    read_sizes.cache_clear()
    assert refused([model], [task(data)], tmp_path).endswith("00000001.tar holds 21 samples, its sizes.json says 22")


def test_a_missing_folder(model, data, tmp_path):
    missing = task_of("tic/emoji/retrieval/yearly/2015", str(data))
    message = refused([model], [task(data), missing], tmp_path)
    assert message == f"no data for {missing.key}: {without_data(missing)}"


def test_an_empty_folder(model, data, tmp_path):
    folder = Path(task(data).folder)
    shutil.rmtree(folder)
    folder.mkdir()
    assert refused([model], [task(data)], tmp_path) == f"{folder} holds no .tar file: {HOW_TO_MAKE}"
    write_shard(folder / "0.tar", [])
    assert refused([model], [task(data)], tmp_path) == f"{folder} holds no sample"


@pytest.mark.parametrize("name", ["classnames.txt", "zeroshot_classification_templates.txt"])
def test_missing_class_names_or_templates(name, model, data, tmp_path):
    folder = Path(task(data, "emojinet").folder)
    (folder.parent / name).unlink()
    message = refused([model], [task(data, "emojinet")], tmp_path)
    assert message == f"{folder} has no {name}, and neither has the folder above it"


def one_sample(data, name, **members):
    """Replace a task's data by one good sample and one whose members are given."""
    folder = Path(task(data, name).folder)
    shutil.rmtree(folder)
    good = {"png": png(np.random.default_rng(0)), "txt": b"a cat", "cls": b"0"}
    bad = {suffix: value for suffix, value in {**good, **members}.items() if value is not None}
    write_split(folder, [("good", good), ("bad", bad)], num_shards=1)


BAD = [
    ("retrieval", {"png": None}, "has no image", "no image"),
    ("retrieval", {"txt": None}, "has no txt", "no txt"),
    ("emojinet", {"cls": None}, "has no cls", "no cls"),
    ("retrieval", {"png": b"no picture"}, "has a bad image: cannot identify image", "bad image"),
    ("emojinet", {"png": b"\x89PNG\r\n\x1a\n"}, "has a bad image: ", "bad image"),
    ("retrieval", {"txt": b"\xff\xfe"}, "has a bad txt: 'utf-8'", "bad txt"),
    ("retrieval", {"txt": b" \n"}, "has an empty caption", "empty caption"),
    ("emojinet", {"cls": b"cat"}, "has a bad cls: invalid literal for int", "bad cls"),
    ("emojinet", {"cls": b"6"}, "has class id 6, there are 6 class names", "unknown class id"),
    ("emojinet", {"cls": b"-1"}, "has class id -1, there are 6 class names", "unknown class id"),
]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("name", "members", "message", "reason"), BAD)
def test_a_bad_sample_is_named_or_counted(name, members, message, reason, workers, model, data, tmp_path):
    one_sample(data, name, **members)
    shard = Path(task(data, name).folder) / "00000000.tar"
    options = {"workers": workers}
    assert refused([model], [task(data, name)], tmp_path, **options).startswith(f"{shard}: sample bad {message}")
    evaluate([model], [task(data, name)], tmp_path, skip_bad=True, **options)
    (line,) = lines(tmp_path)
    assert (line["num_samples"], line["dropped"]) == (1, {reason: 1})
    if name == "retrieval":
        assert line["metrics"]["mean_recall@1"] == 1


def test_samples_that_are_left_out_change_nothing_else(content, model, data, tmp_path):
    usual = run([model], both(data), tmp_path / "a")
    bad = [("x", {**content[5][1], "png": b"?"}), ("y", {**content[6][1], "png": b""})]
    broken = [*content[:5], *bad, *content[5:]]
    for each in both(data):
        write_split(Path(each.folder), broken)
    assert run([model], both(data), tmp_path / "b", skip_bad=True, batch_size=4) == [pytest.approx(m) for m in usual]
    assert [line["dropped"] for line in lines(tmp_path / "b")] == [{"bad image": 2}] * 2


def test_nothing_but_bad_samples(model, data, tmp_path):
    write_split(Path(task(data).folder), [("a", {"txt": b"x"})], num_shards=1)
    message = refused([model], [task(data)], tmp_path, skip_bad=True)
    assert message.endswith("retrieval/2014 holds no sample that can be used")
    write_split(Path(task(data).folder), [("a", {"png": b"x", "txt": b"x"})], num_shards=1)
    assert refused([model], [task(data)], tmp_path, skip_bad=True).endswith("holds no image that can be decoded")


def test_a_truncated_shard(model, data, tmp_path):
    shard = Path(task(data).folder) / "00000001.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    message = refused([model], [task(data)], tmp_path)
    assert message.startswith(str(shard))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size is 0, it must be at least 1"),
        ({"workers": -1}, "--workers is -1, it must be at least 0"),
        ({"together": 0}, "--together is 0"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; the precisions are fp32, amp, amp_bf16"),
        ({"device": "gpu"}, "device gpu can't be used: "),
        ({"device": "cuda:9"}, "device cuda:9 can't be used: "),
    ],
)
def test_a_wrong_option(options, message, model, data, tmp_path):
    assert message in refused([model], [task(data)], tmp_path, **options)


# What a model makes of it.


class Net(torch.nn.Module):
    """Encodes every input as its own direction, and remembers how often, and in what batches, it was asked."""

    def __init__(self, most=None, faults=()):
        super().__init__()
        self.most, self.faults, self.seen = most, faults, {"image": [], "text": []}

    def _encode(self, part, batch):
        if self.most and len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        self.seen[part].append(len(batch))
        features = torch.nn.functional.normalize(batch.flatten(1)[:, :60].float() + 0.01, dim=1)
        if part in self.faults:
            features[0] = float("nan")
        return features

    def encode_image(self, batch, normalize):
        return self._encode("image", batch)

    def encode_text(self, batch, normalize):
        return self._encode("text", batch)


@pytest.fixture
def with_net(monkeypatch, model):
    """Replace the model by a ``Net``."""

    def make(*arguments, **options):
        made, (_, *rest) = Net(*arguments, **options), models.make_model(ARCH, "cpu")
        words = {word: i for i, word in enumerate([*WORDS, "and", "another"])}
        tokens = {"the": 40, "a": 41, "picture": 42, "of": 43}

        def tokenizer(texts):
            rows = torch.zeros(len(texts), 60)
            for row, text in zip(rows, texts, strict=True):
                for word in text.strip(".").split():
                    row[words.get(word, tokens.get(word, 59))] += 1
            return rows

        monkeypatch.setattr(evaluation, "load_model", lambda *_: (made, rest[0], tokenizer))
        return made

    return make


def test_each_image_and_each_different_text_is_encoded_once(content, with_net, model, data, tmp_path):
    doubled = [(f"{key}{copy}", members) for copy in "ab" for key, members in content]
    write_split(Path(task(data).folder), doubled)
    net = with_net()
    evaluate([model], both(data), tmp_path, batch_size=16)
    captions = {line for _, members in content for line in members["txt"].decode().splitlines()}
    assert sum(net.seen["image"]) == 2 * NUM_SAMPLES + NUM_SAMPLES
    assert sum(net.seen["text"]) == len(captions) + len(CLASSES) * len(TEMPLATES)
    (line, _) = lines(tmp_path)
    assert line["num_samples"] == 2 * NUM_SAMPLES


def test_tasks_of_one_folder_share_what_is_encoded(content, with_net, model, tmp_path):
    write_split(tmp_path / "data/both", content)
    write_classes(tmp_path / "data/both")
    kinds = {"one": "retrieval", "two": "classification", "three": "classification"}
    tasks = [static_task(key, {"folder": "both", "kind": kind}, str(tmp_path / "data")) for key, kind in kinds.items()]
    net = with_net()
    assert evaluate([model], tasks, tmp_path) == 3
    assert sum(net.seen["image"]) == NUM_SAMPLES
    first, second, third = ({**line, "key": "", "dataset": ""} for line in lines(tmp_path))
    assert second == third
    assert "text_retrieval_recall@1" in first["metrics"]


def test_a_batch_that_is_too_large_for_the_memory_is_halved(with_net, model, data, tmp_path):
    with_net()
    usual = run([model], both(data), tmp_path / "a")
    net = with_net(5)
    assert run([model], both(data), tmp_path / "b", batch_size=32) == [pytest.approx(each) for each in usual]
    assert max(net.seen["image"] + net.seen["text"]) == 4
    assert {line["batch_size"] for line in lines(tmp_path / "b")} == {4}
    with_net(0.5)
    with pytest.raises(TicError, match="out of memory, even for one sample"):
        evaluate([model], [task(data)], tmp_path / "c")


@pytest.mark.parametrize("part", ["image", "text"])
def test_features_that_are_no_numbers_are_counted(part, with_net, model, data, tmp_path):
    with_net(faults=[part])
    evaluate([model], both(data), tmp_path, batch_size=10)
    retrieval, classification = lines(tmp_path)
    assert retrieval["nonfinite"] > 1
    assert classification["nonfinite"] > 0
    assert all(np.isfinite(value) for line in lines(tmp_path) for value in line["metrics"].values())


def test_a_model_of_nothing_but_nan_finds_nothing(model, checkpoint, data, tmp_path, monkeypatch):
    state = {name: torch.full_like(value, torch.nan) for name, value in torch.load(checkpoint).items()}
    torch.save(state, tmp_path / "nan.pt")
    for metrics in run([Model(name="x", arch=ARCH, weights=str(tmp_path / "nan.pt"))], both(data), tmp_path):
        assert set(metrics.values()) == {0}
    assert [line["nonfinite"] for line in lines(tmp_path)] == [2 * NUM_SAMPLES + 1, NUM_SAMPLES + len(CLASSES)]


def test_models_of_one_architecture_share_what_is_decoded(net, model, data, tmp_path, monkeypatch):
    other = {name: value * 1.1 for name, value in net[0].state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    several = [model, Model(name="other", arch=ARCH, weights=str(tmp_path / "other.pt"))]
    for together in (1, 2):
        evaluate(several, both(data), tmp_path / str(together), together=together, batch_size=8)
    apart, shared = (sorted(map(json.dumps, lines(tmp_path / name))) for name in ("1", "2"))
    assert apart == shared
    decoded = []
    monkeypatch.setattr(evaluation, "decode", lambda data: decoded.append(1) or decode(data))
    evaluate(several, both(data), tmp_path / "3")
    assert len(decoded) == 2 * NUM_SAMPLES


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_another_precision_is_evaluated_and_recorded(precision, model, data, tmp_path):
    (usual,) = run([model], [task(data)], tmp_path)
    assert evaluate([model], [task(data)], tmp_path, precision=precision) == 1
    assert evaluate([model], [task(data)], tmp_path, precision=precision) == 0
    line = lines(tmp_path)[1]
    assert line["precision"] == precision
    assert line["metrics"]["text_retrieval_recall@10"] == pytest.approx(usual["text_retrieval_recall@10"], abs=0.25)


def test_an_older_metric_version_is_evaluated_again(model, data, tmp_path):
    evaluate([model], [task(data)], tmp_path)
    (line,) = lines(tmp_path)
    for change in ({"metric_version": METRIC_VERSION - 1}, {}):
        old = {name: value for name, value in line.items() if name != "metric_version"} | change
        (tmp_path / RESULTS).write_text(json.dumps(old) + "\n")
        assert evaluate([model], [task(data)], tmp_path) == 1


def test_what_is_there_can_be_forced(model, data, tmp_path):
    evaluate([model], [task(data)], tmp_path)
    assert evaluate([model], [task(data)], tmp_path, force=True) == 1
    first, second = lines(tmp_path)
    assert first == second


def test_names_that_stand_twice(model, data, tmp_path):
    assert refused([model, model], [task(data)], tmp_path) == "two models are called cumulative 2014"
    assert refused([model], [task(data)] * 2, tmp_path) == f"two tasks are called {task(data).key}"


def test_coverage_is_the_share_of_the_list_that_is_there(model, data, tmp_path):
    np.save(Path(task(data).folder) / "sample_ids.npy", np.zeros(2 * NUM_SAMPLES, dtype=UID))
    evaluate([model], both(data), tmp_path)
    assert [line["coverage"] for line in lines(tmp_path)] == [0.5, None]


def test_data_in_a_cloud(s3, content, model, data, tmp_path):
    usual = run([model], both(data), tmp_path / "a")
    for path in Path(data).rglob("*"):
        if path.is_file():
            upload(path, f"{s3}/{path.relative_to(data)}")
    found = run([model], both(s3), tmp_path / "b", batch_size=8, workers=1)
    assert found == [pytest.approx(metrics, abs=1e-6) for metrics in usual]
    assert [line["data"] for line in lines(tmp_path / "a")] == [line["data"] for line in lines(tmp_path / "b")]


# Static tasks.


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
    (folder / "test/nshards.txt").write_text("12\n")
    assert refused([model], [chosen], tmp_path) == f"{folder}/test has 11 shards, its nshards.txt says 12"


def test_another_number_of_samples_than_the_list_says(model, data, tmp_path):
    chosen = static_task("x", {"folder": task(data, "emojinet").folder, "size": 50}, str(tmp_path))
    message = refused([model], [chosen], tmp_path)
    assert message == f"{chosen.folder} has {NUM_SAMPLES} samples, the list of tasks says 50"


def test_acc5_of_less_than_five_classes(model, data, tmp_path):
    one_sample(data, "emojinet")
    write_classes(Path(task(data, "emojinet").folder), CLASSES[:4])
    chosen = static_task("x", {"folder": task(data, "emojinet").folder, "main_metric": "acc5"}, str(tmp_path))
    assert refused([model], [chosen], tmp_path) == "x has no acc5: there are 4 classes"


def write_pictures(folder, content, names):
    for number, (key, members) in enumerate(content):
        place = folder / names[int(members["cls"])]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{key}.{'PNG' if number % 2 else 'png'}").write_bytes(members["png"])
        (place / "notes.txt").write_text("not a picture")


def test_pictures_in_folders(content, net, model, tmp_path, monkeypatch):
    write_pictures(tmp_path / "set", content, "abcde")
    write_classes(tmp_path / "set", CLASSES[:5])
    (metrics,) = run([model], [static_task("x", {"folder": "set"}, str(tmp_path))], tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "CLASSES", CLASSES[:5])
    assert metrics == pytest.approx(peer := {**peer_classification(net, content, monkeypatch), **metrics}, abs=1e-6)
    assert metrics["acc1"] == pytest.approx(peer["acc1"])
    assert evaluate([model], [static_task("x", {"folder": "set"}, str(tmp_path))], tmp_path) == 0
    (tmp_path / "set/a/new.png").write_bytes(content[0][1]["png"])
    assert evaluate([model], [static_task("x", {"folder": "set"}, str(tmp_path))], tmp_path) == 1
    message = refused([model], [static_task("x", {"folder": "set", "kind": "retrieval"}, str(tmp_path))], tmp_path)
    assert message.endswith("which is a layout for classes: there are no captions")


def test_folders_with_imagenets_names(content, model, tmp_path):
    synsets = ["n01440764", "n01443537", "n01484850", "n02084071", "my_dogs"]  # the fourth is of no class
    write_pictures(tmp_path / "set", content, synsets)
    classes = read_classes(str(tmp_path / "set"))
    assert classes.names == ("my dogs", "tench", "goldfish", "great white shark", "n02084071")
    assert len(classes.templates) == 80
    (folder,) = [tmp_path / "set"]
    (folder / "classnames.txt").write_text("one\ntwo\n")
    chosen = static_task("x", {"folder": "set"}, str(tmp_path))
    assert refused([model], [chosen], tmp_path) == f"{folder} has 5 folders of pictures and 2 class names"


def test_imagenets_groups_are_told_by_themselves(content, with_net, model, data, tmp_path):
    texts = imagenet_texts()
    folder = Path(task(data, "emojinet").folder)
    (folder / "classnames.txt").write_text("\n".join(texts["classnames.txt"]))
    (folder / "zeroshot_classification_templates.txt").write_text("{c}")
    labels = [151, 153, 10, 17, 999]  # two dogs, two birds, toilet paper
    write_split(folder, [(str(i), {**content[i][1], "cls": str(label).encode()}) for i, label in enumerate(labels)])
    with_net()
    (metrics,) = run([model], [task(data, "emojinet")], tmp_path)
    groups = {name.partition("/")[2] for name in metrics if name.startswith("acc1/")}
    assert groups == {"dog", "bird", "animal"}


# What is wrong with the model.


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def of(weights, arch=ARCH):
    return [Model(name="x", arch=arch, weights=str(weights), about={})]


def test_a_missing_checkpoint_or_an_unknown_tag(data, tmp_path):
    message = refused(of(tmp_path / "no.pt"), [task(data)], tmp_path)
    assert message == f"{tmp_path / 'no.pt'} is neither a checkpoint file nor a pretrained tag of {ARCH}"
    assert "neither a checkpoint file nor a pretrained tag of ViT-B-32" in refused(
        of("laion0b", "ViT-B-32"), [task(data)], tmp_path
    )


def test_an_unknown_architecture(checkpoint, data, tmp_path):
    assert refused(of(checkpoint, "ViT-Z"), [task(data)], tmp_path).startswith("OpenCLIP has no model 'ViT-Z'")


def test_a_checkpoint_of_another_architecture(net, data, tmp_path, capfd):
    state = dict(net[0].state_dict())
    state["text_projection"] = state["text_projection"][:, :64]
    torch.save(state, tmp_path / "narrow.pt")
    message = refused(of(tmp_path / "narrow.pt"), [task(data)], tmp_path)
    fault = f"is not of {ARCH}: text_projection is (128, 64), the model's is (128, 128)"
    assert message == f"checkpoint {tmp_path / 'narrow.pt'} {fault}"
    del state["text_projection"]
    torch.save(state, tmp_path / "less.pt")
    assert refused(of(tmp_path / "less.pt"), [task(data)], tmp_path).endswith("text_projection is only in the model")
    assert capfd.readouterr() == ("", ""), "the error is to be the only line: no progress bar before it"


@pytest.mark.parametrize("damage", ["cut", "text", "list"])
def test_a_damaged_checkpoint(damage, checkpoint, data, tmp_path):
    path = tmp_path / "damaged.pt"
    if damage == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(checkpoint.read_bytes()[:-5000] if damage == "cut" else b"hello")
    assert str(path) in refused(of(path), [task(data)], tmp_path)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_checkpoint_runs_no_code(save, data, tmp_path):
    path, witness = tmp_path / "malicious.pt", tmp_path / "witness"
    save({"state_dict": Malicious(witness)}, path)
    message = refused(of(path), [task(data)], tmp_path)
    assert message.startswith(f"{path} is no checkpoint that can be loaded safely: ")
    assert not witness.exists()
    with suppress(RuntimeError):  # without the safety it would have run
        torch.load(path, weights_only=False)
    assert witness.exists()


def test_released_models_make_one_table(content, net, data, tmp_path, monkeypatch):
    """Two of them, of two steps each, on TiC-DataComp's years; a tiny architecture stands for theirs."""
    monkeypatch.setattr(released, "ARCH", ARCH)
    benchmark = get_benchmark("datacomp")
    root = tmp_path / "data"
    for number, period in enumerate(benchmark.periods):
        write_split(root / f"tic/datacomp/yearly/eval/retrieval/{period}", content[number : number + 12], num_shards=1)
    tasks = [task for task in tasks_of(benchmark, str(root)) if task.kind == "retrieval"]
    outputs = []
    for factor, name in ((1.0, "TiC-CLIP-basic-oracle"), (1.1, "TiC-CLIP-basic-sequential")):
        (tmp_path / f"models/{name}/checkpoints").mkdir(parents=True)
        for year in (2016, 2017):
            state = {key: value * factor ** (year - 2015) for key, value in net[0].state_dict().items()}
            torch.save(state, tmp_path / f"models/{name}/checkpoints/{year}.pt")
        outputs.append(tmp_path / name)
        assert evaluate(released.released_models(str(tmp_path / "models" / name)), tasks, outputs[-1]) == 2 * 9
    report(outputs, tmp_path / "out")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    matrix = summary["runs"]["TiC-CLIP-basic-oracle"]["tasks"]["retrieval"]["matrix"]
    assert [sum(value is not None for value in row) for row in matrix] == [7, 7, 0, 0, 0, 0, 0]
    assert "| TiC-CLIP-basic-sequential | sequential | – | 18 of 63 |" in (tmp_path / "out/table.md").read_text()


# The script, as a process.


def script(*arguments, **settings):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def finished(checkpoint, tmp_path):
    """A run with one finished step."""
    plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": "2014", "model": ARCH}
    plan |= {"samples_seen": 64, "samples": 64, "checkpoints": 2}
    shutil.copytree(checkpoint.parent, tmp_path / "run/2014/checkpoints")
    write_json(tmp_path / "run/2014/done.json", {"plan": plan, "checkpoint": "checkpoints/model.pt"})
    return tmp_path / "run"


def test_the_script_is_quiet_and_says_what_it_did(data, finished, tmp_path):
    tasklist = tmp_path / "tasklist.yml"
    tasklist.write_text("".join(f"{each.key}: {{}}\n" for each in both(data)))
    arguments = ("--train_output_dir", finished, "--data_dir", data, "--tasklist", tasklist)
    status, stdout, stderr = script(*arguments, "--dry_run")
    assert (status, stderr) == (0, "")
    assert stdout.splitlines()[0] == f"oracle 2014: {ARCH} {finished}/2014/checkpoints/model.pt"
    assert [line.split() for line in stdout.splitlines()[1:]] == [[each.key, each.folder] for each in both(data)]
    assert not (finished / RESULTS).exists()
    status, stdout, stderr = script(*arguments)
    assert (status, stdout) == (0, f"2 results appended to {finished}/{RESULTS}\n")
    assert all(re.match(r"(evaluate: .*batch.*)?$", line) for line in stderr.splitlines()), stderr
    status, stdout, stderr = script(*arguments)
    assert (status, stderr) == (0, "")
    assert stdout == f"0 results appended to {finished}/{RESULTS}, 2 were there already\n"


def test_the_script_says_what_is_odd(data, checkpoint, tmp_path):
    one_sample(data, "emojinet", png=b"?")
    (tmp_path / "list.yml").write_text(f"{task(data, 'emojinet').key}:\n")
    model = f"{ARCH} {checkpoint}"
    arguments = ("--use_model", model, "--data_dir", data, "--output_dir", tmp_path, "--skip_bad")
    arguments += ("--tasklist", tmp_path / "list.yml", "--imagenet_val", task(data, "emojinet").folder)
    status, stdout, stderr = script(*arguments)
    assert (status, stdout) == (0, f"2 results appended to {tmp_path}/{RESULTS}\n")
    said = [f"{model} on {name}: 1 samples left out: bad image" for name in ("TiC-EmojiNet-Yearly-2014", "ImageNet 1k")]
    assert stderr.splitlines()[-2:] == said
    assert lines(tmp_path)[1]["key"] == "imagenet1k"


def test_a_model_of_the_hub(net, checkpoint, data, tmp_path):
    """Its configuration and weights come from there; what a checkpoint of there would run is not run."""
    config = json.loads((models.MODEL_CONFIGS / f"{ARCH}.json").read_text())
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (tmp_path / "list.yml").write_text("tic/emoji/retrieval/yearly/2014:")
    torch.save({"state_dict": Malicious(tmp_path / "witness")}, tmp_path / "malicious.bin")
    files = {"open_clip_config.json": json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}).encode()}
    weights = {"good": checkpoint, "bad": tmp_path / "malicious.bin"}
    repositories = {
        f"me/{name}": {**files, "open_clip_pytorch_model.bin": weights[name].read_bytes()} for name in weights
    }
    arguments = ("--data_dir", data, "--output_dir", tmp_path, "--tasklist", tmp_path / "list.yml")
    settings = {"HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with serving_hub(repositories) as hub:
        settings["HF_ENDPOINT"] = hub.url
        status, stdout, _ = script("--use_model", "hf-hub:me/good", *arguments, **settings)
        assert (status, stdout) == (0, f"1 results appended to {tmp_path}/{RESULTS}\n")
        status, _, stderr = script("--use_model", "hf-hub:me/bad", *arguments, **settings)
        assert status == 1
        assert stderr.splitlines()[-1].startswith("error: hf-hub:me/bad can't be loaded: Weights only load failed")
        assert not (tmp_path / "witness").exists()
        status, _, stderr = script("--use_model", "hf-hub:me/none", *arguments, **settings)
        assert status == 1
        assert stderr.splitlines()[-1].startswith("error: hf-hub:me/none can't be loaded: ")
    (line,) = lines(tmp_path)
    assert line["model"] == {"name": "hf-hub:me/good", "arch": "hf-hub:me/good", "sha256": "hf-hub:me/good"}
    (usual,) = run([Model(name="x", arch=ARCH, weights=str(checkpoint))], [task(data)], tmp_path / "usual")
    assert line["metrics"] == pytest.approx(usual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train_output_dir", "{tmp}"), "error: {tmp} has no finished step (no STEP/done.json): "),
        (("--use_model", f"{ARCH} x.pt", "--output_dir", "{tmp}"), "error: x.pt is neither a checkpoint file nor a "),
        (("--use_model", "RN50 openai", "--output_dir", "{tmp}"), "error: no data for tic/datacomp/retrieval/yearly/"),
        (("--use_model", ARCH, "--output_dir", "{tmp}"), 'error: a model is "ARCH FILE", "ARCH TAG" as in '),
        (("--use_model", f"{ARCH} x.pt"), "error: --use_model and --released need an --output_dir"),
        (("--released", "{tmp}", "--output_dir", "{tmp}"), "error: {tmp} is not called as a released model"),
        (("--use_model", "A b", "--benchmark", "laion", "--output_dir", "{tmp}"), "error: unknown benchmark 'laion'"),
        (
            ("--use_model", "RN50 openai", "--output_dir", "{tmp}", "--tasklist", "{tmp}/none.yml"),
            "error: {tmp}/none.yml is missing: dataset_creation/tic-datacomp/generate_tasklist.py writes ",
        ),
        (("--use_model", "RN50 openai", "--train_output_dir", "x"), "error: argument --train_output_dir: not allowed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    status, stdout, stderr = script(*(text.format(tmp=tmp_path) for text in arguments), "--data_dir", tmp_path)
    assert (status, stdout) == (1, "")
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(message.format(tmp=tmp_path))
