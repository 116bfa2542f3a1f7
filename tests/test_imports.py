"""Imports run downwards: the wing ``data`` and the ground floor know nothing of training, evaluation and report."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"tic_clip"} | {f"tic_clip.{name}" for name in ("cli", "storage", "locks", "parallel", "benchmarks")}


def imported_modules(path):
    """The modules of tic_clip that a file imports anywhere, inside its functions as well."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                is_module = (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
                is_package = (ROOT / node.module.replace(".", "/") / alias.name / "__init__.py").exists()
                yield f"{node.module}.{alias.name}" if is_module or is_package else node.module


def ours(path):
    return {name for name in imported_modules(path) if name.split(".")[0] == "tic_clip"}


def test_data_imports_only_itself_and_the_ground_floor():
    files = list(ROOT.glob("tic_clip/data/**/*.py"))
    assert len(files) > 10
    for path in files:
        above = {name for name in ours(path) - GROUND if not name.startswith("tic_clip.data")}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_report_knows_only_results():
    for path in ROOT.glob("tic_clip/report/*.py"):
        above = {name for name in ours(path) - GROUND if not name.startswith("tic_clip.report")}
        assert above <= {"tic_clip.results", "tic_clip.metrics"}, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_imports_only_itself(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = ROOT / module / "__init__.py"
    assert ours(path) <= GROUND


def test_imports_are_found(tmp_path):
    """The reader of imports sees each way of writing one."""
    code = "from tic_clip.data import tar\nfrom tic_clip.data.tar import END\ndef f():\n    import tic_clip.plans\n"
    (tmp_path / "x.py").write_text(code)
    assert ours(tmp_path / "x.py") == {"tic_clip.data.tar", "tic_clip.plans"}
