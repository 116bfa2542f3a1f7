"""One step: OpenCLIP's arguments, and the markers that make a step restartable.

``O/{step}/`` holds ``plan.json`` (written first), ``checkpoints/``, ``train.log.jsonl`` (a line a logged batch),
``out.log``, ``params.txt`` and ``done.json`` (written last). A step with ``done.json`` is skipped; one without goes on
from its own newest checkpoint, and from the last step's model only if it has none.
"""

import functools
import io
import logging
import os
import time
import warnings
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tic_clip import TicError, storage
from tic_clip.data.eval_uids import package_file
from tic_clip.runs import last_checkpoint, read_done
from tic_clip.storage import read_json, write_json
from tic_clip.training.methods import get_method
from tic_clip.training.plan import Request, add_macs, check_run, check_same, difference, make_plan, step_folder
from tic_clip.training.scales import get_scale


def open_clip_arguments(plan: dict[str, Any], request: Request, world_size: int, cuda: bool) -> list[str]:
    """The command line of OpenCLIP's ``training.main`` for a step; it is passed in process, so it may be long."""
    scale = get_scale(plan["scale"])
    flags = {
        "model": plan["model"],
        "logs": request.output_dir,
        "name": plan["step"],
        "train-data": step_folder(request, plan["step"]) / "plan.json",
        "epochs": plan["iterations"] // plan["block"],
        "train-num-samples": plan["block"] * plan["batch_size"],
        "batch-size": plan["batch_size"] // world_size,
        "workers": scale.workers if request.workers is None else request.workers,
        "lr": plan["learning_rate"],
        "warmup": plan["warmup"],
        "wd": plan["weight_decay"],
        "beta1": 0.9,
        "beta2": plan["beta2"],
        "eps": 1e-6,
        "seed": plan["seed"],
        "save-frequency": 1,  # Keeper decides
        "log-every-n-steps": scale.log_every,
        "report-to": request.report_to,
        "precision": "amp" if cuda else "fp32",
        "dist-backend": "nccl" if cuda else "gloo",
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    arguments += ["--new-run", "--fused-adamw", "--local-loss", "--gather-with-grad"]
    arguments += SAMPLING[plan["sampling"]]
    arguments += ["--grad-checkpointing"] * scale.grad_checkpointing
    arguments += ["--keep-optimizer"] * (plan["optimizer"] == "kept")
    arguments += ["--resume", plan["start"]] if plan["start"] else []
    if plan["teacher"]:
        arguments += ["--distill-model", plan["model"], "--distill-pretrained", plan["teacher"]]
    return arguments


SAMPLING = {"exact": ["--dataset-type", "exact"], "resampled": ["--dataset-type", "webdataset", "--dataset-resampled"]}


def run_step(request: Request, *, rank: int, world_size: int) -> bool:
    """Train one step, or go on with it; False if it was done already.

    Raises:
        TicError: as ``make_plan`` and ``check_same``; the model to start from is not there, or has seen later data;
            OpenCLIP ended without the step's last checkpoint.
    """
    plan = make_plan(request, world_size)
    folder = step_folder(request, plan["step"])
    begun, done = folder / "plan.json", folder / "done.json"
    if rank == 0 and fetch_copy(request, plan) and done.exists() and world_size > 1:
        raise TicError(f"{plan['step']} is done, by its copy in {request.remote}, which is here now: start again")
    if done.exists() or (begun.exists() and any(folder.glob("checkpoints/*.pt"))):
        check_same(read_json(begun), plan, folder)
    if done.exists():
        facts = read_done(done)
        if rank == 0 and request.remote:
            from tic_clip.training import checkpoint

            checkpoint.push_done(folder, plan, facts["checkpoint"])
        return False
    if plan["start"] and plan["start"] != request.init:
        check_step_before(plan)
    if rank == 0:
        check_ready(request)
    started = time.monotonic()
    warnings.simplefilter("ignore", FutureWarning)  # of what the pinned OpenCLIP calls, at import and later
    from tic_clip import weights
    from tic_clip.training import checkpoint

    plan = add_macs(plan)
    if plan["start"]:
        checkpoint.check_cutoff(weights.record(plan["start"]), plan["start"], plan)
    if rank != 0:
        train(plan, request, world_size)
        return True
    if plan["start"] and zipfile.is_zipfile(plan["start"]) and (fault := checkpoint.damage(plan["start"])):
        raise TicError(f"{plan['start']}, which {plan['step']} starts from, is damaged: {fault}")
    with checkpoint.alone(folder):
        write_json(begun, plan)
        checkpoint.push(folder, plan, ["plan.json"])
        train(plan, request, world_size)
        finish(plan, request, started)
    return True


def check_ready(request: Request) -> None:
    """Whether a run can begin here, but for its plan: OpenCLIP is patched, the folder can be written, wandb logged in.

    Raises:
        TicError: that is not so; the message says what to do.
    """
    main = package_file("training", "main.py")
    if "tic_clip" not in main.read_text():
        raise TicError(f"{main} is not the patched OpenCLIP's: run bash setup.sh")
    folder = Path(os.path.abspath(request.output_dir))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise TicError(f"{there} is a file, so {folder} can't be the folder of a run")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TicError(f"{there} may not be written: give another output folder")
    if {"wandb", "all"} & set(request.report_to.split(",")) and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise TicError(f"wandb: {error} (.venv/bin/wandb login; WANDB_MODE=offline keeps its log here)") from None


def fetch_copy(request: Request, plan: dict[str, Any]) -> bool:
    """Where nothing of the step is here, get what its remote copy has; whether there was something."""
    if not request.remote:
        return False
    from tic_clip.training import checkpoint

    return checkpoint.fetch(step_folder(request, plan["step"]), plan)


def check_step_before(plan: dict[str, Any]) -> None:
    """Refuse to start from a step that is not done, or is not of the same run.

    Raises:
        TicError: that is so.
    """
    done = Path(plan["start"]).parents[1] / "done.json"
    if not done.exists():
        raise TicError(f"{plan['step']} starts from {plan['start']}, but that step is not done: train it first")
    check_run(read_done(done)["plan"], plan)


def finish(plan: dict[str, Any], request: Request, started: float) -> None:
    """After the last block: the method's own ending, and ``done.json`` with what was read of each source.

    Raises:
        TicError: the step's last checkpoint is not there.
    """
    from tic_clip import weights
    from tic_clip.training import checkpoint

    folder = step_folder(request, plan["step"])
    last = last_checkpoint(plan["checkpoints"])
    if not (folder / last).exists():
        raise TicError(f"OpenCLIP ended without {folder / last}; see {folder / 'out.log'}")
    method = get_method(plan["method"])
    read = (weights.record(str(folder / last)) or {}).get("read", {})
    for name, row in read.items():
        left_out = {reason: count for reason, count in row.items() if reason != "read"}
        if left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
            logging.warning("%s: left out and replaced: %s of %s read", name, reasons, f"{row.get('read', 0):,}")
    facts = {
        "checkpoint": str(last),
        **(method.finish(plan, folder) if method.finish else {}),
        "samples_seen": plan["samples_seen"],
        "macs_seen": plan["macs_seen"],
        "read": read,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "plan": plan,
    }
    checkpoint.clear(folder, plan)
    write_json(folder / "done.json", facts)
    checkpoint.push_done(folder, plan, facts["checkpoint"])


def train(plan: dict[str, Any], request: Request, world_size: int) -> None:
    """Run OpenCLIP's ``main`` in this process on a plan."""
    import torch
    import torch.distributed
    from training import main as openclip_main
    from webdataset.gopen import gopen_schemes

    gopen_schemes.update(dict.fromkeys(("s3", "gs", "az"), open_remote))
    openclip_main.setup_logging = log_to_file
    openclip_main.get_data = functools.partial(get_data, plan)
    openclip_main.get_latest_checkpoint = functools.partial(newest_checkpoint, plan)
    arguments = open_clip_arguments(plan, request, world_size, torch.cuda.is_available())
    try:
        if openclip_main.main(arguments) == -1:
            raise TicError(f"OpenCLIP refused to train step {plan['step']}: its reason is above")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def newest_checkpoint(plan: dict[str, Any], path: str, remote: bool) -> str | None:
    """OpenCLIP's ``get_latest_checkpoint``: the newest that is whole."""
    from tic_clip.training import checkpoint

    return checkpoint.newest(Path(path).parent, plan)


def get_data(plan: dict[str, Any], args: Any, *more: Any, epoch: int = 0, **options: Any) -> dict[str, Any]:
    """OpenCLIP's ``get_data``, with on ``args.tic`` what keeps checkpoints and the log.

    Raises:
        TicError: another rank has another plan.
    """
    from training.data import get_data as openclip_get_data

    from tic_clip.training.checkpoint import Keeper
    from tic_clip.training.loader import gathered

    for rank, other in enumerate(gathered(plan)):
        if found := difference(other, plan):
            raise TicError(f"rank {rank} has another plan than rank {args.rank}: {found}")
    data = openclip_get_data(args, *more, epoch=epoch, **options)
    resumed = getattr(args, "tic_record", None) if epoch else None
    args.tic = Keeper(plan, Path(args.logs) / args.name, data["train"].dataloader, resumed)
    if args.rank == 0:
        args.tic.cut_log(epoch * plan["block"])
    return data


def open_remote(url: str, *_: Any, **__: Any) -> IO[bytes]:
    """A shard in a cloud, for webdataset."""
    return io.BytesIO(storage.read_bytes(url))


def log_to_file(path: str | None, level: int, include_host: bool = False) -> None:
    """OpenCLIP's logging, with only warnings on the console, where the progress bar is."""
    from training.logger import setup_logging

    for handler in [handler for handler in logging.root.handlers if type(handler) is logging.StreamHandler]:
        logging.root.removeHandler(handler)  # of who logged before; each line would come twice
    setup_logging(path, level, include_host)
    loggers = [logging.root, *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)
