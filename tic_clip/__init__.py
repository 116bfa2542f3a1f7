"""tic-clip trains CLIP through time and measures what that does.

The way of the data: ``reshard`` cuts a pool into one split a time step, ``methods`` and ``sampling`` say what a step
trains on, ``training`` runs OpenCLIP, ``evaluation`` scores every checkpoint on every year, ``report`` draws the
matrix.
Importing this package loads no model and no torch.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

__version__ = "0.1.0"

T = TypeVar("T")


class TicError(ValueError):
    """A mistake that the user can mend; scripts print its message as one line and exit with status 1."""


def lookup(table: dict[str, T], kind: str, name: str, plural: str = "") -> T:
    """The row of ``table`` called ``name``.

    Raises:
        TicError: there is none; the message lists those that exist.
    """
    if name not in table:
        raise TicError(f"unknown {kind} {name!r}; the {plural or f'{kind}s'} are {', '.join(table)}")
    return table[name]


def check_installed(package: str) -> None:
    """Raise a TicError if a package that a plain set-up leaves out is missing."""
    if find_spec(package) is None:
        raise TicError(f"{package} is not installed: run bash setup.sh --all")


def package_file(package: str, name: str) -> Path:
    """Return a data file of an installed package, without importing the package."""
    spec = find_spec(package)
    path = Path(spec.submodule_search_locations[0], name) if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise TicError(f"the installed package {package} has no {name}; run: bash setup.sh")
    return path
