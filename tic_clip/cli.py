"""The shell around every script's ``main``: errors of the user as one line, Ctrl-C as status 130, progress bars."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from tic_clip import TicError

T = TypeVar("T")

ONE_SLASH = re.compile(r"(s3|gs|az|https?):/(?!/)")

_bars: WeakSet[tqdm] = WeakSet()

WORDS = {
    errno.EACCES: "permission denied",
    errno.EEXIST: "is a file, where a folder must be",
    errno.EISDIR: "is a folder, where a file must be",
    errno.ENOENT: "is missing",
    errno.ENOTDIR: "is not in a folder, but below a file",
    errno.ENOSPC: "the disk is full",
}
"""What an error of the system means to who reads it; others are said as the system says them."""


class Parser(argparse.ArgumentParser):
    """A script's flags; its module docstring is the help, and a wrong flag is one line."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_args(self, *given: Any) -> argparse.Namespace:
        """The flags; a URL with one slash, which would be a folder called ``s3:``, is a wrong one."""
        args = super().parse_args(*given)
        for value in vars(args).values():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and ONE_SLASH.match(text):
                    self.error(f"{text} is no path; a URL has two slashes: {text.replace(':/', '://', 1)}")
        return args

    def error(self, message: str) -> NoReturn:
        """Exit with the message alone."""
        sys.exit(f"error: {message} (--help shows the flags)")


def run_main(main: Callable[[], int | None], then: str = "goes on from here") -> None:
    """Call ``main`` and exit: 0 or its result, 1 and one line on an error that the user can mend, 130 on Ctrl-C.

    ``then``: what the same command does after a Ctrl-C.
    """
    try:
        sys.exit(main())
    except TicError as error:
        _end_bars()
        sys.exit(f"error: {error}")
    except OSError as error:
        _end_bars()
        sys.exit(f"error: {format_os_error(error)}")
    except KeyboardInterrupt:
        _end_bars()
        if _is_first():
            print(f"interrupted: the same command {then}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # at once: no traceback of threads and workers that were cut off as well


def format_os_error(error: OSError) -> str:
    """The file and what is wrong with it; of a renaming, the new name."""
    path = error.filename2 or error.filename
    return f"{path}: {WORDS.get(error.errno, error.strerror)}" if path and error.strerror else str(error)


def progress(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield ``items`` under a progress bar with the time left; on the first process of several only."""
    with progress_bar(description, total, unit) as bar:
        for item in items:
            yield item
            bar.update()


def progress_bar(description: str, total: int | None, unit: str, done: int = 0) -> tqdm:
    """A progress bar with the time left; it shows on the first process of several only."""
    quiet = not _is_first() or total == 0
    bar = tqdm(
        desc=description, total=total, initial=done, unit=unit, disable=quiet, dynamic_ncols=True, mininterval=0.5
    )
    _bars.add(bar)
    return bar


def _end_bars() -> None:
    """Leave the lines of bars that an error has cut off."""
    for bar in list(_bars):
        bar.close()


def _is_first() -> bool:
    """Whether this is the only process, or the first of torchrun's."""
    return int(os.environ.get("RANK", "0")) == 0
