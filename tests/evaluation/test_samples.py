"""What an evaluation reads: layouts of folders, classes, and data in which something is wrong."""

import shutil
from pathlib import Path

import pytest
import tiny
from miniature import write_split
from tiny import both, cut, evaluate, lines, refused, refused_before_training, run, task, write_classes

from tic_clip.data.clip_benchmark import imagenet_texts
from tic_clip.data.split import HOW_TO_MAKE, SIZES
from tic_clip.evaluation.data import read_classes
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import check_tasks
from tic_clip.evaluation.tasks import static_task
from tic_clip.storage import upload, write_json

checkpoint, content, data, model, net = tiny.FIXTURES

# --- What is wrong with the data ---


def test_missing_empty_and_miscounted_folders(content, model, data, tmp_path):
    check_tasks(both(data))
    chosen, classes = task(data), task(data, "emojinet")
    folder = Path(chosen.folder)

    def check(expected, task=chosen, refuse=refused_before_training):
        message = refuse([model], [task], tmp_path)
        assert message == expected.format(folder=task.folder)

    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        text = Path(classes.folder).parent / name
        shutil.move(text, tmp_path / name)
        check(f"{{folder}} has no {name}, and neither has the folder above it", classes)
        shutil.move(tmp_path / name, text)
    write_classes(Path(classes.folder), templates=["{c}", "a {}"])
    check("{folder}: the template 'a {{}}' has no {{c}}, which stands for the class name", classes)
    write_split(folder, *cut(content, 2))
    write_json(folder / SIZES, {"00000000.tar": 20, "00000001.tar": 22})
    check("{folder}/00000001.tar holds 21 samples, its sizes.json says 22", refuse=refused)
    write_split(folder, [], [])
    check("{folder} holds no sample")
    shutil.rmtree(folder)
    assert refused_before_training([model], [classes, chosen], tmp_path).startswith(
        f"no data for {chosen.key}: {folder} is missing: run scripts/run_emoji_cumulative.sh, or "
    )
    folder.mkdir()
    check(f"{{folder}} holds no .tar file: {HOW_TO_MAKE}")
    write_split(folder, [])
    (folder / SIZES).unlink()
    check("{folder} holds no sample")
    write_split(folder, [("a", {"txt": b"x"})])
    message = refused_before_training([model], [chosen], tmp_path, skip_bad=True)
    assert message == f"{folder} holds no sample that can be used"
    write_split(folder, [("a", {"png": b"x", "txt": b"x"})])
    assert refused([model], [chosen], tmp_path, skip_bad=True) == f"{folder} holds no image that can be decoded"
    (folder / "00000000.tar").write_bytes((folder / "00000000.tar").read_bytes()[:1000])
    assert refused_before_training([model], [chosen], tmp_path).startswith(f"{folder}/00000000.tar: truncated")


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
def test_a_bad_sample_is_named_or_counted(name, members, message, content, model, data, tmp_path):
    chosen, reason = task(data, name), message.split(":")[0]
    bad = {suffix: value for suffix, value in {**content[0][1], **members}.items() if value is not None}
    write_split(Path(chosen.folder), [("bad", bad), content[1]])
    options = {"workers": int(reason == "bad image")}  # one error comes from a worker
    refuse = refused if reason == "bad image" else refused_before_training
    line = refuse([model], [chosen], tmp_path, **options)
    assert line.startswith(f"{chosen.folder}/00000000.tar: sample bad: {message}")
    check_tasks([chosen], Settings(skip_bad=True))
    evaluate([model], [chosen], tmp_path, skip_bad=True, **options)
    (line,) = lines(tmp_path)
    assert (line["num_samples"], line["dropped"]) == (1, {reason: 1})


def test_samples_that_are_left_out_change_nothing_else(content, model, data, tmp_path):
    """Also in a batch of nothing else."""
    usual = run([model], both(data), tmp_path / "a")
    bad = [("x", {**content[5][1], "png": b"?"}), ("y", {**content[6][1], "png": b""})]
    for each in both(data):
        write_split(Path(each.folder), [*content[:5], *bad, *content[5:]])
    found = run([model], both(data), tmp_path / "b", skip_bad=True, batch_size=1)
    assert found == [pytest.approx(metrics) for metrics in usual]
    assert [line["dropped"] for line in lines(tmp_path / "b")] == [{"bad image": 2}] * 2


# --- Layouts ---


@pytest.fixture
def usual(model, data, tmp_path):
    """The metrics of classification, of a split of ours."""
    (metrics,) = run([model], [task(data, "emojinet")], tmp_path / "usual")
    return metrics


def write_images(folder, content, names):
    for number, (key, members) in enumerate(content):
        parent = folder / names[int(members["cls"])]
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{key}.{'PNG' if number % 2 else 'png'}").write_bytes(members["png"])
        (parent / "notes.txt").write_text("not an image")


def test_a_webdataset_of_clip_benchmark(content, model, usual, tmp_path):
    folder = tmp_path / "wds_my-set_test"
    write_split(folder / "test", *cut(content, 11), names="{}.tar")
    (folder / "test" / SIZES).unlink()
    write_classes(folder)
    (folder / "test/nshards.txt").write_text("11\n")
    chosen = static_task("my/set", {"size": tiny.NUM_SAMPLES, "main_metric": "acc5"}, str(tmp_path))
    assert run([model], [chosen], tmp_path) == [pytest.approx({**usual, "main_metric": usual["acc5"]}, abs=1e-6)]
    (line,) = lines(tmp_path)
    assert (line["key"], line["dataset"], line["ci95"]) == ("my/set", "my/set", None)
    more = static_task("my/set", {"size": 50}, str(tmp_path))
    assert refused([model], [more], tmp_path) == f"{folder} has {tiny.NUM_SAMPLES} samples, the list of tasks says 50"
    (folder / "test/nshards.txt").write_text("12\n")
    message = refused_before_training([model], [chosen], tmp_path)
    assert message == f"{folder}/test has 11 shards, its nshards.txt says 12"


def test_images_in_folders(content, model, usual, tmp_path):
    names = ["a", "b", "c", "d", "e", "f"]
    write_images(tmp_path / "set", content, names)
    (tmp_path / "set/f").mkdir()
    write_classes(tmp_path / "set")
    chosen = static_task("x", {"folder": "set"}, str(tmp_path))
    assert run([model], [chosen], tmp_path) == [pytest.approx({**usual, "main_metric": usual["acc1"]}, abs=1e-6)]
    check_tasks([chosen])
    assert evaluate([model], [chosen], tmp_path) == 0
    (tmp_path / "set/a/new.png").write_bytes(content[0][1]["png"])
    assert evaluate([model], [chosen], tmp_path) == 1
    for name in ("a/b.gif", "b/b.GIF", "c/d.tiff"):
        (tmp_path / "set" / name).write_bytes(b"not read")
    more = static_task("x", {"folder": "set", "size": tiny.NUM_SAMPLES + 4}, str(tmp_path))
    assert evaluate([model], [more], tmp_path) == 1
    line = lines(tmp_path)[-1]
    assert line["dropped"] == {"gif images are not read": 2, "tiff images are not read": 1}
    assert line["num_samples"] == tiny.NUM_SAMPLES + 1
    retrieval = static_task("x", {"folder": "set", "kind": "retrieval"}, str(tmp_path))
    assert refused_before_training([model], [retrieval], tmp_path).endswith("for each class, and no captions")
    write_classes(tmp_path / "set", tiny.CLASSES[:2])
    message = refused_before_training([model], [chosen], tmp_path)
    assert message == f"{tmp_path}/set has 6 folders of images and 2 class names"


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


def test_data_in_a_cloud(s3, model, data, content, tmp_path):
    write_images(data / "set", content[:20], "abcde")
    write_classes(data / "set", tiny.CLASSES[:5])
    usual = run([model], [*both(data), static_task("x", {"folder": "set"}, str(data))], tmp_path / "a")
    for path in Path(data).rglob("*"):
        if path.is_file():
            upload(path, f"{s3}/{path.relative_to(data)}")
    tasks = [*both(s3), static_task("x", {"folder": "set"}, s3)]
    check_tasks(tasks)
    found = run([model], tasks, tmp_path / "b", batch_size=8, workers=1)
    assert found == [pytest.approx(metrics, abs=1e-6) for metrics in usual]
    assert [line["data"] for line in lines(tmp_path / "a")] == [line["data"] for line in lines(tmp_path / "b")]
