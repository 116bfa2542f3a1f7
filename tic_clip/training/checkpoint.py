"""The checkpoints of a step: when one is written, under which name, how many stay, and which one to go on from.

``epoch_{k}.pt`` are the step's own, one at the end of each checkpoint interval; ``iteration_{i}.pt`` lie in between and
go when the step is done. Each records benchmark, step, the data's cut-off, iteration, samples seen and what was read.
"""

import json
import logging
import math
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import Any

from tic_clip import TicError, storage, weights
from tic_clip.runs import LOG
from tic_clip.storage import NotFoundError

LAST = ("plan.json", "done.json")
"""What says that the rest is there; ``done.json`` after ``plan.json``."""
NAME = re.compile(r"(epoch|iteration)_(\d+)\.pt")


class Keeper:
    """What OpenCLIP asks after each block; it lies on its ``args`` as ``tic``, with the loader that counts."""

    def __init__(self, plan: dict[str, Any], folder: Path, loader: Any, resumed: dict[str, Any] | None) -> None:
        self.plan, self.folder, self.loader = plan, folder, loader
        self.before = Counter(_pairs(resumed["read"])) if resumed else Counter()
        self.saved = time.monotonic()

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write what OpenCLIP would save after a block, if it is time for it, and remove what need not stay."""
        plan, keep = self.plan, self.plan["keep"]
        iteration = checkpoint["epoch"] * plan["block"]
        name = name_of(plan, iteration)
        if name.startswith("iteration") and not self._due(iteration, keep):
            return
        path = self.folder / "checkpoints" / name
        weights.write({**checkpoint, "tic": self._record(iteration)}, path)
        self.saved = time.monotonic()
        for old in surplus([file.name for file in kept(path.parent)], plan, keep["max_kept"]):
            storage.remove(path.parent / old)
        if keep["remote"]:
            self._copy(name)

    def _copy(self, name: str) -> None:
        """Bring the remote copy up to date, and within its bound; a store that is away does not end the training."""
        plan = self.plan
        with tolerated(plan):
            push(self.folder, plan, [f"checkpoints/{name}", *([LOG] if (self.folder / LOG).exists() else [])])
            for old in surplus(remote_checkpoints(plan), plan, plan["keep"]["max_kept"]):
                storage.remove(remote_name(plan, f"checkpoints/{old}"))

    def log(self, iteration: int, values: dict[str, float]) -> None:
        """Append a line to ``train.log.jsonl``: OpenCLIP's figures after ``iteration`` iterations of the step.

        Raises:
            TicError: the loss is no number.
        """
        losses = {name: value for name, value in values.items() if name.endswith("loss")}
        line = {
            "step": iteration,
            "samples_seen": self._seen(iteration),
            **losses,
            "lr": values["lr"],
            "samples_per_second": values["samples_per_second"],
            "data_wait": values["data_time"],
        }
        if not all(map(math.isfinite, losses.values())):
            raise TicError(f"the loss after {iteration} iterations of step {self.plan['step']} is {values['loss']}")
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps(line) + "\n")

    def cut_log(self, iteration: int) -> None:
        """Take away what an earlier attempt logged after the checkpoint that training goes on from."""
        path = self.folder / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if _logged(line) <= iteration]
            storage.write_text(path, "".join(lines))

    def _seen(self, iteration: int) -> int:
        return self.plan["samples_seen"] - self.plan["samples"] + iteration * self.plan["batch_size"]

    def _due(self, iteration: int, keep: dict[str, Any]) -> bool:
        """Whether so many samples, or minutes, have passed since a checkpoint could be written."""
        every, each = keep["save_every"], self.plan["batch_size"]
        if every and iteration * each // every > (iteration - self.plan["block"]) * each // every:
            return True
        return time.monotonic() - self.saved >= 60 * keep["save_minutes"]

    def _record(self, iteration: int) -> dict[str, Any]:
        plan = self.plan
        tally = self.before + getattr(self.loader, "tally", Counter())
        return {
            "benchmark": plan["benchmark"],
            "step": plan["step"],
            "cutoff": plan["cutoff"],
            "iteration": iteration,
            "samples_seen": self._seen(iteration),
            "read": _nested(tally),
        }


def _logged(line: str) -> float:
    """The iteration of a line of the log; infinite for half a line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _nested(tally: Counter) -> dict[str, dict[str, int]]:
    """{(source, what): n} as {source: {what: n}}."""
    table: dict[str, dict[str, int]] = {}
    for (source, what), count in sorted(tally.items()):
        table.setdefault(source, {})[what] = count
    return table


def _pairs(table: dict[str, dict[str, int]]) -> dict[tuple[str, str], int]:
    return {(source, what): count for source, row in table.items() for what, count in row.items()}


def name_of(plan: dict[str, Any], iteration: int) -> str:
    """The name of the checkpoint after ``iteration`` iterations of a step."""
    interval = plan["iterations"] // plan["checkpoints"]
    number, rest = divmod(iteration, interval)
    return f"iteration_{iteration}.pt" if rest else f"epoch_{number}.pt"


def kept(folder: Path) -> list[Path]:
    """The checkpoints in a step's folder ``checkpoints/``, in no order."""
    return [path for path in Path(folder).glob("*.pt") if NAME.fullmatch(path.name)]


def iteration_of(name: str, plan: dict[str, Any]) -> int:
    """After how many iterations of the step a checkpoint of this name was written."""
    kind, number = NAME.fullmatch(name).groups()
    return int(number) * (plan["iterations"] // plan["checkpoints"] if kind == "epoch" else 1)


def surplus(names: list[str], plan: dict[str, Any], most: int) -> list[str]:
    """Which of a step's checkpoints go, so that at most ``most`` stay.

    The newest stays in any case; of those in between the two newest stay where there is room; then the oldest go.
    """
    old_to_new = sorted(names, key=lambda name: iteration_of(name, plan))
    between = [name for name in old_to_new if name.startswith("iteration")]
    gone = between[:-2]
    left = [name for name in old_to_new if name not in gone]
    extra = max(0, len(left) - most)
    candidates = [name for name in between[-2:] if name != old_to_new[-1]]
    candidates += [name for name in left[:-1] if name not in candidates]
    return gone + candidates[:extra]


def newest(folder: Path, plan: dict[str, Any]) -> str | None:
    """The newest checkpoint that is whole; one that is not is named in a warning and passed over."""
    for path in sorted(kept(folder), key=lambda path: iteration_of(path.name, plan), reverse=True):
        fault = damage(path)
        if fault is None:
            return str(path)
        logging.warning("%s is damaged (%s): it is passed over for the one before, if there is one", path, fault)
    return None


def damage(path: object) -> str | None:
    """What is wrong with a checkpoint's file, by the checksums that torch writes and by loading it, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"wrong checksum of {bad}"
        weights.record(str(path))
    except Exception as error:  # noqa: BLE001  zipfile raises many kinds for a flipped bit
        return str(error) or type(error).__name__
    return None


def clear(folder: Path, plan: dict[str, Any]) -> None:
    """Remove what lies in between from a step's folder, and from its remote copy: the step is done."""
    for path in kept(folder / "checkpoints"):
        if path.name.startswith("iteration"):
            storage.remove(path)
    with tolerated(plan):
        for name in remote_checkpoints(plan) if plan["keep"]["remote"] else ():
            if name.startswith("iteration"):
                storage.remove(remote_name(plan, f"checkpoints/{name}"))


def remote_checkpoints(plan: dict[str, Any]) -> list[str]:
    """The names of the checkpoints in a step's remote copy."""
    try:
        there = storage.list_files(remote_name(plan, "checkpoints"), "*.pt")
    except NotFoundError:
        return []
    return [name for path, _ in there if NAME.fullmatch(name := path.rsplit("/", 1)[-1])]


def remote_name(plan: dict[str, Any], name: str) -> str:
    """Where the copy of a file of the step's folder is."""
    return f"{plan['keep']['remote'].rstrip('/')}/{plan['step']}/{name}"


@contextmanager
def tolerated(plan: dict[str, Any]) -> Iterator[None]:
    """A store that is away does not end the training: what it lacks is said, and copied at the next occasion."""
    try:
        yield
    except (TicError, OSError) as error:
        logging.warning("the copy in %s is behind: %s", plan["keep"]["remote"], error)


def push(folder: Path, plan: dict[str, Any], names: Iterable[str]) -> None:
    """Copy files of a step's folder to where its remote copy is, if it has one."""
    for name in names if plan["keep"]["remote"] else ():
        storage.upload(folder / name, remote_name(plan, name))


def push_done(folder: Path, plan: dict[str, Any], checkpoint: str) -> None:
    """Bring the remote copy of a finished step up to date, unless it says that it is finished."""
    with tolerated(plan):
        if plan["keep"]["remote"] and not storage.exists(remote_name(plan, "done.json")):
            last = name_of(plan, plan["iterations"])
            names = dict.fromkeys([f"checkpoints/{last}", checkpoint, LOG, *LAST])
            push(folder, plan, [name for name in names if (folder / name).exists()])


def fetch(folder: Path, plan: dict[str, Any]) -> bool:
    """Where nothing of a step is on this disk, what the remote copy has, of its checkpoints the newest that is whole.

    Returns:
        Whether there was something.
    """
    if not plan["keep"]["remote"] or (folder / "plan.json").exists():
        return False
    try:
        there = storage.list_files(remote_name(plan, "").rstrip("/"), "**/*")
    except NotFoundError:
        return False
    names = [path.removeprefix(remote_name(plan, "")) for path, _ in there]
    own = [name for name in names if NAME.fullmatch(Path(name).name)]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in sorted(own, key=lambda name: iteration_of(Path(name).name, plan), reverse=True):
        storage.download(remote_name(plan, name), folder / name)
        if fault := damage(folder / name):
            logging.warning("%s is damaged (%s) and left out", remote_name(plan, name), fault)
            storage.remove(folder / name)
            continue
        break
    rest = [name for name in names if name not in own and name not in LAST]
    for name in [*rest, *(name for name in LAST if name in names)]:
        storage.download(remote_name(plan, name), folder / name)
    return bool(names)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else trains the step meanwhile, on this machine; what a killed process half wrote is removed.

    Raises:
        TicError: somebody does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            raise TicError(f"another process is training {folder}") from None
        for half in folder.glob("checkpoints/.*.tmp"):
            half.unlink()
        yield


def check_cutoff(record: dict[str, Any] | None, path: str, plan: dict[str, Any]) -> None:
    """Refuse to start from a model that has seen data from after the step.

    A released model records no cut-off; its name (``2019.pt``) is one.

    Raises:
        TicError: it has.
    """
    from tic_clip.benchmarks import cutoff

    found = (record or {}).get("cutoff") or cutoff(Path(path).stem)
    if found and found > plan["cutoff"]:
        raise TicError(f"{path} has seen data up to {found}, after those of step {plan['step']}, {plan['cutoff']}")
