"""Say which Python to use, in one line, where another one runs a script: each imports this first."""

import os
import sys
from pathlib import Path

try:
    import tic_clip.cli  # noqa: F401
except ModuleNotFoundError as error:
    python = os.path.relpath(Path(__file__).resolve().parents[1] / ".venv/bin/python")
    raise SystemExit(f"error: {error}: use the Python of bash setup.sh: {python} {sys.argv[0]}") from None
