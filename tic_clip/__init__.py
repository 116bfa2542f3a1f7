"""tic-clip trains CLIP through time and measures what that does.

Data flow: ``data`` splits a pool by time step, ``training`` runs OpenCLIP step by step, ``evaluation`` scores each
checkpoint on each period, ``report`` draws the matrix. Importing this package does not import torch.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

__version__ = "0.1.0"

T = TypeVar("T")


class TicError(ValueError):
    """An error that the user can fix; scripts print its message as one line and exit with status 1."""


def lookup(table: dict[str, T], kind: str, name: str, plural: str = "") -> T:
    """Return the row of ``table`` called ``name``; the TicError for an unknown name lists the valid ones."""
    if name not in table:
        raise TicError(f"unknown {kind} {name!r}; the {plural or f'{kind}s'} are {', '.join(table)}")
    return table[name]


def check_installed(package: str) -> None:
    """Raise a TicError if an optional package is missing."""
    if find_spec(package) is None:
        raise TicError(f"{package} is not installed: run bash setup.sh --all")


def package_file(package: str, name: str) -> Path:
    """Return the path of a data file of an installed package without importing the package."""
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], name) if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise TicError(f"the installed package {package} has no {name}; run: bash setup.sh")
    return path
