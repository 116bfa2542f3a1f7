"""The checkpoints of a step: when one is written, its name, which are kept, and from which one training resumes.

``epoch_{k}.pt`` is written at the end of each of the step's checkpoint intervals; ``iteration_{i}.pt`` lies in between
and is deleted when the step is done. Each records benchmark, step, cut-off, iteration, samples seen and what was read.
"""

import json
import logging
import math
import re
import time
import zipfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tic_clip import TicError, storage, weights
from tic_clip.cli import progress
from tic_clip.runs import LOG
from tic_clip.storage import NotFoundError
from tic_clip.timeline import cutoff
from tic_clip.training.sampling import add_counts

NAME = re.compile(r"checkpoints/(epoch|iteration)_(\d+)\.pt")  # in the step's folder
LAST = ("plan.json", "done.json")  # copied last and in this order: they say that the rest is complete


class Keeper:
    """Writes the checkpoints and the log of a step; on OpenCLIP's ``args`` it is ``tic``, which the hooks call.

    ``loader`` counts what it reads; ``resumed`` is the record of the checkpoint that the step was resumed from.
    """

    def __init__(self, plan: dict[str, Any], folder: Path, loader: Any, resumed: dict[str, Any] | None) -> None:
        self.plan, self.folder, self.loader = plan, folder, loader
        self.read_before = resumed["read"] if resumed else {}
        self.saved = time.monotonic()
        self.bar: Any = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Write what OpenCLIP would save after a block, if it is due, delete old checkpoints, and update the copy."""
        plan, iteration = self.plan, checkpoint["epoch"] * self.plan["block"]
        name = name_of(plan, iteration)
        if "iteration" in name and not self._is_due(iteration):
            return
        record = {key: plan[key] for key in ("benchmark", "step", "cutoff")}
        record |= {"iteration": iteration, "samples_seen": self._samples_seen(iteration)}
        record["read"] = add_counts(self.read_before, getattr(self.loader, "counts", {}))
        weights.write({**checkpoint, "tic": record}, self.folder / name)
        self.saved = time.monotonic()
        clear(self.folder, plan)
        push(self.folder, plan, [name, LOG])

    def _is_due(self, iteration: int) -> bool:
        """Return whether ``save_every`` samples or ``save_minutes`` have passed."""
        keep, batch_size = self.plan["keep"], self.plan["batch_size"]
        every, samples, block = keep["save_every"], iteration * batch_size, self.plan["block"] * batch_size
        if every and samples // every > (samples - block) // every:
            return True
        return time.monotonic() - self.saved >= 60 * keep["save_minutes"]

    def _samples_seen(self, iteration: int) -> int:
        return self.plan["samples_seen"] - self.plan["samples"] + iteration * self.plan["batch_size"]

    def log(self, iteration: int, values: dict[str, float]) -> None:
        """Append OpenCLIP's figures after ``iteration`` iterations to ``train.log.jsonl``, and move the progress bar.

        An infinite or NaN loss raises a TicError.
        """
        plan = self.plan
        losses = {name: value for name, value in values.items() if name.endswith("loss")}
        if not all(map(math.isfinite, losses.values())):
            raise TicError(f"the loss after {iteration} iterations of step {plan['step']} is {values['loss']}")
        line = {"step": iteration, "samples_seen": self._samples_seen(iteration), **losses, "lr": values["lr"]}
        line |= {"samples_per_second": values["samples_per_second"], "data_wait": values["data_time"]}
        with open(self.folder / LOG, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.bar is None:
            self.bar = progress(None, f"train {plan['step']}", plan["iterations"], "batch", done=iteration - 1)
        self.bar.update(min(iteration, plan["iterations"]) - self.bar.n)  # webdataset rounds a block's batches up
        if iteration >= plan["iterations"]:
            self.bar.close()

    def cut_log(self, iteration: int) -> None:
        """Delete what was logged after the checkpoint that training resumes from, and half a line."""
        path = self.folder / LOG
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            storage.write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= iteration))


def name_of(plan: dict[str, Any], iteration: int) -> str:
    """Return the name of the checkpoint after ``iteration`` iterations of a step."""
    number, rest = divmod(iteration, plan["iterations"] // plan["checkpoints"])
    return f"checkpoints/iteration_{iteration}.pt" if rest else f"checkpoints/epoch_{number}.pt"


def new_to_old(names: Iterable[str], plan: dict[str, Any]) -> list[str]:
    """Return the checkpoints among the names of a step's files, the newest first."""
    factor = {"epoch": plan["iterations"] // plan["checkpoints"], "iteration": 1}
    iterations = {name: int(found[2]) * factor[found[1]] for name in names if (found := NAME.fullmatch(name))}
    return sorted(iterations, key=iterations.get, reverse=True)


def list_checkpoints(folder: Path, plan: dict[str, Any]) -> list[str]:
    """Return the checkpoints in a step's folder, the newest first."""
    return new_to_old((f"checkpoints/{path.name}" for path in folder.glob("checkpoints/*.pt")), plan)


def surplus(names: Iterable[str], plan: dict[str, Any]) -> list[str]:
    """Return which checkpoints among a step's files to delete, so that at most ``max_kept`` remain.

    The newest is kept, then the last of each interval, then the two newest in between; none of these once the step's
    last checkpoint exists.
    """
    checkpoints = new_to_old(names, plan)
    between = [name for name in checkpoints if "iteration" in name]
    ends = [name for name in checkpoints if name not in between]
    is_done = name_of(plan, plan["iterations"]) in ends
    keep = list(dict.fromkeys([*checkpoints[:1], *ends, *([] if is_done else between[:2])]))
    return [name for name in checkpoints if name not in keep[: plan["keep"]["max_kept"]]]


def clear(folder: Path, plan: dict[str, Any]) -> None:
    """Delete a step's surplus checkpoints."""
    for name in surplus(list_checkpoints(folder, plan), plan):
        storage.remove(folder / name)


def newest(folder: Path, plan: dict[str, Any]) -> str | None:
    """Return the newest checkpoint in a step's folder that is not damaged; name those that are in a warning."""
    for path in [folder / name for name in list_checkpoints(folder, plan)]:
        fault = damage(path)
        if fault is None:
            return str(path)
        logging.warning("%s is damaged (%s): it is passed over for the one before, if there is one", path, fault)
    return None


def damage(path: object) -> str | None:
    """Return what is wrong with a checkpoint's file, by the checksums that torch writes and by loading it, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"wrong checksum of {bad}"
        weights.record(str(path))
    except Exception as error:  # noqa: BLE001  zipfile raises many kinds for a flipped bit
        return str(error) or type(error).__name__
    return None


def remote_name(plan: dict[str, Any], name: str) -> str:
    """Return the path or URL of the copy of a file of the step's folder."""
    return f"{plan['keep']['remote'].rstrip('/')}/{plan['step']}/{name}"


def list_remote(plan: dict[str, Any]) -> list[str]:
    """Return the names of the files in the copy of a step's folder."""
    root = remote_name(plan, "")
    try:
        return [path.removeprefix(root) for path, _ in storage.list_files(root.rstrip("/"), "**/*")]
    except NotFoundError:
        return []


def push(folder: Path, plan: dict[str, Any], names: Collection[str]) -> None:
    """Upload those of a step's files that exist, if it has a copy that is not complete; delete old checkpoints there.

    An error is logged and does not end the training: the copy of a step that is done is completed at the next start.
    """
    if not plan["keep"]["remote"]:
        return
    try:
        existing = list_remote(plan)
        if "done.json" in existing:
            return
        for name in names:
            if (folder / name).exists():
                storage.upload(folder / name, remote_name(plan, name))
        for name in surplus([*existing, *names], plan):
            storage.remove(remote_name(plan, name))
    except (TicError, OSError) as error:
        logging.warning("the copy in %s is behind: %s", plan["keep"]["remote"], error)


def push_done(folder: Path, plan: dict[str, Any], checkpoint: str) -> None:
    """Complete the copy of a step that is done; its model is ``checkpoint``."""
    push(folder, plan, dict.fromkeys([name_of(plan, plan["iterations"]), checkpoint, LOG, *LAST]))


def fetch(folder: Path, plan: dict[str, Any]) -> bool:
    """Download a step's copy if its folder has no ``plan.json``; return whether there was a copy.

    Of its checkpoints, the newest that is not damaged is downloaded.
    """
    if not plan["keep"]["remote"] or (folder / "plan.json").exists():
        return False
    names = list_remote(plan)
    checkpoints = new_to_old(names, plan)
    for name in checkpoints:
        storage.download(remote_name(plan, name), folder / name)
        fault = damage(folder / name)
        if fault is None:
            break
        logging.warning("%s is damaged (%s) and left out", remote_name(plan, name), fault)
        storage.remove(folder / name)
    others = {*names} - {*checkpoints, *LAST}
    for name in [*sorted(others), *(name for name in LAST if name in names)]:
        storage.download(remote_name(plan, name), folder / name)
    return bool(names)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a step's folder, and delete what a killed process left half written."""
    with storage.lock_folder(folder):
        for half in folder.glob("checkpoints/.*.tmp"):
            half.unlink()
        yield


def check_cutoff(record: dict[str, Any] | None, path: str, plan: dict[str, Any]) -> None:
    """Raise a TicError if a model to start from, with its ``record``, has seen data from after the step.

    A released model records no cut-off; its name (``2019.pt``) is one.
    """
    seen = (record or {}).get("cutoff") or cutoff(Path(path).stem)
    if seen and seen > plan["cutoff"]:
        raise TicError(f"{path} has seen data up to {seen}, after those of step {plan['step']}, {plan['cutoff']}")
