"""Features on disk: memory holds a piece of them, however many samples and models there are."""

import mmap
import shutil
import tempfile

import numpy as np

from tic_clip import TicError

PIECE = 1 << 14  # rows in memory at a time
ADVICE = "set TMPDIR to a larger disk, or lower --models_at_once"


def check_space(name: str, count: int, width: int) -> None:
    """Raise a TicError if ``count`` features of ``name`` have no room in TMPDIR, before hours of encoding them."""
    needed, free = 4 * count * width, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.1f} GB"
        raise TicError(f"the features of {name} need {sizes}: {ADVICE}")


class Rows:
    """Features that are appended to an unnamed file in TMPDIR, and read as an array that lies there, not in memory."""

    def __init__(self) -> None:
        self.file, self.width = tempfile.TemporaryFile(), 0  # noqa: SIM115  its space is free when nobody has it

    def append(self, rows: np.ndarray) -> None:
        """Add float32 ``rows`` (B, D)."""
        try:
            self.file.write(np.ascontiguousarray(rows, dtype=np.float32))
            self.file.flush()
        except OSError as error:
            raise TicError(f"{tempfile.gettempdir()}, where features are kept: {error.strerror}; {ADVICE}") from None
        self.width = rows.shape[1]

    def read(self) -> np.ndarray:
        """Return all rows (N, D)."""
        content = mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ)
        return np.frombuffer(content, dtype=np.float32).reshape(-1, self.width)


def pick(rows: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return ``rows[which]`` (M, D), on disk as they are."""
    picked = Rows()
    for start in range(0, len(which), PIECE):
        picked.append(rows[which[start : start + PIECE]])
    return picked.read()


def count_nonfinite(rows: np.ndarray) -> int:
    """Return how many rows hold a NaN or an infinite value."""
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    return sum(int((~np.isfinite(piece).all(axis=1)).sum()) for piece in pieces)
