"""One tiny model with random weights, some forty random images for both tasks of TiC-Emoji in 2014, and shorthands."""

import json
import re
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from miniature import make_image, write_split

from tic_clip import TicError, models
from tic_clip.evaluation import encode
from tic_clip.evaluation import evaluate as evaluation
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import RESULTS, check_tasks
from tic_clip.evaluation.tasks import task_of
from tic_clip.models import Model

ARCH = "ViT-Tiny-8-48"
SCRIPT = ROOT / "scripts/evaluate.py"
WORDS = ["red", "blue", "round", "happy", "sad", "cat", "dog", "tree", "house", "ship", "moon", "sun", "star", "hand"]
CLASSES, TEMPLATES = WORDS[:6], ["a picture of a {c}.", "the {c}", "{c}"]
NUM_SAMPLES = 41


def cut(content, count):
    """Cut samples into shards."""
    return [content[i * len(content) // count : (i + 1) * len(content) // count] for i in range(count)]


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
        image = make_image(f"{i}", "PNG", (60, 48))
        samples.append((f"s-{i}", {"png": image, "txt": caption.encode(), "cls": label.encode()}))
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


load_once = cache(models.load_model)


@pytest.fixture
def model(checkpoint, monkeypatch):
    monkeypatch.setattr(encode, "load_model", load_once)  # the same few models in most tests
    about = {"benchmark": "emoji", "method": "cumulative", "scale": "tic_tiny", "step": "2014", "samples_seen": 9984}
    return Model(name="cumulative 2014", arch=ARCH, weights=str(checkpoint), about=about)


@pytest.fixture
def data(content, tmp_path):
    """The data of both tasks of TiC-Emoji for 2014."""
    root = tmp_path / "data" / "tic" / "emoji" / "yearly" / "eval"
    write_split(root / "retrieval/2014", *cut(content, 2))
    write_split(root / "emojinet/2014", *cut(content, 3))
    write_classes(root / "emojinet")
    return tmp_path / "data"


FIXTURES = checkpoint, content, data, model, net


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
