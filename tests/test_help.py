"""--help of every script: an example of its use, and a description of every flag, in a moment."""

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("scripts", "dataset_creation", "bench")
IMPORTED = set(ROOT.glob("*/**/require_venv.py"))
PYTHON_SCRIPTS = sorted({path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py")} - IMPORTED)
MODULES = ("tic_clip.benchmarks",)
BASH_SCRIPTS = sorted([*ROOT.glob("*.sh"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.sh"))])
SOURCED = [path for path in BASH_SCRIPTS if not path.read_text().startswith("#!")]
COMMANDS = [str(path.relative_to(ROOT)) for path in PYTHON_SCRIPTS] + [f"-m {name}" for name in MODULES]
RUNS = [str(path.relative_to(ROOT)) for path in BASH_SCRIPTS if path not in SOURCED]
WITH_ARGUMENTS = ("setup.sh", "convert_wds.sh", "fetch_models.sh", "run_tests.sh", "slurm.sh")


def run(command, folder, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def examples(text, command):
    """The lines of a help that begin with a command, after settings of the environment."""
    found = re.findall(
        rf"^ +((?:\w+=(?:\S+|\".*?\") )*{re.escape(command)}(?: .*)?)$", text.replace("\\\n", ""), re.MULTILINE
    )
    return [shlex.split(line, comments=True) for line in found]


HELP = """
import contextlib, io, json, os, runpy, sys
printed, path = {}, sys.path[0]
for command in sys.argv[1:]:
    *module, name = command.split()
    sys.argv, sys.path[0] = [name, "--help"], os.path.dirname(name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed[command]:
        (runpy.run_module if module else runpy.run_path)(name, run_name="__main__")
assert "torch" not in sys.modules
print(json.dumps({command: text.getvalue() for command, text in printed.items()}))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """What each Python command prints, all in one process, which imports no torch and writes nothing."""
    folder = tmp_path_factory.mktemp("help")
    commands = {command if command.startswith("-m") else str(ROOT / command): command for command in COMMANDS}
    done = run([sys.executable, "-W", "ignore", "-c", HELP, *commands], folder)
    assert (done.returncode, done.stderr, list(folder.iterdir())) == (0, "", [])
    return {commands[name]: text for name, text in json.loads(done.stdout).items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_python_shows_an_example_whose_flags_exist_and_needs_no_torch(command, helps):
    shown = [each for name in ("python", ".venv/bin/python") for each in examples(helps[command], f"{name} {command}")]
    assert shown
    flags = re.findall(r"^  (-\S.*?)(?:  |$)", helps[command], re.MULTILINE)
    known = {flag for line in flags for flag in re.findall(r"--?[\w-]+", line)}
    used = {word for words in shown for word in words[2:] if word.startswith("-") and word != "-m"}
    assert used <= known


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.startswith(("scripts/", "dataset_creation/"))])
def test_another_python_is_one_line_that_names_ours(command):
    done = run([sys.executable, "-S", command, "--help"], ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: No module named 'tic_clip': use ")
    assert done.stderr.endswith(f" .venv/bin/python {command}\n")


class Stop(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_described_with_its_default(command, monkeypatch):
    def stop(parser, *_):
        raise Stop(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    script = ROOT / (command.removeprefix("-m ").replace(".", "/") + ".py" if command.startswith("-m") else command)
    monkeypatch.syspath_prepend(script.parent)
    with pytest.raises(Stop) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    actions = stopped.value.args[0]._actions
    assert [action.dest for action in actions if not action.help] == []
    shown = [action for action in actions if action.help is not argparse.SUPPRESS]
    told = {action.dest: re.findall(r"default: (.+?)\)?$", action.help) for action in shown}
    silent = (None, False, "", argparse.SUPPRESS)
    assert [action.dest for action in shown if action.default not in silent and not told[action.dest]] == []
    numbers = {action.dest: action.default for action in shown if type(action.default) in (int, float)}
    if command == "scripts/evaluate.py":
        numbers["workers"] = "its cores - 1"
    assert {name: told[name][0].replace(",", "") for name in numbers} == {name: str(numbers[name]) for name in numbers}


@pytest.mark.parametrize("command", RUNS)
def test_bash_shows_its_head_with_an_example_and_does_nothing(command, tmp_path):
    for flag in ("--help", "-h"):
        done = run(["bash", str(ROOT / command), flag], tmp_path, PATH=os.environ["PATH"])
        assert (done.returncode, done.stderr) == (0, "")
    head = re.findall(r"^#(?:$| (.*))", (ROOT / command).read_text().partition("\nset -")[0], re.MULTILINE)
    assert done.stdout.splitlines()[: len(head)] == head
    name = "sbatch" if command == "scripts/slurm.sh" else "bash"
    assert examples(done.stdout, f"{name} {command}") or f" {command} scripts/run_" in done.stdout
    assert ("METHOD" in done.stdout) >= ("BENCHMARK" in (ROOT / command).read_text())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [name for name in RUNS if Path(name).name not in WITH_ARGUMENTS])
def test_bash_refuses_an_argument_in_one_line(command, tmp_path):
    done = run(["bash", command, "--method=lwf"], ROOT, DATA_DIR=str(tmp_path), OUT=str(tmp_path / "out"))
    said = "unknown argument --method=lwf: settings come from the environment, as in NAME=value bash"
    assert (done.returncode, done.stderr) == (1, f"error: {said} {command} (--help shows them)\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", SOURCED, ids=lambda path: path.name)
def test_what_others_source_says_so(path):
    shown = run(["bash", str(path), "--help"], ROOT)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[0] == path.read_text().splitlines()[0].removeprefix("# ")
    if path.name != "cli.sh":
        done = run(["bash", str(path)], ROOT)
        said = f"error: scripts/{path.name} is a part of the run_*.sh: start one of those\n"
        assert (done.returncode, done.stderr) == (1, said)
