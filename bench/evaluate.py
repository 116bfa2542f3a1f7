"""A run's 7 × 14 tasks by one and two of our processes and by clip_benchmark's CLI; images a second beside decoding.

    .venv/bin/python bench/evaluate.py
    .venv/bin/python bench/evaluate.py --model ViT-B-16 --images 20000 --image 256 --workers 12    # on a GPU

Seven checkpoints with random weights, seven years of TiC-Emoji's two tasks, of noise (JPEGs, a caption and a class
each). A row is a command with its start, a thread a process; CPU is that of the process that needs most. The metrics of
all contenders must be the same to 1e-6. Then a folder is evaluated by the library in each precision: "seconds" holds
reading, decoding, encoding and recall, not the imports.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser
from tic_clip.evaluation.results import RESULTS, read_results
from tic_clip.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
EVAL, CLASSES = "tic/emoji/yearly/eval", 10
PEER = """
import sys, numpy, open_clip
from clip_benchmark import cli
from clip_benchmark.metrics import zeroshot_classification
from tic_clip.models import MODEL_CONFIGS
open_clip.add_model_config(MODEL_CONFIGS)
zeroshot_classification.float = lambda value: numpy.asarray(value).item()  # NumPy 2.4 makes no float of an array
sys.exit(cli.main())
"""
STEPS = [step.name for step in get_benchmark("emoji").steps]


def main() -> None:
    """Write the sets and the checkpoints, evaluate, and print two tables."""
    parser = Parser(__doc__)
    parser.add_argument("--model", default="ViT-Tiny-8-48", help="OpenCLIP's name of it (default: ViT-Tiny-8-48)")
    parser.add_argument("--images", type=int, default=1000, help="images of a set (default: 1000)")
    parser.add_argument("--image", type=int, default=64, help="width of the JPEGs in pixels (default: 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data (default: 0)")
    parser.add_argument("--rounds", type=int, default=1, help="how often each command is timed (default: 1)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_run(Path(folder), args)
        compare(Path(folder), args)
        print()
        measure_library(Path(folder), args)


def write_run(folder: Path, args: argparse.Namespace) -> None:
    """Write a run's checkpoints, and the sets as clip_benchmark reads them, too."""
    import torch
    from PIL import Image

    from tic_clip.data.clip_benchmark import convert
    from tic_clip.data.tar import write_shard
    from tic_clip.models import make_model

    rng = np.random.default_rng(0)
    for step in STEPS:
        plan = {"benchmark": "emoji", "method": "oracle", "scale": "tic_tiny", "step": step, "model": args.model}
        write_json(folder / "run" / step / "done.json", {"plan": plan, "checkpoint": "model.pt"})
        torch.save(make_model(args.model, "cpu")[0].state_dict(), folder / "run" / step / "model.pt")
        for task in ("retrieval", "emojinet"):
            content = []
            for i in range(args.images):
                file = io.BytesIO()
                noise = Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))
                noise.resize((args.image, args.image)).save(file, "JPEG", quality=90)
                label = str(rng.integers(CLASSES)).encode()
                content.append((f"{i:08d}", {"jpg": file.getvalue(), "txt": b"image %d" % i, "cls": label}))
            split = folder / "data" / EVAL / task / step
            write_json(split / "sizes.json", {"00000000.tar": write_shard(split / "00000000.tar", content)})
    (split.parent / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(CLASSES)))
    (split.parent / "zeroshot_classification_templates.txt").write_text("a {c}\nthe {c}\n{c}\n")
    for task, kind in (("retrieval", "retrieval"), ("emojinet", "classification")):
        list(convert(str(folder / "data" / EVAL / task), kind))


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Time each contender in turn, and print a table of medians."""
    flags = ["--train_output_dir", folder / "run", "--data_dir", folder / "data", "--workers", str(args.workers)]
    ours = [sys.executable, ROOT / "scripts/evaluate.py", *flags, "--batch_size", "64", "--output_dir"]
    peer = [sys.executable, "-c", PEER, "eval", "--model", args.model, "--no_amp", "--quiet", "--batch_size", "64"]
    peer += ["--dataset_root", folder / "data" / EVAL / "{dataset}", "--num_workers", str(args.workers)]
    peer += ["--output", folder / "peer" / "{dataset}-{pretrained_full_path}", "--recall_k", "1", "5", "10"]
    peer += ["--pretrained", *(folder / "run" / step / "model.pt" for step in STEPS), "--dataset"]
    kinds = (("retrieval", "zeroshot_retrieval"), ("emojinet", "zeroshot_classification"))
    commands = [[*peer, *(f"wds/{task}/{step}" for step in STEPS), "--task", kind] for task, kind in kinds]
    (folder / "peer").mkdir()
    times = {"ours, one process": [], "ours, two processes": [], "clip_benchmark": []}
    for number in range(args.rounds):
        times["ours, one process"].append(timed([[*ours, folder / f"one-{number}"]]))
        times["ours, two processes"].append(timed([[*ours, folder / f"two-{number}"]] * 2))
        parts = np.array([timed([command]) for command in commands])
        times["clip_benchmark"].append(tuple(parts.sum(axis=0)))
    expected = peer_metrics(folder)
    for name in ("one-0", "two-0"):
        found = {(line["step"], line["key"].split("/")[2], line["key"].split("/")[-1]): line["metrics"] for line in
                 read_results(folder / name / RESULTS)}  # fmt: skip
        assert found.keys() == expected.keys()
        worst = max(abs(found[key][name] - value) for key in expected for name, value in expected[key].items())
        assert worst < 1e-6, worst
    base, base_cpu = np.median(times["ours, one process"], axis=0)
    print(
        "| contender | seconds: median (range) | ratio | CPU s | ratio |",
        "| --- | ---: | ---: | ---: | ---: |",
        sep="\n",
    )
    for name, rows in times.items():
        (wall, cpu), walls = np.median(rows, axis=0), [row[0] for row in rows]
        spread = f"({min(walls):.1f}–{max(walls):.1f})"
        print(f"| {name} | {wall:.1f} {spread} | {wall / base:.2f} | {cpu:.1f} | {cpu / base_cpu:.2f} |", flush=True)


def timed(commands: list[list]) -> tuple[float, float]:
    """Run commands at the same time; return the seconds, and the CPU seconds of the one that needs most."""
    environment, start = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment}
    processes = [subprocess.Popen(list(map(str, command)), **quiet) for command in commands]
    cpu = []
    for process in processes:
        error = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(error)
        cpu.append(usage.ru_utime + usage.ru_stime)
    return time.perf_counter() - start, max(cpu)


def peer_metrics(folder: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """Return clip_benchmark's metrics by model, task and period."""
    found = {}
    for path in (folder / "peer").iterdir():
        content = json.loads(path.read_text())
        model, (task, period) = Path(content["pretrained"]).parent.name, content["dataset"].split("/")[1:]
        found[model, task, period] = content["metrics"]
    return found


def measure_library(folder: Path, args: argparse.Namespace) -> None:
    """Print images a second of one folder, of decoding alone and of each precision with one and four models."""
    import torch

    from tic_clip.data.decode import decode_image
    from tic_clip.evaluation.data import read_images, read_set
    from tic_clip.evaluation.encode import PRECISIONS, Settings
    from tic_clip.evaluation.evaluate import evaluate
    from tic_clip.evaluation.tasks import task_of
    from tic_clip.models import make_model
    from tic_clip.runs import models_of

    task = task_of("tic/emoji/retrieval/yearly/2014", str(folder / "data"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform, samples = make_model(args.model, "cpu")[1], read_set(task.folder, {"retrieval"}).samples
    print(
        "| precision | models | seconds | images/s | images × models/s |",
        "| --- | ---: | ---: | ---: | ---: |",
        sep="\n",
    )
    start = time.perf_counter()
    for data in read_images(samples):
        transform(decode_image(data))
    seconds = time.perf_counter() - start
    print(f"| decoding alone, one process | | {seconds:.1f} | {args.images / seconds:,.0f} | |", flush=True)
    for precision in PRECISIONS:
        for count in (1, 4):
            settings = Settings(device=device, precision=precision, workers=args.workers, models_at_once=count)
            start = time.perf_counter()
            evaluate(models_of(str(folder / "run"))[:count], [task], str(folder / f"{precision}-{count}"), settings)
            seconds = time.perf_counter() - start
            rate = args.images / seconds
            print(f"| {precision} | {count} | {seconds:.1f} | {rate:,.0f} | {rate * count:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
