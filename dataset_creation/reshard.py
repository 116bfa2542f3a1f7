"""Cut a pool of tar shards into any number of splits in one pass.

    python dataset_creation/reshard.py -i data/emoji/pool -o data/emoji/tic/emoji/yearly -s data/emoji/uids -j 2

(run_emoji_cumulative.sh makes this pool and these lists.) SUBSETS is one .npy of UIDs (then OUT is the split), or a
folder of {name}.npy (then OUT/{name}/ are the splits). POOL, OUT, SUBSETS and CLASSES are paths or s3://, gs://, az://
URLs. Writes {:08d}.tar, {:08d}_stats.json, sizes.json, sample_ids.npy and, last, meta.json to each split; with --parts,
to each {split}/{part:05d}/ (sample_ids.npy only to 00000/). The output does not depend on -j, --engine or
interruptions: run the same command again to resume. A UID that occurs twice in the pool is taken once; with --parts,
once per part.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, add_flags, run_main
from tic_clip.data.folder import table
from tic_clip.data.reshard import Options, reshard


def main() -> None:
    """Parse the flags, reshard, and print a table of the splits."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("-i", "--input-dir", dest="pool", metavar="POOL", required=True, help="the pool: a folder of .tar shards")
    flag("-o", "--output-dir", metavar="OUT", required=True, help="the split, or the folder of the splits")
    flag("-s", "--subset-file", dest="subsets", metavar="SUBSETS", required=True, help="a .npy of UIDs, or a folder")
    flag("-c", "--cls-file", dest="classes", metavar="CLASSES", help="a .npy of UIDs and class ids, or a folder")
    flag("--part", type=int, help="make only this part, counted from 0: for a job array")
    flag("--ray-address", help="a Ray cluster, or auto; by default, Ray starts on this machine")
    add_flags(parser, Options)
    args = parser.parse_args()
    print(table(reshard(**vars(args))))
    if args.dry_run:
        print("dry run: nothing was written")


if __name__ == "__main__":
    run_main(main)
