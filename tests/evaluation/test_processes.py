"""Several processes evaluate together: what each takes, where each writes, and what a killed one leaves."""

import errno
import fcntl
import json
import os
import resource
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import Script
from test_evaluation import ARCH, SCRIPT, png, write_classes, write_split

from tic_clip import TicError, models
from tic_clip.evaluation import claims, features
from tic_clip.evaluation import evaluate as evaluation
from tic_clip.evaluation.claims import claim, local_rank, open_lock, process_rank, release, take
from tic_clip.evaluation.encode import Settings
from tic_clip.evaluation.evaluate import evaluate
from tic_clip.evaluation.results import RESULTS, append_result, own_results, read_results
from tic_clip.evaluation.tasks import static_task
from tic_clip.models import Model
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
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (process_rank(), local_rank()) == (rank, local)


def in_another_process(work):
    """Return the exit status of ``work()`` in a fork of this process."""
    child = os.fork()
    if not child:
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_claim_is_of_one_process_until_it_ends_or_is_released(tmp_path):
    def claims_of_another():
        with open_lock(tmp_path) as lock:
            return sum(claim(lock, name) << i for i, name in enumerate(("a", "b")))

    with open_lock(tmp_path) as lock:
        assert claim(lock, "a")
        assert in_another_process(claims_of_another) == 0b10
        release(lock, "a")
        assert in_another_process(claims_of_another) == 0b11
        assert claim(lock, "a")  # that process has ended
    assert in_another_process(claims_of_another) == 0b11


def test_each_process_has_a_file_of_its_own(tmp_path, monkeypatch):
    def number_of_another():
        with open_lock(tmp_path) as lock:
            return int("0" + "".join(filter(str.isdigit, own_results(tmp_path, lock).name)))

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
    folder, rng = tmp_path_factory.mktemp("emoji"), np.random.default_rng(0)
    torch.manual_seed(0)
    net = models.make_model(ARCH, "cpu")[0]
    for number, step in enumerate(YEARS):
        plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": step, "model": ARCH}
        plan |= {"samples_seen": 64, "samples": 64, "checkpoints": 1}
        write_json(folder / "run" / step / "done.json", {"plan": plan, "checkpoint": "model.pt"})
        state = {name: value * (1 + number / 10) for name, value in net.state_dict().items()}
        torch.save(state, folder / "run" / step / "model.pt")
        content = [
            (f"{i}", {"png": png(rng), "txt": f"picture {i}".encode(), "cls": b"%d" % (i % 6)})
            for i in range(30 + number)
        ]
        root = folder / "data/tic/emoji/yearly/eval"
        for task in ("retrieval", "emojinet"):
            write_split(root / task / step, content)
    write_classes(root / "emojinet")
    lines = [f"tic/emoji/{task}/yearly/{year}:\n" for task in ("retrieval", "emojinet") for year in YEARS]
    (folder / "list.yml").write_text("".join(lines))
    return folder


def start(emoji, output_dir, *more, ranks=1, **environment):
    flags = ("--train_output_dir", emoji / "run", "--data_dir", emoji / "data", "--tasklist", emoji / "list.yml")
    flags += ("--output_dir", output_dir, "--batch_size", 8, "--workers", 0)
    return Script(SCRIPT, *flags, *more, ranks=ranks, OMP_NUM_THREADS="1", **environment)


def finish(script):
    script.wait()
    assert script.returncode == 0, script.stderr
    return script


def metrics_of(folder):
    """The metrics of each step and task; none is there twice."""
    results = read_results(folder / RESULTS)
    assert max(Counter((result["step"], result["key"]) for result in results).values()) == 1
    return {(result["step"], result["key"]): result["metrics"] for result in results}


def test_two_processes_one_of_them_killed_give_the_results_of_one(emoji, tmp_path):
    finish(start(emoji, tmp_path / "one"))
    usual = metrics_of(tmp_path / "one")
    assert len(usual) == 3 * 6
    with open_lock(tmp_path / "two") as lock:
        assert claim(lock, str(("oracle 2016", "tic/emoji/retrieval/yearly/2016")))  # so that they can't end
        together, until = start(emoji, tmp_path / "two", ranks=2), time.monotonic() + 120
        while not read_results(tmp_path / "two" / RESULTS, quiet=True):
            assert time.monotonic() < until
            time.sleep(0.01)
        together.kill()
    left = len(usual) - len(metrics_of(tmp_path / "two"))
    assert left
    again = [start(emoji, tmp_path / "two") for _ in range(2)]  # twice the same, by hand
    new = [int(finish(script).stdout.split()[0]) for script in again]
    assert sum(new) == left
    found = metrics_of(tmp_path / "two")
    assert found.keys() == usual.keys()
    assert [found[key] for key in usual] == [pytest.approx(metrics, abs=1e-6) for metrics in usual.values()]


def test_what_a_lost_process_had_is_done_by_the_one_that_waits(emoji, tmp_path, monkeypatch):
    def hold_everything():
        monkeypatch.setattr(claims, "PAUSE", 0.01)
        with open_lock(tmp_path) as lock:
            for _ in take(lock, [0], lambda _: [("oracle 2014", "tic/emoji/retrieval/yearly/2014")]):
                os.write(ready, b"x")
                time.sleep(60)

    read, ready = os.pipe()
    child = os.fork()
    if not child:
        hold_everything()
        os._exit(1)
    os.read(read, 1)
    script = start(emoji, tmp_path)
    until = time.monotonic() + 120
    message = "waiting for another process, which has 1 of the folders\n"
    while message not in Path(script.output[1].name).read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(read_results(tmp_path / RESULTS)) == 15
    os.kill(child, 9)
    os.waitpid(child, 0)
    finish(script)
    assert len(metrics_of(tmp_path)) == 18


def test_processes_of_a_launcher_cut_large_folders(emoji, tmp_path, monkeypatch):
    """Here into 30, 31 and 32 images by 12: nine slices of both kinds of task, and a bad image on a slice's border."""
    content = [(f"{i}", {"png": png(np.random.default_rng(i)), "txt": b"picture %d" % (i % 20)}) for i in range(30)]
    content[12][1]["png"] = content[29][1]["png"] = b"no image"
    write_split(tmp_path / "retrieval", content)
    here = emoji / "data/tic/emoji/yearly/eval"
    folders = {
        "retrieval/a": tmp_path / "retrieval",
        "retrieval/b": here / "retrieval/2015",
        "c": here / "emojinet/2016",
    }
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

    child = os.fork()
    if not child:
        os._exit(work_as(1))
    assert work_as(0) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
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
    script.main([*map(str, flags), "--watch"])
    said = [f"6 new results in {run}{already}" for already in ("", ", 6 were there already", ", 12 were there already")]
    assert capsys.readouterr().out.splitlines() == said
    for wrong in (["--force"], ["--train_output_dir", str(tmp_path / "nothing")]):
        with pytest.raises(TicError, match="--watch needs --train_output_dir, a folder that"):
            script.main([*map(str, flags), "--watch", *wrong])
    sys.modules.pop("evaluate", None)


# --- Memory


def test_a_full_disk_for_features_is_one_line(emoji, tmp_path, monkeypatch):
    model = Model(name="x", arch=ARCH, weights=str(emoji / "run/2014/model.pt"))
    task = static_task("x", {"folder": str(emoji / "data/tic/emoji/yearly/eval/emojinet/2014")}, "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(TicError, match=r"where features are kept: File too large; set TMPDIR to a larger disk, or"):
            evaluate([model], [task], str(tmp_path), Settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=32_000))
    with pytest.raises(TicError, match=r"the features of x need 0.0 GB in .*, which has 0.0 GB: set TMPDIR to"):
        evaluate([model, replace(model, name="y"), replace(model, name="z")], [task], str(tmp_path), Settings())
    assert not (tmp_path / RESULTS).exists()
    assert len(evaluate([model], [task], str(tmp_path), Settings())) == 1
