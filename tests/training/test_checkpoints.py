"""Which checkpoints of a step are written, kept, found again and copied; its log."""

import json
from types import SimpleNamespace

import pytest
import torch

from tic_clip import TicError, storage, weights
from tic_clip.training import checkpoint as checkpoints
from tic_clip.training import hooks
from tic_clip.training.checkpoint import Keeper, damage, name_of, newest, surplus

PLAN = {"benchmark": "emoji", "scale": "tic_tiny", "filter": "all", "method": "cumulative", "step": "2015"}
PLAN |= {"iterations": 120, "checkpoints": 2, "block": 20, "batch_size": 64, "cutoff": 201512}
PLAN |= {"samples": 7680, "samples_seen": 15360}


def make_plan(**keep):
    return PLAN | {"keep": {"max_kept": 2, "save_every": None, "save_minutes": 1000, "remote": None} | keep}


def make_keeper(folder, loader=None, resumed=None, **keep):
    return Keeper(make_plan(**keep), folder, loader, resumed)


def list_names(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def train(keeper, blocks):
    """What OpenCLIP does after each block."""
    for block in blocks:
        state = {"epoch": block, "state_dict": {"w": torch.tensor([float(block)])}}
        hooks.save(state, "unused", SimpleNamespace(tic=keeper))


def names(*iterations):
    return [name_of(PLAN, iteration) for iteration in iterations]


def test_checkpoints_by_samples(tmp_path):
    keeper = make_keeper(tmp_path, save_every=2500, max_kept=9)  # blocks end at 1280, 2560, 3840, 5120, 6400 and 7680
    found = []
    for block in range(1, 7):
        train(keeper, [block])
        path = newest(tmp_path, keeper.plan)
        found.append(path and path.rsplit("/", 1)[1])
    assert found == [None, "iteration_40.pt", "epoch_1.pt", "iteration_80.pt", "iteration_80.pt", "epoch_2.pt"]
    assert list_names(tmp_path) == ["epoch_1.pt", "epoch_2.pt"]  # the step is done


def test_checkpoints_by_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    keeper = make_keeper(tmp_path, save_minutes=10, max_kept=9)
    for block, seconds in ((1, 599), (2, 600), (3, 700), (4, 1200), (5, 1300)):
        now[0] = seconds
        train(keeper, [block])
    assert list_names(tmp_path) == ["epoch_1.pt", "iteration_100.pt", "iteration_40.pt"]  # 1300: ten minutes after 700


def test_the_checkpoint_before_a_cool_down_is_kept_beside_the_others(tmp_path):
    keeper = make_keeper(tmp_path, max_kept=1)
    keeper.plan |= {"schedule": "wsd", "cooldown": 40}  # the last two blocks of six
    train(keeper, range(1, 7))
    assert list_names(tmp_path) == ["before_cooldown.pt", "epoch_2.pt"]
    assert weights.record(str(tmp_path / "checkpoints/before_cooldown.pt"))["iteration"] == 80


@pytest.mark.parametrize(
    ("written", "max_kept", "kept"),
    [
        ((20, 40, 60, 80, 100), 9, (60, 80, 100)),  # of those in between two
        ((20, 40, 60, 80, 100), 2, (60, 100)),
        ((20, 40, 60, 80, 100), 1, (100,)),
        ((20, 40), 9, (20, 40)),
        ((60, 80, 100, 120), 9, (60, 120)),  # the step is done
        ((60, 120), 1, (120,)),
        ((60, 80, 100), 2, (60, 100)),
    ],
)
def test_the_newest_and_the_ends_of_intervals_are_kept(written, max_kept, kept):
    other = ["plan.json", "checkpoints/patched.pt", "checkpoints/epoch_x.pt", "checkpoints/.epoch_1.pt.1-1.tmp"]
    deleted = surplus([*names(*written), *other], make_plan(max_kept=max_kept))
    assert set(names(*written)) - set(deleted) == set(names(*kept))
    assert not set(deleted) & set(other)


def test_a_checkpoint_records_where_it_comes_from_and_what_was_read(tmp_path):
    loader = SimpleNamespace(counts={"2014": {"read": 10}, "2015": {"read": 5, "undecodable": 1}})
    train(make_keeper(tmp_path, loader), [3])
    record = weights.record(str(tmp_path / "checkpoints/epoch_1.pt"))
    place = {"benchmark": "emoji", "step": "2015", "cutoff": 201512, "iteration": 60, "samples_seen": 7680 + 60 * 64}
    assert record == place | {"read": loader.counts}
    train(make_keeper(tmp_path, loader, resumed=record), [6])  # a process that resumed there read as much again
    read = weights.record(str(tmp_path / "checkpoints/epoch_2.pt"))["read"]
    assert read == {"2014": {"read": 20}, "2015": {"read": 10, "undecodable": 2}}


def test_damage_is_found_wherever_a_bit_is_flipped(tmp_path, caplog):
    """From the data to the end, where the zip says what is in it: the file is called damaged, or loads as it was."""
    keeper = make_keeper(tmp_path)
    train(keeper, range(1, 7))
    before, last = (tmp_path / name for name in names(60, 120))
    assert newest(tmp_path, keeper.plan) == str(last)
    data, faults = last.read_bytes(), 0
    for place in range(600, len(data), 5):  # the weights are at about 700
        last.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        if damage(last):
            faults += 1
        else:
            assert weights.load(str(last))["w"] == 6
    assert faults > 50
    last.write_bytes(data[:300])
    assert newest(tmp_path, keeper.plan) == str(before)
    assert f"{last} is damaged" in caplog.text
    before.write_bytes(b"")
    assert newest(tmp_path, keeper.plan) is None


@pytest.fixture(params=["folder", "s3"])
def remote(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return "./remote//" if request.param == "folder" else request.getfixturevalue("s3") + "/runs/x"


def list_copy(remote):
    return [path.partition("/2015/")[2] for path, _ in storage.list_files(remote, "**/*")]


def test_the_copy_is_bounded_alike_and_a_lost_disk_resumes_from_it(tmp_path, remote):
    run, other = tmp_path / "run", tmp_path / "other"
    keeper = make_keeper(run, save_every=1280, remote=remote)
    plan = keeper.plan
    checkpoints.fetch(run, plan)
    assert not run.exists()
    for block in range(1, 6):
        train(keeper, [block])
        assert [name.removeprefix("checkpoints/") for name in list_copy(remote)] == list_names(run)
    (run / "plan.json").write_text("{}")
    checkpoints.push(run, plan, ["plan.json"])
    checkpoints.fetch(other, plan)
    assert list_names(other) == ["iteration_100.pt"]
    newest_name = "checkpoints/iteration_100.pt"
    assert (other / newest_name).read_bytes() == (run / newest_name).read_bytes()
    (other / newest_name).unlink()
    checkpoints.fetch(other, plan)  # what is on this disk is not replaced
    assert list_names(other) == []
    train(keeper, [6])
    for name in ("train.log.jsonl", "done.json", "checkpoints/patched.pt"):
        (run / name).write_text("{}")
    for _ in range(2):  # the second time nothing is left to do
        checkpoints.push_done(run, plan)
    ends = ["checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt"]
    made = "checkpoints/patched.pt"
    assert list_copy(remote) == [*ends, made, "done.json", "plan.json", "train.log.jsonl"]
    checkpoints.fetch(tmp_path / "third", plan)
    assert list_names(tmp_path / "third") == ["epoch_2.pt", "patched.pt"]
    assert (tmp_path / "third/done.json").exists()


def test_a_store_that_is_away_does_not_end_the_training_and_is_completed_later(tmp_path, remote, caplog):
    """What the copy has too much goes."""
    train(make_keeper(tmp_path, save_every=1280, remote=remote), range(1, 6))
    (tmp_path / "file").touch()
    train(make_keeper(tmp_path, remote=str(tmp_path / "file")), [6])
    assert list_names(tmp_path) == ["epoch_1.pt", "epoch_2.pt"]
    assert f"the copy in {tmp_path}/file is behind: " in caplog.text
    for name in ("plan.json", "done.json"):
        (tmp_path / name).write_text("{}")
    checkpoints.push_done(tmp_path, make_plan(remote=remote))
    assert list_copy(remote) == ["checkpoints/epoch_1.pt", "checkpoints/epoch_2.pt", "done.json", "plan.json"]


def test_of_a_damaged_copy_the_checkpoint_before_is_fetched(tmp_path, remote, caplog):
    keeper = make_keeper(tmp_path / "run", remote=remote)
    train(keeper, range(1, 7))
    (tmp_path / "half.pt").write_bytes((tmp_path / "run/checkpoints/epoch_2.pt").read_bytes()[:400])
    storage.upload(tmp_path / "half.pt", f"{remote}/2015/checkpoints/epoch_2.pt")
    checkpoints.fetch(tmp_path / "other", keeper.plan)
    assert list_names(tmp_path / "other") == ["epoch_1.pt"]
    assert "epoch_2.pt is damaged" in caplog.text


def test_a_step_is_trained_by_one_process(tmp_path):
    half = tmp_path / "2014/checkpoints/.epoch_1.pt.1-1.tmp"
    with checkpoints.alone(tmp_path / "2014"):
        half.parent.mkdir()
        half.touch()
        second = checkpoints.alone(tmp_path / "2014")
        with pytest.raises(TicError, match=r"another process is writing .*/2014; "), second:
            raise AssertionError
    assert half.exists()
    with checkpoints.alone(tmp_path / "2014"):
        assert not half.exists()  # what a killed process left


FIGURES = {"train/loss": 3.5, "train/lr": 0.001, "train/samples_per_second": 300.0, "train/data_time": 0.02}


def read_log(folder):
    return [json.loads(line) for line in (folder / "train.log.jsonl").read_text().splitlines()]


def test_the_log_and_the_progress_bar_of_a_step(tmp_path, capsys):
    args = SimpleNamespace(tic=make_keeper(tmp_path))
    args.tic.cut_log(20)  # there is none yet
    hooks.log(args, 0, {**FIGURES, "train/scale": 14.3})
    hooks.log(args, 119, {**FIGURES, "train/contrastive_loss": 2.0})
    rest = {"lr": 0.001, "samples_per_second": 300.0, "data_wait": 0.02}
    assert read_log(tmp_path) == [
        {"step": 1, "samples_seen": 7744, "loss": 3.5, **rest},
        {"step": 120, "samples_seen": 15360, "loss": 3.5, "contrastive_loss": 2.0, **rest},
    ]
    assert "train 2015: 100%" in capsys.readouterr().err
    hooks.log(SimpleNamespace(), 0, FIGURES)  # stock OpenCLIP
    with open(tmp_path / "train.log.jsonl", "a") as file:
        file.write('{"step": 1')  # what kill -9 leaves
    args.tic.cut_log(20)  # of a step that resumes there
    assert [line["step"] for line in read_log(tmp_path)] == [1]


def test_what_is_not_a_number_ends_the_step(tmp_path):
    args = SimpleNamespace(tic=make_keeper(tmp_path))
    for loss in (float("nan"), float("inf")):
        with pytest.raises(TicError, match=rf"the loss after 5 iterations of step 2015 is {loss}"):
            hooks.log(args, 4, {**FIGURES, "train/loss": loss})
    state = {"epoch": 3, "state_dict": {"w": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(TicError, match=r"the weights b are NaN or infinite after 60 iterations of step 2015"):
        hooks.save(state, "unused", args)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_in_wandb_has_the_name_of_what_it_is_and_resumes(tmp_path):
    def options(seed, logs):
        keeper = make_keeper(tmp_path)
        keeper.plan = {**keeper.plan, "seed": seed}
        return hooks.wandb_options(SimpleNamespace(tic=keeper, name="2015", logs=logs, resume="latest"))

    found = options(0, "a")
    assert (found["name"], found["resume"]) == ("emoji-tic_tiny-all-cumulative-2015", "allow")
    assert options(0, "a") == found
    assert len({options(seed, logs)["id"] for seed in (0, 1) for logs in ("a", "b")}) == 4
    stock = hooks.wandb_options(SimpleNamespace(name="mine", resume="latest"))
    assert stock == {"name": "mine", "id": "mine", "resume": "auto"}
