"""Make TiC-DataComp's UID files from the released lists (download_uids.py): evaluation, and training without it.

    python dataset_creation/tic-datacomp/generate_eval_uids.py --output-path data/lists

Writes uids/yearly/eval/{retrieval,datacompnet}/{year}.npy and, of the training lists that are there,
uids/yearly/train/{year}.npy (a hard link where the disk can), uids/monthly/train/{YYYYMM}.npy (without any evaluation
UID) and uids/monthly/eval/{retrieval,datacompnet}/{YYYYMM}.npy (the evaluation UIDs of its year that it has). A month
that is done is not done again. One call then makes every split, after generate_datacompnet_uid2classid.py:

    python dataset_creation/reshard.py -i POOL -o DATA/tic/datacomp -s data/lists/uids -c data/lists/classes
"""

from tic_clip.cli import Parser, run_main
from tic_clip.data.evalsets import missing_training_lists, write_eval_uids


def main() -> None:
    """Parse the flags, write the files, and print one line a file."""
    parser = Parser(__doc__)
    parser.add_argument("--output-path", required=True, help="folder of uids/")
    parser.add_argument("--lists", help="folder of the released lists (default: OUTPUT_PATH/released)")
    args = parser.parse_args()
    lists = args.lists or f"{args.output_path}/released"
    for written in write_eval_uids(lists, args.output_path):
        print(written)
    if missing := missing_training_lists(lists):
        print(missing)


if __name__ == "__main__":
    run_main(main)
