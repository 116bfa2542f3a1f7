import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tic_clip import TicError, weights
from tic_clip.training import hooks


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))


def test_a_checkpoint_comes_back(tmp_path, model):
    path = str(tmp_path / "epoch_1.pt")
    weights.write({"epoch": 1, "state_dict": model.state_dict(), "optimizer": {"lr": 0.5}}, path)
    assert torch.equal(weights.load(path)["0.weight"], model[0].weight)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pt"]


def test_a_bare_state_dict_and_ddps_prefix_are_read(tmp_path, model):
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "bare.pt")
    assert weights.load(str(tmp_path / "bare.pt")).keys() == model.state_dict().keys()


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, model, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    weights.write({"state_dict": model.state_dict()}, str(path))
    before = path.read_bytes()

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        weights.write({"state_dict": {}}, str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("raised", "shown"),
    [(OSError("not a picture"), "not a picture"), (OSError(28, "No space left"), r"No space left: '.*epoch_1.pt'")],
)
def test_an_error_of_the_disk_names_the_file_and_others_keep_their_message(tmp_path, raised, shown, monkeypatch):
    def fail(*_):
        raise raised

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=shown):
        weights.write({"state_dict": {}}, str(tmp_path / "epoch_1.pt"))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_never_runs_code(tmp_path):
    torch.save({"state_dict": {}, "bomb": Bomb(str(tmp_path / "exploded"))}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(TicError, match="no checkpoint that can be loaded safely"):
            weights.load(str(tmp_path / name))
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "empty.pt").touch()
    for name, message in (
        ("empty.pt", "safely: EOFError"),
        ("missing.pt", "is missing"),
        ("list.pt", "no state dict"),
        ("damaged.pt", "loaded safely"),
    ):
        with pytest.raises(TicError, match=rf"{name}.* {message}"):
            weights.load(str(tmp_path / name))


def test_mismatch_names_the_first_difference(model):
    own = model.state_dict()
    assert weights.mismatch(own, own) is None
    assert weights.mismatch({**own, "extra": own["0.bias"]}, own) == "extra is only in the checkpoint"
    assert weights.mismatch({k: v for k, v in own.items() if k != "1.bias"}, own) == "1.bias is only in the model"
    other = {**own, "0.weight": torch.zeros(2, 4)}
    assert weights.mismatch(other, own) == "0.weight is (2, 4), the model's is (2, 3)"


@pytest.mark.parametrize(
    ("new_run", "resume", "own", "start", "still_new"),
    [
        (True, "last.pt", None, "last.pt", True),  # a step begins from the last one's model
        (True, "last.pt", "epoch_1.pt", "epoch_1.pt", False),  # cut off, it goes on from its own
        (True, None, None, None, True),
        (True, None, "epoch_1.pt", "epoch_1.pt", False),
        (True, "latest", None, None, True),
        (False, "latest", "epoch_1.pt", "epoch_1.pt", False),  # as in stock OpenCLIP
        (False, "latest", None, None, False),
    ],
)
def test_start_from(new_run, resume, own, start, still_new):
    args = SimpleNamespace(new_run=new_run, resume=resume)
    assert hooks.start_from(args, own) == start
    assert args.new_run == still_new


def arguments(path, new_run=False, keep_optimizer=False):
    return SimpleNamespace(new_run=new_run, resume=str(path), model="M", keep_optimizer=keep_optimizer)


def resume(checkpoint, model, path, **flags):
    torch.save(checkpoint, path)
    return hooks.checkpoint_for(model, arguments(path, **flags))


def test_a_new_run_gets_the_weights_only_and_a_resumed_one_everything(model, tmp_path):
    checkpoint = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": {"state": {}}}
    assert resume(checkpoint, model, tmp_path / "x.pt", new_run=True).keys() == model.state_dict().keys()
    assert resume(checkpoint, model, tmp_path / "x.pt")["epoch"] == 3


def test_a_new_run_that_keeps_the_optimizer_begins_at_epoch_0(model, tmp_path):
    checkpoint = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": {"state": {0: 1}}}
    kept = resume(checkpoint, model, tmp_path / "x.pt", new_run=True, keep_optimizer=True)
    assert (kept["epoch"], kept["optimizer"]) == (0, {"state": {0: 1}})
    del checkpoint["optimizer"]
    with pytest.raises(TicError, match=r"x.pt holds no optimizer to go on with"):
        resume(checkpoint, model, tmp_path / "x.pt", new_run=True, keep_optimizer=True)


def test_what_a_checkpoint_records_of_its_making_is_handed_on(model, tmp_path):
    torch.save(
        {"epoch": 1, "state_dict": model.state_dict(), "optimizer": {}, "tic": {"step": "2014"}}, tmp_path / "x.pt"
    )
    args = arguments(tmp_path / "x.pt")
    hooks.checkpoint_for(model, args)
    assert args.tic_record == weights.record(str(tmp_path / "x.pt")) == {"step": "2014"}
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    assert weights.record(str(tmp_path / "bare.pt")) is None


def test_checkpoints_of_any_number_of_ranks_fit(model, tmp_path):
    wrapped = torch.nn.ModuleDict({"module": model})
    for saved in (model, wrapped):
        for wanted in (model, wrapped):
            checkpoint = {"epoch": 1, "state_dict": saved.state_dict(), "optimizer": {}}
            fitted = resume(checkpoint, wanted, tmp_path / "x.pt")
            assert str(wanted.load_state_dict(fitted["state_dict"])) == "<All keys matched successfully>"


def test_a_checkpoint_of_another_architecture_does_not_fit(model, tmp_path):
    other = {"state_dict": torch.nn.Sequential(torch.nn.Linear(4, 2)).state_dict()}
    with pytest.raises(TicError, match=r"x.pt is not of M: 0.weight is \(2, 4\), the model's is \(2, 3\)"):
        resume(other, model[:1], tmp_path / "x.pt")


def test_a_full_disk_is_one_line_that_names_the_checkpoint(tmp_path):
    """torch turns the disk's OSError into a RuntimeError about its zip writer; here the process may write 8 KiB."""
    code = f"""
import resource, signal, torch
from tic_clip import TicError, weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    weights.write({{"state_dict": {{"w": torch.zeros(100_000)}}}}, {str(tmp_path / "epoch_1.pt")!r})
except (TicError, OSError) as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1, done.stderr
    assert "epoch_1.pt" in done.stdout
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_device_ids():
    assert hooks.device_ids(torch.device("cpu")) is None
    assert hooks.device_ids(torch.device("cuda:1")) == [torch.device("cuda:1")]
