import json
import logging
from types import SimpleNamespace

import pytest
import torch

from tic_clip import TicError, storage, weights
from tic_clip.training import checkpoint as checkpoints
from tic_clip.training import hooks
from tic_clip.training.checkpoint import Keeper, damage, iteration_of, name_of, newest, surplus

PLAN = {
    "benchmark": "emoji",
    "scale": "tic_tiny",
    "filter": "all",
    "method": "cumulative",
    "step": "2015",
    "cutoff": 201512,
    "iterations": 120,
    "checkpoints": 2,
    "block": 20,
    "batch_size": 64,
    "samples": 7680,
    "samples_seen": 15360,
    "keep": {"max_kept": 2, "save_every": None, "save_minutes": 1000, "remote": None},
}


def keeper(folder, loader=None, resumed=None, **keep):
    return Keeper({**PLAN, "keep": {**PLAN["keep"], **keep}}, folder, loader, resumed)


def files(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def train(one, blocks):
    """What OpenCLIP does after each block."""
    for block in blocks:
        hooks.save(
            {"epoch": block, "state_dict": {"w": torch.tensor([float(block)])}}, "unused", SimpleNamespace(tic=one)
        )


@pytest.mark.parametrize(
    ("iteration", "name"),
    [(20, "iteration_20.pt"), (60, "epoch_1.pt"), (80, "iteration_80.pt"), (120, "epoch_2.pt")],
)
def test_names_say_the_place_in_the_step(iteration, name):
    assert name_of(PLAN, iteration) == name
    assert iteration_of(name, PLAN) == iteration


def test_only_the_steps_own_checkpoints_are_written_unless_it_is_time(tmp_path):
    train(keeper(tmp_path), range(1, 7))
    assert files(tmp_path) == ["epoch_1.pt", "epoch_2.pt"]


def test_checkpoints_by_samples(tmp_path):
    one = keeper(tmp_path, save_every=2500, max_kept=9)  # blocks end at 1280, 2560, 3840, 5120, 6400 and 7680
    seen = []
    for block in range(1, 7):
        train(one, [block])
        seen.append(newest(tmp_path / "checkpoints", PLAN))
    names = [path and path.rsplit("/", 1)[1] for path in seen]
    assert names == [None, "iteration_40.pt", "epoch_1.pt", "iteration_80.pt", "iteration_80.pt", "epoch_2.pt"]


def test_checkpoints_by_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    one = keeper(tmp_path, save_minutes=10, max_kept=9)
    for block, seconds in ((1, 599), (2, 600), (3, 700), (4, 1200), (5, 1300)):
        now[0] = seconds
        train(one, [block])
    assert files(tmp_path) == ["epoch_1.pt", "iteration_100.pt", "iteration_40.pt"]  # 1300 is ten minutes after 700


@pytest.mark.parametrize(
    ("most", "left"),
    [
        (9, ["epoch_1.pt", "iteration_100.pt", "iteration_80.pt"]),  # of those in between two stay
        (3, ["epoch_1.pt", "iteration_100.pt", "iteration_80.pt"]),
        (2, ["epoch_1.pt", "iteration_100.pt"]),
        (1, ["iteration_100.pt"]),
    ],
)
def test_how_many_stay(most, left):
    names = ["iteration_20.pt", "iteration_40.pt", "epoch_1.pt", "iteration_80.pt", "iteration_100.pt"]
    gone = surplus(names, PLAN, most)
    assert sorted(set(names) - set(gone)) == left
    assert len(gone) == len(set(gone))


def test_of_many_checkpoints_the_newest_stay():
    plan = {**PLAN, "iterations": 600, "checkpoints": 10}
    names = [f"epoch_{k}.pt" for k in range(1, 11)]
    assert surplus(names, plan, 3) == names[:7]
    assert surplus(names, plan, 1) == names[:9]
    assert surplus(names, plan, 10) == []


def test_a_checkpoint_records_where_it_comes_from_and_what_was_read(tmp_path):
    loader = SimpleNamespace(tally={("2014", "read"): 10, ("2015", "read"): 5, ("2015", "undecodable"): 1})
    from collections import Counter

    loader.tally = Counter(loader.tally)
    train(keeper(tmp_path, loader), [3])
    record = weights.record(str(tmp_path / "checkpoints/epoch_1.pt"))
    assert record == {
        "benchmark": "emoji",
        "step": "2015",
        "cutoff": 201512,
        "iteration": 60,
        "samples_seen": 7680 + 60 * 64,
        "read": {"2014": {"read": 10}, "2015": {"read": 5, "undecodable": 1}},
    }
    train(keeper(tmp_path, loader, resumed=record), [6])  # a process that went on from there read as much again
    assert weights.record(str(tmp_path / "checkpoints/epoch_2.pt"))["read"]["2015"] == {"read": 10, "undecodable": 2}


def test_without_a_step_of_ours_openclips_checkpoint_is_written_as_it_asks(tmp_path):
    hooks.save({"epoch": 1}, str(tmp_path / "epoch_1.pt"), SimpleNamespace())
    assert torch.load(tmp_path / "epoch_1.pt") == {"epoch": 1}


def spoil(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "bit"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before_and_says_so(tmp_path, caplog, how):
    train(keeper(tmp_path, max_kept=9), range(1, 7))
    last = tmp_path / "checkpoints/epoch_2.pt"
    assert newest(tmp_path / "checkpoints", PLAN) == str(last)
    assert damage(last) is None
    if how == "bit":
        weights.write({"epoch": 6, "state_dict": {"w": torch.zeros(1000)}}, last)
        spoil(last)
    else:
        last.write_bytes(last.read_bytes()[: 300 if how == "cut" else 0])
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path / "checkpoints", PLAN) == str(tmp_path / "checkpoints/epoch_1.pt")
    assert f"{last} is damaged" in caplog.text
    (tmp_path / "checkpoints/epoch_1.pt").write_bytes(b"")
    assert newest(tmp_path / "checkpoints", PLAN) is None


def test_other_files_are_no_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("patched.pt", "epoch_1.pt.tmp", "epoch_x.pt", ".epoch_1.pt"):
        (tmp_path / "checkpoints" / name).touch()
    assert newest(tmp_path / "checkpoints", PLAN) is None


def test_what_lies_in_between_goes_when_the_step_is_done(tmp_path):
    train(keeper(tmp_path, save_every=1280, max_kept=9), range(1, 7))
    assert files(tmp_path) == ["epoch_1.pt", "epoch_2.pt", "iteration_100.pt", "iteration_80.pt"]
    checkpoints.clear(tmp_path, PLAN)
    assert files(tmp_path) == ["epoch_1.pt", "epoch_2.pt"]


@pytest.fixture(params=["folder", "s3"])
def remote(request, tmp_path):
    return str(tmp_path / "remote") if request.param == "folder" else request.getfixturevalue("s3") + "/runs/x"


def test_the_remote_copy_is_bounded_alike_and_can_be_gone_on_from(tmp_path, remote):
    from tic_clip.storage import list_files

    one = keeper(tmp_path / "run", save_every=1280, max_kept=2, remote=remote)
    plan = one.plan
    for block in range(1, 6):
        train(one, [block])
        there = sorted(path.rsplit("/", 1)[1] for path, _ in list_files(f"{remote}/2015/checkpoints", "*.pt"))
        assert there == files(tmp_path / "run")
        assert len(there) <= 2
    (tmp_path / "run/plan.json").write_text("{}")
    checkpoints.push(tmp_path / "run", plan, ["plan.json"])
    checkpoints.fetch(tmp_path / "other", plan)
    assert files(tmp_path / "other") == ["iteration_100.pt"]
    same = (tmp_path / "other/checkpoints/iteration_100.pt").read_bytes()
    assert same == (tmp_path / "run/checkpoints/iteration_100.pt").read_bytes()
    assert (tmp_path / "other/plan.json").read_text() == "{}"
    (tmp_path / "other/checkpoints/iteration_100.pt").unlink()
    checkpoints.fetch(tmp_path / "other", plan)  # what is on this disk is not replaced
    assert files(tmp_path / "other") == []
    train(one, [6])
    checkpoints.clear(tmp_path / "run", plan)
    for name in ("train.log.jsonl", "done.json"):
        (tmp_path / "run" / name).write_text("{}")
    checkpoints.push(tmp_path / "run", plan, ["checkpoints/epoch_2.pt", "train.log.jsonl", "done.json"])
    assert sorted(path.removeprefix(f"{remote}/") for path, _ in list_files(remote, "**/*")) == [
        "2015/checkpoints/epoch_1.pt",
        "2015/checkpoints/epoch_2.pt",
        "2015/done.json",
        "2015/plan.json",
        "2015/train.log.jsonl",
    ]
    checkpoints.fetch(tmp_path / "third", plan)
    assert files(tmp_path / "third") == ["epoch_2.pt"]
    assert (tmp_path / "third/done.json").exists()


def test_a_store_that_is_away_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").touch()
    train(keeper(tmp_path / "run", remote=str(tmp_path / "file")), [3])
    assert files(tmp_path / "run") == ["epoch_1.pt"]
    assert f"the copy in {tmp_path}/file is behind: " in caplog.text


def test_of_a_damaged_copy_the_checkpoint_before_is_fetched(tmp_path, remote, caplog):
    one = keeper(tmp_path / "run", max_kept=9, remote=remote)
    train(one, range(1, 7))
    (tmp_path / "run/plan.json").write_text("{}")
    (tmp_path / "half.pt").write_bytes((tmp_path / "run/checkpoints/epoch_2.pt").read_bytes()[:400])
    storage.upload(tmp_path / "half.pt", f"{remote}/2015/checkpoints/epoch_2.pt")
    checkpoints.push(tmp_path / "run", one.plan, ["plan.json"])
    assert checkpoints.fetch(tmp_path / "other", one.plan)
    assert files(tmp_path / "other") == ["epoch_1.pt"]
    assert "epoch_2.pt is damaged" in caplog.text


def test_the_copy_of_a_finished_step_that_is_behind_is_completed(tmp_path, remote):
    one = keeper(tmp_path, max_kept=9)
    train(one, range(1, 7))
    for name in ("plan.json", "done.json"):
        (tmp_path / name).write_text("{}")
    plan = keeper(tmp_path, remote=remote).plan
    for _ in range(2):
        checkpoints.push_done(tmp_path, plan, "checkpoints/epoch_2.pt")
        there = [path.removeprefix(f"{remote}/2015/") for path, _ in storage.list_files(remote, "**/*")]
        assert sorted(there) == ["checkpoints/epoch_2.pt", "done.json", "plan.json"]


def test_a_step_is_trained_by_one_process(tmp_path):
    half = tmp_path / "2014/checkpoints/.epoch_1.pt.1-1.tmp"
    with checkpoints.alone(tmp_path / "2014"):
        half.parent.mkdir()
        half.touch()
        with (
            pytest.raises(TicError, match=r"another process is training .*/2014"),
            checkpoints.alone(tmp_path / "2014"),
        ):
            raise AssertionError
    assert half.exists()
    with checkpoints.alone(tmp_path / "2014"):
        assert not half.exists()  # what a killed process left


def test_damage_is_found_wherever_a_bit_is_flipped(tmp_path):
    """Each byte behind the data, where the zip says what is in it: the file is called damaged, or loads as it was."""
    path = tmp_path / "epoch_1.pt"
    weights.write({"epoch": 1, "state_dict": {"w": torch.arange(3.0)}, "tic": {"step": "x"}}, path)
    data = path.read_bytes()
    faults = 0
    for place in range(len(data) - 600, len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        if damage(path) is None:
            assert torch.equal(weights.load(str(path))["w"], torch.arange(3.0))
        else:
            faults += 1
    assert faults > 100


def test_nothing_to_fetch_is_no_error(tmp_path, remote):
    checkpoints.fetch(tmp_path / "run", {**PLAN, "keep": {**PLAN["keep"], "remote": remote}})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("record", "path", "refused"),
    [
        ({"cutoff": 201612}, "run/2016/checkpoints/epoch_2.pt", True),
        ({"cutoff": 201512}, "run/2015/checkpoints/epoch_2.pt", False),
        ({"cutoff": 201412}, "models/2019.pt", False),  # what it records counts, not its name
        (None, "models/2019.pt", True),  # a released model
        (None, "models/2014.pt", False),
        (None, "models/201602.pt", True),
        (None, "models/openai.pt", False),  # nothing is known
    ],
)
def test_a_model_that_has_seen_later_data_is_refused(record, path, refused):
    if refused:
        with pytest.raises(TicError, match=r"has seen data up to 20\d{4}, after those of step 2015, 201512"):
            checkpoints.check_cutoff(record, path, PLAN)
    else:
        checkpoints.check_cutoff(record, path, PLAN)


FIGURES = {"train/loss": 3.5, "train/lr": 0.001, "train/samples_per_second": 300.0, "train/data_time": 0.02}


def test_the_log_of_a_step(tmp_path):
    args = SimpleNamespace(tic=keeper(tmp_path))
    hooks.log(args, 0, {**FIGURES, "train/scale": 14.3})
    hooks.log(args, 9, {**FIGURES, "train/contrastive_loss": 2.0})
    assert [json.loads(line) for line in (tmp_path / "train.log.jsonl").read_text().splitlines()] == [
        {"step": 1, "samples_seen": 7744, "loss": 3.5, "lr": 0.001, "samples_per_second": 300.0, "data_wait": 0.02},
        {
            "step": 10,
            "samples_seen": 8320,
            "loss": 3.5,
            "contrastive_loss": 2.0,
            "lr": 0.001,
            "samples_per_second": 300.0,
            "data_wait": 0.02,
        },
    ]
    hooks.log(SimpleNamespace(), 0, FIGURES)  # stock OpenCLIP


def test_the_log_of_a_step_that_goes_on_ends_at_its_checkpoint(tmp_path):
    one = keeper(tmp_path)
    one.cut_log(20)  # none yet
    for step in (1, 10, 20, 21, 30):
        one.log(step, {name.removeprefix("train/"): value for name, value in FIGURES.items()})
    with open(tmp_path / "train.log.jsonl", "a") as file:
        file.write('{"step": 1')  # what kill -9 leaves
    one.cut_log(20)
    lines = (tmp_path / "train.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 10, 20]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_step(tmp_path, loss):
    with pytest.raises(TicError, match=rf"the loss after 5 iterations of step 2015 is {loss}"):
        hooks.log(SimpleNamespace(tic=keeper(tmp_path)), 4, {**FIGURES, "train/loss": loss})


def test_the_name_of_a_run_says_what_it_is(tmp_path):
    args = SimpleNamespace(tic=keeper(tmp_path), name="2015")
    assert hooks.wandb_name(args) == "emoji-tic_tiny-all-cumulative-2015"
    assert hooks.wandb_name(SimpleNamespace(name="mine")) == "mine"
