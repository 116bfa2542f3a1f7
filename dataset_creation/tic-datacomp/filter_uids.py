"""Filter the training UID lists by a sorted UID file, such as one from DataComp's baselines.py.

    python dataset_creation/tic-datacomp/filter_uids.py --uids data/lists/uids --filter-uids data/lists/basic.npy \\
        --output-path data/lists/basic

Writes every list in --uids to the output folder: lists in train/ keep only the UIDs in the file, the others become
links. With --filter bestpool the filtered lists are in train_bestpool/. reshard.py -s OUTPUT_PATH makes the splits.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.eval_uids import filter_lists


def main() -> None:
    """Parse the flags, write the lists, and print one line for each that is filtered."""
    parser = Parser(__doc__)
    parser.add_argument("--uids", required=True, help="the folder of lists from generate_eval_uids.py")
    parser.add_argument("--filter-uids", required=True, help="a sorted .npy of the UIDs that pass the filter")
    parser.add_argument("--output-path", required=True, help="the folder of the filtered lists")
    parser.add_argument("--filter", default="basic", help="basic or bestpool (default: basic)")
    for line in filter_lists(**vars(parser.parse_args())):
        print(line)


if __name__ == "__main__":
    run_main(main)
