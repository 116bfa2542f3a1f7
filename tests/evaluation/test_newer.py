"""The later OpenCLIP of setup.sh --models, in a process of its own: our checkpoints and its architectures."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_png
from PIL import Image

from tic_clip import models
from tic_clip.data.tar import write_shard
from tic_clip.evaluation.evaluate import evaluate
from tic_clip.evaluation.tasks import task_of
from tic_clip.models import NEWER, Model

ARCH, LATER = "ViT-Tiny-8-48", "MobileCLIP2-S0"
CAPTIONS = ["a red cat", "two dogs on a street"]
MAIN = f"""
import runpy, sys, torch
from tic_clip import models
models.prefer_newer()
folder, script, *flags = sys.argv[1:]
net, _, tokenizer = models.load_model("{ARCH}", folder + "/ours.pt", "cpu")
torch.save(net.encode_text(tokenizer({CAPTIONS}), normalize=True), folder + "/text.pt")
torch.save(net.encode_image(torch.load(folder + "/images.pt"), normalize=True), folder + "/image.pt")
torch.save(models.make_model("{LATER}", "cpu")[0].state_dict(), folder + "/later.pt")
sys.argv = [script, *flags]
sys.path.insert(0, script.rpartition("/")[0])
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.skipif(not NEWER.exists(), reason="needs open_clip_models/: bash setup.sh --models")
def test_our_checkpoints_have_the_same_features_and_later_models_their_own(tmp_path):
    torch.manual_seed(0)
    net, preprocess, tokenizer = models.make_model(ARCH, "cpu")
    torch.save(net.state_dict(), tmp_path / "ours.pt")
    images = torch.stack([preprocess(Image.effect_noise((60, 50), i).convert("RGB")) for i in (30, 90)])
    torch.save(images, tmp_path / "images.pt")
    content = [(str(i), {"png": make_png(80 * i), "txt": f"image {i}".encode()}) for i in range(4)]
    key = "tic/emoji/retrieval/yearly/2014"
    write_shard(tmp_path / "tic/emoji/yearly/eval/retrieval/2014/0.tar", content)
    (tmp_path / "list.yml").write_text(f"{key}:")
    flags = ["--data_dir", tmp_path, "--output_dir", tmp_path, "--tasklist", tmp_path / "list.yml", "--workers", "0"]
    flags += ["--use_model", f"{ARCH} {tmp_path}/ours.pt", f"{LATER} {tmp_path}/later.pt"]
    (tmp_path / "main.py").write_text(MAIN)
    command = [sys.executable, tmp_path / "main.py", tmp_path, ROOT / "scripts/evaluate.py", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.stdout == f"2 new results in {tmp_path}\n", done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("evaluate: ")] == []
    with torch.inference_mode():
        parts = {"text": net.encode_text(tokenizer(CAPTIONS), normalize=True)}
        parts["image"] = net.encode_image(images, normalize=True)
    for name, expected in parts.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, rtol=0, atol=1e-5)
    ours, later = map(json.loads, (tmp_path / "eval_results.jsonl").read_text().splitlines())
    assert (ours["model"]["arch"], later["model"]["arch"]) == (ARCH, LATER)
    assert ours["pins"]["open_clip"] == later["pins"]["open_clip"] == "3.3.0"
    model = Model(name="x", arch=ARCH, weights=str(tmp_path / "ours.pt"))
    (pinned,) = evaluate([model], [task_of(key, str(tmp_path))], str(tmp_path / "pinned"))
    assert ours["metrics"] == pytest.approx(pinned["metrics"], abs=1e-6)
    assert (later["num_samples"], later["nonfinite"]) == (4, 0)
