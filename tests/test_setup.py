"""setup.sh and the bash scripts, in a copy of the checkout that shares nothing but the installed packages."""

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """What setup.sh reads, and a .venv with OpenCLIP's wheel and a python that refuses to do more than name it."""
    for name in (
        "setup.sh",
        "open_clip.patch",
        "datacomp.patch",
        "open_clip.sha256",
        "requirements.txt",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, tmp_path)
    site = next((ROOT / ".venv/lib").glob("python3*/site-packages"))
    fake = tmp_path / ".venv/site"
    for package in ("open_clip", "training"):
        shutil.copytree(site / package, fake / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv/bin").mkdir()
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo "{fake}"; else echo "called: $*" >&2; exit 9; fi\n')
    python.chmod(0o755)
    stamp = subprocess.run(
        "cat requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1", shell=True, cwd=tmp_path, capture_output=True
    )
    (tmp_path / ".venv/tic-clip.stamp").write_bytes(stamp.stdout)
    return tmp_path


def setup(checkout, *arguments):
    return subprocess.run(["bash", "setup.sh", *arguments], cwd=checkout, capture_output=True, text=True)


def source(checkout, name="training/main.py"):
    return (checkout / "open_clip/src" / name).read_text()


def test_setup_patches_open_clip_and_doing_it_again_changes_nothing(checkout):
    assert setup(checkout).returncode == 0
    assert "import tic_clip.weights" in source(checkout)
    path_file = (checkout / ".venv/site/tic_clip_open_clip.pth").read_text().removeprefix("import os, sys; ")
    for environ, expected in ({}, [str(checkout), str(checkout / "open_clip/src")]), ({"PIP_BUILD_TRACKER": "x"}, []):
        python = SimpleNamespace(path=["others"])
        exec(path_file, {"sys": python, "os": SimpleNamespace(environ=environ)})
        assert python.path == [*expected, "others"]
    before = source(checkout)
    again = setup(checkout)
    assert (again.returncode, again.stderr) == (0, "setup: ready: .venv/ and open_clip/ (patched)\n")
    assert source(checkout) == before


def test_a_changed_byte_stops_setup_before_anything_is_patched(checkout):
    file = checkout / ".venv/site/open_clip/loss.py"
    file.write_text(file.read_text() + "#")
    done = setup(checkout)
    assert done.returncode == 1
    assert "open_clip/loss.py: FAILED" in done.stderr
    assert "setup: error: these files of open_clip_torch 2.24.0 are not the released ones" in done.stderr
    assert not (checkout / "open_clip").exists()


def test_a_newer_patch_replaces_the_old_one(checkout):
    assert setup(checkout).returncode == 0
    patch = checkout / "open_clip.patch"
    patch.write_text(patch.read_text().replace("unless this experiment", "except where this experiment"))
    assert setup(checkout).returncode == 0
    assert "except where this experiment" in source(checkout, "training/params.py")


def test_edits_by_hand_are_not_thrown_away(checkout):
    assert setup(checkout).returncode == 0
    file = checkout / "open_clip/src/training/train.py"
    file.write_text(file.read_text() + "# mine\n")
    done = setup(checkout)
    assert done.returncode == 1
    assert "edits that are not in open_clip.patch" in done.stderr
    assert file.read_text().endswith("# mine\n")


def test_a_clone_at_the_pinned_commit_is_taken_as_it_is(checkout):
    """What `git clone; git checkout; git apply ../open_clip.patch` leaves."""
    clone = checkout / "open_clip"
    for package in ("open_clip", "training"):
        shutil.copytree(checkout / ".venv/site" / package, clone / "src" / package)
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@x"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "pinned"], ["apply", "../open_clip.patch"]):
        subprocess.run([*git, *arguments], check=True)
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert "unpacking" not in done.stderr
    assert "import tic_clip.weights" in source(checkout)


def test_a_wrong_python_or_argument_is_one_line(checkout):
    old = checkout / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", "setup.sh"], cwd=checkout, capture_output=True, text=True, env={**os.environ, "PYTHON": str(old)}
    )
    assert done.returncode == 1
    assert "is older than 3.11" in done.stderr
    said = "setup: error: unknown argument --nonsense; there is --datacomp, or none\n"
    assert setup(checkout, "--nonsense").stderr == said


def test_datacomp_is_cloned_and_patched_on_request(checkout, monkeypatch):
    if not (ROOT / "datacomp").exists():
        pytest.skip("needs datacomp/: bash setup.sh --datacomp")
    monkeypatch.setenv("DATACOMP_GIT", str(ROOT / "datacomp"))
    done = setup(checkout, "--datacomp")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "setup: ready: .venv/, open_clip/ and datacomp/ (patched)"
    for name in ("evaluate.py", "resharder.py", "scale_configs.py", "train.py"):
        assert "tic_clip.datacomp" in (checkout / "datacomp" / name).read_text()
    (checkout / "datacomp/tasklist.yml").write_text("mine: {}")  # as users do
    patch = checkout / "datacomp.patch"
    patch.write_text(patch.read_text().replace("ends each shard with an empty dict", "ends shards so"))
    assert setup(checkout).returncode == 0  # with and without the flag
    assert "ends shards so" in (checkout / "datacomp/resharder.py").read_text()
    assert (checkout / "datacomp/tasklist.yml").read_text() == "mine: {}"
    (checkout / "datacomp/train.py").write_text("mine")
    assert "datacomp/ has edits that are not in datacomp.patch" in setup(checkout).stderr


def test_datacomp_that_cannot_be_reached_says_what_is_missing(checkout, monkeypatch):
    monkeypatch.setenv("DATACOMP_GIT", str(checkout / "nowhere"))
    done = setup(checkout, "--datacomp")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert said.startswith(f"setup: error: {checkout}/nowhere can't be cloned at 7fdb5c65")
    assert said.endswith("there is no datacomp/ with its train.py, evaluate.py and resharder.py; all else is ready")
    assert [path.name for path in checkout.glob("datacomp*")] == ["datacomp.patch"]
    assert (checkout / "open_clip").exists()


def test_requirements_pin_every_direct_dependency():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for group in project["optional-dependencies"].values() for name in group]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if "==" in line and not line.startswith((" ", "#"))
    }
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].lower().replace("_", "-")
        assert name in pinned, name
