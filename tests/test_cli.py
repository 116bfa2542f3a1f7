import os
import subprocess
import sys
import termios

import pytest

from tic_clip.cli import Parser


def call(body, **options):
    """Run ``main``, whose body is given, in a process of its own: its status, output and errors."""
    code = f"import os, time\nfrom tic_clip import TicError, cli, storage\ndef main():\n    {body}\ncli.run_main(main)"
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    done = subprocess.run([sys.executable, "-c", code], text=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        ("return 3", 3, ""),
        ("raise TicError('no data in x')", 1, "error: no data in x\n"),
        ("os.rename('/nowhere', '/else')", 1, "error: /else: No such file or directory\n"),
        ("raise storage.StorageError('s3://b/x: Access Denied')", 1, "error: s3://b/x: Access Denied\n"),
    ],
)
def test_the_status_is_what_main_returns_and_an_error_is_one_line(body, status, line):
    assert call(body) == (status, "", line)


def test_a_mistake_of_ours_keeps_its_traceback():
    status, _, stderr = call("return {}['x']")
    assert (status, stderr.partition(" ")[0]) == (1, "Traceback")


@pytest.mark.parametrize(("body", "expected"), [("raise KeyboardInterrupt", 130), ("os.kill(os.getpid(), 15)", 143)])
def test_an_interruption_is_one_line_and_removes_temporary_files(body, expected, tmp_path):
    status, _, stderr = call(f"with storage.temporary_folder(): {body}", env={"TMPDIR": str(tmp_path)})
    assert (status, stderr) == (expected, "interrupted: run the same command again to resume\n")
    assert list(tmp_path.iterdir()) == []


def test_the_line_does_not_stand_behind_a_progress_bar():
    status, _, stderr = call("for _ in cli.progress('abc', 'letters', 3): raise OSError(28, 'full', 'x')")
    assert (status, stderr.splitlines()[-1]) == (1, "error: x: full")


def test_only_the_first_process_shows_progress():
    body = "print(list(cli.progress(iter('abc'), 'letters', 3)))"
    first, second = call(body, env={"RANK": "0"}), call(body, env={"RANK": "1"})
    assert first[:2] == second[:2] == (0, "['a', 'b', 'c']\n")
    assert "letters: 100%" in first[2]
    assert second[2] == ""


def test_each_flag_is_taken_with_dashes_and_with_underscores():
    parser = Parser(None)
    parser.add_argument("--data_dir")
    parser.add_mutually_exclusive_group().add_argument("--image-path")
    for words in (["--data_dir", "a_b", "--image-path=c-d"], ["--data-dir=a_b", "--image_path", "c-d"]):
        assert vars(parser.parse_args(words)) == {"data_dir": "a_b", "image_path": "c-d"}
    assert "--data-dir" not in parser.format_help()


@pytest.mark.parametrize("body", ["print('x' * 99_999)", "time.sleep(0.5); print('x')"])
def test_a_reader_that_stops_early_is_not_an_error(body):
    """As in ``DRY_RUN=1 … | head``."""
    reader, writer = os.pipe()
    os.close(reader)
    assert call(body, stdout=writer) == (141, None, "")
    os.close(writer)


BAR = "for _ in cli.progress(range(4), 'read', 4, 'row'): time.sleep(0.02)"


@pytest.mark.parametrize(("minute", "expected"), [(0.01, [0, 1, 2, 3, 4]), (60.0, [0, 4])])
def test_a_log_gets_a_line_a_minute(minute, expected):
    _, _, stderr = call(f"cli.MINUTE = {minute}\n    {BAR}")
    assert "\r" not in stderr
    assert sorted({int(line.split("/")[0].split()[-1]) for line in stderr.splitlines()}) == expected


def test_a_terminal_gets_a_bar():
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    assert call(BAR, stderr=slave)[0] == 0
    written = os.read(master, 4096).decode()
    assert written.startswith("\rread:   0%|")
    assert "4/4" in written.rstrip().rpartition("\r")[2]
