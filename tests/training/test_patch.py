"""Each hunk of open_clip.patch, and that without a flag of ours OpenCLIP trains as the wheel does."""

import csv
import pickle
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import ROOT
from forked import Script
from miniature import make_image, write_split

from tic_clip import TicError
from tic_clip.data.split import read_sizes
from tic_clip.models import MODEL_CONFIGS, load_model
from tic_clip.training import hooks
from tic_clip.training.step import join_ranks, read_ranks

ARGUMENTS = ["--model", "ViT-Tiny-8-48", "--batch-size", "8", "--epochs", "2", "--precision", "fp32", "--workers", "0"]
ARGUMENTS += ["--warmup", "0"]


def openclip(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return __import__(f"training.{module}", fromlist=[""])


STOCK = """import sys
sys.path.insert(0, "{folder}/wheel/src")
for name in [name for name in sys.modules if name.split(".")[0] in ("open_clip", "training")]:
    del sys.modules[name]
import open_clip
from tic_clip.models import MODEL_CONFIGS
from training import train
def backward(loss, _):
    print(loss.item(), file=losses, flush=True)
    loss.backward()
losses, train.backward = open("{folder}/losses", "w"), backward
open_clip.add_model_config(MODEL_CONFIGS)
"""


def stock_run(folder, *arguments):
    """The losses of a run of OpenCLIP as it was before the patch, in a process of its own."""
    files = ["git", "-C", ROOT / "open_clip", "checkout-index", "--all", f"--prefix={folder}/wheel/"]
    subprocess.run(files, check=True)
    words = [*ARGUMENTS, "--logs", folder / "stock", *arguments]
    main = folder / "wheel/src/training/main.py"
    done = Script(main, *words, folder=folder, before=STOCK.format(folder=folder)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(line) for line in (folder / "losses").read_text().splitlines()]


def patched_run(folder, *arguments):
    """The losses of a run of the patched OpenCLIP in this process."""
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openclip("main"), "setup_logging", lambda *_: None)
        patch.setattr(openclip("train"), "backward", lambda loss, _: losses.append(loss.item()) or loss.backward())
        open_clip.add_model_config(MODEL_CONFIGS)
        openclip("main").main([*ARGUMENTS, "--logs", str(folder / "patched"), *map(str, arguments)])
    return losses


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A CSV of 24 noise images with captions, OpenCLIP's simplest dataset."""
    folder = tmp_path_factory.mktemp("images")
    with open(folder / "images.csv", "w") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["filepath", "title"])
        for i in range(24):
            (folder / f"{i}.png").write_bytes(make_image(f"{i}", "PNG"))
            table.writerow([folder / f"{i}.png", f"image number {i}"])
    return ["--train-data", str(folder / "images.csv")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """A run of two epochs in ``first/``, stock and patched, with no flag of ours: their folder and their losses."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = (*images, "--name", "first")
    return folder, stock_run(folder, *arguments), patched_run(folder, *arguments)


def test_without_a_flag_of_ours_training_is_stock(runs):
    _, stock, patched = runs
    assert Path(openclip("main").__file__) == ROOT / "open_clip/src/training/main.py"
    assert len(patched) == 6
    assert patched == stock


def test_our_checkpoints_load_safely_with_torch_alone_and_stocks_with_ours(runs):
    """Once torch alone loads stock's, the learning-rate hunk can go."""
    folder, *_ = runs
    checkpoint = "first/checkpoints/epoch_1.pt"
    assert torch.load(folder / "patched" / checkpoint, weights_only=True)["epoch"] == 1
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        torch.load(folder / "stock" / checkpoint, weights_only=True)
    assert load_model("ViT-Tiny-8-48", str(folder / "stock" / checkpoint), "cpu")


def test_new_run_takes_the_weights_only_and_resumes_its_own(runs, images):
    folder, *_ = runs
    last = folder / "patched/first/checkpoints/epoch_2.pt"
    new = [*images, "--name", "second", "--resume", last, "--new-run"]
    assert len(patched_run(folder, *new)) == 6  # from epoch 0, although the checkpoint says 2
    (folder / "patched/second/checkpoints/epoch_2.pt").unlink()
    assert len(patched_run(folder, *new)) == 3  # from its own epoch 1


def test_each_checkpoint_is_written_by_the_hook(tmp_path, monkeypatch):
    saved = []

    def save(checkpoint, path, *args):
        saved.append((Path(path).name, len(args)))
        Path(path).touch()

    monkeypatch.setattr(hooks, "save", save)
    arguments = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--epochs", "1", "--save-most-recent"]
    patched_run(tmp_path, *arguments, "--name", "run")
    assert saved == [("epoch_1.pt", 1), ("tmp.pt", 0)]  # a step of ours decides from OpenCLIP's args


def test_the_end_of_a_shard_is_not_a_sample():
    files = [{"fname": "a.txt", "data": b"x", "__url__": "u"}, {}, {"fname": "b.txt", "data": b"y", "__url__": "u"}]
    assert [s["__key__"] for s in openclip("data").group_by_keys_nothrow(files)] == ["a", "b"]


def test_the_dataset_size_is_that_of_all_its_folders(tmp_path):
    data = openclip("data")
    for name, sizes in (("a", (3, 4)), ("b", (5, 6))):
        write_split(
            tmp_path / name, *([(f"{i} {j}", {"png": b"", "txt": b""}) for j in range(n)] for i, n in enumerate(sizes))
        )
    urls = f"{tmp_path}/a/{{00000000..00000001}}.tar::{tmp_path}/b/{{00000000..00000001}}.tar"
    args = SimpleNamespace(train_data=urls, train_num_samples=None, dataset_resampled=True, seed=0, batch_size=1)
    args.train_data_upsampling_factors, args.world_size, args.workers = None, 1, 0
    assert data.get_wds_dataset(args, None, True).dataloader.num_samples == 18
    (tmp_path / "b" / "sizes.json").unlink()
    read_sizes.cache_clear()
    with pytest.raises(TicError, match=rf"{tmp_path}/b has no sizes.json"):
        data.get_wds_dataset(args, None, True)


def test_a_run_with_a_teacher_joins_the_process_group_that_is_there(runs, images, monkeypatch):
    """A second group in one process fails with gloo; and on a CPU neither model has device_ids. The group is of one."""
    folder, *_ = runs
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    last = folder / "patched/first/checkpoints/epoch_2.pt"
    teacher = ["--distill-model", "ViT-Tiny-8-48", "--distill-pretrained", last]
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        assert len(patched_run(folder, *images, *teacher, "--dist-backend", "gloo", "--name", "joined")) == 6
    finally:
        torch.distributed.destroy_process_group()
    state = torch.load(folder / "patched/joined/checkpoints/epoch_2.pt", weights_only=True)["state_dict"]
    assert all(name.startswith("module.") for name in state)
    assert hooks.device_ids(torch.device("cuda:1")) == [torch.device("cuda:1")]


def test_openclip_gives_no_future_warning_and_imports_timm_and_transformers_only_for_their_models(tmp_path):
    """It takes seconds; test_model_kinds.py has such models."""
    calls = "get_autocast('amp')(); get_autocast('amp_bf16')()"
    code = f"from training import main, train\nexec({calls!r}, vars(train))\nexec('GradScaler()', vars(main))\n"
    code += "import sys\nassert not {'timm', 'transformers'} & sys.modules.keys()"
    (tmp_path / "script.py").write_text(code)
    done = Script(tmp_path / "script.py").wait()
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr


def test_one_process_in_an_interactive_slurm_allocation_is_one_rank(monkeypatch):
    from training.distributed import is_using_distributed

    monkeypatch.setenv("WORLD_SIZE", "1")  # put back after the test
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert is_using_distributed()
    with join_ranks(1):
        assert not is_using_distributed()


SLURM = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456"}
STEP = {**SLURM, "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}


@pytest.mark.parametrize(
    ("environ", "expected", "address"),
    [
        ({}, (0, 1), None),
        ({"WORLD_SIZE": "4"}, (0, 1), None),  # left over
        (SLURM, (0, 1), None),  # in the shell of sbatch or salloc
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, (0, 1), None),
        ({**STEP, "RANK": "3", "WORLD_SIZE": "8"}, (3, 8), None),  # torchrun in a task
        ({**STEP, "SLURM_STEP_NODELIST": "gpu[007-010,12]"}, (9, 16), "gpu007:23456"),
        ({**STEP, "SLURM_STEP_NODELIST": "a-1,b[2-3]"}, (9, 16), "a-1:23456"),
        ({**STEP, "SLURM_STEP_NODELIST": "a[5]-x", "MASTER_ADDR": "m", "MASTER_PORT": "1"}, (9, 16), "m:1"),
    ],
)
def test_who_launches_says_how_many_ranks_there_are(environ, expected, address):
    environ = dict(environ)
    assert read_ranks(environ) == expected
    if address:
        assert f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}" == address
        assert [environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["9", "1", "16"]
