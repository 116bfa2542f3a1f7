"""Write sizes.json (shard -> samples) into each folder of shards of a pool or a split, from the shards' stats.

    python dataset_creation/tic-datacomp/add_sizes.py --url data/emoji/pool --num-proc 2

DIR is local or a URL, and holds shards or folders of shards. If stats are missing, run generate_stats.py first.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.split import add_sizes


def main() -> None:
    """Parse the flags, write the tables, and print one line a folder."""
    parser = Parser(__doc__)
    parser.add_argument("--url", required=True, metavar="DIR", help="the pool or the split")
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="stats to read at a time (default: 1)")
    for folder, count in add_sizes(**vars(parser.parse_args())).items():
        print(f"{folder}: {count} samples")


if __name__ == "__main__":
    run_main(main)
