"""torchrun that ends without a traceback of its own after Ctrl-C, or after an error that a process has told of.

    python -m tic_clip.launch --standalone --nproc-per-node 2 scripts/train.py --benchmark emoji …

Its flags are torchrun's, and so are its processes; scripts/loop.sh starts steps with it.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Start the processes, wait for them, and exit as the first that fails."""
    logging.disable(logging.ERROR)  # in this process only: what the others say is theirs
    try:
        run.main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            sys.exit(f"error: rank {rank} was killed by signal {-failure.exitcode}; 9 is often a lack of memory")
        sys.exit(failure.exitcode)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    main()
