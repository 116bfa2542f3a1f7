"""Check OpenCLIP's own flags that a user passes through: which are allowed, with what values."""

import io
import shlex
from contextlib import redirect_stderr, redirect_stdout

from tic_clip import TicError

PLANNED = {
    *("model", "logs", "name", "train-data", "train-num-samples", "train-data-upsampling-factors", "dataset-type"),
    *("dataset-resampled", "val-data", "epochs", "batch-size", "workers", "lr", "warmup", "wd", "beta2", "eps", "seed"),
    *("lr-cooldown-end", "lr-cooldown-power", "epochs-cooldown", "skip-scheduler"),
    *("log-every-n-steps", "report-to", "resume", "new-run", "keep-optimizer", "pretrained", "fused-adamw"),
    *("local-loss", "gather-with-grad", "distill-model", "distill-pretrained", "save-frequency", "save-most-recent"),
    *("delete-previous-checkpoint", "remote-sync", "dist-url", "dist-backend", "no-set-device-rank", "horovod"),
    "trace",
}
OTHER_MODEL = {
    *("force-quick-gelu", "force-custom-text", "force-image-size", "image-mean", "image-std", "image-resize-mode"),
    "use-bnb-linear",
}
"""What evaluation, which makes the model by its name, would not know."""
OURS = {"accum-freq": "accum_freq", "precision": "precision", "grad-checkpointing": "grad_checkpointing"}
OURS |= {"lr-scheduler": "schedule"}
"""OpenCLIP's flags that are settings of ours -> those."""


def read_flags(text: str) -> str:
    """Return OpenCLIP's flags in ``text``, sorted, each once; raise a TicError for unknown or refused ones."""
    flags = group_words(shlex.split(text))
    known = {name.replace("_", "-") for name in _parse([])}
    for name in flags:
        if name not in known:
            raise TicError(f"unrecognized arguments: --{name}")
        if name in PLANNED:
            raise TicError(f"OpenCLIP's --{name} is set by the plan, from flags of scripts/train.py and the scale")
        if name in OTHER_MODEL:
            raise TicError(f"OpenCLIP's --{name} makes another model than --model names, which can't be evaluated")
    words = join_flags(flags)
    _parse(words)
    return shlex.join(words)


def group_words(words: list[str]) -> dict[str, list[str]]:
    """Return flag -> values, sorted: ``--b 1 --a=2`` is {"a": ["2"], "b": ["1"]}."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, *values = word[2:].split("=", 1)
            flags[name] = values
        elif flags and word != "-h":
            flags[name].append(word)
        else:
            raise TicError(f"unrecognized arguments: {word}")
    return dict(sorted(flags.items()))


def join_flags(flags: dict[str, list[str]]) -> list[str]:
    """Return the words of a command line."""
    return [word for name, values in flags.items() for word in (f"--{name}", *values)]


def _parse(words: list[str]) -> dict[str, object]:
    from training.params import parse_args

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        try:
            return vars(parse_args(words))
        except SystemExit:
            raise TicError(said.getvalue().strip().rpartition("error: ")[2]) from None
