"""--help of every script: an example of its use, and a description of every flag, in a moment."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

PATHS = [path for folder in ("bench", "dataset_creation", "scripts") for path in sorted(ROOT.glob(f"{folder}/**/*"))]
PYTHON = [str(path.relative_to(ROOT)) for path in PATHS if path.suffix == ".py" and path.name != "require_venv.py"]
BASH = ["setup.sh", *(str(path.relative_to(ROOT)) for path in PATHS if path.suffix == ".sh")]
SOURCED = [name for name in BASH if not (ROOT / name).read_text().startswith("#!")]
RUNS = [name for name in BASH if name not in SOURCED]
WITH_ARGUMENTS = ("setup.sh", "convert_wds.sh", "fetch_models.sh", "run_tests.sh", "slurm.sh")


def run(command, folder, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def examples(text, command):
    """The words of the lines of a help that begin with a command, after settings of the environment."""
    pattern = rf"^ +((?:\w+=(?:\S+|\".*?\") )*{re.escape(command)}(?: .*)?)$"
    return [shlex.split(line, comments=True) for line in re.findall(pattern, text.replace("\\\n", ""), re.MULTILINE)]


HELP = """
import contextlib, os, runpy, sys
for name in sys.argv[1:]:
    sys.argv, sys.path[0] = [name, "--help"], os.path.dirname(name)
    with contextlib.suppress(SystemExit):
        runpy.run_path(name, run_name="__main__")
assert "torch" not in sys.modules
"""


def test_help_needs_no_torch_and_writes_nothing(tmp_path):
    names = [str(ROOT / name) for name in PYTHON]
    done = run([sys.executable, "-W", "ignore", "-c", HELP, *names, str(ROOT / "tic_clip/benchmarks.py")], tmp_path)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert done.stdout.count("show this help") == len(names) + 1


class Stop(Exception):
    pass


@pytest.fixture
def parse(monkeypatch):
    """Give the parser of a script."""

    def stop(parser, *_):
        raise Stop(parser)

    def parse(name):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.syspath_prepend((ROOT / name).parent)
        with pytest.raises(Stop) as stopped:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return stopped.value.args[0]

    return parse


@pytest.mark.parametrize("name", [*PYTHON, "tic_clip/benchmarks.py"])
def test_python_shows_an_example_whose_flags_exist_and_every_default(name, parse):
    parser = parse(name)
    command = name if name in PYTHON else "-m tic_clip.benchmarks"
    starts = (f"python {command}", f".venv/bin/python {command}")
    used = [words for start in starts for words in examples(parser.format_help(), start)]
    assert used
    flags = {word for words in used for word in words if word.startswith("-") and word != "-m"}
    assert flags <= parser._option_string_actions.keys()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert [action.dest for action in shown if not action.help] == []
    told = {action.dest: re.findall(r"default: (.+?)\)?$", action.help) for action in shown}
    silent = (None, False, "", argparse.SUPPRESS)
    assert [action.dest for action in shown if action.default not in silent and not told[action.dest]] == []
    numbers = {action.dest: str(action.default) for action in shown if type(action.default) in (int, float)}
    if name == "scripts/evaluate.py":
        numbers["workers"] = "its cores - 1"
    assert {dest: told[dest][0].replace(",", "") for dest in numbers} == numbers


@pytest.mark.parametrize("name", [name for name in PYTHON if not name.startswith("bench/")])
def test_another_python_is_one_line_that_names_ours(name):
    done = run([sys.executable, "-S", name, "--help"], ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: No module named 'tic_clip': use ")
    assert done.stderr.endswith(f" .venv/bin/python {name}\n")


@pytest.mark.parametrize("name", RUNS)
def test_bash_shows_its_head_with_an_example_and_does_nothing(name, tmp_path):
    for flag in ("--help", "-h"):
        done = run(["bash", str(ROOT / name), flag], tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    text = (ROOT / name).read_text()
    head = re.findall(r"^#(?:$| (.*))", text.partition("\nset -")[0], re.MULTILINE)
    assert done.stdout.splitlines()[: len(head)] == head
    start = "sbatch" if name == "scripts/slurm.sh" else "bash"
    assert examples(done.stdout, f"{start} {name}") or f" {name} scripts/run_" in done.stdout
    assert ("METHOD" in done.stdout) >= ("BENCHMARK" in text)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith(WITH_ARGUMENTS)])
def test_bash_refuses_an_argument_in_one_line(name, tmp_path):
    done = run(["bash", name, "--method=lwf"], ROOT, DATA_DIR=str(tmp_path), OUT=str(tmp_path / "out"))
    said = "unknown argument --method=lwf: settings come from the environment, as in NAME=value bash"
    assert (done.returncode, done.stderr) == (1, f"error: {said} {name} (--help shows them)\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SOURCED)
def test_what_others_source_says_so(name):
    shown = run(["bash", name, "--help"], ROOT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[0] == (ROOT / name).read_text().splitlines()[0].removeprefix("# ")
    if name != "scripts/cli.sh":
        done = run(["bash", name], ROOT)
        assert (done.returncode, done.stderr) == (1, f"error: {name} is a part of the run_*.sh: start one of those\n")
