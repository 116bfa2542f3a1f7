"""Imports run downwards: the ground floor imports no wing, and a wing only those below it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOOR = {file.stem for file in (ROOT / "tic_clip").glob("*.py")} - {"__init__", "datacomp"}
GROUND = {"tic_clip"} | {f"tic_clip.{name}" for name in FLOOR}


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


WINGS = [("data", ()), ("training", ("data",)), ("evaluation", ("data",)), ("report", ("evaluation.results",))]


@pytest.mark.parametrize(("wing", "below"), WINGS)
def test_a_wing_imports_only_itself_and_what_is_below(wing, below):
    files = list(ROOT.glob(f"tic_clip/{wing}/**/*.py"))
    assert len(files) >= 4
    allowed = tuple(f"tic_clip.{name}" for name in (wing, *below))
    for path in files:
        above = {name for name in ours(path) - GROUND if not name.startswith(allowed)}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_imports_only_itself(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.exists():
        path = ROOT / module / "__init__.py"
    assert ours(path) <= GROUND


def test_imports_are_found(tmp_path):
    """The reader of imports sees each way of writing one."""
    code = "from tic_clip.data import tar\nfrom tic_clip.data.tar import END\ndef f():\n    import tic_clip.runs\n"
    (tmp_path / "x.py").write_text(code)
    assert ours(tmp_path / "x.py") == {"tic_clip.data.tar", "tic_clip.runs"}


def test_no_module_imports_itself_through_others():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in ROOT.glob("tic_clip/**/*.py")
    }
    graph = {module: ours(path) & files.keys() - {module} for module, path in files.items()}
    floors = {}
    for module in TopologicalSorter(graph).static_order():
        floors[module] = 1 + max((floors[below] for below in graph[module]), default=0)
    assert len(floors) == len(files) > 40
    assert max(floor for module, floor in floors.items() if module.startswith("tic_clip.training")) <= 8
