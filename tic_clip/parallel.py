"""Where work runs: in threads or processes of this machine, or on a Ray cluster."""

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
    """Yield ``work(job)`` for each job in order, from threads or processes; see ``map_in_pool``."""
    with make_pool(num_workers, threads=not use_processes) as pool:
        yield from map_in_pool(pool, work, jobs, 4 * num_workers)


def map_in_pool(
    pool: Executor, work: Callable[[Job], Result], jobs: Iterable[Job], max_pending: int
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job in order; at most ``max_pending`` jobs are taken and not yet yielded.

    An error of a job is raised as it is, that of a process that died as a ``TicError``; both shut the pool down.
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
    """Return an executor of ``num_workers`` processes that end with this one, or of threads; of a thread for 1 worker.

    ``fork`` starts them at once as copies of this process: quicker, but it must have no threads and no connections to a
    cloud, which the copies would share.
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
    """Leave Ctrl-C to the parent process, and end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.set_threshold(100_000)  # an index is many small objects and no cycles
    end_with(parent, signal.SIGKILL)


def end_with(parent: int, number: int) -> None:
    """Have this process get a signal when ``parent``, which has started it, ends, however it does (Linux)."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)  # it has ended before


def map_on_ray(
    work: Callable[[Job], Result], jobs: Iterable[Job], *, num_cpus: int, address: str | None
) -> Iterator[Result]:
    """Yield ``work(job)`` for each job as it ends, on a Ray cluster; jobs of a lost machine run again on others.

    ``address``: that of the cluster, "auto" for one that this machine belongs to; else RAY_ADDRESS or one started here.
    Raises a TicError if Ray is not installed or there is no cluster, and an error of a job as it is.
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
    """Yield the batches of a torch ``DataLoader``; a TicError or OSError in it becomes a TicError without traceback."""
    try:
        yield from loader
    except (TicError, OSError) as error:  # a worker's comes with its traceback, the message last
        message = str(error).strip().splitlines()[-1]
        raise TicError(re.sub(r"^tic_clip\.\S+Error: ", "", message)) from None


def share(tensor: Any) -> Any:
    """Return a loader process's tensor in shared memory: an error if that is full, for which torch's queue waits."""
    from torch.utils.data import get_worker_info

    return tensor.share_memory_() if get_worker_info() else tensor
