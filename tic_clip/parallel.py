"""Run jobs in threads, in processes or on a Ray cluster."""

import ctypes
import gc
import os
import re
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from tic_clip import TicError, check_installed

Job, Result = TypeVar("Job"), TypeVar("Result")


def map_ordered(
    work: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int, *, use_processes: bool = False
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job, in order, computed in threads or processes; see ``map_in_pool``."""
    with make_pool(num_workers, threads=not use_processes) as pool:
        yield from map_in_pool(pool, work, jobs, 4 * num_workers)


def map_in_pool(
    pool: Executor, work: Callable[[Job], Result], jobs: Iterable[Job], max_pending: int
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job, in order, with at most ``max_pending`` jobs submitted and not yet yielded.

    Raises a job's own error, or a ``TicError`` if a worker process died; both shut the pool down.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(work, job))
            if len(pending) >= max_pending:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise TicError("a worker process died (out of memory?); try fewer workers") from None
    finally:
        if pending:
            pool.shutdown(cancel_futures=True)


def make_pool(num_workers: int, *, threads: bool = False, fork: bool = False) -> Executor:
    """Return a pool of ``num_workers`` processes that end with this one, or of threads; one worker is a thread.

    ``fork`` starts the processes at once by forking: quicker, but only safe without threads and cloud connections.
    """
    if num_workers < 1:
        raise TicError("the number of workers must be at least 1")
    if num_workers == 1 or threads:
        return ThreadPoolExecutor(num_workers)
    context = get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (os.getpid(),))
    if fork:
        pool.submit(os.getpid)
    return pool


def _start_worker(parent: int) -> None:
    """Ignore Ctrl-C, which the parent handles, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.set_threshold(100_000)  # an index is many small objects and no cycles
    end_with(parent, signal.SIGKILL)


def end_with(parent: int, number: int) -> None:
    """Send this process a signal when its ``parent`` ends, even if that is killed (Linux)."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # the parent has already ended


def map_on_ray(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, num_cpus: int, address: str | None
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job as it finishes on a Ray cluster; jobs of a lost machine run again elsewhere.

    ``address``: the cluster's, or "auto" for the one that this machine belongs to; by default RAY_ADDRESS, or a new
    local cluster. Raises a TicError without Ray or without a cluster, and a job's own error.
    """
    check_installed("ray")
    import ray
    from ray.exceptions import RayError, RayTaskError

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a user's run is sent unasked
    host, _, port = address.rpartition("://")[2].rpartition(":")
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        if host and port.isdigit():  # fail fast if nothing listens there, where Ray would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, configure_logging=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise TicError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None
    try:
        most = int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]))
        if num_cpus > most:  # Ray would wait for such a machine
            raise TicError(f"no machine of the Ray cluster has {num_cpus} cores; give -j {most} or less")
        task = ray.remote(work).options(num_cpus=num_cpus, max_retries=10)
        pending = [task.remote(job) for job in jobs]
        while pending:
            (ready,), pending = ray.wait(pending, num_returns=1)
            yield ray.get(ready)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise TicError(f"a part failed on the Ray cluster: {str(error).splitlines()[0]}") from None
    finally:
        ray.shutdown()


def iterate_batches(loader: Iterable[Job]) -> Iterator[Job]:
    """Yield the batches of a torch ``DataLoader``; turn a worker's TicError or OSError into a one-line TicError."""
    try:
        yield from loader
    except (TicError, OSError) as error:  # a worker's error is its traceback, the message last
        message = str(error).strip().splitlines()[-1]
        raise TicError(re.sub(r"^tic_clip\.\S+Error: ", "", message)) from None


def share(tensor: Any) -> Any:
    """Move a loader worker's tensor to shared memory: an error if that is full, where torch's queue would hang."""
    from torch.utils.data import get_worker_info

    return tensor.share_memory_() if get_worker_info() else tensor
