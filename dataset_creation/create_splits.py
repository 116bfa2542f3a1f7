"""Split your own table of dated images by time: a training and a test list for each step, and the benchmark's file.

    python dataset_creation/create_splits.py photos.csv --image path --caption text --date taken --suggest 5
    python dataset_creation/create_splits.py photos.csv --image path --caption text --date taken --every year \\
        --name photos --test-share 0.1 --output-path data/lists/photos

A table is CSV, TSV, JSON Lines (also .gz) or Parquet: a path, a URL, several of them, or a folder of them (such as an
img2dataset download). Dates are ISO 8601, seconds or milliseconds since 1970, or years, in UTC. --image names a column
of paths, or of the images themselves, which are then written to LISTS/images/. Writes {train,test}_batch_{step}.csv
(key, image, caption, date and, with --label, label; sorted by UID), benchmark.yaml and, last, manifest.json. Continue
with create_tars.py.

With --pool instead of tables, it splits a pool of tars by a date in each sample's JSON, and writes the lists
uids/{train,eval/retrieval}/{step}.npy for reshard.py.
"""

import argparse
import sys

import require_venv  # noqa: F401

from tic_clip import TicError
from tic_clip.cli import Parser, add_flags, from_flags, run_main
from tic_clip.data import lists, pairs, pool
from tic_clip.data.dates import suggest_steps
from tic_clip.data.tables import Columns


def main() -> None:
    """Parse the flags, cut or suggest steps, and print a table of the lists."""
    args = parse_args()
    columns, options, source = from_flags(Columns, args), from_flags(lists.OwnOptions, args), args.pool or args.tables
    if args.suggest is not None:
        count_months = pool.count_months if args.pool else pairs.count_months
        found = suggest_steps(count_months(source, columns, options), args.suggest)
        print("\n".join(f"{name:<15}  {count:>11,}" for name, count in found))
        print(f"\n--steps {','.join(name for name, _ in found)}")
        return
    create = pool.create_pool_splits if args.pool else pairs.create_own_splits
    manifest, reused = create(source, columns, options)
    for line in lists.warnings(manifest):
        print(f"warning: {line}", file=sys.stderr)
    print(lists.describe(options.output_path, manifest, reused))
    print(lists.next_step(options.output_path, args.pool))


def parse_args() -> argparse.Namespace:
    """Return the flags."""
    parser = Parser(__doc__)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("tables", metavar="TABLE", nargs="*", default="", help="a table, or a folder of tables")
    inputs.add_argument("--pool", metavar="DIR", help="a folder or URL of webdataset tars")
    add_flags(parser, Columns)
    cuts = parser.add_mutually_exclusive_group(required=True)
    cuts.add_argument("--steps", metavar="NAMES", help="dates separated by commas: 2014-2016,2017,2018Q1,201804")
    cuts.add_argument("--every", choices=("year", "quarter", "month"), help="one step for each, from the first row on")
    cuts.add_argument("--suggest", type=int, metavar="N", help="print N near-equal steps, write nothing")
    add_flags(parser, lists.OwnOptions)
    args = parser.parse_args()
    for name in ("image", "caption", "label", "key") if args.pool else ():
        if getattr(args, name):
            raise TicError(f"--{name} is for tables")
    return args


if __name__ == "__main__":
    run_main(main, on_interrupt="start over")
