import subprocess
import sys

import pytest


def call(body, **environment):
    """Run ``main``, whose body is given, in a process of its own."""
    code = f"from tic_clip import TicError, cli\ndef main():\n    {body}\ncli.run_main(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment or None)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "status"), [("return None", 0), ("return 0", 0), ("return 3", 3), ("print('done')", 0)]
)
def test_the_status_is_what_main_returns(body, status):
    assert call(body) == (status, "done\n" if "print" in body else "", "")


def test_an_error_of_the_user_is_one_line():
    assert call("raise TicError('no data in x')") == (1, "", "error: no data in x\n")


def test_so_is_an_error_of_the_system():
    status, _, stderr = call("open('/nowhere/at/all')")
    assert (status, stderr) == (1, "error: /nowhere/at/all: is missing\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    status, _, stderr = call("return {}['x']")
    assert status == 1
    assert stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("body", "expected"), [("raise KeyboardInterrupt", 130), ("import os; os.kill(os.getpid(), 15)", 143)]
)
def test_an_interruption_is_one_line_and_removes_temporary_files(body, expected, tmp_path):
    body = f"from tic_clip.storage import temporary_folder\n    with temporary_folder(): {body}"
    status, _, stderr = call(body, TMPDIR=str(tmp_path))
    assert (status, stderr) == (expected, "interrupted: run the same command again to resume\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ["TicError('bad')", "OSError(28, 'full', 'x')", "KeyboardInterrupt"])
def test_the_line_does_not_stand_behind_a_progress_bar(error):
    status, _, stderr = call(f"bars = cli.progress('abc', 'letters', 3); next(bars); raise {error}")
    assert status
    assert stderr.splitlines()[-1].startswith(("error: ", "interrupted: "))
    assert stderr.endswith("\n" + stderr.splitlines()[-1] + "\n")


def test_only_the_first_process_shows_progress():
    body = "print(list(cli.progress(iter('abc'), 'letters', 3)))"
    first, second = call(body, RANK="0"), call(body, RANK="1")
    assert first[:2] == second[:2] == (0, "['a', 'b', 'c']\n")
    assert "letters: 100%" in first[2]
    assert second[2] == ""
