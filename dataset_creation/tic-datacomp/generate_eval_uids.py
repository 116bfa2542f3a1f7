"""Make TiC-DataComp's UID files from the published lists (download_uids.py), for evaluation and for training.

    python dataset_creation/tic-datacomp/generate_eval_uids.py --output-path data/lists

Writes uids/yearly/eval/{retrieval,datacompnet}/{year}.npy and, from the existing training lists,
uids/yearly/train/{year}.npy (a hard link if possible), uids/monthly/train/{YYYYMM}.npy (without evaluation UIDs) and
uids/monthly/eval/{retrieval,datacompnet}/{YYYYMM}.npy (the month's evaluation UIDs of its year). After
generate_datacompnet_uid2classid.py, one call makes every split:

    python dataset_creation/reshard.py -i POOL -o DATA/tic/datacomp -s data/lists/uids -c data/lists/classes
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.eval_uids import write_eval_uids


def main() -> None:
    """Parse the flags, write the files, and print one line a file."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder of uids/")
    parser.add_argument("--lists", help="folder of the published lists (default: OUTPUT_PATH/released)")
    for line in write_eval_uids(**vars(parser.parse_args())):
        print(line)


if __name__ == "__main__":
    run_main(main)
