"""Train steps with OpenCLIP in this process, one after the other.

A step's folder holds ``plan.json`` (written first), ``checkpoints/``, ``train.log.jsonl`` (a line a logged batch),
``out.log``, ``params.txt`` and ``done.json`` (written last). A step with ``done.json`` is skipped; one without resumes
from its own newest checkpoint, and starts from the last step's model only if it has none.
"""

import functools
import gc
import logging
import os
import re
import time
import zipfile
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tic_clip import TicError, check_installed, package_file
from tic_clip.benchmarks import get_benchmark
from tic_clip.models import MODEL_CONFIGS, has_logit_bias, save_pretrained
from tic_clip.runs import keep_benchmark, last_checkpoint
from tic_clip.storage import read_json, write_json
from tic_clip.training.config import Config, scale_of
from tic_clip.training.losses import save_fisher
from tic_clip.training.patching import average, patch
from tic_clip.training.plan import add_macs, check_step, difference, make_plan

FINISH = {"patching": patch, "averaging": average, "ewc": save_fisher}
"""What makes a method's model after training: maps the plan and the folder of a step to facts for ``done.json``."""


def train_steps(config: Config, steps: Sequence[str], rank: int, world_size: int) -> None:
    """Train ``steps`` in this process, one of ``world_size`` ranks; skip finished ones."""
    with join_ranks(world_size) as waiting:
        for step in steps:
            is_trained = train_step(replace(config, step=step), rank, world_size, waiting)
            if rank == 0 and not is_trained:
                print(f"{step}: done already", flush=True)


def read_ranks(environ: MutableMapping[str, str]) -> tuple[int, int]:
    """Return (rank, number of ranks) from torchrun, or from srun with one task per rank; else (0, 1).

    What srun has set gets torchrun's names.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")  # SLURM_NTASKS may be those of a job in whose shell this is
    if "RANK" not in environ and tasks != "1":
        first_host = re.sub(r"\[(\w+).*?\]", r"\1", environ["SLURM_STEP_NODELIST"]).partition(",")[0]
        environ |= {"WORLD_SIZE": tasks, "RANK": environ["SLURM_PROCID"], "LOCAL_RANK": environ["SLURM_LOCALID"]}
        environ.setdefault("MASTER_ADDR", first_host)
        environ.setdefault("MASTER_PORT", str(20000 + int(environ["SLURM_JOB_ID"]) % 10000))  # two jobs do not meet
    return (int(environ["RANK"]), int(environ["WORLD_SIZE"])) if "RANK" in environ else (0, 1)


@contextmanager
def join_ranks(world_size: int) -> Iterator[Any]:
    """Initialise torch.distributed for several ranks; yield a group in which ranks may wait for hours."""
    if world_size == 1:
        os.environ["WORLD_SIZE"] = "1"  # else OpenCLIP takes the tasks of an interactive Slurm allocation for ranks
        yield None
        return
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()  # srun may show each task its own
        os.environ["LOCAL_RANK"] = str(device)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    yield torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    torch.distributed.destroy_process_group()


def train_step(config: Config, rank: int, world_size: int, waiting: Any) -> bool:
    """Train or resume one step; return False if it was already done."""
    plan = make_plan(config, world_size)
    folder = Path(config.output_dir, plan["step"])
    if waiting:
        check_ranks(plan, rank)
    added = [prepare(config, plan, folder) if rank == 0 else None]
    if waiting:  # the files may change, so rank 0 decides for all
        import torch.distributed

        torch.distributed.broadcast_object_list(added, group=waiting)
    if added[0] is None:
        return False
    started = time.monotonic()
    from tic_clip.training import checkpoint

    plan = add_macs({**plan, **added[0]})
    if rank != 0:
        run_open_clip(plan, config, world_size)
        return True
    with checkpoint.alone(folder):
        write_json(folder / "plan.json", plan)
        checkpoint.push(folder, plan, ["plan.json"])
        run_open_clip(plan, config, world_size)
        finish(plan, folder, started)
    return True


def check_ranks(plan: dict[str, Any], rank: int) -> None:
    """Raise a TicError if ranks have different plans."""
    from tic_clip.training.loader import gathered

    for number, other in enumerate(gathered(plan)):
        if found := difference({**other, **other["layout"]}, {**plan, **plan["layout"]}):
            raise TicError(f"rank {number} has another plan than rank {rank}: {found}")


def prepare(config: Config, plan: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """Download the step's copy; return None if the step is done, else check it and return additions to its plan."""
    from tic_clip.training import checkpoint

    checkpoint.fetch(folder, plan)
    if check_step(config, plan):
        checkpoint.push_done(folder, plan)
        return None
    check_ready(config)
    keep_benchmark(config.output_dir, get_benchmark(config.benchmark))
    start = plan["start"]
    if start and not Path(start).exists():
        save_pretrained(config.init, plan["model"], start)
    if start and zipfile.is_zipfile(start) and (fault := checkpoint.damage(start)):
        raise TicError(f"{start}, which {plan['step']} starts from, is damaged: {fault}")
    return {} if "precision" in plan else choose_precision(folder)


def choose_precision(folder: Path) -> dict[str, str]:
    """Return the precision of the run so far, or else the device's default, as a part of a plan."""
    is_begun = any(folder.glob("checkpoints/*.pt"))
    for path in [folder / "plan.json"] if is_begun else sorted(folder.parent.glob("*/done.json")):
        plan = read_json(path.with_name("plan.json"))
        return {"precision": plan["precision"]} if "precision" in plan else {}  # of an earlier version
    import torch

    if not torch.cuda.is_available():
        return {"precision": "fp32"}
    return {"precision": "amp_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "amp"}


def check_ready(config: Config) -> None:
    """Raise a TicError if OpenCLIP is not patched, a logger is not ready, or the precision needs a GPU."""
    if config.precision == "amp":
        import torch

        if not torch.cuda.is_available():
            raise TicError("--precision amp needs a GPU: on a CPU fp32 or amp_bf16 can be trained")
    main = package_file("training", "main.py")
    if "tic_clip" not in main.read_text():
        raise TicError(f"{main} is not the patched OpenCLIP's: run bash setup.sh")
    reports = config.report_to.replace("all", "tensorboard,wandb").split(",")
    for package in filter(None, reports):
        check_installed(package)
    if "wandb" in reports and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise TicError(f"wandb: {error} (.venv/bin/wandb login; WANDB_MODE=offline keeps its log here)") from None


def open_clip_arguments(plan: dict[str, Any], config: Config, world_size: int, cuda: bool) -> list[str]:
    """Return the command line of OpenCLIP's ``training.main`` for a step."""
    scale = scale_of(config)
    flags = {
        "model": plan["model"],
        "logs": config.output_dir,
        "name": plan["step"],
        "dataset-type": "exact",
        "train-data": Path(config.output_dir, plan["step"], "plan.json"),
        "epochs": plan["iterations"] // plan["block"],
        "train-num-samples": plan["block"] * plan["batch_size"],
        "batch-size": plan["batch_size"] // world_size // plan["layout"]["accum_freq"],
        "accum-freq": plan["layout"]["accum_freq"],
        "workers": scale.workers,
        "lr": plan["learning_rate"],
        "warmup": plan["warmup"],
        "wd": plan["weight_decay"],
        "beta2": plan["beta2"],
        "eps": 1e-6,
        "seed": plan["seed"],
        "log-every-n-steps": scale.log_every,
        "report-to": config.report_to,
        "precision": plan.get("precision") or ("amp" if cuda else "fp32"),
    }
    arguments = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    arguments += ["--new-run", "--fused-adamw", "--local-loss", "--gather-with-grad"]
    arguments += ["--grad-checkpointing"] * scale.grad_checkpointing
    arguments += ["--siglip"] * has_logit_bias(plan["model"])
    arguments += ["--keep-optimizer"] * (plan["optimizer"] == "kept")
    arguments += ["--resume", plan["start"]] if plan["start"] else []
    if plan["teacher"]:
        arguments += ["--distill-model", plan["model"], "--distill-pretrained", plan["teacher"]]
    return arguments + plan["openclip_flags"]


def run_open_clip(plan: dict[str, Any], config: Config, world_size: int) -> None:
    """Run OpenCLIP's ``main`` on a plan in this process, then free its memory."""
    import open_clip
    import torch
    from training import main as openclip_main
    from training import train as openclip_train

    from tic_clip.training import checkpoint

    if not torch.cuda.is_available():  # OpenCLIP's autocast is for CUDA alone
        cpu = functools.partial(torch.autocast, "cpu", torch.bfloat16)
        openclip_train.get_autocast = lambda precision: cpu if precision == "amp_bf16" else nullcontext
    open_clip.add_model_config(MODEL_CONFIGS)
    openclip_main.setup_logging = log_to_file
    openclip_main.get_latest_checkpoint = lambda path, remote: checkpoint.newest(Path(path).parent, plan)
    arguments = open_clip_arguments(plan, config, world_size, torch.cuda.is_available())
    if openclip_main.main(arguments) == -1:
        raise TicError(f"OpenCLIP refused to train step {plan['step']}: its reason is above")
    gc.collect()
    torch.cuda.empty_cache()


def log_to_file(path: str | None, level: int, include_host: bool = False) -> None:
    """Set up OpenCLIP's logging for a step, with only warnings on the console beside the progress bar."""
    from training.logger import setup_logging

    for handler in list(logging.root.handlers):
        if type(handler) in (logging.StreamHandler, logging.FileHandler):  # of the step before
            logging.root.removeHandler(handler)
            handler.close()
    setup_logging(path, level, include_host)
    for logger in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.WARNING)


def check_shares(plan: dict[str, Any], read: dict[str, dict[str, int]]) -> None:
    """Warn if a source gave another number of samples than planned; raise a TicError if it gave none."""
    for source in plan["sources"] if read else ():  # a step of an earlier version may have counted nothing
        name, planned, counts = source["name"], source["samples"], read.get(source["name"], {})
        count, bad = counts.get("read", 0), counts.get("undecodable", 0)
        if not count:
            raise TicError(f"step {plan['step']} read no sample of {name}, {planned:,} were planned")
        if count != planned:
            logging.warning("%s: %s samples were read, %s were planned", name, f"{count:,}", f"{planned:,}")
        if bad:
            logging.warning("%s: left out and replaced: %s undecodable of %s read", name, f"{bad:,}", f"{count:,}")


def finish(plan: dict[str, Any], folder: Path, started: float) -> None:
    """Finish a step: make the method's model and write ``done.json`` with what was read of each source."""
    from tic_clip import weights
    from tic_clip.training import checkpoint

    last = str(last_checkpoint(plan["checkpoints"]))
    read = (weights.record(f"{folder}/{last}") or {}).get("read", {})
    check_shares(plan, read)
    facts = {
        "checkpoint": last,
        **FINISH.get(plan["method"], lambda *_: {})(plan, folder),
        "samples_seen": plan["samples_seen"],
        "macs_seen": plan["macs_seen"],
        "read": read,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "plan": plan,
    }
    checkpoint.clear(folder, plan)
    write_json(folder / "done.json", facts)
    checkpoint.push_done(folder, plan)
