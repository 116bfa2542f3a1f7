"""Evaluate models on every period of a benchmark, and on static tasks.

    python scripts/evaluate.py --train_output_dir results/emoji/cumulative --data_dir data/emoji
    python scripts/evaluate.py --use_model "ViT-B-16 openai" "ViT-B-32 laion2b_s34b_b79k" hf-hub:apple/TiC-CLIP-… \
        --data_dir data --output_dir results/existing
    python scripts/evaluate.py --released data/models/TiC-CLIP-basic-cumulative --data_dir data --output_dir results/tic

A model is "ARCH FILE", "ARCH TAG" or "hf-hub:OWNER/NAME". A task list is a YAML file, task key -> what there is to say:

    tic/datacomp/retrieval/yearly:             # all its periods; or one: tic/datacomp/retrieval/yearly/2014
    imagenet1k:                                # data in DATA_DIR/wds_imagenet1k_test, as DataComp has them
      size: 50000
    sketches: {folder: /data/sketches}         # a webdataset of clip_benchmark's, or folders of pictures, one a class

Appends one line a model and task to eval_results.jsonl in the output folder (by default the run's own); what is there
already, of the same weights, data, precision and metric version, is skipped.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from tic_clip import TicError
from tic_clip.benchmarks import BENCHMARKS, get_benchmark
from tic_clip.cli import Parser, run_main
from tic_clip.data.released import released_models
from tic_clip.evaluation.evaluate import PRECISIONS, RESULTS, Settings, evaluate, fingerprints, missing
from tic_clip.evaluation.tasks import Task, read_tasklist, static_task, tasks_of
from tic_clip.models import Model, named_model
from tic_clip.runs import models_of


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, evaluate, and say what was done and what to know of it."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--train_output_dir", metavar="RUN", help="a run of scripts/train.py: all its finished steps")
    which.add_argument("--use_model", nargs="+", metavar="MODEL", help="models that OpenCLIP can load")
    which.add_argument("--check", action="store_true", help="no model: see that the tasks and their data are there")
    which.add_argument("--released", metavar="DIR", help="a released TiC-CLIP model of scripts/fetch_models.sh")
    parser.add_argument("--data_dir", required=True, help="the folder that holds tic/{dataset}/…")
    parser.add_argument(
        "--benchmark", help=f"for --use_model and --check: one of {', '.join(BENCHMARKS)} (default: datacomp)"
    )
    parser.add_argument("--tasklist", metavar="FILE", help="a list of tasks (default: all of the benchmark)")
    parser.add_argument("--imagenet_val", metavar="DIR", help="ImageNet's validation set, as one more task")
    parser.add_argument("--output_dir", help="where eval_results.jsonl goes (default: RUN)")
    parser.add_argument("--all_checkpoints", action="store_true", help="of a run: also those inside its steps")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the GPU where there is one)")
    parser.add_argument("--batch_size", type=int, default=256, help="images encoded at a time (default: 256)")
    parser.add_argument("--workers", type=int, default=_workers(), help="loader processes (default: cores - 1)")
    parser.add_argument("--together", type=int, default=8, help="models of a run in memory at a time (default: 8)")
    parser.add_argument("--skip_bad", action="store_true", help="leave out and count samples that can't be used")
    parser.add_argument("--force", action="store_true", help="evaluate also what is there already")
    dry_run = os.environ.get("DRY_RUN", "0") != "0"
    parser.add_argument(
        "--dry_run", action="store_true", default=dry_run, help="print what is missing, evaluate nothing"
    )
    args = parser.parse_args(argv)
    if args.check:
        fingerprints(_tasks(args, "datacomp"))
        return
    models, output_dir = _models(args)
    tasks = _tasks(args, models[0].about["benchmark"])
    names = ("batch_size", "workers", "precision", "device", "together", "skip_bad", "force")
    settings = Settings(**{name: getattr(args, name) for name in names})
    if args.dry_run:
        for model, _, some in missing(models, tasks, fingerprints(tasks), output_dir, settings):
            print(f"{model.name}: {model.arch} {model.weights}".rstrip())
            print(*(f"  {task.key}  {task.folder}" for task in some), sep="\n")
        return
    found = evaluate(models, tasks, output_dir, settings)
    for result in found:
        _remark(result)
    there = len(models) * len(tasks) - len(found)
    already = f", {there} were there already" if there else ""
    print(f"{len(found)} results appended to {output_dir}/{RESULTS}{already}")


def _workers() -> int:
    return min(len(os.sched_getaffinity(0)) - 1, 16)


def _models(args: Any) -> tuple[list[Model], str]:
    """The models that the flags name, and the folder for their results."""
    if args.train_output_dir:
        models = models_of(args.train_output_dir, every=args.all_checkpoints)
        return models, args.output_dir or args.train_output_dir
    if not args.output_dir:
        raise TicError("--use_model and --released need an --output_dir for the results")
    if args.released:
        return released_models(args.released), args.output_dir
    benchmark = get_benchmark(args.benchmark or "datacomp")
    return [named_model(text, benchmark.name) for text in args.use_model], args.output_dir


def _tasks(args: Any, benchmark: str) -> list[Task]:
    """The tasks that the flags name."""
    benchmark = get_benchmark(args.benchmark or benchmark)
    tasks = read_tasklist(args.tasklist, args.data_dir) if args.tasklist else tasks_of(benchmark, args.data_dir)
    if args.imagenet_val:
        entry = {"name": "ImageNet 1k", "folder": os.path.abspath(args.imagenet_val)}
        tasks.append(static_task("imagenet1k", entry, args.data_dir))
    return tasks


def _remark(result: dict[str, Any]) -> None:
    """Say what makes a result one to look at again."""
    what = [f"{count} samples left out: {reason}" for reason, count in result["dropped"].items()]
    if result["nonfinite"]:
        what.append(f"{result['nonfinite']} features of the model are no numbers and find nothing")
    if what:
        print(f"{result['model']['name']} on {result['dataset']}: {'; '.join(what)}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
