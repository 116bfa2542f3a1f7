"""torchrun's ends, as who starts a run sees them."""

import os
import signal
import subprocess
import sys
import time

import pytest

BODY = """
import os, pathlib, signal, sys, time
from tic_clip import TicError, cli

def main():
    if os.environ["RANK"] == "1" and sys.argv[1] == "error":
        raise TicError("no data in x")
    if os.environ["RANK"] == "1" and sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path(os.environ["RANK"]).touch()
    time.sleep(60)

cli.run_main(main)
"""


def start(folder, *arguments):
    (folder / "script.py").write_text(BODY)
    command = [
        sys.executable,
        "-m",
        "tic_clip.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
        "script.py",
        *arguments,
    ]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("error", "error: no data in x\n"),
        ("kill", "error: rank 1 was killed by signal 9; 9 is often a lack of memory\n"),
    ],
)
def test_a_process_that_fails_is_one_line(how, said, tmp_path):
    job = start(tmp_path, how)
    assert (job.communicate(timeout=60)[1], job.returncode) == (said, 1)


def test_ctrl_c_is_one_line(tmp_path):
    job = start(tmp_path, "wait")
    until = time.monotonic() + 60
    while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    assert job.communicate(timeout=60)[1] == "interrupted: run the same command again to resume\n"
    assert job.returncode == 130
