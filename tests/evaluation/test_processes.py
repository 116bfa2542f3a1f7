"""Several processes evaluate together: what each takes, where each writes, and what a killed one leaves."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import file_limit
from miniature import make_image, write_split
from tiny import ARCH, SCRIPT, cut, write_classes

from tic_clip import TicError, models
from tic_clip.evaluation import claims, features
from tic_clip.evaluation import evaluate as evaluation
from tic_clip.evaluation.claims import claim, local_rank, open_lock, process_rank, release, take
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import evaluate
from tic_clip.evaluation.results import RESULTS, append_result, own_results, read_results
from tic_clip.evaluation.tasks import read_tasklist, static_task
from tic_clip.models import Model
from tic_clip.runs import models_of
from tic_clip.storage import write_json

YEARS = ("2014", "2015", "2016")
SLICES = {(0, 12), (12, 24), (24, 36)}


# --- Claims


@pytest.mark.parametrize(
    ("variables", "rank", "local"),
    [
        ({}, (0, 1), 0),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8), 1),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, (3, 4), 1),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0"}, (1, 8), 0),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, (7, 8), 3),
    ],
)  # fmt: skip
def test_the_rank_is_what_launchers_say(variables, rank, local, monkeypatch):
    monkeypatch.setattr(os, "environ", variables)
    assert (process_rank(), local_rank()) == (rank, local)


def fork(work):
    """Start ``work()`` in a fork of this process, which ends with what it returns."""
    child, status = os.fork(), 255
    if child:
        return child
    try:
        status = work()
    finally:
        os._exit(status)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_another_process(work):
    return status_of(fork(work))


def test_a_claim_is_of_one_process_until_it_ends_or_is_released(tmp_path):
    def another_can_claim():
        with open_lock(tmp_path) as lock:
            return claim(lock, "a") + 2 * claim(lock, "b")

    with open_lock(tmp_path) as lock:
        assert claim(lock, "a")
        assert in_another_process(another_can_claim) == 2
        release(lock, "a")
        assert in_another_process(another_can_claim) == 3
        assert claim(lock, "a")  # that process has ended
    assert in_another_process(another_can_claim) == 3


def test_each_process_has_a_file_of_its_own(tmp_path, monkeypatch):
    def number_of_another():
        with open_lock(tmp_path) as lock:
            return int(own_results(tmp_path, lock).name.split(".")[1])

    with open_lock(tmp_path) as lock:
        assert own_results(tmp_path, lock) == tmp_path / RESULTS
        assert in_another_process(number_of_another) == 1
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert in_another_process(number_of_another) == 4  # 1 to 3 are for the other ranks


def test_ranks_begin_with_their_share_and_take_what_is_left(tmp_path, monkeypatch):
    """The missing parts are listed again when they are claimed: another process may just have done them."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    missing, taken = {unit: [f"{unit}1", f"{unit}2"] for unit in "abcde"}, []
    missing["a"] = []
    with open_lock(tmp_path) as lock:
        for unit, parts in take(lock, "abcde", lambda unit: list(missing[unit])):
            taken.append((unit, parts))
            missing[unit] = []
            missing["c"] = ["c2"]
    assert taken == [("b", ["b1", "b2"]), ("e", ["e1", "e2"]), ("c", ["c2"]), ("d", ["d1", "d2"])]


def test_without_locks_each_process_does_all_and_says_so_once(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claims._warn.cache_clear()
    missing = {"a": ["1"], "b": ["2"]}
    with open_lock(tmp_path) as lock:
        for unit, _ in take(lock, "ab", lambda unit: list(missing[unit])):
            missing[unit] = []
    assert capfd.readouterr().err.splitlines() == [
        f"warning: {tmp_path}/.eval.lock: no lock (No locks available): processes may do a few things twice"
    ]


# --- Results


def test_the_files_of_all_processes_are_read_in_the_order_of_time(tmp_path):
    old = {"key": "a", "metrics": {}}
    first, second, third = ({"key": key, "metrics": {}, "time": now} for key, now in (("a", 1.5), ("b", 2.5), ("a", 3)))
    for name, results in ((RESULTS, [old, second]), ("eval_results.12.jsonl", [first, third])):
        for result in results:
            append_result(tmp_path / name, result)
    (tmp_path / "eval_results.old.jsonl").write_text(json.dumps(old))
    assert read_results(tmp_path / RESULTS) == [old, first, second, third]
    (tmp_path / RESULTS).unlink()
    assert read_results(tmp_path / RESULTS) == [first, third]


# --- Several processes


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A run of three steps on TiC-Emoji with random weights, and pictures of three years for both tasks."""
    folder = tmp_path_factory.mktemp("emoji")
    torch.manual_seed(0)
    net = models.make_model(ARCH, "cpu")[0]
    for number, step in enumerate(YEARS):
        plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": step, "model": ARCH}
        plan |= {"samples_seen": 64, "samples": 64, "checkpoints": 1}
        write_json(folder / "run" / step / "done.json", {"plan": plan, "checkpoint": "model.pt"})
        state = {name: value * (1 + number / 10) for name, value in net.state_dict().items()}
        torch.save(state, folder / "run" / step / "model.pt")
        images = [make_image(f"{step} {i}", "PNG") for i in range(30 + number)]
        content = [(f"{i}", {"png": png, "txt": b"%d" % i, "cls": b"%d" % (i % 6)}) for i, png in enumerate(images)]
        for task in ("retrieval", "emojinet"):
            write_split(folder / "data/tic/emoji/yearly/eval" / task / step, *cut(content, 2))
    write_classes(folder / "data/tic/emoji/yearly/eval/emojinet")
    lines = [f"tic/emoji/{task}/yearly/{year}:\n" for task in ("retrieval", "emojinet") for year in YEARS]
    (folder / "list.yml").write_text("".join(lines))
    return folder


def evaluate_here(emoji, output_dir):
    """Evaluate the run in this process; how many results are new."""
    tasks = read_tasklist(str(emoji / "list.yml"), str(emoji / "data"))
    return len(evaluate(models_of(str(emoji / "run")), tasks, str(output_dir), Settings(batch_size=8)))


def metrics_of(folder):
    """The metrics of each step and task; none is there twice."""
    results = read_results(folder / RESULTS)
    assert max(Counter((result["step"], result["key"]) for result in results).values()) == 1
    return {(result["step"], result["key"]): result["metrics"] for result in results}


def test_two_processes_one_of_them_killed_give_the_results_of_one(emoji, tmp_path):
    assert evaluate_here(emoji, tmp_path / "one") == 3 * 6
    usual, two = metrics_of(tmp_path / "one"), tmp_path / "two"

    def work_as(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        return evaluate_here(emoji, two)

    with open_lock(two) as lock:
        assert claim(lock, str(("oracle 2016", "tic/emoji/retrieval/yearly/2016")))  # so that they can't end
        together, until = [fork(partial(work_as, rank)) for rank in range(2)], time.monotonic() + 120
        while not read_results(two / RESULTS, quiet=True):
            assert time.monotonic() < until
            time.sleep(0.1)
        for child in together:
            os.kill(child, signal.SIGKILL)
            assert status_of(child) == -signal.SIGKILL
    left = len(usual) - len(metrics_of(two))
    assert left
    child = fork(lambda: evaluate_here(emoji, two))  # twice the same, by hand
    assert evaluate_here(emoji, two) + status_of(child) == left
    found = metrics_of(two)
    assert found.keys() == usual.keys()
    assert [found[key] for key in usual] == [pytest.approx(metrics, abs=1e-6) for metrics in usual.values()]


def test_what_a_lost_process_had_is_done_by_the_one_that_waits(emoji, tmp_path, monkeypatch, capfd):
    def hold_a_folder():
        with open_lock(tmp_path) as lock:
            for _ in take(lock, [0], lambda _: [("oracle 2014", "tic/emoji/retrieval/yearly/2014")]):
                os.write(ready, b"x")
                time.sleep(60)

    read, ready = os.pipe()
    child, there = fork(hold_a_folder), []
    os.read(read, 1)

    def kill_the_other(_):
        there.append(len(read_results(tmp_path / RESULTS)))
        if len(there) == 2:  # the first time another folder had been missing, too
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    monkeypatch.setattr(claims, "sleep", kill_the_other)
    assert evaluate_here(emoji, tmp_path) == 18
    assert there == [15, 15, 18]
    assert "waiting for another process, which has 1 of the folders\n" in capfd.readouterr().err


def test_processes_of_a_launcher_cut_large_folders(emoji, tmp_path, monkeypatch):
    """Here into 30, 31 and 32 images by 12: nine slices of both kinds of task, and a bad image on a slice's border."""
    content = [(f"{i}", {"png": make_image(f"{i}"), "txt": b"picture %d" % (i % 20)}) for i in range(30)]
    content[12][1]["png"] = content[29][1]["png"] = b"no image"
    write_split(tmp_path / "retrieval", *cut(content, 2))
    here = emoji / "data/tic/emoji/yearly/eval"
    folders = {"retrieval/a": tmp_path / "retrieval", "retrieval/b": here / "retrieval/2015"}
    folders["c"] = here / "emojinet/2016"
    tasks = [static_task(key, {"folder": str(folder)}, "") for key, folder in folders.items()]
    run = [Model(name=step, arch=ARCH, weights=str(emoji / f"run/{step}/model.pt")) for step in YEARS]
    settings = Settings(batch_size=5, skip_bad=True, slice_size=12)
    whole = evaluate(run, tasks, str(tmp_path / "whole"), settings)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(claims, "PAUSE", 0.01)
    encoded, encode_set = [], evaluation.encode_set

    def encode_or_die(encoders, name, found, part=slice(None)):
        encoded.append(part)
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return encode_set(encoders, name, found, part)

    monkeypatch.setattr(evaluation, "encode_set", encode_or_die)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, tasks, str(tmp_path / "cut"), settings)
    kept = sorted((tmp_path / "cut/features").iterdir())
    assert len(kept) == 4 * len(run)
    content = kept[0].read_bytes()
    kept[0].write_bytes(content[:-9])
    with pytest.raises(TicError, match=f"{kept[0]} is damaged: delete it"):
        evaluate(run, tasks, str(tmp_path / "cut"), settings)
    kept[0].write_bytes(content)

    def work_as(rank):
        monkeypatch.setenv("RANK", str(rank))
        evaluate(run, tasks, str(tmp_path / "cut"), settings)
        return 0 if all((part.start, part.stop) in SLICES for part in encoded) else 1

    child = fork(lambda: work_as(1))
    assert (work_as(0), status_of(child)) == (0, 0)
    assert not (tmp_path / "cut/features").exists()
    found = read_results(tmp_path / "cut" / RESULTS)
    assert len(found) == len(whole) == 9
    usual = {(result["model"]["name"], result["key"]): result for result in whole}
    for result in found:
        other = usual[result["model"]["name"], result["key"]]
        assert result["metrics"] == pytest.approx(other["metrics"], abs=1e-6)
        assert (result["num_samples"], result["dropped"]) == (other["num_samples"], other["dropped"])


# --- While training


def test_watching_evaluates_each_step_when_it_is_finished(emoji, tmp_path, monkeypatch, capsys):
    """The step is that of the benchmark, of which seven are trained; the last ends it."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    sys.modules.pop("evaluate", None)
    import evaluate as script

    run, steps = tmp_path / "run", ["2015", "2021-2025"]
    shutil.copytree(emoji / "run/2014", run / "2014")

    def finish_another(seconds):
        assert seconds == script.POLL
        step = steps.pop(0)
        facts = json.loads((emoji / "run/2015/done.json").read_text())
        (run / step).mkdir()
        shutil.copy(emoji / "run/2015/model.pt", run / step)
        write_json(run / step / "done.json", facts | {"plan": facts["plan"] | {"step": step}})

    monkeypatch.setattr(script.time, "sleep", finish_another)
    flags = ["--train_output_dir", run, "--data_dir", emoji / "data", "--tasklist", emoji / "list.yml", "--workers", 0]
    flags = [*map(str, flags)]
    script.main([*flags, "--watch"])
    said = [f"6 new results in {run}{already}" for already in ("", ", 6 were there already", ", 12 were there already")]
    assert capsys.readouterr().out.splitlines() == said
    for wrong in (["--force"], ["--train_output_dir", str(tmp_path / "nothing")]):
        with pytest.raises(TicError, match="--watch needs --train_output_dir, a folder that"):
            script.main([*flags, "--watch", *wrong])
    sys.modules.pop("evaluate", None)


# --- Memory


def test_a_full_disk_for_features_is_one_line(emoji, tmp_path, monkeypatch):
    model = Model(name="x", arch=ARCH, weights=str(emoji / "run/2014/model.pt"))
    task = static_task("x", {"folder": str(emoji / "data/tic/emoji/yearly/eval/emojinet/2014")}, "")
    message = r"where features are kept: File too large; set TMPDIR to a larger disk, or"
    with file_limit(5000), pytest.raises(TicError, match=message):
        evaluate([model], [task], str(tmp_path), Settings())
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=32_000))
    with pytest.raises(TicError, match=r"the features of x need 0.0 GB in .*, which has 0.0 GB: set TMPDIR to"):
        evaluate([model, replace(model, name="y"), replace(model, name="z")], [task], str(tmp_path), Settings())
    assert not (tmp_path / RESULTS).exists()
    assert len(evaluate([model], [task], str(tmp_path), Settings())) == 1
