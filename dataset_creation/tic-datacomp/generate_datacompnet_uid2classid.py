"""Make the class files of TiC-DataCompNet: the ImageNet class id of each UID, by year and by month.

    python dataset_creation/tic-datacomp/generate_datacompnet_uid2classid.py --output-path data/lists

A class id is the position of the synset among ImageNet's 1,000 sorted synsets; a UID in several synsets of a year gets
the lowest. Writes classes/{yearly,monthly}/eval/datacompnet/{step}.npy, for the months from generate_eval_uids.py.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.eval_uids import write_classes


def main() -> None:
    """Parse the flags, write the files, and print one line a file."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder of uids/ and classes/")
    parser.add_argument("--lists", help="folder of the published lists (default: OUTPUT_PATH/released)")
    lines = list(write_classes(**vars(parser.parse_args())))
    print(*lines, sep="\n")
    if not any(line.startswith("classes/monthly/") for line in lines):
        print("no classes by month: run generate_eval_uids.py with monthly lists first")


if __name__ == "__main__":
    run_main(main)
