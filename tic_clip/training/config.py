"""The settings of a run: a table of scales, and ``Config``, whose fields are the flags of scripts/train.py."""

import argparse
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tic_clip import TicError, lookup
from tic_clip.benchmarks import BENCHMARKS, read_yaml
from tic_clip.cli import from_flags
from tic_clip.models import HUB
from tic_clip.settings import BOOLEANS
from tic_clip.storage import is_remote, to_path
from tic_clip.training.flags import OURS, group_words, join_flags, read_flags
from tic_clip.training.methods import METHODS

Count, CountOr0 = Annotated[int, Meta(ge=1)], Annotated[int, Meta(ge=0)]


class Scale(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a step is trained; ``batch_size`` is the global batch, ``samples_per_step`` is C in the documents."""

    batch_size: Count
    samples_per_step: Count
    warmup: CountOr0  # iterations, of a step that starts from random weights
    next_warmup: CountOr0 = 0  # iterations, of a step that starts from a trained model
    model: str = "ViT-B-16"
    learning_rate: Annotated[float, Meta(gt=0)] = 5e-4
    weight_decay: Annotated[float, Meta(ge=0)] = 0.2
    beta2: Annotated[float, Meta(gt=0, lt=1)] = 0.98
    checkpoints: Count = 5  # a step
    max_kept: Count = 7  # checkpoints of a step on the disk: these five and the two newest in between
    resume_every: Count = 300  # iterations, about, between two places where training can be resumed
    log_every: Count = 100  # iterations
    grad_checkpointing: bool = True
    workers: CountOr0 = 4  # a rank
    image_backend: Literal["torchvision", "pil"] = "torchvision"


SCALES = {
    "tic_tiny": Scale(
        model="ViT-Tiny-12-48",
        batch_size=64,
        samples_per_step=6_400,
        learning_rate=1e-3,
        warmup=30,
        next_warmup=15,
        weight_decay=0.1,
        checkpoints=2,
        max_kept=2,
        resume_every=20,
        log_every=10,
        grad_checkpointing=False,
        workers=0,
    ),
    "tic_debug": Scale(
        model="ViT-B-32", batch_size=1024, samples_per_step=1_024_000, learning_rate=1e-4, warmup=500, resume_every=100
    ),
    "tic_medium": Scale(batch_size=4096, samples_per_step=18_432_000, warmup=500),
    "tic_large": Scale(batch_size=8192, samples_per_step=184_320_000, warmup=500),
    "tic_xlarge": Scale(
        batch_size=90_112, samples_per_step=1_847_296_000, learning_rate=1e-3, warmup=10_000, resume_every=100
    ),
    # TiC-CLIP's own settings for these two are not known: about eight passes over a quarter of the data, in batches
    # that one GPU holds.
    "tic_yfcc15m": Scale(batch_size=1024, samples_per_step=30_720_000, warmup=2_000),
    "tic_redcaps": Scale(batch_size=1024, samples_per_step=24_576_000, warmup=2_000),
}


def get_scale(name: str) -> Scale:
    """Return the scale called ``name``, or read it from the YAML file ``name``."""
    if not name.endswith((".yaml", ".yml")):
        return lookup(SCALES, "scale", name)
    try:
        return read_yaml(name, Scale, strict=False)  # YAML reads 1e-4 as a text
    except TicError as error:
        keys = f"; the keys are {', '.join(Scale.__struct_fields__)}" * ("unknown field" in str(error))
        raise TicError(f"{error}{keys}") from None


def _value(parse: Callable[[str], Any], is_valid: Callable[[Any], Any], description: str) -> Callable[[str], Any]:
    """Return an argparse type: parsed text that ``is_valid``; ``description`` ends "it is not …" of an error."""

    def convert(text: str) -> Any:
        try:
            if is_valid(value := parse(text)):
                return value
        except TicError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        except (ValueError, ArithmeticError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")

    return convert


def _each(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: tuple(map(parse, text.split(",")))


def _number(text: str) -> float:
    return float(Fraction(text.strip()))  # 4/3, too


location = _value(str, len, "a folder or a URL")
remote_folder = _value(str, lambda text: text and to_path(text), "a folder or a URL")
local_folder = _value(str, lambda text: text and not is_remote(text), "a local folder; --remote gets copies of a run")
disk_folder = _value(str, lambda text: text and not is_remote(text), "a folder on a local disk")
start_model = _value(
    str,
    lambda text: Path(text).is_file() or names_model(text),
    'a file on this disk, nor a model as "ViT-B-32 laion2b_s34b_b79k" or hf-hub:OWNER/NAME',
)
boolean = _value(lambda text: BOOLEANS.get(text.lower()), lambda value: value is not None, "one of 0, 1, no, yes")
whole = _value(int, lambda number: number > 0, "a whole number from 1")
whole_or_0 = _value(int, lambda number: number >= 0, "a whole number from 0")
random_seed = _value(int, lambda number: 0 <= number < 2**32, "a whole number from 0 to 2**32 - 1")
amount = _value(float, lambda number: 0 <= number < inf, "a number from 0")
positive = _value(float, lambda number: 0 < number < inf, "a number above 0")
share = _value(float, lambda number: 0 <= number <= 1, "a number from 0 to 1")
amounts = _value(_each(_number), lambda found: min(found) > 0, "a list of numbers above 0, such as 1,1,1.5")
counts = _value(_each(int), lambda found: min(found) >= 0, "a whole number from 0, or a list of them")
part = _value(float, lambda number: 0 <= number < 1, "a number from 0, less than 1")
dtype = _value(str, ("fp32", "amp", "amp_bf16").__contains__, "fp32, amp or amp_bf16")
other_flags = _value(read_flags, lambda _: True, "a list of OpenCLIP's flags")
decoder = _value(str, ("torchvision", "pil").__contains__, "torchvision or pil")
REPORTS = {"", "tensorboard", "wandb", "all"}
reports = _value(str, lambda text: REPORTS.issuperset(text.split(",")), "tensorboard, wandb or both")


def _flag(convert: Callable[[str], Any], help_text: str, default: Any = None) -> Any:
    optional = {"nargs": "?", "const": True} if convert is boolean else {}
    return field(default=default, metadata={"type": convert, "help": help_text, **optional})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train: names of tables' rows, folders, and values that replace those of the rows.

    Each field is a flag of scripts/train.py and, in capitals, a variable of the run scripts. Fields after
    ``temperature`` do not change the model: a step may be resumed with other values.
    """

    benchmark: str = _flag(str, f"one of {', '.join(BENCHMARKS)}, or a path.yaml (default: datacomp)", "datacomp")
    method: str = _flag(str, f"one of {', '.join(METHODS)}", MISSING)
    scale: str = _flag(str, f"one of {', '.join(SCALES)}, or a path.yaml", MISSING)
    step: str = _flag(str, "a step, or all (python -m tic_clip.benchmarks BENCHMARK lists them)", MISSING)
    data_dir: str = _flag(location, "the folder or URL that holds tic/{dataset}/…", MISSING)
    output_dir: str = _flag(local_folder, "the run's folder, one for all its steps", MISSING)
    filter: str | None = _flag(str, "filter of datacomp's training data: basic or bestpool (default: basic)")
    resampled: bool = _flag(boolean, "sample with replacement", False)
    seed: int = _flag(random_seed, "seed of weights, order and augmentation (default: 0)", 0)
    model: str | None = _flag(str, "an OpenCLIP architecture, such as ViT-B-32 (default: the scale's)")
    samples_per_step: int | None = _flag(whole, "C, the samples that a step spends (default: the scale's)")
    batch_size: int | None = _flag(whole, "the global batch size (default: the scale's)")
    budget: tuple[float, ...] | None = _flag(
        amounts, "each step's budget in units of C: 1,1,1.5,2 (default: the method's)"
    )
    replay: float | None = _flag(amount, "old data of cumulative-exp and -equal, in units of the new data (default: 1)")
    mixture: str | None = _flag(
        str, 'JSON {"step": {"split": share, …}, …}; a step\'s shares sum to 1 (default: no file)'
    )
    init: str | None = _flag(
        start_model, "a checkpoint to start from, or a model: ARCH TAG, hf-hub:… (default: random weights)"
    )
    first_step: str | None = _flag(str, "the first step to train, from --init (default: the benchmark's first)")
    lr: tuple[float, ...] | None = _flag(
        amounts, "peak learning rate, or one per step: 5e-4,1e-4 (default: the scale's)"
    )
    warmup: tuple[int, ...] | None = _flag(
        counts, "warm-up iterations of steps from random weights, or one number per step (default: the scale's)"
    )
    next_warmup: int | None = _flag(
        whole_or_0, "warm-up iterations of steps from a trained model (default: the scale's; 0 with wsd and rsqrt)"
    )
    schedule: str | None = _flag(str, "of the rate: cosine, const, const-cooldown, wsd or rsqrt (default: cosine)")
    cooldown: float | None = _flag(part, "the last part of a step, in which the rate falls to 0 (default: 0.2)")
    keep_optimizer: bool | None = _flag(
        boolean, "steps from a trained model keep the optimizer's state (default: 0; 1 with wsd and rsqrt)"
    )
    precision: str | None = _flag(dtype, "fp32, amp or amp_bf16 (default: amp_bf16 or amp on a GPU, else fp32)")
    openclip_flags: str = _flag(other_flags, "other flags of OpenCLIP's training.main; or give them after --", "")
    resume_every: int | None = _flag(whole, "approximate iterations between resume points (default: the scale's)")
    image_backend: str | None = _flag(
        decoder, "torchvision decodes images, or pil as in OpenCLIP (default: the scale's)"
    )
    coefficient: float | None = _flag(share, "patching's coefficient, 0 to 1 (default: chosen on held-out data)")
    loss_weight: float | None = _flag(amount, "the weight of the last model's loss term in lwf (default: 1), ewc (10)")
    temperature: float | None = _flag(positive, "the temperature of lwf's similarities (default: 1)")
    accum_freq: int | None = _flag(whole, "gradient accumulation: passes per process and batch (default: 1)")
    max_batch: int | None = _flag(whole, "the most samples per pass and process (default: its part of the batch)")
    grad_checkpointing: bool | None = _flag(boolean, "save memory for a third more time (default: the scale's)")
    workers: int | None = _flag(whole_or_0, "loader processes per rank (default: the scale's)")
    max_kept: int | None = _flag(whole, "checkpoints of a step to keep on this disk (default: the scale's)")
    save_every: int | None = _flag(whole, "samples between two checkpoints (default: by --save_minutes)")
    save_minutes: float = _flag(amount, "minutes between two checkpoints (default: 10)", 10)
    report_to: str = _flag(reports, "tensorboard, wandb or tensorboard,wandb (default: neither)", "")
    remote: str | None = _flag(remote_folder, "a URL or folder for copies of the checkpoints (default: none)")
    cache: str | None = _flag(disk_folder, "a local folder that caches shards from a cloud (default: none)")
    cache_gb: float | None = _flag(amount, "the cache's size limit in GB; evicts the least recently used shards")


def names_model(init: str) -> bool:
    """Return whether ``--init`` is a model that OpenCLIP downloads: ``ARCH TAG`` or ``hf-hub:…``."""
    return not Path(init).is_file() and (init.startswith(HUB) or len(init.split()) == 2)


def init_path(config: Config) -> str | None:
    """Return the checkpoint that a run starts from; a downloaded model is saved in the run's folder."""
    if config.init is None or not names_model(config.init):
        return config.init
    return str(Path(config.output_dir, "init/checkpoints", re.sub(r"[^\w.-]+", "_", config.init) + ".pt"))


def scale_of(config: Config) -> Scale:
    """Return the scale with the values that the settings replace."""
    given = {name: getattr(config, name, None) for name in Scale.__struct_fields__ if name != "warmup"}
    if config.init and names_model(config.init) and not config.init.startswith(HUB):
        given["model"] = config.model or config.init.split()[0]
    given = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(get_scale(config.scale), **given)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of ``Config``."""
    for each in fields(Config):
        default = {"required": True} if each.default is MISSING else {"default": each.default}
        parser.add_argument(f"--{each.name}", **default, **each.metadata)


def config_from(args: argparse.Namespace) -> Config:
    """Return the settings from the flags, including ours that are given under OpenCLIP's names."""
    config = from_flags(Config, args)
    given, found = group_words(shlex.split(config.openclip_flags)), {}
    for flag, name in OURS.items():
        if flag in given:
            try:
                found[name] = Config.__dataclass_fields__[name].metadata["type"](*given.pop(flag) or ["1"])
            except argparse.ArgumentTypeError as error:
                raise TicError(f"OpenCLIP's --{flag}: {error}") from None
            if (own := getattr(config, name)) not in (None, found[name]):
                raise TicError(f"--{name} is {own}, and {found[name]} among OpenCLIP's flags: give one")
    return replace(config, **found, openclip_flags=shlex.join(join_flags(given)))


def to_flags(config: Config) -> list[str]:
    """Return the flags of scripts/train.py that differ from their defaults."""
    values = {each.name: value for each in fields(Config) if (value := getattr(config, each.name)) != each.default}
    texts = {name: ",".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return [f"--{name}={int(text) if isinstance(text, bool) else text}" for name, text in texts.items()]
