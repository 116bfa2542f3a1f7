"""Features on disk, so that memory does not grow with the number of samples and models."""

import mmap
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.storage import atomic_open

PIECE = 1 << 14  # rows in memory at a time
ADVICE = "set TMPDIR to a larger disk, or lower --models_at_once"


def check_space(name: str, count: int, width: int) -> None:
    """Raise a TicError if TMPDIR has no room for ``count`` features of ``name``."""
    needed, free = 4 * count * width, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        sizes = f"{needed / 1e9:.1f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.1f} GB"
        raise TicError(f"the features of {name} need {sizes}: {ADVICE}")


class Rows:
    """Features appended to an unnamed file in TMPDIR and read as a memory-mapped array."""

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


@dataclass
class Features:
    """One model's features of a folder or of a slice of it."""

    images: Rows = field(default_factory=Rows)
    texts: Rows = field(default_factory=Rows)
    bad: list[int] = field(default_factory=list)  # which samples can't be decoded, and have no row

    def save(self, path: Path) -> None:
        """Write all of them to a file."""
        arrays = {name: rows.read() for name, rows in (("images", self.images), ("texts", self.texts)) if rows.width}
        with atomic_open(path) as file:
            np.savez(file, bad=np.array(self.bad, dtype=np.int64), **arrays)


def read_features(paths: list[Path], slices: list[slice]) -> Features:
    """Return the features of a folder from the files of its slices."""
    features = Features()
    for path, part in zip(paths, slices, strict=True):
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (ValueError, OSError, zipfile.BadZipFile):
            raise TicError(f"{path} is damaged: delete it and start again") from None
        features.bad += (arrays.pop("bad") + part.start).tolist()
        for name, rows in arrays.items():
            getattr(features, name).append(rows)
    return features


def pick(rows: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Return ``rows[which]`` (M, D), also on disk."""
    picked = Rows()
    for start in range(0, len(which), PIECE):
        picked.append(rows[which[start : start + PIECE]])
    return picked.read()


def count_nonfinite(rows: np.ndarray) -> int:
    """Return how many rows hold a NaN or an infinite value."""
    pieces = (rows[start : start + PIECE] for start in range(0, len(rows), PIECE))
    return sum(int((~np.isfinite(piece).all(axis=1)).sum()) for piece in pieces)
