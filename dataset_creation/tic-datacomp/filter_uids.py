"""Filter the UID lists of training by a sorted UID file, such as that of DataComp's baselines.py.

    python dataset_creation/tic-datacomp/filter_uids.py --uids data/lists/uids --filter-uids data/lists/basic.npy \\
        --output-path data/lists/basic

Writes every list below --uids to the output folder: those in train/ keep the UIDs that the file holds, the others are
links. With --filter bestpool the filtered lists are in train_bestpool/. reshard.py -s OUTPUT_PATH makes the splits.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.eval_uids import filter_lists


def main() -> None:
    """Parse the flags, write the lists, and print one line for each that is filtered."""
    parser = Parser(__doc__)
    parser.add_argument("--uids", required=True, help="the folder of lists that generate_eval_uids.py has made")
    parser.add_argument("--filter-uids", required=True, help="a .npy of the UIDs that pass the filter, sorted")
    parser.add_argument("--output-path", required=True, help="the folder of the filtered lists")
    parser.add_argument("--filter", default="basic", help="basic or bestpool (default: basic)")
    for line in filter_lists(**vars(parser.parse_args())):
        print(line)


if __name__ == "__main__":
    run_main(main)
