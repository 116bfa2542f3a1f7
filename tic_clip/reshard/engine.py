"""Run a function over many jobs in several processes, results in the order of the jobs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from tic_clip import TicError

Job, Result = TypeVar("Job"), TypeVar("Result")


def run(work: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order; at most four jobs a process are under way or waiting at any time.

    Raises:
        TicError: a process died (out of memory, say); an error of a job is raised as it is.
    """
    if num_workers == 1:
        yield from map(work, jobs)
        return
    context = get_context("spawn")  # a fork would share the parent's open connections to a cloud
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= 4 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise TicError("a worker process died (out of memory?); try fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)
