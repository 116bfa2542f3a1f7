"""Pack the lists of create_splits.py and their images into shards: of TiC-YFCC15M, TiC-RedCaps, and your own data.

    python dataset_creation/create_tars.py --csv-path data/lists/yfcc15m --image-path images --output-path data -j 8

Images may be at the paths in the lists, flat, with other suffixes, in zips, or in tars such as img2dataset's. Those of
your own data must be at their paths, in the folder or in an archive. Nothing there is changed. Writes train/{step}/,
eval/retrieval/{step}/ and, for lists with labels, eval/labels/{step}/ to DATA/tic/{dataset}/{cadence}/. Each has
{:08d}.tar with samples in the order of their UIDs (the image's bytes unchanged, txt, json), {:08d}_stats.json,
sizes.json, sample_ids.npy and, last, meta.json. For your own data, test images whose bytes are in a training set are
left out. The output does not depend on -j or interruptions: run the same command again to resume. Finished splits are
kept.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, add_flags, from_flags, run_main
from tic_clip.data.folder import table
from tic_clip.data.pack import TEMPLATES, PackOptions, create_tars


def main() -> None:
    """Parse the flags, pack, and print a table of the splits and of what is in none."""
    parser = Parser(__doc__)
    parser.add_argument("--csv-path", required=True, help="the lists: the output folder of create_splits.py")
    parser.add_argument("--image-path", required=True, help="the folder of the images")
    parser.add_argument("--output-path", required=True, help="the folder of all data (train.py's --data_dir)")
    add_flags(parser, PackOptions)
    text = f"a prompt template, repeatable (default: {' and '.join(TEMPLATES)})"
    parser.add_argument("--template", dest="templates", action="append", metavar="TEXT", help=text)
    args = parser.parse_args()
    args.templates = args.templates or TEMPLATES
    splits, dropped = create_tars(args.csv_path, args.image_path, args.output_path, from_flags(PackOptions, args))
    print(table(splits))
    if dropped:
        print("dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items())))


if __name__ == "__main__":
    run_main(main)
