"""Evaluate models on every period of a benchmark, and on static tasks.

    python scripts/evaluate.py --train_output_dir results/emoji/cumulative --data_dir data/emoji
    python scripts/evaluate.py --use_model "ViT-B-16 openai" "ViT-B-32 laion2b_s34b_b79k" hf-hub:apple/TiC-CLIP-… \\
        --data_dir data --output_dir results/existing
    python scripts/evaluate.py --released data/models/TiC-CLIP-basic-cumulative --data_dir data --output_dir results/tic

A model is "ARCH FILE", "ARCH TAG" or "hf-hub:OWNER/NAME". A task list is a YAML file of tasks and their fields:

    tic/datacomp/retrieval/yearly:             # all periods; one of them: tic/datacomp/retrieval/yearly/2014
    imagenet1k:                                # data in DATA_DIR/wds_imagenet1k_test, in DataComp's layout
      size: 50000
    sketches: {folder: /data/sketches}         # a clip_benchmark webdataset, or one folder of images per class

Appends a line per model and task to eval_results.jsonl in the output folder (default: the run's). Skips results that
already exist for the same weights, data, precision and metric version. Start it several times (torchrun, srun, a job
array, by hand) to share the work: docs/evaluation.md.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import require_venv  # noqa: F401

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from tic_clip.cli import Parser, run_main
from tic_clip.evaluation.encode import PRECISIONS, Settings
from tic_clip.evaluation.evaluate import check_tasks, evaluate, fingerprints, list_pending
from tic_clip.evaluation.tasks import Task, read_tasklist, static_task, tasks_of
from tic_clip.models import Model, named_model, prefer_newer, quickgelu_fault, released_models
from tic_clip.runs import keep_benchmark, models_of
from tic_clip.settings import is_on

POLL = 60  # seconds between two looks at a run that is being trained


def make_parser() -> Parser:
    """Return the parser of the flags."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--train_output_dir", metavar="RUN", help="a run of scripts/train.py: all its finished steps")
    which.add_argument(
        "--use_model", nargs="+", metavar="MODEL", help="models that OpenCLIP can load (more with setup.sh --models)"
    )
    which.add_argument("--check", action="store_true", help="no model: check that the data of all tasks can be used")
    which.add_argument("--released", metavar="DIR", help="a released TiC-CLIP model, from scripts/fetch_models.sh")
    add = parser.add_argument
    add("--data_dir", required=True, help="the folder that holds tic/{dataset}/…")
    benchmarks = f"one of {', '.join(BENCHMARKS)}, or a path.yaml (default: TASKLIST's or datacomp)"
    add("--benchmark", help=f"for --use_model, --check: {benchmarks}")
    add("--tasklist", metavar="FILE", help="a list of tasks (default: all tasks of the benchmark)")
    add("--imagenet_val", metavar="DIR", help="also evaluate on ImageNet's validation set")
    add("--output_dir", help="the folder for eval_results.jsonl (default: RUN)")
    add("--all_checkpoints", action="store_true", help="with a run: also the checkpoints inside its steps")
    add("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    add("--device", help="cpu, cuda, cuda:1, … (default: the GPU if there is one)")
    add("--batch_size", type=int, default=256, help="images per batch (default: 256)")
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes here
    workers = min(max(cores, 1) - 1, 16)
    add("--workers", type=int, default=workers, help="loader processes per process (default: its cores - 1)")
    add("--models_at_once", type=int, default=8, help="models of a run in memory at a time (default: 8)")
    add("--skip_bad", action="store_true", help="leave out and count unusable samples")
    add("--force", action="store_true", help="repeat existing results")
    add("--watch", action="store_true", help="with a run: evaluate each step when it is finished, until the last")
    add("--dry_run", action="store_true", help="print the missing results and stop; so does DRY_RUN=1")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Check the tasks, print what is missing, or evaluate, once or whenever a step is finished."""
    args = make_parser().parse_args(argv)
    if min(args.batch_size, args.models_at_once, args.workers + 1) < 1:
        raise TicError("--batch_size and --models_at_once must be at least 1, --workers at least 0")
    names = ("batch_size", "workers", "precision", "device", "models_at_once", "skip_bad")
    since = time.time() if args.force else 0
    settings = Settings(**{name: getattr(args, name) for name in names}, since=since)
    if args.check:
        check_tasks(select_tasks(args, get_benchmark(args.benchmark or "datacomp")), settings)
    elif args.watch:
        watch(args, settings)
    else:
        evaluate_models(args, settings)


def watch(args: Any, settings: Settings) -> None:
    """Evaluate the finished steps of a run, which may still be trained, until its last step is among them."""
    run, steps = args.train_output_dir, []
    if args.force or not run or not Path(run).is_dir():
        raise TicError("--watch needs --train_output_dir, a folder that scripts/train.py writes, and no --force")
    while True:
        done = sorted(Path(run).glob("*/done.json"))
        if done != steps and evaluate_models(args, settings):
            return
        steps = done
        time.sleep(POLL)


def evaluate_models(args: Any, settings: Settings) -> bool:
    """Evaluate, print how many results are new, and warn about samples left out or NaN features.

    Returns whether the last step of the benchmark was among the models.
    """
    models, output_dir = select_models(args)
    for model in models:
        if model.weights != "openai" and (fault := quickgelu_fault(model.arch, model.weights)):
            print(f"warning: {fault}", file=sys.stderr)  # OpenCLIP itself sees to openai's
    benchmark = get_benchmark(args.benchmark or models[0].about["benchmark"])
    tasks = select_tasks(args, benchmark)
    is_last = models[-1].about.get("step") == benchmark.steps[-1].name
    if args.dry_run or is_on(os.environ, "DRY_RUN"):
        for model, pending in list_pending(models, tasks, fingerprints(tasks), output_dir, settings):
            print(f"{model.name}: {model.arch} {model.weights}".rstrip())
            print(*(f"  {task.key}  {task.folder}" for task in pending), sep="\n")
        return is_last
    keep_benchmark(output_dir, benchmark)
    results = evaluate(models, tasks, output_dir, settings)
    for result in results:
        warnings = [f"{count} samples left out: {reason}" for reason, count in result["dropped"].items()]
        if result["nonfinite"]:
            warnings.append(f"{result['nonfinite']} features of the model are NaN or infinite and find nothing")
        if warnings:
            print(f"{result['model']['name']} on {result['dataset']}: {'; '.join(warnings)}", file=sys.stderr)
    skipped = len(models) * len(tasks) - len(results)
    print(f"{len(results)} new results in {output_dir}" + f", {skipped} were there already" * (skipped > 0), flush=True)
    return is_last


def select_models(args: Any) -> tuple[list[Model], str]:
    """Return the models that the flags name, and the folder for their results."""
    if args.train_output_dir:
        models = models_of(args.train_output_dir, every=args.all_checkpoints)
        return models, args.output_dir or args.train_output_dir
    if not args.output_dir:
        raise TicError("--use_model and --released need an --output_dir for the results")
    if args.released:
        return released_models(args.released), args.output_dir
    listed = read_tasklist(args.tasklist, args.data_dir) if args.tasklist else []
    found = next((task.benchmark for task in listed if task.benchmark), "datacomp")
    benchmark = get_benchmark(args.benchmark or found)
    return [named_model(text, benchmark.name) for text in args.use_model], args.output_dir


def select_tasks(args: Any, benchmark: Benchmark) -> list[Task]:
    """Return the tasks that the flags name."""
    tasks = read_tasklist(args.tasklist, args.data_dir) if args.tasklist else tasks_of(benchmark, args.data_dir)
    if args.imagenet_val:
        entry = {"name": "ImageNet 1k", "folder": os.path.abspath(args.imagenet_val)}
        tasks.append(static_task("imagenet1k", entry, args.data_dir))
    return tasks


if __name__ == "__main__":
    prefer_newer()  # run.py, which has trained, stays with its own
    run_main(main)
