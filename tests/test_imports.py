"""Imports run downwards: the ground floor imports no wing, a wing only those below it; and the house stays small."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("tic_clip/**/*.py")
}
GROUND = {name for name, path in FILES.items() if path.parent == ROOT / "tic_clip"} - {"tic_clip.datacomp"}


def imported_modules(path):
    """The modules of tic_clip that a file imports anywhere, inside its functions as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in names)


def ours(path):
    return {name for name in imported_modules(path) if name.split(".")[0] == "tic_clip"}


@pytest.mark.parametrize(
    ("wing", "below"),
    [("data", ()), ("training", ("data",)), ("evaluation", ("data",)), ("report", ("evaluation.results",))],
)
def test_a_wing_imports_only_itself_and_what_is_below(wing, below):
    files = [name for name in FILES if f"{name}.".startswith(f"tic_clip.{wing}.")]
    assert len(files) >= 4
    allowed = tuple(f"tic_clip.{name}" for name in (wing, *below))
    for file in files:
        assert {name for name in ours(FILES[file]) - GROUND if not name.startswith(allowed)} == set(), file


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_floor_imports_only_itself(module):
    assert ours(FILES[module]) <= GROUND


def test_imports_are_found(tmp_path):
    """The reader of imports sees each way of writing one."""
    code = "from tic_clip.data import tar\nfrom tic_clip.data.tar import END\ndef f():\n    import tic_clip.runs\n"
    (tmp_path / "x.py").write_text(code)
    assert ours(tmp_path / "x.py") == {"tic_clip.data.tar", "tic_clip.runs"}


def test_no_module_imports_itself_through_others():
    graph = {module: ours(path) & FILES.keys() - {module} for module, path in FILES.items()}
    floors = {}
    for module in TopologicalSorter(graph).static_order():
        floors[module] = 1 + max((floors[below] for below in graph[module]), default=0)
    assert len(floors) == len(FILES) > 40
    assert max(floor for module, floor in floors.items() if module.startswith("tic_clip.training")) <= 8


LINES = {"library": 10_300, "file": 350, "function": 50, "file of tests": 500}
"""How many there may be of each, docstrings and blank lines included."""


def test_the_house_stays_small():
    texts = {name: path.read_text() for name, path in FILES.items()}
    found = [("file", name, len(text.splitlines())) for name, text in texts.items()]
    found.append(("library", "tic_clip", sum(count for _, _, count in found)))
    found += [
        ("function", f"{name}.{node.name}", node.end_lineno - node.lineno + 1)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
    ]
    tests = ROOT.glob("tests/**/*.py")
    found += [("file of tests", path.name, len(path.read_text().splitlines())) for path in tests]
    assert [(kind, name, count) for kind, name, count in found if count > LINES[kind]] == []
