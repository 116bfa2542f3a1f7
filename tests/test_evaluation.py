"""One tiny model with random weights, some forty random pictures, and clip_benchmark's own evaluation of the same."""

import io
import json
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
from PIL import Image

from tic_clip import TicError, evaluation
from tic_clip.evaluation import RESULTS, Model, evaluate, models_of, read_tasklist, task_of, tasks_of
from tic_clip.shards import SIZES, read_sizes
from tic_clip.storage import write_json
from tic_clip.tarshard import write_shard
from tic_clip.timeline import get_benchmark

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

    open_clip.add_model_config(evaluation.MODEL_CONFIGS)
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
    return cache(evaluation.load_model)


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


def run(models, tasks, output_dir, **options):
    """The metrics of each result of a fresh evaluation."""
    evaluate(models, tasks, str(output_dir), **options)
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

    encoder = evaluation.Encoder(model, 8, 0)
    assert not encoder.net.training
    with torch.inference_mode():
        ours = encoder.classifier(Path(task(data, "emojinet").folder))
    peer = zero_shot_classifier(net[0], net[2], CLASSES, TEMPLATES, "cpu", amp=False)
    np.testing.assert_allclose(ours, peer.numpy().T, atol=1e-6)


def test_a_line_has_the_documented_fields(model, data, tmp_path):
    assert evaluate([model], both(data), str(tmp_path)) == 2
    first, second = lines(tmp_path)
    fields = {"key", "dataset", "metrics", "num_samples", "benchmark", "method", "scale", "step", "samples_seen"}
    assert set(first) == set(second) == fields | {"model", "data", "pins"}
    assert (first["key"], second["key"]) == ("tic/emoji/retrieval/yearly/2014", "tic/emoji/emojinet/yearly/2014")
    assert (first["dataset"], second["dataset"]) == ("TiC-Emoji-Retrieval-Yearly-2014", "TiC-EmojiNet-Yearly-2014")
    assert second["metrics"]["main_metric"] == second["metrics"]["acc1"]
    assert {name: first[name] for name in model.about} == model.about
    assert first["num_samples"] == second["num_samples"] == NUM_SAMPLES
    assert first["model"] == {"name": "cumulative 2014", "arch": ARCH, "sha256": model.fingerprint()}
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
    assert evaluate([model], both(data), str(tmp_path)) == 2
    before = (tmp_path / RESULTS).read_bytes()
    capfd.readouterr()
    assert evaluate([model], both(data), str(tmp_path)) == 0
    assert (tmp_path / RESULTS).read_bytes() == before
    assert capfd.readouterr() == ("", "")


def test_it_goes_on_where_it_was(model, data, tmp_path):
    evaluate([model], both(data), str(tmp_path))
    whole = (tmp_path / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(whole[:-100])  # killed while it wrote the second line
    assert evaluate([model], both(data), str(tmp_path)) == 1
    assert (tmp_path / RESULTS).read_text() == whole


def test_another_checkpoint_is_evaluated(net, model, data, tmp_path):
    other = {name: value + 0.01 for name, value in net[0].state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    models = [model, Model(name="other", arch=ARCH, weights=str(tmp_path / "other.pt"), about={})]
    evaluate([model], [task(data)], str(tmp_path))
    assert evaluate(models, [task(data)], str(tmp_path)) == 1
    assert [line["model"]["name"] for line in lines(tmp_path)] == ["cumulative 2014", "other"]


def test_weights_that_come_back_are_evaluated_again(net, model, data, tmp_path):
    """The matrix takes a step's last line, so that must be of the weights that are there now."""
    other = {name: value + 0.01 for name, value in net[0].state_dict().items()}
    torch.save(other, tmp_path / "other.pt")
    changed = Model(name=model.name, arch=ARCH, weights=str(tmp_path / "other.pt"), about=model.about)
    for now in (model, changed, model):
        assert evaluate([now], [task(data)], str(tmp_path)) == 1
    first, second, third = (line["model"]["sha256"] for line in lines(tmp_path))
    assert first == third != second


@pytest.mark.parametrize("change", ["samples", "uids", "classnames", "templates", "bytes"])
def test_changed_data_are_evaluated_anew(change, content, model, data, tmp_path):
    chosen = task(data, "emojinet")
    folder = Path(chosen.folder)
    if change == "bytes":  # of a folder that has neither sizes nor UIDs
        (folder / SIZES).unlink()
    evaluate([model], [chosen], str(tmp_path))
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
    assert evaluate([model], [chosen], str(tmp_path)) == 1
    first, second = lines(tmp_path)
    assert first["data"] != second["data"]


# What is wrong with the data.


def refused(models, tasks, tmp_path, **options):
    with pytest.raises(TicError) as caught:
        evaluate(models, tasks, str(tmp_path / "refused"), **options)
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
    assert message == f"no data for {missing.key}: {missing.folder} is missing"


def test_an_empty_folder(model, data, tmp_path):
    folder = Path(task(data).folder)
    shutil.rmtree(folder)
    folder.mkdir()
    assert refused([model], [task(data)], tmp_path) == f"{folder} holds no .tar file"
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


@pytest.mark.parametrize(("label", "ids"), [("6", "0 to 6"), ("-1", "-1 to 0")])
def test_a_class_id_out_of_range(label, ids, model, data, tmp_path):
    one_sample(data, "emojinet", cls=label.encode())
    message = refused([model], [task(data, "emojinet")], tmp_path)
    assert message == f"tic/emoji/emojinet/yearly/2014: class ids are {ids}, there are 6 class names"


@pytest.mark.parametrize(
    ("name", "members", "message"),
    [
        ("retrieval", {"png": None}, "sample bad has no image"),
        ("retrieval", {"txt": None}, "sample bad has no txt"),
        ("emojinet", {"cls": None}, "sample bad has no cls"),
        ("retrieval", {"png": b"no picture"}, "sample bad has a bad image or txt: cannot identify image"),
        ("retrieval", {"txt": b"\xff\xfe"}, "sample bad has a bad image or txt: 'utf-8'"),
        ("emojinet", {"cls": b"cat"}, "sample bad has a bad image or cls: invalid literal for int"),
    ],
)
def test_a_bad_sample_is_named(name, members, message, model, data, tmp_path):
    one_sample(data, name, **members)
    shard = Path(task(data, name).folder) / "00000000.tar"
    assert refused([model], [task(data, name)], tmp_path).startswith(f"{shard}: {message}")


def test_an_error_in_a_worker_is_one_line_too(model, data, tmp_path):
    one_sample(data, "retrieval", png=b"no picture")
    message = refused([model], [task(data)], tmp_path, workers=1)
    assert message.startswith(f"{Path(task(data).folder) / '00000000.tar'}: sample bad has a bad image")


def test_a_truncated_shard(model, data, tmp_path):
    shard = Path(task(data).folder) / "00000001.tar"
    shard.write_bytes(shard.read_bytes()[:-3000])
    message = refused([model], [task(data)], tmp_path)
    assert message.startswith(str(shard))


def test_an_image_without_a_caption_is_not_found(model, data, tmp_path):
    one_sample(data, "retrieval", txt=b"")
    (metrics,) = run([model], [task(data)], tmp_path, batch_size=1)  # a batch without a caption as well
    assert metrics["text_retrieval_recall@10"] == 0.5
    assert metrics["image_retrieval_recall@10"] == 1


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": -1}])
def test_a_wrong_option(options, model, data, tmp_path):
    assert "at least 1 and 0" in refused([model], [task(data)], tmp_path, **options)


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


# Tasks and runs.


def test_keys_names_and_folders():
    first = task_of("tic/datacomp/datacompnet/monthly/201403", "/data/")
    assert (first.name, first.kind) == ("TiC-DataCompNet-Monthly-201403", "classification")
    assert first.folder == "/data/tic/datacomp/monthly/eval/datacompnet/201403"
    second = task_of("tic/datacomp/retrieval/yearly/2014", "s3://bucket/data")
    assert (second.name, second.kind) == ("TiC-DataComp-Retrieval-Yearly-2014", "retrieval")
    assert second.folder == "s3://bucket/data/tic/datacomp/yearly/eval/retrieval/2014"


def test_all_tasks_of_a_benchmark():
    tasks = tasks_of(get_benchmark("datacomp"), "data")
    assert len(tasks) == 2 * 9
    assert [each for each in tasks if task_of(each.key, "data") != each] == []


@pytest.mark.parametrize(
    "key", ["tic/datacomp/retrieval/yearly/2023", "tic/emoji/emojinet/2014", "retrieval/imagenet", "", 7]
)
def test_an_unknown_task(key):
    with pytest.raises(TicError, match=f"unknown task {key!r}"):
        task_of(key, "data")


def test_a_tasklist(tmp_path):
    path = tmp_path / "tasklist.yml"
    keys = ["tic/datacomp/retrieval/yearly/2016", "tic/datacomp/datacompnet/monthly/201403"]
    path.write_text("".join(f"{key}:\n  name: any\n  tags: [any]\n" for key in keys))
    assert [each.key for each in read_tasklist(str(path), "data")] == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of tasks"),
        ("- tic/emoji/retrieval/yearly/2014", "no list of tasks"),
        ("a: [", "is not valid YAML"),
        ("vtab/cifar10: {}", "unknown task 'vtab/cifar10'"),
        ("2014: {}", "unknown task 2014"),
    ],
)
def test_a_bad_tasklist(text, message, tmp_path):
    path = tmp_path / "tasklist.yml"
    path.write_text(text)
    with pytest.raises(TicError, match=message) as caught:
        read_tasklist(str(path), "data")
    assert len(str(caught.value).splitlines()) == 1


def finish(run, step, checkpoint="checkpoints/epoch_2.pt", **plan):
    plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": step, "samples_seen": 64} | plan
    (run / step).mkdir(parents=True)
    write_json(run / step / "done.json", {"plan": {"model": ARCH, **plan}, "checkpoint": checkpoint})


def test_models_of_a_run_in_the_order_of_its_steps(tmp_path):
    months = {"benchmark": "datacomp", "model": "ViT-B-16"}
    for step in ("2018", "2014-2016"):  # from before plans had MACs
        finish(tmp_path, step, **months)
    finish(tmp_path, "2017", macs_seen=123, **months)
    (tmp_path / "2019").mkdir()  # begun and not finished
    models = models_of(str(tmp_path))
    assert [model.name for model in models] == ["oracle 2014-2016", "oracle 2017", "oracle 2018"]
    assert models[1].weights == str(tmp_path / "2017" / "checkpoints" / "epoch_2.pt")
    assert models[1].arch == "ViT-B-16"
    about = {"method": "oracle", "scale": "tic_tiny", "step": "2017", "samples_seen": 64}
    assert models[1].about == {"benchmark": "datacomp", **about, "macs_seen": 123}
    assert models[0].about["macs_seen"] is None


def test_a_run_without_a_finished_step(tmp_path):
    (tmp_path / "2014").mkdir()
    with pytest.raises(TicError, match=r"no STEP/done.json"):
        models_of(str(tmp_path))


# The script, as a process.


def script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_script_is_quiet_and_says_what_it_did(data, checkpoint, tmp_path):
    shutil.copytree(checkpoint.parent, tmp_path / "run" / "2014" / "checkpoints")
    finish_in = tmp_path / "made"
    finish(finish_in, "2014", "checkpoints/model.pt")
    shutil.copy(finish_in / "2014" / "done.json", tmp_path / "run" / "2014")
    tasklist = tmp_path / "tasklist.yml"
    tasklist.write_text("".join(f"{each.key}: {{}}\n" for each in both(data)))
    arguments = ("--train_output_dir", tmp_path / "run", "--data_dir", data, "--tasklist", tasklist)
    status, stdout, stderr = script(*arguments)
    assert (status, stdout) == (0, f"2 results appended to {tmp_path / 'run'}/{RESULTS}\n")
    assert all(re.match(r"(evaluate: .*task.*)?$", line) for line in stderr.splitlines()), stderr
    status, stdout, stderr = script(*arguments)
    assert (status, stderr) == (0, "")
    assert stdout == f"0 results appended to {tmp_path / 'run'}/{RESULTS}, 2 were there already\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train_output_dir", "{tmp}"), "error: {tmp} has no finished step (no STEP/done.json): "),
        (("--use_model", f"{ARCH} x.pt", "--output_dir", "{tmp}"), "error: no data for tic/datacomp/retrieval/yearly/"),
        (("--use_model", ARCH, "--output_dir", "{tmp}"), 'error: --use_model takes "ARCH WEIGHTS"'),
        (("--use_model", f"{ARCH} x.pt"), 'error: --use_model takes "ARCH WEIGHTS"'),
        (("--use_model", "A b", "--benchmark", "laion", "--output_dir", "{tmp}"), "error: unknown benchmark 'laion'"),
        (("--use_model", "A b", "--output_dir", "{tmp}", "--tasklist", "{tmp}/none.yml"), "error: [Errno 2] No such"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    status, stdout, stderr = script(*(text.format(tmp=tmp_path) for text in arguments), "--data_dir", tmp_path)
    assert (status, stdout) == (1, "")
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(message.format(tmp=tmp_path))
