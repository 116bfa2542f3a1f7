"""Download the published TiC-CLIP models from the Hugging Face Hub.

    python scripts/fetch_models.py data/models basic-cumulative 2016 2022

fetch_models.sh calls it; see its --help.
"""

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.released import download_models
from tic_clip.models import RELEASED


def main() -> None:
    """Parse the arguments, download, and print one line a file."""
    parser = Parser(__doc__)
    parser.add_argument("output_dir", help="the folder to download to")
    parser.add_argument("model", nargs="?", help=f"one of {', '.join(RELEASED)} (default: all)")
    parser.add_argument("years", nargs="*", default=[], help="the checkpoints to download (default: all)")
    for path in download_models(**vars(parser.parse_args())):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB", flush=True)


if __name__ == "__main__":
    run_main(main)
