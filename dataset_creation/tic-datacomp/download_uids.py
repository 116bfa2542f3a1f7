"""Download TiC-DataComp's published UID lists from the Hugging Face Hub: by year, by month, and two tables.

    python dataset_creation/tic-datacomp/download_uids.py --output-path data/lists/released --lists yearly eval

Run it again to resume. Writes tic-datacomp_training_yearly_noeval/{year}.npy (about 200 GB in all),
tic-datacomp_training_monthly/{YYYYMM}.npy (about 200 GB), tic-datacomp_retrieval_evals_year2uids.json and
tic-datacompnet_year2uids.json. HF_ENDPOINT sets a mirror of the hub, HF_TOKEN a login. Files that you downloaded by
hand go into the same folder; months may also be {year}/{YYYYMM}.npy, and files symbolic links.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.released import LISTS, YEARS, download_lists


def main() -> None:
    """Parse the flags, download, and print one line a list."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder of the lists (--lists of generate_*.py)")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=LISTS, help="which lists (default: all)")
    parser.add_argument("--years", nargs="+", choices=YEARS, default=YEARS, help="which years (default: all)")
    for line in download_lists(**vars(parser.parse_args())):
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
