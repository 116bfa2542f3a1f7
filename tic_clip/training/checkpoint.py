"""The checkpoints of a step: when they are written, which are kept, and from which one training resumes.

``epoch_{k}.pt`` is written at the end of each of the step's checkpoint intervals; ``iteration_{i}.pt`` lies in between
and is deleted when the step is done. Each records benchmark, step, cut-off, iteration, samples seen and what was read.
"""

import json
import logging
import math
import re
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tic_clip import TicError, storage, weights
from tic_clip.cli import progress
from tic_clip.runs import LOG
from tic_clip.storage import NotFoundError
from tic_clip.training.sampling import add_counts
from tic_clip.training.schedule import BRANCH, branch_point

NAME = re.compile(r"checkpoints/(epoch|iteration)_(\d+)\.pt")  # in the step's folder


class Keeper:
    """Write the checkpoints and the log of a step; the hooks call it as ``args.tic``.

    ``loader`` counts what it reads; ``resumed`` is the record of the checkpoint that the step was resumed from.
    """

    def __init__(self, plan: dict[str, Any], folder: Path, loader: Any, resumed: dict[str, Any] | None) -> None:
        self.plan, self.folder, self.loader = plan, folder, loader
        self.read_before = resumed["read"] if resumed else {}
        self.saved = time.monotonic()
        self.bar: Any = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write a checkpoint after a block if it is due, delete old ones, and update the copy."""
        plan, iteration = self.plan, checkpoint["epoch"] * self.plan["block"]
        name = name_of(plan, iteration)
        names = [name] if "epoch" in name or self._is_due(iteration) else []
        names += [str(BRANCH)] * (iteration == branch_point(plan))
        if not names:
            return
        read = add_counts(self.read_before, getattr(self.loader, "counts", {}))
        record = {key: plan[key] for key in ("benchmark", "step", "cutoff")}
        record |= {"iteration": iteration, "samples_seen": self._samples_seen(iteration), "read": read}
        weights.check_finite(checkpoint["state_dict"], f"after {iteration} iterations of step {plan['step']}")
        for name in names:
            weights.write({**checkpoint, "tic": record}, self.folder / name)
        self.saved = time.monotonic()
        clear(self.folder, plan)
        push(self.folder, plan, [*names, LOG])

    def _is_due(self, iteration: int) -> bool:
        """Return whether ``save_every`` samples or ``save_minutes`` have passed."""
        keep, batch_size = self.plan["keep"], self.plan["batch_size"]
        every, now, before = keep["save_every"], iteration * batch_size, (iteration - self.plan["block"]) * batch_size
        is_passed = every and now // every > before // every
        return is_passed or time.monotonic() - self.saved >= 60 * keep["save_minutes"]

    def _samples_seen(self, iteration: int) -> int:
        return self.plan["samples_seen"] - self.plan["samples"] + iteration * self.plan["batch_size"]

    def log(self, iteration: int, values: dict[str, float]) -> None:
        """Log OpenCLIP's figures after ``iteration`` iterations; raise a TicError for a NaN or infinite loss."""
        plan = self.plan
        losses = {name: value for name, value in values.items() if name.endswith("loss")}
        if not all(map(math.isfinite, losses.values())):
            raise TicError(f"the loss after {iteration} iterations of step {plan['step']} is {values['loss']}")
        line = {"step": iteration, "samples_seen": self._samples_seen(iteration), **losses}
        line |= {name: values[name] for name in ("lr", "samples_per_second")}
        if plan.get("layout", {}).get("accum_freq", 1) == 1:  # else OpenCLIP counts passes of the model to the wait
            line["data_wait"] = values["data_time"]
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.bar is None:
            self.bar = progress(None, f"train {plan['step']}", plan["iterations"], "batch", done=iteration - 1)
        self.bar.update(iteration - self.bar.n)
        if iteration >= plan["iterations"]:
            self.bar.close()

    def cut_log(self, iteration: int) -> None:
        """Delete log lines after the checkpoint that training resumes from, and an incomplete line."""
        path = self.folder / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            storage.write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= iteration))


def name_of(plan: dict[str, Any], iteration: int) -> str:
    """Return the name of the checkpoint after ``iteration`` iterations of a step."""
    number, rest = divmod(iteration, plan["iterations"] // plan["checkpoints"])
    return f"checkpoints/iteration_{iteration}.pt" if rest else f"checkpoints/epoch_{number}.pt"


def new_to_old(names: Iterable[str], plan: dict[str, Any]) -> list[str]:
    """Return the checkpoints among file names, newest first."""
    factor = {"epoch": plan["iterations"] // plan["checkpoints"], "iteration": 1}
    iterations = {name: int(found[2]) * factor[found[1]] for name in names if (found := NAME.fullmatch(name))}
    return sorted(iterations, key=iterations.get, reverse=True)


def list_names(folder: object) -> list[str]:
    """Return the file names in a step's folder or copy."""
    try:
        return [path.removeprefix(f"{folder}/") for path, _ in storage.list_files(folder, "**/*")]
    except NotFoundError:
        return []


def surplus(names: Iterable[str], plan: dict[str, Any]) -> list[str]:
    """Return which checkpoints to delete so that at most ``max_kept`` remain.

    Keep the newest, then the last of each interval, then, until the step is done, the two newest in between.
    """
    checkpoints = new_to_old(names, plan)
    between = [name for name in checkpoints if "iteration" in name]
    ends = [name for name in checkpoints if name not in between]
    if name_of(plan, plan["iterations"]) in ends:
        between = []
    keep = list(dict.fromkeys([*checkpoints[:1], *ends, *between[:2]]))
    return [name for name in checkpoints if name not in keep[: plan["keep"]["max_kept"]]]


def clear(folder: object, plan: dict[str, Any]) -> None:
    """Delete the surplus checkpoints in a step's folder or in its copy."""
    for name in surplus(list_names(folder), plan):
        storage.remove(f"{folder}/{name}")


def newest(folder: Path, plan: dict[str, Any]) -> str | None:
    """Return the newest undamaged checkpoint in a step's folder."""
    paths = (folder / name for name in new_to_old(list_names(folder), plan))
    return next((str(path) for path in paths if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    if fault := damage(path):
        logging.warning("%s is damaged (%s): it is passed over for the one before, if there is one", path, fault)
    return not fault


def damage(path: object) -> str | None:
    """Return what is wrong with a checkpoint, by torch's checksums and by loading it, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                return f"wrong checksum of {bad}"
        weights.record(str(path))
    except Exception as error:  # noqa: BLE001  zipfile raises many kinds for a flipped bit
        return str(error) or type(error).__name__
    return None


def copy_of(plan: dict[str, Any]) -> str | None:
    """Return the path or URL of a step's copy, or None."""
    remote = plan["keep"]["remote"]
    return f"{storage.to_path(remote)}/{plan['step']}" if remote else None


def push(folder: Path, plan: dict[str, Any], names: Iterable[str]) -> None:
    """Upload a step's files that exist to its copy, unless the copy is complete; only log errors."""
    try:
        copy = copy_of(plan)
        if not copy or "done.json" in list_names(copy):
            return
        for name in names:
            if (folder / name).exists():
                storage.upload(folder / name, f"{copy}/{name}")
        clear(copy, plan)
    except (TicError, OSError) as error:
        logging.warning("the copy in %s is behind: %s", plan["keep"]["remote"], error)


def push_done(folder: Path, plan: dict[str, Any]) -> None:
    """Complete the copy of a finished step: its model and the files that the next step needs."""
    made = [name for name in list_names(folder) if name.startswith("checkpoints/") and not NAME.fullmatch(name)]
    push(folder, plan, [name_of(plan, plan["iterations"]), *made, LOG, "plan.json", "done.json"])


def fetch(folder: Path, plan: dict[str, Any]) -> None:
    """Download a step's copy, with its newest undamaged checkpoint, if the folder has no ``plan.json``."""
    copy = copy_of(plan)
    if not copy or (folder / "plan.json").exists():
        return
    names = list_names(copy)
    checkpoints = new_to_old(names, plan)
    for name in checkpoints:
        storage.download(f"{copy}/{name}", folder / name)
        if _is_whole(folder / name):
            break
        storage.remove(folder / name)
    # plan.json and then done.json come last: they say that the rest is complete.
    for name in sorted({*names} - {*checkpoints}, key=lambda name: (name == "done.json", name == "plan.json", name)):
        storage.download(f"{copy}/{name}", folder / name)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a step's folder, and delete temporary files of a killed process."""
    with storage.lock_folder(folder):
        for half in folder.glob("checkpoints/.*.tmp"):
            half.unlink()
        yield
