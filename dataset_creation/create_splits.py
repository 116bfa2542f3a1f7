"""Cut your own table of dated images by time: a training and a test list of each step, and the benchmark's file.

    python dataset_creation/create_splits.py photos.csv --image path --caption text --date taken --suggest 5
    python dataset_creation/create_splits.py photos.csv --image path --caption text --date taken --every year \
        --name photos --test-share 0.1 --output-path data/lists/photos

A table is CSV, TSV, JSON Lines (also .gz) or Parquet, a path or a URL, several of them, or a folder of them (such as
img2dataset's). Dates are ISO 8601, seconds or milliseconds since 1970, or years, in UTC. --image names a column of
paths, or of the images themselves, which are then written to LISTS/images/. Writes {train,test}_batch_{step}.csv (key,
image, caption, date and, with --label, label; by UID), benchmark.yaml and, last, manifest.json. Next: create_tars.py.

With --pool in place of tables, a pool of tars is cut by a date in each sample's JSON: the lists are then
uids/{train,eval/retrieval}/{step}.npy, as reshard.py takes them.
"""

import sys
from functools import partial
from typing import Any

from tic_clip import TicError
from tic_clip.cli import Parser, run_main
from tic_clip.data import own, pool
from tic_clip.data.pairs import describe
from tic_clip.data.tables import Columns


def main() -> None:
    """Parse the flags, cut or suggest steps, and print a table of the lists."""
    args = parse_args()
    tables, tars, steps, field = (args.pop(name) for name in ("tables", "pool", "suggest", "date_field"))
    columns = Columns(**{name: args.pop(name) for name in Columns.__dataclass_fields__})
    if tars:
        form = {"date_field": field, "date_format": columns.date_format}
        suggest, create = partial(pool.suggest, tars, **form), partial(pool.create_pool_splits, tars, **form)
    else:
        suggest, create = partial(own.suggest, tables, columns), partial(own.create_own_splits, tables, columns=columns)
    if steps is not None:
        found = suggest(steps, num_workers=args["num_workers"], skip_bad_rows=args["skip_bad_rows"])
        print("\n".join(f"{name:<15}  {count:>11,}" for name, count in found))
        print(f"\n--steps {','.join(name for name, _ in found)}")
        return
    manifest, reused = create(**args)
    for line in own.warnings(manifest):
        print(f"warning: {line}", file=sys.stderr)
    print(describe(args["output_path"], manifest, reused))
    print(own.next_step(args["output_path"], tars))


def parse_args() -> dict[str, Any]:
    """Return the flags."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("tables", metavar="TABLE", nargs="*", default="", help="a table, or a folder of tables")
    inputs.add_argument("--pool", metavar="DIR", help="a folder or URL of tars, as webdataset has them")
    flag("--date-field", default="", metavar="FIELD", help="where the JSON of a pool's sample has its date")
    flag("--date", default="", metavar="COLUMN", help="the column of dates")
    flag("--date-format", default="auto", help="auto, year, s, ms, or of strftime, as %%d.%%m.%%Y (default: auto)")
    flag("--image", default="", metavar="COLUMN", help="the column of paths, or of images")
    flag("--caption", default="", metavar="COLUMN", help="the column of captions")
    flag("--label", default="", metavar="COLUMN", help="a column of classes: adds classification")
    flag("--key", default="", metavar="COLUMN", help="the column of keys; else the image's path without suffix")
    cuts = parser.add_mutually_exclusive_group(required=True)
    cuts.add_argument("--steps", metavar="NAMES", help="dates with commas between: 2014-2016,2017,2018Q1,201804")
    cuts.add_argument("--every", choices=("year", "quarter", "month"), help="a step for each, from the first row on")
    cuts.add_argument("--suggest", type=int, metavar="N", help="print N near-equal steps, write nothing")
    flag("--name", default="", help="the benchmark's name")
    flag("--output-path", default="", metavar="LISTS", help="folder of the lists")
    flag("--test-share", type=float, default=0.01, help="fraction that is held out (default: 0.01)")
    flag("--seed", type=int, default=0, help="which samples are held out (default: 0)")
    flag("-j", "--num-workers", type=int, default=1, help="processes (default: 1)")
    flag("--skip-bad-rows", action="store_true", help="leave out rows with a fault, and count them")
    flag("--overwrite", action="store_true", help="make the lists again")
    args = vars(parser.parse_args())
    for name in ("image", "caption", "label", "key", "date") if args["pool"] else ("date_field",):
        if args[name]:
            raise TicError(f"--{name.replace('_', '-')} is for {'tables' if args['pool'] else '--pool'}")
    return args


if __name__ == "__main__":
    run_main(main, on_interrupt="start over")
