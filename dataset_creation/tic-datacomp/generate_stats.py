"""Count the samples of each shard of a pool or a split, and write a {:08d}_stats.json where it is missing.

    python dataset_creation/tic-datacomp/generate_stats.py --url data/emoji/pool --num-proc 2

DIR is local or a URL, and holds shards or folders of shards. Only headers are read; remote shards are downloaded.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.split import generate_stats


def main() -> None:
    """Parse the flags, count, and print how many shards there are."""
    parser = Parser(__doc__)
    parser.add_argument("--url", required=True, metavar="DIR", help="the pool or the split")
    parser.add_argument("--num-proc", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="count again, keeping other keys of the stats")
    args = parser.parse_args()
    shards, counted = generate_stats(**vars(args))
    print(f"{args.url}: {shards} shards, {counted} of them counted now")


if __name__ == "__main__":
    run_main(main)
