"""Make evaluation splits readable for clip_benchmark and DataComp's evaluate.py.

    python dataset_creation/tic-datacomp/convert_wds.py data/tic/datacomp/yearly/eval/retrieval retrieval

convert_wds.sh calls it; see its --help.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.clip_benchmark import convert


def main() -> None:
    """Parse the arguments, convert, and print one line a split."""
    parser = Parser(__doc__)
    parser.add_argument("path", metavar="dir", help="a split, or a folder of splits")
    parser.add_argument("kind", choices=("retrieval", "classification"), help="the kind of task")
    for split, count in convert(**vars(parser.parse_args())):
        print(f"{split}: {count} shards for clip_benchmark in test/" if count else f"{split}: no sample, so no test/")


if __name__ == "__main__":
    run_main(main)
