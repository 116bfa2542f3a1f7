"""Draw the step x period matrix of a run, or compare several runs and models, from their eval_results.jsonl.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison
    python scripts/report.py results/medium_basic_cumulative --out results/paper --reference paper.csv
    python scripts/report.py --paired results/emoji/cumulative results/emoji/sequential

R is the folder of a run, or of other evaluated models. Runs that differ only in their seed become one row. The
reference is your copy of published numbers, in per cent, with the columns of table.md (these are made up):

    method,retrieval backward,retrieval ID,retrieval forward
    cumulative,60.0,50.0,40.0

--paired tests whether the first of two is better than the second: the difference, its 95 % interval and p, for ID,
backward, forward and each cell, by a bootstrap over the samples that both were evaluated on. paired.csv has them in
full precision.

Writes summary.json, matrix.csv, table.csv, table.md, table.tex, report.html and, if they have something to show, the
figures heatmap, bars, curves, compute, robustness and training as .png and .svg. Prints the table.
"""

from collections.abc import Sequence

import require_venv  # noqa: F401

from tic_clip import TicError
from tic_clip.cli import Parser, run_main
from tic_clip.report import report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, write the report, print its table and where it is."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="R", help="a folder with eval_results.jsonl")
    parser.add_argument("--out", metavar="DIR", help="the folder to write to (default with a single R: R)")
    parser.add_argument("--reference", metavar="CSV", help="published numbers to show beside ours")
    parser.add_argument("--paired", action="store_true", help="test the difference of two; without --out, only that")
    args = parser.parse_args(argv)
    if args.out is None and len(args.runs) > 1 and not args.paired:
        raise TicError("--out DIR is needed to compare several runs")
    output = args.out or (None if args.paired else args.runs[0])
    tables, files = report(args.runs, output, args.reference, args.paired)
    print(tables)
    if files:
        print(f"\n{', '.join(files[:-1])} and {files[-1]} are in {output}")


if __name__ == "__main__":
    run_main(main)
