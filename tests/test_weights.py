"""Checkpoint files: written atomically, read without running their code, and what OpenCLIP resumes from."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Bomb, file_limit
from safetensors.torch import save_file

from tic_clip import TicError, weights
from tic_clip.training import hooks


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))


def test_a_checkpoint_comes_back_without_ddps_prefix(tmp_path, model):
    path = str(tmp_path / "epoch_1.pt")
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    weights.write({"epoch": 1, "state_dict": state, "optimizer": {"lr": 0.5}}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pt"]
    assert weights.load(path).keys() == model.state_dict().keys()
    assert torch.equal(weights.load(path)["0.weight"], model[0].weight)
    assert weights.record(path) is None


def test_training_starts_from_what_evaluation_reads(tmp_path, model):
    """Bare, in half precision, in torch's old format and as safetensors; a file that is none is one line."""
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "bare.bin")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "model.safetensors")
    for name in ("bare.bin", "old.pt", "model.safetensors"):
        path = str(tmp_path / name)
        assert all(torch.equal(value, state[key]) for key, value in weights.load(path).items())
        args = SimpleNamespace(resume=path, new_run=True, keep_optimizer=False, model="ViT")
        assert hooks.checkpoint_for(model, args).keys() == state.keys()
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with pytest.raises(TicError, match=r"model.safetensors is not a checkpoint that can be loaded safely"):
        weights.load(path)


@pytest.mark.parametrize(
    ("raised", "shown"),
    [(OSError("not a tensor"), "not a tensor"), (OSError(28, "No space left"), r"No space left: '.*epoch_1.pt'")],
)
def test_a_save_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, raised, shown, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    path.write_bytes(b"before")

    def fail(_, file):
        file.write(b"half")
        raise raised

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=shown):
        weights.write({"state_dict": {}}, str(path))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_that_names_the_checkpoint(tmp_path):
    """torch turns the disk's OSError into a RuntimeError about its zip writer."""
    message = r"epoch_1.pt.*File too large"
    with file_limit(8192), pytest.raises((TicError, OSError), match=message) as caught:
        weights.write({"state_dict": {"w": torch.zeros(100_000)}}, str(tmp_path / "epoch_1.pt"))
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


class Scalar(Bomb):
    """A NumPy scalar of any object, where those of numbers are read."""

    def __reduce__(self):
        return np._core.multiarray.scalar, (np.dtype("O"), pickle.dumps(Bomb(self.path)))


def test_a_checkpoint_never_runs_code(tmp_path):
    exploded = tmp_path / "exploded"
    torch.save({"state_dict": {}, "bomb": Bomb(exploded)}, tmp_path / "bomb.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb(exploded)))
    torch.save({"state_dict": {}, "lr": Scalar(exploded)}, tmp_path / "scalar.pt")
    for name in ("bomb.pt", "plain.pt", "scalar.pt"):
        for read in (weights.load, weights.record):
            with pytest.raises(TicError, match="not a checkpoint that can be loaded safely"):
                read(str(tmp_path / name))
    assert not exploded.exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "empty.pt").touch()
    messages = {"empty": "safely: EOFError", "missing": "is missing", "list": "no state dict", "damaged": "safely"}
    for name, message in messages.items():
        with pytest.raises(TicError, match=rf"{name}.pt.* {message}"):
            weights.load(str(tmp_path / f"{name}.pt"))


@pytest.mark.parametrize(
    ("new_run", "resume", "own", "start", "still_new"),
    [
        (True, "last.pt", None, "last.pt", True),  # a step begins from the last one's model
        (True, "last.pt", "epoch_1.pt", "epoch_1.pt", False),  # interrupted, it resumes from its own
        (True, None, None, None, True),
        (True, "latest", None, None, True),
        (False, "latest", "epoch_1.pt", "epoch_1.pt", False),  # as in stock OpenCLIP
        (False, "latest", None, None, False),
    ],
)
def test_what_a_run_starts_from(new_run, resume, own, start, still_new):
    args = SimpleNamespace(new_run=new_run, resume=resume)
    assert hooks.start_from(args, own) == start
    assert args.new_run == still_new


def resume(checkpoint, model, tmp_path, new_run=False, keep_optimizer=False):
    """What OpenCLIP gets of a checkpoint file, and its arguments."""
    torch.save(checkpoint, tmp_path / "x.pt")
    args = SimpleNamespace(new_run=new_run, keep_optimizer=keep_optimizer, resume=str(tmp_path / "x.pt"), model="M")
    return hooks.checkpoint_for(model, args), args


def test_a_new_run_gets_the_weights_and_on_demand_the_optimizer_a_resumed_one_everything(model, tmp_path):
    own, record = model.state_dict(), {"step": "2014"}
    checkpoint = {"epoch": 3, "state_dict": own, "optimizer": {"state": {0: 1}}, "tic": record}
    found, args = resume(checkpoint, model, tmp_path)
    assert (found["epoch"], args.tic_record, weights.record(args.resume)) == (3, record, record)
    assert resume(checkpoint, model, tmp_path, new_run=True)[0].keys() == own.keys()
    found, _ = resume(checkpoint, model, tmp_path, new_run=True, keep_optimizer=True)
    assert (found["epoch"], found["optimizer"]) == (0, {"state": {0: 1}})
    del checkpoint["optimizer"]
    with pytest.raises(TicError, match=r"x.pt has no optimizer to resume with"):
        resume(checkpoint, model, tmp_path, new_run=True, keep_optimizer=True)


def test_checkpoints_of_any_number_of_ranks_fit(model, tmp_path):
    wrapped = torch.nn.ModuleDict({"module": model})
    for saved in (model, wrapped):
        for wanted in (model, wrapped):
            found, _ = resume({"epoch": 1, "state_dict": saved.state_dict(), "optimizer": {}}, wanted, tmp_path)
            assert str(wanted.load_state_dict(found["state_dict"])) == "<All keys matched successfully>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.zeros(1)}, "extra is only in the checkpoint"),
        ({"1.bias": None}, "1.bias is only in the model"),
        ({"0.weight": torch.zeros(2, 4)}, r"0.weight is \(2, 4\), the model's is \(2, 3\)"),
    ],
)
def test_the_first_difference_from_another_architecture_is_named(model, tmp_path, change, message):
    state = {name: value for name, value in (model.state_dict() | change).items() if value is not None}
    with pytest.raises(TicError, match=f"x.pt is not of M: {message}"):
        resume({"state_dict": state}, model, tmp_path)
