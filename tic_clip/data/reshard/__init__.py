"""Cut a pool of tars into any number of splits in one pass: ``options``, ``index``, ``writer``, ``part`` (the loop)."""

from tic_clip.data.reshard.options import find_subsets, reshard
from tic_clip.data.reshard.part import Options

__all__ = ["Options", "find_subsets", "reshard"]
