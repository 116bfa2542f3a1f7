"""Download the released lists of TiC-DataComp's UIDs: by year, by month, and the two evaluation tables.

    python dataset_creation/tic-datacomp/download_uids.py --output-path data/lists/released --lists yearly eval

Goes on where it was cut off; what is there is skipped. Writes tic-datacomp_training_yearly_noeval/{year}.npy (about
200 GB in all), tic-datacomp_training_monthly/{year}/{YYYYMM}.npy (about 200 GB; its tars need as much for one year
while they are unpacked), tic-datacomp_retrieval_evals_year2uids.json and tic-datacompnet_year2uids.json (or .pkl).
"""

import os

from tic_clip.cli import Parser, run_main
from tic_clip.data.download import LISTS, SOURCES, download_lists
from tic_clip.data.released import YEARS


def main() -> None:
    """Parse the flags, download, and print one line a list."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder of the lists; generate_*.py take it as --lists")
    parser.add_argument(
        "--base-url",
        default=os.environ.get("LISTS_URL"),
        help=f"where the lists are (default: $LISTS_URL, or {SOURCES[0]}, then {SOURCES[1]})",
    )
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=LISTS, help="which lists (default: all)")
    parser.add_argument("--years", nargs="+", choices=YEARS, default=YEARS, help="of which years (default: all)")
    args = parser.parse_args()
    sources = (args.base_url,) if args.base_url else SOURCES
    for name, new in download_lists(args.output_path, sources=sources, lists=args.lists, years=args.years):
        print(f"{args.output_path}/{name}: {'downloaded' if new else 'already there'}")


if __name__ == "__main__":
    run_main(main)
