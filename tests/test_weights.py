import pickle
from types import SimpleNamespace

import pytest
import torch

from tic_clip import TicError, weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))


def test_a_checkpoint_comes_back(tmp_path, model):
    path = str(tmp_path / "epoch_1.pt")
    weights.save({"epoch": 1, "state_dict": model.state_dict(), "optimizer": {"lr": 0.5}}, path)
    assert torch.equal(weights.load(path)["0.weight"], model[0].weight)
    assert [file.name for file in tmp_path.iterdir()] == ["epoch_1.pt"]


def test_a_bare_state_dict_and_ddps_prefix_are_read(tmp_path, model):
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "bare.pt")
    assert weights.load(str(tmp_path / "bare.pt")).keys() == model.state_dict().keys()


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path, model, monkeypatch):
    path = tmp_path / "epoch_1.pt"
    weights.save({"state_dict": model.state_dict()}, str(path))
    before = path.read_bytes()

    def full(_, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save({"state_dict": {}}, str(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


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
    assert weights.start_from(args, own) == start
    assert args.new_run == still_new


def test_a_new_run_gets_the_weights_only_and_a_resumed_one_everything(model):
    checkpoint = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": {"state": {}}}
    args = SimpleNamespace(new_run=True, resume="x.pt", model="M")
    assert weights.fit(checkpoint, model, args).keys() == model.state_dict().keys()
    args.new_run = False
    assert weights.fit(checkpoint, model, args)["epoch"] == 3


def test_fit_takes_checkpoints_of_any_number_of_ranks(model):
    wrapped = torch.nn.ModuleDict({"module": model})
    args = SimpleNamespace(new_run=False, resume="x.pt", model="M")
    for saved in (model, wrapped):
        for wanted in (model, wrapped):
            fitted = weights.fit({"epoch": 1, "state_dict": saved.state_dict()}, wanted, args)
            assert str(wanted.load_state_dict(fitted["state_dict"])) == "<All keys matched successfully>"


def test_fit_refuses_another_architecture(model):
    args = SimpleNamespace(new_run=True, resume="x.pt", model="ViT-B-32")
    with pytest.raises(TicError, match=r"checkpoint x.pt is not of ViT-B-32: 0.weight is \(2, 4\)"):
        weights.fit({"state_dict": torch.nn.Sequential(torch.nn.Linear(4, 2)).state_dict()}, model[:1], args)


def test_device_ids():
    assert weights.device_ids(torch.device("cpu")) is None
    assert weights.device_ids(torch.device("cuda:1")) == [torch.device("cuda:1")]
