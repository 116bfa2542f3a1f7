"""Split RedCaps by year into TiC-RedCaps: a training and a test list for each step.

    python dataset_creation/tic-redcaps/create_splits.py --annotations-path annotations --output-path data/splits

The folder holds RedCaps' annotations, {subreddit}_{year}.json. A sample's year is that of its created_utc, in UTC. Its
caption is unchanged, on one line. One in a hundred is held out, by a hash of the image's id. Writes
{train,test}_batch_{step}.csv (key, image, caption, date; sorted by UID) and, last, manifest.json.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data import pairs


def main() -> None:
    """Parse the flags, cut, and print a table of the lists."""
    parser, text = Parser(__doc__), "{subreddit}_{year}.json"
    parser.add_argument("--annotations-path", dest="input_path", metavar="DIR", required=True, help=text)
    pairs.main(parser, "redcaps")


if __name__ == "__main__":
    run_main(main, on_interrupt="start over")
