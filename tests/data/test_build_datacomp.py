"""build_tic_datacomp.sh, from a tiny pool and hand-made lists to splits that are read back."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, read_tars, times, tree
from test_eval_uids import GOLDFISH, SHARK, TENCH, write_table

from tic_clip.benchmarks import get_benchmark
from tic_clip.data.released import MONTHLY, YEARLY
from tic_clip.data.split import list_shards, split_folders, split_sizes
from tic_clip.data.uids import parse_uids, save_uids
from tic_clip.data.verify import verify
from tic_clip.evaluation.data import read_set
from tic_clip.evaluation.tasks import tasks_of

# Samples of the pool by their number; those from 100 are not in it.
TRAIN = {"2014": [0, 1, 2, 100], "2016": [3, 4, 4, 101]}
RETRIEVAL = {"2014": [5, 6, 6, 102], "2016": [7, 8, 9]}
DATACOMPNET = {"2014": {GOLDFISH: [10, 5], TENCH: [11, 5]}, "2016": {SHARK: [12, 103]}}
MONTH = [0, 3, 5, 7, 10, 12, 13, 14, 15, 104]  # 201604, with evaluation UIDs of this year and of another

# What comes of them: {split: {sample: class id or None}}, and how many UIDs its list has.
CLASSES = {"yearly/eval/datacompnet/2014": {5: 0, 10: 1, 11: 0}, "yearly/eval/datacompnet/2016": {12: 2}}
CLASSES |= {"monthly/eval/datacompnet/201604": {12: 2}}
SPLITS = {
    "yearly/train/2014": ([0, 1, 2], 4),
    "yearly/train/2016": ([3, 4, 4], 4),
    "yearly/eval/retrieval/2014": ([5, 6], 3),
    "yearly/eval/retrieval/2016": ([7, 8, 9], 3),
    "yearly/eval/datacompnet/2014": ([5, 10, 11], 3),
    "yearly/eval/datacompnet/2016": ([12], 2),
    "monthly/train/201604": ([0, 3, 13, 14, 15], 6),
    "monthly/eval/retrieval/201604": ([7], 1),
    "monthly/eval/datacompnet/201604": ([12], 1),
}
YEARS = {name: split for name, split in SPLITS.items() if name.startswith("yearly/")}


@pytest.fixture
def pool(make_pool):
    return make_pool((4, 3, 5, 4))


@pytest.fixture
def uid(pool):
    return lambda number: pool.uids[number] if number < 100 else hashlib.md5(b"%d" % number).hexdigest()


@pytest.fixture
def released(tmp_path, uid):
    """The folder of the released lists."""
    folder = tmp_path / "lists/released"
    lists = {f"{YEARLY}/{year}": numbers for year, numbers in TRAIN.items()} | {f"{MONTHLY}/201604": MONTH}
    for name, numbers in lists.items():
        save_uids(folder / f"{name}.npy", parse_uids(map(uid, numbers)))
    write_table(folder, "retrieval", RETRIEVAL, uid)
    write_table(folder, "datacompnet", DATACOMPNET, uid)
    return folder


@pytest.fixture
def start(tmp_path, pool, released):
    """Begin to build ``tmp_path/data``, with further variables."""

    def call(cwd=None, **settings):
        own = {"POOL": pool.path, "DATA_DIR": f"{tmp_path}/data", "LISTS": f"{tmp_path}/lists", "NUM_WORKERS": "1"}
        env = {**os.environ, "CADENCE": "", "FLAGS": "", **own, **settings}
        options = {"env": env, "cwd": cwd, "text": True, "start_new_session": True}
        script = ROOT / "dataset_creation/tic-datacomp/build_tic_datacomp.sh"
        return subprocess.Popen(["bash", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    return call


@pytest.fixture
def build(start):
    """Build to the end; returns the lines that it prints, of one that fails the last line of its error."""

    def call(code=0, **settings):
        process = start(**settings)
        stdout, stderr = process.communicate()
        assert process.returncode == code, stderr
        return stderr.splitlines()[-1] if code else stdout.splitlines()

    return call


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data/tic/datacomp"


def content(split, suffix):
    """{sample's key: its member, or None} of a split, without clip_benchmark's links."""
    samples = [sample for folder in split_folders(split) for sample in read_tars(folder, "*.tar")]
    found = {key: members.get(suffix) for key, members in samples}
    assert len(found) == len(samples)
    return found


def check_splits(data, pool, uid, lists, wanted=SPLITS):
    """All splits are there and no others, with the right samples, and without a fault."""
    found = {re.sub(r"/[0-9]{5}$", "", str(path.parent.relative_to(data))) for path in data.rglob("meta.json")}
    assert found == set(wanted)
    for name, (numbers, total) in wanted.items():
        keys = {f"{uid(number)}-{numbers[:i].count(number)}": number for i, number in enumerate(numbers)}
        texts, classes = content(data / name, "txt"), content(data / name, "cls")
        assert texts == {key: pool.samples[uid(number)]["txt"] for key, number in keys.items()}
        ids = {key: str(CLASSES[name][number]).encode() if name in CLASSES else None for key, number in keys.items()}
        assert classes == ids
        seen = Counter()
        assert list(verify(str(data / name), str(lists / f"uids/{name}.npy"), seen=seen)) == []
        assert (seen["samples"], seen["there"], seen["wanted"]) == (len(numbers), len(numbers), total)


def check_table(lines, data):
    """The last lines are the table of the splits, as it is in summary.txt."""
    lines = [line.removesuffix("  already there") for line in lines[-len(SPLITS) - 1 :]]
    assert "\n".join(lines) + "\n" == (data / "summary.txt").read_text()
    ends = {str(data / name): f"{100 * len(found) / total:.1f} % of {total}" for name, (found, total) in SPLITS.items()}
    assert {line.split()[0]: re.split(" {2,}", line)[4] for line in lines[1:]} == ends


def check_evaluation(data):
    """Our evaluation finds each evaluation split and loads it whole, as clip_benchmark does all of its shards."""
    tasks = [task for name in ("datacomp", "datacomp_monthly") for task in tasks_of(get_benchmark(name), str(data))]
    tasks = {str(Path(task.folder).relative_to(data / "tic/datacomp")): task for task in tasks}
    for name, (numbers, _) in SPLITS.items():
        if "/train/" not in name:
            folder, kind = tasks[name].folder, tasks[name].kind
            assert len(list(Path(folder, "test").glob("*.tar"))) == len(list_shards(folder))
            found = [
                sample.label if name in CLASSES else sample.captions for sample in read_set(folder, [kind]).samples
            ]
            captions = [[f"picture {number} of pool"] for number in numbers]
            assert sorted(found) == sorted(CLASSES[name].values() if name in CLASSES else captions)


def test_everything_again_and_after_a_kill(tmp_path, pool, uid, start, build, data):
    """It is killed when the first file beside a shard has appeared."""
    lines = build()
    check_splits(data, pool, uid, tmp_path / "lists")
    check_table(lines, data)
    check_evaluation(tmp_path / "data")
    before = tree(tmp_path), times(data)
    assert all(line.endswith("  already there") for line in build()[-len(SPLITS) :])
    assert (tree(tmp_path), times(data)) == before
    for made in "lists/uids", "lists/classes", "data":
        shutil.rmtree(tmp_path / made)
    process = start(NUM_WORKERS="2")
    while process.poll() is None and not any(data.glob("yearly/*/*/*.json")):
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (data / "summary.txt").exists()
    build()
    assert tree(tmp_path) == before[0]


def test_in_parts_one_cadence_then_both(tmp_path, pool, uid, build, data):
    settings = {"FLAGS": "--parts 2  --shard-size 2", "NUM_WORKERS": "2"}
    build(CADENCE="yearly", **settings)
    assert (data / "yearly/train/2014/00001/meta.json").exists()
    assert os.readlink(data / "yearly/eval/datacompnet/2014/test/0.tar").startswith("../0000")
    before = tree(data / "yearly"), times(data / "yearly")
    lines = build(CADENCE="", **settings)
    assert (tree(data / "yearly"), times(data / "yearly")) == before
    check_splits(data, pool, uid, tmp_path / "lists")
    check_table(lines, data)
    check_evaluation(tmp_path / "data")
    assert sum(line.endswith("  already there") for line in lines) == len(YEARS)


def test_without_months_and_from_another_folder(tmp_path, pool, uid, build, released):
    """Relative paths count from where the user stands."""
    shutil.rmtree(released / MONTHLY)
    build(cwd=tmp_path, POOL=os.path.relpath(pool.path, tmp_path), DATA_DIR="mine/data", LISTS="lists")
    data = tmp_path / "mine/data/tic/datacomp"
    check_splits(data, pool, uid, tmp_path / "lists", YEARS)
    assert (data / "yearly/eval/datacompnet/2014/test/0.tar").exists()
    assert "mine/data/tic/datacomp/yearly/train/2014  " in (data / "summary.txt").read_text()
    assert not (ROOT / "mine").exists()
    assert build(1, CADENCE="monthly").startswith(f"error: {tmp_path}/lists/uids/monthly is missing: ")


def test_training_lists_through_a_filter(tmp_path, uid, build, data):
    """Evaluation is what it was; train_bestpool/ stands beside train/, which another list replaces only if told."""
    chosen = {"basic": (0, 2, 4, 7, 13, 104), "bestpool": (0, 4)}
    for name, numbers in chosen.items():
        save_uids(tmp_path / f"{name}.npy", parse_uids(map(uid, numbers)))
        build(FILTER=name, FILTER_UIDS=str(tmp_path / f"{name}.npy"))
    kept = {"yearly/train/2014": [0, 2], "yearly/train/2016": [4, 4], "monthly/train/201604": [0, 13]}
    kept |= {"yearly/train_bestpool/2014": [0], "yearly/train_bestpool/2016": [4, 4]}
    for name, numbers in {**kept, "monthly/train_bestpool/201604": [0]}.items():
        assert sum(split_sizes(data / name).values()) == len(numbers)
        assert {key.split("-")[0] for key in content(data / name, "txt")} == {uid(number) for number in numbers}
    assert sum(split_sizes(data / "yearly/eval/retrieval/2016").values()) == 3
    assert "give --overwrite" in build(1, FILTER_UIDS=str(tmp_path / "bestpool.npy"))
    assert build(1, FILTER="bestpool").startswith("error: FILTER is bestpool without FILTER_UIDS")
