"""Where work runs: in threads or processes of this machine."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from tic_clip import TicError

Job, Result = TypeVar("Job"), TypeVar("Result")

# A fork would share the parent's open connections to a cloud.
processes = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))


def each(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_workers: int,
    executor: Callable[[int], Executor] = ThreadPoolExecutor,
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order; at most four jobs a worker are under way or waiting at any time.

    Args:
        work: for processes, a function of a module, as are its jobs and results whatever can be pickled.
        jobs: taken one by one, as there is room.
        num_workers: 1 is this thread itself.
        executor: makes the executor of so many workers; ``processes`` where the work is Python's own.

    Raises:
        TicError: a process died; an error of a job is raised as it is.
    """
    if num_workers == 1:
        yield from map(work, jobs)
        return
    with executor(num_workers) as pool:
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
