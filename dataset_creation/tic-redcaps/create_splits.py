"""Cut RedCaps by year into TiC-RedCaps: a training and a test list of each step.

    python dataset_creation/tic-redcaps/create_splits.py --annotations-path annotations --output-path data/splits

The folder holds RedCaps' annotations, {subreddit}_{year}.json. The year of a sample is that of its created_utc, in UTC;
a caption is as it is given, on one line. One in a hundred is held out, by a hash of the image's id. Writes
{train,test}_batch_{step}.csv (key, image, caption, date; sorted by UID) and, last, manifest.json.
"""

from tic_clip.cli import Parser, run_main
from tic_clip.data.pairs import create_splits, format_table


def main() -> None:
    """Parse the flags, cut, and print a table of the lists."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--annotations-path", dest="input_path", metavar="DIR", required=True, help="{subreddit}_{year}.json")
    flag("--output-path", required=True, help="folder of the lists")
    flag("-j", "--num-workers", type=int, default=1, help="processes that make captions (default: 1)")
    flag("--test-share", type=float, default=0.01, help="fraction that is held out (default: 0.01)")
    flag("--seed", type=int, default=0, help="which samples are held out (default: 0)")
    flag("--skip-bad-rows", action="store_true", help="leave out rows with a fault, and count them")
    flag("--overwrite", action="store_true", help="make the lists again")
    args = parser.parse_args()
    print(format_table(args.output_path, *create_splits("redcaps", **vars(args))))


if __name__ == "__main__":
    run_main(main, on_interrupt="start over")
