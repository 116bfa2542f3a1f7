"""Everything that open_clip.patch calls; ``args.tic`` is the ``Keeper`` when OpenCLIP trains a step of ours."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tic_clip import TicError, weights
from tic_clip.data.split import dataset_size as dataset_size
from tic_clip.runs import run_id, run_name
from tic_clip.storage import read_json
from tic_clip.training import losses
from tic_clip.training.checkpoint import Keeper
from tic_clip.training.loader import ExactDataset, Loader, image_functions
from tic_clip.training.schedule import learning_rate

# What the pinned OpenCLIP calls; and the first of several passes needs no gradient of what it checkpoints.
warnings.filterwarnings("ignore", category=FutureWarning, module="(training|open_clip)[.]")
warnings.filterwarnings("ignore", "torch.utils.checkpoint: |None of the inputs have requires_grad", UserWarning)


def get_exact_dataset(args: Any, preprocess: Callable, is_train: bool, epoch: int = 0, tokenizer: Any = None) -> Any:
    """Return OpenCLIP's ``DataInfo`` for ``--dataset-type exact --train-data plan.json``; its epoch is a block.

    Sets ``args.tic`` for a step of ours, which then writes checkpoints and the log.
    """
    from training.data import DataInfo, SharedEpoch

    plan, passes = read_json(args.train_data), getattr(args, "accum_freq", 1)
    if plan["batch_size"] != args.batch_size * args.world_size * passes:
        found = f"{args.batch_size} × {args.world_size} ranks" + f" × {passes} passes" * (passes > 1)
        raise TicError(f"the plan's batch is {plan['batch_size']}, not {found}")
    in_passes = plan | {name: passes * plan[name] for name in ("iterations", "block")}
    in_passes["batch_size"] //= passes
    shared_epoch = SharedEpoch(epoch=epoch)
    load, to_input = image_functions(plan.get("image_backend", "pil"), preprocess, args.device)
    dataset = ExactDataset(in_passes, args.rank, args.world_size, (load, tokenizer))
    loader = Loader(dataset, shared_epoch, args.workers, to_input)
    if "method" in plan:  # a step of ours
        resumed = getattr(args, "tic_record", None) if epoch else None
        args.tic = Keeper(plan, Path(args.logs, args.name), loader, resumed)
        if args.rank == 0:
            args.tic.cut_log(epoch * plan["block"])
    return DataInfo(dataloader=loader, shared_epoch=shared_epoch)


def save(checkpoint: dict[str, Any], path: str, args: Any = None) -> None:
    """Save the checkpoint of an epoch; for a step of ours, an epoch is a block and ``args.tic`` decides."""
    if hasattr(args, "tic"):
        args.tic.save(checkpoint)
    else:
        weights.write(checkpoint, path)


def start_from(args: Any, own: str | None) -> str | None:
    """Return the checkpoint to resume: the experiment's ``own`` newest, or else ``--resume`` for a new run."""
    if args.new_run:
        args.new_run = own is None
        return own or (None if args.resume == "latest" else args.resume)
    return own


def checkpoint_for(model: torch.nn.Module, args: Any) -> dict[str, Any]:
    """Load ``--resume``, saved by any number of ranks; a new run gets its weights, and the optimizer if asked to.

    ``args.tic_record`` is what the checkpoint records.
    """
    from training.file_utils import pt_load

    checkpoint = weights.read(args.resume, pt_load)
    wanted = model.state_dict()
    prefix = "module." if all(name.startswith("module.") for name in wanted) else ""
    state = {prefix + name: value for name, value in weights.state_dict(checkpoint, args.resume).items()}
    if difference := weights.mismatch(state, wanted):
        raise TicError(f"checkpoint {args.resume} is not of {args.model}: {difference}")
    args.tic_record = checkpoint.get("tic")
    if args.new_run and not args.keep_optimizer:
        return state
    if "optimizer" not in checkpoint:
        raise TicError(f"{args.resume} has no optimizer to resume with")
    return {**checkpoint, "state_dict": state, "epoch": 0 if args.new_run else checkpoint["epoch"]}


def scheduler(stock: Callable, optimizer: torch.optim.Optimizer, args: Any) -> Callable[[int], None]:
    """Return the function that sets the learning rate: OpenCLIP's, or the plan's for a step of ours."""
    from training.scheduler import assign_learning_rate

    if not hasattr(args, "tic"):
        return stock
    return lambda iteration: assign_learning_rate(optimizer, learning_rate(args.tic.plan, iteration))


def loss(stock: torch.nn.Module, model: torch.nn.Module, args: Any) -> Callable:
    """Return OpenCLIP's loss, or the method's for a step of ours."""
    if not hasattr(args, "tic"):
        return stock
    parameters = {name.removeprefix("module."): value for name, value in model.named_parameters()}
    return losses.method_loss(stock, args.tic.plan, parameters, args.accum_freq)


def device_ids(device: torch.device) -> list[torch.device] | None:
    """Return DDP's ``device_ids``: None for a module on the CPU."""
    return [device] if device.type == "cuda" else None


def log(args: Any, step: int, values: dict[str, float]) -> None:
    """Log OpenCLIP's figures after batch ``step`` (from 0) of a step of ours."""
    if hasattr(args, "tic"):
        args.tic.log(step + 1, {name.removeprefix("train/"): value for name, value in values.items()})


def wandb_options(args: Any) -> dict[str, str | None]:
    """Return name, id and resume for ``wandb.init``; a step of ours resumes its own run."""
    if not hasattr(args, "tic"):
        return {"name": args.name, "id": args.name, "resume": "auto" if args.resume == "latest" else None}
    return {"name": run_name(args.tic.plan), "id": run_id(args.tic.plan, args.logs), "resume": "allow"}
