"""Run a script in a child of one process that has imported OpenCLIP, which is most of what a launch costs."""

import ctypes
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["training.main", "tic_clip.training.hooks", "tic_clip.training.patching", "tic_clip.datacomp"]
SERVER.set_forkserver_preload(PRELOADED)


class Script:
    """A script that runs in as many ranks as asked for; ``returncode``, ``stdout`` and ``stderr`` when it has ended.

    ``shm``: the size of its /dev/shm, as in Docker ("64m"); it takes root. ``before``: code that runs before it.
    """

    def __init__(self, path, *arguments, ranks=1, folder=".", shm=None, before="", **environment):
        self.output = [tempfile.NamedTemporaryFile("r+") for _ in range(2)]  # noqa: SIM115  read when it has ended
        names = [file.name for file in self.output]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        together = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        each = [{**together, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)] if ranks > 1 else [{}]
        words = [str(path), *map(str, arguments)]
        folder = os.path.abspath(folder)
        self.processes = [
            SERVER.Process(target=run, args=(words, folder, environment | own, names, shm, before)) for own in each
        ]
        for process in self.processes:
            process.start()

    def kill(self):
        """End it as a power cut does."""
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def wait(self):
        """Wait for its end; one rank that fails ends the others, as torchrun does it."""
        running = list(self.processes)
        while running:
            ended = multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [process for process in running if process.sentinel in ended]:
                process.join()
                running.remove(process)
                for other in running if process.exitcode else ():
                    other.terminate()
        self.returncode = max(abs(process.exitcode) for process in self.processes)
        self.stdout, self.stderr = (file.read() for file in self.output)
        return self


def run(words, folder, environment, names, shm, before):
    """Be the script: in a session of its own, with its arguments, folder, environment, output and size of /dev/shm."""
    os.setsid()
    if shm:
        ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: mounts of its own
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={shm}", "none", "/dev/shm"], check=True)
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.environ.update(environment)
    for number, name in enumerate(names, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    exec(before, {})
    runpy.run_path(words[0], run_name="__main__")
