"""From a pool to splits: lists of UIDs, tar shards, resharding, packing, verification."""
