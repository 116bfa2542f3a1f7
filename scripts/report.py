"""Draw the step x period matrix of one run, or compare several, from their eval_results.jsonl.

    python scripts/report.py results/emoji/cumulative results/emoji/sequential --out results/emoji/comparison

Writes summary.json, matrix.csv, table.md, table.tex, heatmap.png and report.html and prints the table.
"""

from tic_clip import TicError
from tic_clip.cli import Parser, run
from tic_clip.report import report
from tic_clip.tables import table_text


def main() -> None:
    """Parse the flags, write the report, print its table and where it is."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="R", help="a run's folder, with its eval_results.jsonl")
    parser.add_argument("--out", metavar="DIR", help="where to write; by default R, where there is only one")
    args = parser.parse_args()
    if args.out is None and len(args.runs) > 1:
        raise TicError("--out DIR is needed to compare several runs")
    output = args.out or args.runs[0]
    print(table_text(report(args.runs, output)))
    print(f"\nreport.html, heatmap.png, table.md, table.tex, matrix.csv and summary.json are in {output}")


if __name__ == "__main__":
    run(main)
