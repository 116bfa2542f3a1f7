"""Where work runs: in threads or processes of this machine, or on a Ray cluster."""

import ctypes
import gc
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

from tic_clip import TicError

Job, Result = TypeVar("Job"), TypeVar("Result")

_PR_SET_PDEATHSIG = 1

# A fork would share the parent's open connections to a cloud.
processes = partial(ProcessPoolExecutor, mp_context=get_context("spawn"))


def map_ordered(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_workers: int,
    *,
    use_processes: bool = False,
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order; at most four jobs a worker are under way or waiting at any time.

    Args:
        work: for processes, a function of a module, as are its jobs and results whatever can be pickled.
        jobs: taken one by one, as there is room.
        num_workers: 1 is this thread itself.
        use_processes: processes instead of threads, where the work is Python's own.

    Raises:
        TicError: a process died; an error of a job is raised as it is.
    """
    if num_workers < 1:
        raise TicError("the number of workers must be at least 1")
    if num_workers == 1:
        yield from map(work, jobs)
        return
    with (processes if use_processes else ThreadPoolExecutor)(num_workers) as pool:
        yield from map_in_pool(pool, work, jobs, 4 * num_workers)


def map_in_pool(pool: Executor, work: Callable[[Job], Result], jobs: Iterable[Job], most: int) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order from an open executor; at most ``most`` are under way or waiting.

    Raises:
        TicError: a process died; an error of a job is raised as it is. The executor is shut down then.
    """
    waiting = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise TicError("a worker process died (out of memory?); try fewer workers") from None
    finally:
        if waiting:
            pool.shutdown(cancel_futures=True)


class Inline(Executor):
    """Runs each job at once, in this process."""

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> "Future[Result]":
        """The result of ``fn``, already there."""
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except (TicError, OSError) as error:
            future.set_exception(error)
        return future


def make_pool(count: int, *, fork: bool = False) -> Executor:
    """An executor of ``count`` processes (of none but this one for 1).

    ``fork`` starts them at once, as copies of this process: quicker, but it must have no threads and no connections to
    a cloud, which the copies would share.
    """
    if count == 1:
        return Inline()
    context = get_context("fork" if fork else "spawn")
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_tie_to_parent, initargs=(os.getpid(),))
    if fork:
        executor.submit(os.getpid)
    return executor


def _tie_to_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however it does (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(100_000)  # an index is many small objects and no cycles
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it has ended before


def map_on_ray(work: Callable[[Job], Result], jobs: Iterable[Job], *, num_cpus: int, address: str | None) -> Iterator:
    """Yield ``work(job)`` for each job as it ends, on a Ray cluster: that of ``address`` ("auto": one that this machine
    belongs to), that of the variable RAY_ADDRESS, or one started here. Jobs of a lost node are run again on others.

    Raises:
        TicError: Ray is not installed or there is no cluster; an error of a job is raised as it is.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError:
        raise TicError("--engine ray needs Ray: pip install 'tic-clip[ray]'") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about anybody's run goes out unasked
    started = not ray.is_initialized()
    if started:
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        try:
            _reach(address)
            own = {"include_dashboard": False} if address == "local" else {}
            ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
        except (OSError, ValueError, RuntimeError) as error:
            raise TicError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    try:
        most = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
        if num_cpus > most:
            raise TicError(f"no machine of the Ray cluster has {num_cpus} processors; give -j {most} or less")
        task = ray.remote(work).options(num_cpus=num_cpus, max_retries=10)
        waiting = [task.remote(job) for job in jobs]
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(ready)
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:
                raise TicError(f"a part failed on the Ray cluster: {str(error).splitlines()[0]}") from None
    finally:
        if started:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise an OSError at once where nothing answers at host:port; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
