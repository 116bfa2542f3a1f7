import os
import time

import pytest
from forked import Script

from tic_clip import TicError
from tic_clip.parallel import map_ordered


def slow_square(number):
    time.sleep(0.002 * (number % 3))
    return number * number


def die(number):
    if number == 3:
        os._exit(1)


@pytest.mark.parametrize(("num_workers", "use_processes"), [(1, False), (2, False), (3, True)])
def test_results_come_in_order(num_workers, use_processes):
    for jobs in range(40), []:
        squares = map_ordered(slow_square, jobs, num_workers, use_processes=use_processes)
        assert list(squares) == [number * number for number in jobs]


def test_jobs_are_taken_as_there_is_room():
    taken = []
    results = map_ordered(slow_square, (taken.append(number) or number for number in range(100)), 2)
    assert [next(results), next(results)] == [0, 1]
    assert len(taken) == 9
    results.close()
    assert len(taken) == 9


def test_an_error_is_raised_as_it_is_and_a_process_that_dies_is_one_line():
    for num_workers in 1, 2:
        with pytest.raises(ZeroDivisionError):
            list(map_ordered(lambda number: 1 // number, [1, 0, 1], num_workers))
    with pytest.raises(TicError, match=r"^a worker process died \(out of memory\?\); try fewer workers$"):
        list(map_ordered(die, range(6), 2, use_processes=True))


KILLED = """
import os, signal
from torch.utils.data import DataLoader
from tic_clip.cli import run_main
from tic_clip.parallel import iterate_batches

def load(i):
    os.kill(os.getpid(), signal.SIGKILL)

run_main(lambda: list(iterate_batches(DataLoader([1, 2], batch_size=None, collate_fn=load, num_workers=1))))
"""


def test_a_loader_process_that_is_killed_is_one_line(tmp_path):
    (tmp_path / "script.py").write_text(KILLED)
    done = Script(tmp_path / "script.py").wait()
    line = "error: a loader process ended (killed by signal: Killed); if memory ran out, give fewer --workers\n"
    assert (done.returncode, done.stderr) == (1, line)
