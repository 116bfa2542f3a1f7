"""Verify a split: counts, names, gaps, damage, keys, and how much of its UID list it has.

    python dataset_creation/verify.py data/emoji/tic/emoji/yearly/train/2014 --subset data/emoji/uids/train/2014.npy

(scripts/run_emoji_cumulative.sh makes this split.) Reads every shard once and prints a line per fault; exits with 1 if
there is one. Missing UIDs of the subset are counted but are no fault, because links die. Writes nothing.
"""

from collections import Counter

import require_venv  # noqa: F401

from tic_clip.cli import Parser, run_main
from tic_clip.data.verify import verify


def main() -> int:
    """Parse the flags, verify, and print the faults and the counts."""
    parser = Parser(__doc__)
    parser.add_argument("split", help="a folder of .tar shards, or of parts; local or a URL")
    parser.add_argument("--subset", help="the .npy of UIDs that the split was made from")
    parser.add_argument("-j", "--num-workers", type=int, default=1, help="processes (default: 1)")
    args, seen, count = parser.parse_args(), Counter(), 0
    for count, fault in enumerate(verify(**vars(args), seen=seen), 1):  # noqa: B007
        print(fault)
    faults = f"{count or 'no'} fault{'s' * (count != 1)}"
    print(f"{args.split}: {seen['samples']} samples in {seen['shards']} shards, {faults}")
    if args.subset:
        wanted, there = seen["wanted"], seen["there"]
        coverage = there * 10_000 // wanted / 100 if wanted else 100.0  # rounded down: 100 is all
        print(f"{args.subset}: {there} UIDs there, {wanted - there} missing (coverage {coverage:.2f} %)")
    return 1 if count else 0


if __name__ == "__main__":
    run_main(main)
