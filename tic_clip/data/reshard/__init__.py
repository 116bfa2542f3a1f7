"""Cut a pool of tars into any number of splits in one pass: ``options``, ``index``, ``writer``, ``part`` (the loop)."""

from tic_clip.data.reshard.options import ENGINES, find_subsets, reshard

__all__ = ["ENGINES", "find_subsets", "reshard"]
