"""setup.sh in a copy of the checkout; a script in place of uv hands out OpenCLIP's files as its wheel has them."""

import itertools
import os
import re
import shutil
import subprocess
import tomllib
from functools import partial

import pytest
from conftest import ROOT, times

PYTHON = """#!/bin/bash
cd {tmp} && echo "$*" >> calls
case "$*" in
    *"pip sync"*) [ ! -e stop ] || exit 7; rm -rf checkout/.venv/lib/*/*/open_clip ;;
    *"--target open_clip_models.tmp"*)
        [[ "$(cat)" = "open_clip_torch==3.3.0 --hash=sha256:"c549ad5e* ]] || exit 8
        mkdir checkout/open_clip_models.tmp ;;
    *--target*)
        [ ! -p wait ] || cat wait
        [[ "$(cat)" = "open_clip_torch==2.24.0 --hash=sha256:"{sha256} ]] || exit 8
        mkdir -p checkout/open_clip.tmp/src && cp -r {wheel}/src checkout/open_clip.tmp ;;
esac
"""
SHA256 = "2537dbe76c8008caa46652bc97cb32bceeae56baff6289e7b4eb22539a80c801"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    git = ["git", "-c", "safe.directory=*", "-C", ROOT / "open_clip"]
    subprocess.run([*git, "checkout-index", "--all", f"--prefix={folder}/"], check=True)
    return folder


@pytest.fixture
def checkout(tmp_path, wheel):
    """What setup.sh reads, and a .venv in which the packages of requirements.txt are installed."""
    folder = tmp_path / "checkout"
    for name in ("bin", "lib/python3.11/site-packages"):
        (folder / ".venv" / name).mkdir(parents=True)
    (folder / ".venv/pyvenv.cfg").write_text("relocatable = true\n")
    for name in ("setup.sh", "open_clip.patch", "datacomp.patch", "requirements.txt", "requirements-all.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(ROOT / "requirements.txt", folder / ".venv/tic-clip.stamp")
    (folder / ".venv/bin/python").write_text(PYTHON.format(tmp=tmp_path, wheel=wheel, sha256=SHA256))
    (folder / ".venv/bin/python").chmod(0o755)
    return folder


def setup(checkout, *arguments, code=0, **settings):
    """What setup.sh says."""
    command, env = ["bash", "setup.sh", *arguments], {**os.environ, **settings}
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=env)
    assert done.returncode == code, done.stderr
    return done.stderr


def test_open_clip_is_patched_and_a_ready_checkout_is_not_written_to(checkout):
    """Nor has it to be one's own: git's own tests take a folder for another user's by the variable."""
    states = []
    for _ in range(2):
        assert setup(checkout, GIT_TEST_ASSUME_DIFFERENT_OWNER="1") == "setup: ready: .venv open_clip\n"
        states.append(times(checkout.parent))
    assert states[0] == states[1]
    assert "tic_clip" in (checkout / "open_clip/src/training/main.py").read_text()


def test_two_at_once_in_a_fresh_clone(checkout, tmp_path):
    os.mkfifo(tmp_path / "wait")
    start = partial(subprocess.Popen, ["bash", "setup.sh"], cwd=checkout, stderr=subprocess.PIPE, text=True)
    with start() as first, open(tmp_path / "wait", "w") as held, start() as second:  # open waits for the first to read
        assert second.stderr.readline() == "setup: waiting for another setup.sh\n"
        held.close()
        assert (first.wait(), second.wait()) == (0, 0)
    assert (tmp_path / "calls").read_text().count("\n") == 1


def test_a_later_openclip_is_installed_once_beside_the_patched_one(checkout, tmp_path):
    for _ in range(2):
        assert setup(checkout, "--models") == "setup: ready: .venv open_clip open_clip_models\n"
    assert (tmp_path / "calls").read_text().count("--target open_clip_models.tmp") == 1
    assert not (checkout / "open_clip_models.tmp").exists()


def test_a_newer_patch_replaces_the_old_one_but_not_edits_by_hand(checkout):
    setup(checkout)
    patch, file = checkout / "open_clip.patch", checkout / "open_clip/src/training/params.py"
    patch.write_text(patch.read_text().replace("unless this experiment", "except where this experiment"))
    setup(checkout)
    assert "except where this experiment" in file.read_text()
    file.write_text(file.read_text() + "# mine\n")
    assert "edits that are not in open_clip.patch" in setup(checkout, code=1)
    assert file.read_text().endswith("# mine\n")


def test_a_clone_at_the_pinned_commit_is_taken_as_it_is(checkout, wheel, tmp_path):
    """What `git clone; git checkout; git apply ../open_clip.patch` leaves."""
    shutil.copytree(wheel / "src", checkout / "open_clip/src")
    git = ["git", "-C", checkout / "open_clip", "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "pinned"], ["apply", "../open_clip.patch"]):
        subprocess.run([*git, *arguments], check=True)
    setup(checkout)
    assert not (tmp_path / "calls").exists()


def test_packages_are_installed_again_after_an_interruption_and_can_be_moved(checkout, tmp_path):
    """The lines of the .pth lead from site-packages to the checkout, wherever it is."""
    site = checkout / ".venv/lib/python3.11/site-packages"
    (site / "open_clip").mkdir()  # of a package that a user has added; it would hide the patched one
    (tmp_path / "stop").touch()
    setup(checkout, code=7)
    (tmp_path / "stop").unlink()
    (site / "open_clip").rmdir()
    setup(checkout)
    calls = re.findall(r"-m (pip|uv --quiet \w+ ?\S+)", (tmp_path / "calls").read_text())
    assert calls == ["pip", "uv --quiet venv --relocatable", "uv --quiet pip sync"] * 2 + ["uv --quiet pip install"]
    moved = checkout.rename(tmp_path / "moved")
    site = moved / site.relative_to(checkout)
    lines = (site / "tic_clip_open_clip.pth").read_text().splitlines()
    assert [os.path.normpath(site / line) for line in lines] == [str(moved), str(moved / "open_clip/src")]


def test_a_wrong_python_or_argument_is_one_line(checkout):
    (checkout / ".venv/tic-clip.stamp").unlink()
    for python, message in ("/nope", "PYTHON=/nope does not exist"), ("false", "false is older than 3.11"):
        (line,) = setup(checkout, code=1, PYTHON=python).splitlines()
        assert line.startswith(f"setup: error: {message}; set PYTHON=")
    assert "unknown argument --nonsense; there is --all, " in setup(checkout, "--nonsense", code=1)


@pytest.mark.skipif(not (ROOT / "datacomp").exists(), reason="needs datacomp/: bash setup.sh --datacomp")
def test_datacomp_is_cloned_and_patched_on_request(checkout):
    assert "ready: .venv datacomp open_clip" in setup(checkout, "--datacomp", DATACOMP_GIT=str(ROOT / "datacomp"))
    (checkout / "datacomp/tasklist.yml").write_text("mine: {}")  # as users do
    patch = checkout / "datacomp.patch"
    patch.write_text(patch.read_text().replace("tic_clip.datacomp.scales()", "tic_clip.datacomp.new()"))
    setup(checkout)  # without the flag, too
    assert "tic_clip.datacomp.new()" in (checkout / "datacomp/scale_configs.py").read_text()
    assert (checkout / "datacomp/tasklist.yml").read_text() == "mine: {}"


def test_all_packages_are_installed_on_request_and_stay(checkout, tmp_path):
    stamp = checkout / ".venv/tic-clip.stamp"
    for arguments, name in (((), "requirements"), (("--all",), "requirements-all"), ((), "requirements-all")):
        setup(checkout, *arguments)
        assert stamp.read_text() == (ROOT / f"{name}.txt").read_text()
    assert re.findall("pip sync.* (requirements.*txt)", (tmp_path / "calls").read_text()) == ["requirements-all.txt"]


def test_requirements_are_pins_of_every_direct_dependency_but_open_clip():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    plain = [*project["dependencies"], *extras["emoji"]]
    for wanted, file in ((plain, ""), ([*plain, *itertools.chain(*extras.values())], "-all")):
        names = {re.split(r"[\[>=]", requirement)[0].lower().replace("_", "-") for requirement in wanted}
        lines = (ROOT / f"requirements{file}.txt").read_text().splitlines()
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
        assert names - {line.split("==")[0] for line in lines} == {"open-clip-torch"}  # setup.sh has its hash


def test_git_ignores_what_readme_puts_into_the_checkout():
    names = ["pool/x", "sources/x", "data/x", "results/x", "tic_clip/data/x"]
    done = subprocess.run(["git", "check-ignore", *names], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == names[:-1]
