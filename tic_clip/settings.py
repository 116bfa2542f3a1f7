"""Read settings from environment variables; find old names, misspellings and contradictions.

python -m tic_clip.settings NAME…          # exit with one line if a variable looks like a misspelt NAME
"""

import difflib
import os
import re
import sys
from collections.abc import Collection, Mapping

from tic_clip import TicError
from tic_clip.cli import run_main

BOOLEANS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True}


def read_environment(environ: Mapping[str, str], known: Collection[str], renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the known variables that are set and not empty; ``renamed`` maps old names to new ones.

    Raises a TicError for a name that is almost a known one, and for a variable set under its old and its new name.
    """
    settings = {name: environ[name] for name in known if environ.get(name)}
    for old, new in renamed.items():
        if not environ.get(old):
            continue
        if new in settings:
            raise TicError(f"{old} is the old name of {new}: set only {new}")
        print(f"{old} is now called {new}", file=sys.stderr)
        settings[new] = environ[old]
    for name in environ.keys() - set(known) - renamed.keys():
        similar = difflib.get_close_matches(name, known, 1, 0.85)
        if similar:
            raise TicError(f"unknown setting {name}: did you mean {similar[0]}? (If not: env -u {name})")
    return settings


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Return the value of a yes/no variable; raise a TicError for any other value."""
    value = environ.get(name) or "0"
    if value.lower() not in BOOLEANS:
        raise TicError(f"{name}: {value!r} is not one of 0, 1, no, yes")
    return BOOLEANS[value.lower()]


def check_fixed(settings: Mapping[str, str], fixed: Mapping[str, str], script: str) -> None:
    """Raise a TicError if a variable contradicts the script's name; BENCHMARK may be a variant (x_monthly of x)."""
    for name, value in fixed.items():
        given = settings.get(name, value)
        variant = name == "BENCHMARK" and given.startswith(f"{value}_")
        if given != value and not variant:
            raise TicError(f"{name} is {given}, but {script} is for {value}: unset {name} or use another script")


def name_variables(message: str, names: Collection[str]) -> str:
    """Return an error message with flags replaced by the variables that the user set."""
    return re.sub(r"--([a-z_]+)", lambda match: match[1].upper() if match[1].upper() in names else match[0], message)


if __name__ == "__main__":
    run_main(lambda: read_environment(os.environ, sys.argv[1:], {}) and None)
