"""Cut a pool of tar shards into splits: ``options`` (what is asked for), ``index``, ``writer``, ``part`` (the loop).

One pass over the pool serves any number of splits. The bytes depend on the pool and the lists alone, so they are the
same whatever the number of processes or machines, and after an interruption.
"""

from tic_clip.data.reshard.options import ENGINES, find_subsets, reshard

__all__ = ["ENGINES", "find_subsets", "reshard"]
