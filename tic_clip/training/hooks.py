"""All that open_clip.patch calls: data, the start from a checkpoint, saving and logging."""

from collections.abc import Callable
from typing import Any

import torch

from tic_clip import TicError, weights
from tic_clip.data.split import dataset_size, split_sizes
from tic_clip.runs import run_name
from tic_clip.storage import read_json
from tic_clip.training.loader import Loader

__all__ = ["dataset_size"]  # open_clip.patch calls it


def get_exact_dataset(
    args: Any, preprocess: Callable, is_train: bool, epoch: int = 0, tokenizer: Callable | None = None
) -> Any:
    """Return OpenCLIP's ``DataInfo`` for ``--dataset-type exact --train-data plan.json``: the plan's samples.

    OpenCLIP's epoch is a block of the plan.

    Raises:
        TicError: the plan's batch is not what ``--batch-size`` times the number of ranks makes.
    """
    from training.data import DataInfo, SharedEpoch

    assert is_train, "exact sampling is for training"
    plan = read_json(args.train_data)
    if plan["batch_size"] != args.batch_size * args.world_size:
        raise TicError(f"the plan's batch is {plan['batch_size']}, not {args.batch_size} × {args.world_size} ranks")
    shared_epoch = SharedEpoch(epoch=epoch)
    loader = Loader(plan, shared_epoch, args.rank, args.world_size, args.workers, (preprocess, tokenizer))
    return DataInfo(dataloader=loader, shared_epoch=shared_epoch)


def weighted_shards(path: str) -> tuple[list[str], list[float] | None]:
    """Return all shards and how likely each is drawn, for ``--dataset-resampled --train-data plan.json``.

    A shard that is drawn gives all its samples, so every shard of a source with the share s of n samples weighs s / n;
    None where all weigh the same.
    """
    sources = read_json(path)["sources"]
    shares = {entry["split"]: entry["samples"] / entry["size"] for entry in sources}
    shards = [(shard, shares[entry["split"]]) for entry in sources for shard in split_sizes(entry["split"])]
    alike = max(shares.values()) < 1.001 * min(shares.values())  # rounding to whole samples aside
    return [shard for shard, _ in shards], None if alike else [weight for _, weight in shards]


def save(checkpoint: dict[str, Any], path: str, args: Any = None) -> None:
    """Save what OpenCLIP saves after an epoch; in a step of ours an epoch is a block, and its ``Keeper`` decides.

    Raises:
        TicError: the file can't be written.
    """
    keeper = getattr(args, "tic", None)
    if keeper:
        keeper.save(checkpoint)
    else:
        weights.write(checkpoint, path)


def start_from(args: Any, own: str | None) -> str | None:
    """Return what to resume: this experiment's ``own`` newest checkpoint if there is one, which is not a new run.

    Without ``--new-run`` it is ``own``, as in stock OpenCLIP's ``--resume latest``.
    """
    if not args.new_run:
        return own
    args.new_run = own is None
    return own or (None if args.resume == "latest" else args.resume)


def checkpoint_for(model: torch.nn.Module, args: Any) -> dict[str, Any]:
    """Return the checkpoint ``--resume``, whatever number of ranks saved it.

    Of a new run only its weights, and its optimizer where ``--keep-optimizer`` asks for it. What the checkpoint records
    of its making goes to ``args.tic_record``.

    Raises:
        TicError: it can't be loaded, is of another architecture, or holds no optimizer; the message names the file.
    """
    from training.file_utils import pt_load

    checkpoint = weights.read_safely(pt_load, args.resume, map_location="cpu")
    wanted = model.state_dict()
    prefix = "module." if all(name.startswith("module.") for name in wanted) else ""
    state = {prefix + name: value for name, value in weights.state_dict(checkpoint, args.resume).items()}
    difference = weights.mismatch(state, wanted)
    if difference:
        raise TicError(f"checkpoint {args.resume} is not of {args.model}: {difference}")
    args.tic_record = checkpoint.get("tic")
    if args.new_run and not args.keep_optimizer:
        return state
    if "optimizer" not in checkpoint:
        raise TicError(f"{args.resume} holds no optimizer to go on with")
    return {**checkpoint, "state_dict": state, "epoch": 0 if args.new_run else checkpoint["epoch"]}


def device_ids(device: torch.device) -> list[torch.device] | None:
    """Return what DDP takes as ``device_ids``: None for a module on the CPU."""
    return [device] if device.type == "cuda" else None


def log(args: Any, step: int, values: dict[str, float]) -> None:
    """Append what OpenCLIP logs after its batch ``step`` (from 0) to the log of a step of ours."""
    if getattr(args, "tic", None):
        args.tic.log(step + 1, {name.removeprefix("train/"): value for name, value in values.items()})


def wandb_name(args: Any) -> str:
    """Return the name of a run for wandb."""
    return run_name(args.tic.plan) if getattr(args, "tic", None) else args.name
