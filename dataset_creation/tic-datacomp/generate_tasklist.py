"""Write a list of evaluation tasks (default: TiC-DataComp's) for scripts/evaluate.py and DataComp's evaluate.py.

    python dataset_creation/tic-datacomp/generate_tasklist.py --yaml-path tasklist.yml --sample-eval

The default is retrieval and TiC-DataCompNet on 9 years and 102 months; --sample-eval is 2014 and 201403 only.
--eval-tasks selects groups, such as tic/datacomp/retrieval/yearly,tic/yfcc15m/retrieval/yearly, or single tasks by key.
--benchmark selects all groups of another benchmark, such as your own benchmark.yaml.
"""

import require_venv  # noqa: F401

import yaml

from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, run_main
from tic_clip.evaluation.tasks import DATACOMP_GROUPS, groups_of, list_tasks
from tic_clip.storage import write_text


def main() -> None:
    """Parse the flags, write the list, and print how many tasks it has."""
    parser = Parser(__doc__)
    parser.add_argument("--yaml-path", required=True, help="file to write")
    parser.add_argument("--sample-eval", action="store_true", help="only 2014 and 201403")
    parser.add_argument("--eval-tasks", help="groups or keys, separated by commas (default: all)")
    parser.add_argument("--benchmark", help="a name or a path.yaml (default: datacomp and datacomp_monthly)")
    args = parser.parse_args()
    groups = groups_of(get_benchmark(args.benchmark)) if args.benchmark else DATACOMP_GROUPS
    tasks = list_tasks(args.eval_tasks.split(",") if args.eval_tasks else groups, sample=args.sample_eval)
    write_text(args.yaml_path, yaml.safe_dump(tasks, sort_keys=False))
    print(f"{args.yaml_path}: {len(tasks)} tasks")


if __name__ == "__main__":
    run_main(main)
