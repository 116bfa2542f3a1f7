"""Split YFCC15M by upload year into TiC-YFCC15M: a training and a test list for each step.

    python dataset_creation/tic-yfcc15m/create_splits.py --csv-path yfcc15m.csv --output-path data/splits -j 8

The table has the columns key, title, description, usertags and dateuploaded (seconds since 1970; years are UTC). The
caption is "title. description. usertags", URL-decoded, mended by ftfy, without HTML tags, its first 500 characters. One
in a hundred is held out, by a hash of the key, and so is the same in both benchmarks. Writes
{train,test}_batch_{step}.csv (key, image, caption, date; sorted by UID) and, last, manifest.json.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data import pairs


def main() -> None:
    """Parse the flags, cut, and print a table of the lists."""
    parser = Parser(__doc__)
    parser.add_argument("--csv-path", dest="input_path", metavar="CSV", required=True, help="the table, yfcc15m.csv")
    choices = ("yfcc15m", "yfcc15m_2011")
    parser.add_argument("--benchmark", choices=choices, default="yfcc15m", help="which steps (default: yfcc15m)")
    pairs.main(parser, "yfcc15m")


if __name__ == "__main__":
    run_main(main, on_interrupt="start over")
