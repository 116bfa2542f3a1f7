"""Evaluate models on every period of a benchmark.

    python scripts/evaluate.py --train_output_dir results/emoji/cumulative --data_dir data/emoji
    python scripts/evaluate.py --use_model "ViT-B-16 openai" --data_dir data --output_dir results/openai

Appends one line a model and task to eval_results.jsonl in the output folder (by default the run's own); what is there
already is skipped.
"""

from tic_clip import TicError
from tic_clip.cli import Parser, run
from tic_clip.evaluation import RESULTS, Model, evaluate, models_of, read_tasklist, tasks_of
from tic_clip.timeline import BENCHMARKS, get_benchmark


def main() -> None:
    """Parse the flags and evaluate."""
    parser = Parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--train_output_dir", help="a run of scripts/train.py: all its finished steps")
    which.add_argument("--use_model", metavar='"ARCH WEIGHTS"', help="an architecture and a checkpoint file or tag")
    parser.add_argument("--data_dir", required=True, help="the folder that holds tic/{dataset}/…")
    parser.add_argument("--benchmark", help=f"for --use_model: one of {', '.join(BENCHMARKS)} (default: datacomp)")
    parser.add_argument("--tasklist", help="a YAML file with task keys, instead of all tasks of the benchmark")
    parser.add_argument("--output_dir", help="where eval_results.jsonl goes")
    parser.add_argument("--batch_size", type=int, default=256, help="images encoded at a time (default: 256)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    args = parser.parse_args()
    if args.train_output_dir:
        models = models_of(args.train_output_dir)
        benchmark = get_benchmark(models[0].about["benchmark"])
        output_dir = args.output_dir or args.train_output_dir
    else:
        benchmark = get_benchmark(args.benchmark or "datacomp")
        arch, _, weights = args.use_model.partition(" ")
        if not weights or not args.output_dir:
            raise TicError('--use_model takes "ARCH WEIGHTS" (as in "ViT-B-16 openai") and needs --output_dir')
        models = [Model(name=args.use_model, arch=arch, weights=weights, about={"benchmark": benchmark.name})]
        output_dir = args.output_dir
    tasks = read_tasklist(args.tasklist, args.data_dir) if args.tasklist else tasks_of(benchmark, args.data_dir)
    new = evaluate(models, tasks, output_dir, batch_size=args.batch_size, workers=args.workers)
    there = len(models) * len(tasks) - new
    print(f"{new} results appended to {output_dir}/{RESULTS}" + (f", {there} were there already" if there else ""))


if __name__ == "__main__":
    run(main)
