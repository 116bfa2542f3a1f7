"""Cut a pool of tar shards into splits, all of them in one pass.

    python dataset_creation/reshard.py -i data/emoji/pool -o data/emoji/tic/emoji/yearly -s data/emoji/uids -j 2

SUBSETS is one .npy of UIDs (then OUT is the split), or a folder of {name}.npy (then OUT/{name}/ are the splits). POOL,
OUT, SUBSETS and CLASSES are paths or s3://, gs://, az:// URLs. Writes {:08d}.tar, {:08d}_stats.json, sizes.json,
sample_ids.npy and, last, meta.json in each split; with --parts, in each {split}/{part:05d}/. The bytes do not depend on
-j, --engine or interruptions: the same command goes on where it was.
"""

from tic_clip.cli import Parser, run_main
from tic_clip.data.reshard import ENGINES, reshard, table


def main() -> None:
    """Parse the flags, reshard, and print a table of the splits."""
    parser = Parser(__doc__)
    parser.add_argument("-i", "--input-dir", required=True, help="the pool: a folder of .tar shards")
    parser.add_argument("-o", "--output-dir", required=True, help="the split, or the folder of the splits")
    parser.add_argument("-s", "--subset-file", required=True, help="a .npy of UIDs, or a folder of them")
    parser.add_argument("-c", "--cls-file", help="a .npy of UIDs and class ids (adds cls), or a folder of them")
    parser.add_argument("-j", "--num-workers", type=int, default=1, help="processes (of each part, on Ray; default: 1)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="most samples in a shard (default: 10000)")
    parser.add_argument("--parts", type=int, default=1, help="blocks that the pool is cut into (default: 1)")
    parser.add_argument("--part", type=int, help="make this part only, counted from 0: one job of an array")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where parts run (default: local)")
    parser.add_argument("--ray-address", help="a Ray cluster, or auto; by default one is started on this machine")
    parser.add_argument("--skip-bad-shards", action="store_true", help="leave out pool shards that can't be read")
    parser.add_argument("--overwrite", action="store_true", help="replace splits made with other arguments")
    parser.add_argument("--dry-run", action="store_true", help="count, write nothing")
    args = parser.parse_args()
    splits = reshard(
        args.input_dir,
        args.output_dir,
        args.subset_file,
        classes=args.cls_file,
        num_workers=args.num_workers,
        shard_size=args.shard_size,
        parts=args.parts,
        part=args.part,
        engine=args.engine,
        ray_address=args.ray_address,
        skip_bad_shards=args.skip_bad_shards,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
    )
    print(table(splits))
    if args.dry_run:
        print("dry run: nothing was written")


if __name__ == "__main__":
    run_main(main)
