"""Command-line basics of every script: flags, one-line errors, Ctrl-C and SIGTERM, progress bars."""

import argparse
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from tic_clip import TicError

T = TypeVar("T")
MINUTE = 60.0  # seconds between the lines of a progress bar that is not on a terminal


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is the script's docstring and whose errors are one line."""

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse the arguments; accept each flag with dashes or with underscores."""
        for word in args[0] if args and args[0] is not None else sys.argv[1:]:
            if word.endswith("=--"):  # argparse takes it for no value at all
                self.error(f"argument {word.removesuffix('=--')}: '--' is not a value")
        for option, action in list(self._option_string_actions.items()):
            for old, new in ("_-", "-_"):
                self._option_string_actions.setdefault(option[:2] + option[2:].replace(old, new), action)
        return super().parse_known_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        """Exit with the message alone."""
        sys.exit(f"error: {message} (--help shows the flags)")


def flag(text: str, default: Any, **options: Any) -> Any:
    """Return a dataclass field that ``add_flags`` turns into a flag; ``options`` are argparse's or ``short``."""
    shown = "" if default is False or default == "" else f" (default: {default})"
    return field(default=default, metadata={"help": text + shown, **options})


def add_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add a flag for each field of a dataclass that was made by ``flag``."""
    for each in fields(kind):
        if options := dict(each.metadata):
            names = [name for name in (options.pop("short", ""), f"--{each.name.replace('_', '-')}") if name]
            options |= {"action": "store_true"} if each.default is False else {"type": type(each.default)}
            parser.add_argument(*names, default=each.default, **options)


def from_flags(kind: type[T], args: argparse.Namespace) -> T:
    """Return a dataclass filled with the flags named like its fields."""
    return kind(**{each.name: getattr(args, each.name) for each in fields(kind)})


def run_main(main: Callable[[], int | None], on_interrupt: str = "resume") -> None:
    """Call ``main`` and exit with its result, 1 and one line on a user's error, 130 on Ctrl-C, or 143 on SIGTERM.

    ``on_interrupt``: what running the command again does ("resume").
    """
    if "RANK" not in os.environ:  # torchrun ends its processes itself, also those that wait for another
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        try:
            sys.exit(main())
        finally:
            for bar in list(getattr(tqdm, "_instances", [])):  # so that an error starts on a new line
                bar.close()
            sys.stdout.flush()
    except (TicError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            os._exit(141)  # the shell's status for SIGPIPE; a normal exit would flush again
        sys.exit(f"error: {error if isinstance(error, TicError) else format_os_error(error)}")
    except RuntimeError as error:
        if message := describe_loader_error(error):
            sys.exit(f"error: {message}")
        raise
    except KeyboardInterrupt as error:
        if is_rank_zero():
            print(f"interrupted: run the same command again to {on_interrupt}", file=sys.stderr, flush=True)
        os._exit(143 if 143 in error.args else 130)  # no tracebacks of threads and workers


def _interrupt(*_: Any) -> NoReturn:
    """Turn SIGTERM, which Slurm and containers send, into Ctrl-C, so that temporary files are removed."""
    raise KeyboardInterrupt(143)


def _is_stdout_closed() -> bool:
    """Return whether the reader of a pipe has exited, as in ``| head``."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def describe_loader_error(error: RuntimeError) -> str | None:
    """Return advice for a DataLoader worker that ran out of memory, or None for any other error."""
    text = f"{error} {error.__cause__}"
    if "shared memory" in text:
        size = shutil.disk_usage("/dev/shm").total / 2**20
        hint = "docker run --shm-size=16g, or fewer --workers; --workers 0 needs none"
        return f"/dev/shm, {size:,.3g} MB, is too small for the batches of the loader processes: {hint}"
    if not re.match(r"DataLoader worker \(pid", str(error)):
        return None
    reason = re.search(r"killed by signal: [\w ]+|exit code \d+", text)
    return f"a loader process ended ({reason[0] if reason else error}); if memory ran out, give fewer --workers"


def format_os_error(error: OSError) -> str:
    """Return an OSError as "path: reason"; the path of a failed rename is the new one."""
    path = error.filename2 or error.filename
    return f"{path}: {error.strerror}" if path and error.strerror else str(error)


def progress(
    items: Iterable[T] | None, description: str, total: int | None = None, unit: str = "it", done: int = 0
) -> "tqdm[T]":
    """Return a progress bar over ``items`` with the time left, shown by rank 0 only.

    If standard error is not a terminal, as in a batch job, it prints one line a minute instead.
    """
    options = {"disable": not is_rank_zero() or total == 0, "dynamic_ncols": True, "mininterval": 0.5}
    if not sys.stderr.isatty():
        options |= {"dynamic_ncols": False, "ncols": 0, "file": _LogLines()}
        options |= {"mininterval": MINUTE, "maxinterval": MINUTE}
    return tqdm(items, description, total, initial=done, unit=unit, **options)


class _LogLines:
    """A file for tqdm that prints each state of a bar as a line on standard error."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def is_rank_zero() -> bool:
    """Return whether this is the only process or rank 0."""
    return os.environ.get("RANK", "0") == "0"
