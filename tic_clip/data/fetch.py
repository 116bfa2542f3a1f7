"""The released TiC-CLIP models: fetching them from the Hugging Face Hub, and the command that goes on from one.

    python -m tic_clip.data.fetch data/models basic-cumulative 2016 2022     # no years: all; no model: all six

Writes DIR/TiC-CLIP-{model}/checkpoints/{year}.pt, each when all of it is there; beside them, in .cache/, is what
huggingface_hub notes to know that a file is still the released one.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HTTPError

from tic_clip import TicError, lookup
from tic_clip.benchmarks import get_benchmark
from tic_clip.cli import Parser, run_main
from tic_clip.storage import is_remote

ROOT = Path(__file__).parents[2]
ARCH = "ViT-B-16"
MODELS = {
    f"{filtered}-{method}": f"apple/TiC-CLIP-{filtered}-{method}"
    for filtered in ("basic", "bestpool")
    for method in ("cumulative", "sequential", "oracle")
}
"""Repositories on the hub, by model: the filter of its training data, and its method."""

FAILURES = (HTTPError, OSError, RuntimeError)  # RuntimeError is how hf_xet says it


@dataclass(frozen=True, kw_only=True)
class Release:
    """A model's checkpoints at one commit of its repository; ``sizes`` maps a year to bytes, None if untold."""

    model: str
    repository: str
    commit: str
    sizes: dict[str, int | None]


def find_release(model: str, *, endpoint: str | None = None) -> Release:
    """What the hub has of a model; ``endpoint`` is the hub's address (default: what HF_ENDPOINT says).

    Raises:
        TicError: there is no such model, or the hub can't be reached or does not give it.
    """
    repository, hub = lookup(MODELS, "model", model), HfApi(endpoint=endpoint)
    try:
        info = hub.model_info(repository, revision="main", files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT)
    except (*FAILURES, ValueError) as error:  # ValueError: an answer that is no JSON
        raise TicError(f"{hub.endpoint}/{repository}: {_reason(error)}") from None
    files = {file.rfilename: file.size for file in info.siblings or ()}
    years = {found[1]: name for name in sorted(files) if (found := re.fullmatch(r"checkpoints/(\d{4})\.pt", name))}
    if not (info.sha and years):
        raise TicError(f"{hub.endpoint}/{repository} has no checkpoints/{{year}}.pt")
    sizes = {year: files[name] for year, name in years.items()}
    return Release(model=model, repository=repository, commit=info.sha, sizes=sizes)


def fetch(release: Release, year: str, folder: Path, *, endpoint: str | None = None) -> Path:
    """Fetch a year's checkpoint into ``folder`` unless it is there as released; returns its path.

    Raises:
        TicError: the hub can't be reached, or stops the transfer again and again.
    """
    name = f"checkpoints/{year}.pt"
    try:
        hf_hub_download(release.repository, name, revision=release.commit, local_dir=folder, endpoint=endpoint)
    except FAILURES as error:
        raise TicError(f"{release.repository}/{name}: {_reason(error)} (the same command goes on from here)") from None
    path, size = folder / name, release.sizes[year]
    if size is not None and path.stat().st_size != size:  # the library keeps an old file where the hub fails
        raise TicError(f"{path} has {path.stat().st_size} bytes, not {size}; delete it to fetch it again")
    return path


def _reason(error: Exception) -> str:
    """What went wrong, on one line; the library wraps the server's answer in advice of several."""
    error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    response = getattr(error, "response", None)
    if response is None:
        return " ".join(str(error).split()) or type(error).__name__
    hint = " (if it asks for a login: HF_TOKEN)" if response.status_code in (401, 403) else ""
    return f"the server answers {response.status_code} {response.reason_phrase}{hint}"


def fetch_models(
    output: str, models: list[str] | None = None, years: list[str] | None = None, *, endpoint: str | None = None
) -> Iterator[str]:
    """Fetch the checkpoints of some or all models and years into ``output``; yields the lines to print.

    These are each file's path and size and, after a model's last, the command that goes on from there. Whether the hub
    has all that is asked for is known before anything is written.

    Raises:
        TicError: a model or year does not exist or can't be fetched.
    """
    if is_remote(output):
        raise TicError(f"{output} is not local; models are fetched to a local disk")
    releases = [find_release(model, endpoint=endpoint) for model in models or MODELS]
    for release in releases:
        for year in years or ():
            if year not in release.sizes:
                known = ", ".join(release.sizes)
                raise TicError(f"{release.repository} has no checkpoints/{year}.pt; its years are {known}")
    for release in releases:
        folder, paths = Path(output) / release.repository.partition("/")[2], {}
        for year in sorted(set(years or release.sizes)):
            paths[year] = fetch(release, year, folder, endpoint=endpoint)
            yield f"{paths[year]}: {paths[year].stat().st_size / 1e6:,.1f} MB"
        yield f"next: {next_command(release.model, paths)}"


def next_command(model: str, paths: dict[str, Path]) -> str:
    """What to type with a model's checkpoints, by year: train on from the newest that has a step after it.

    An oracle starts each step from scratch, so there it is evaluating them; so it is without a script to train.
    """
    script = f"scripts/run_medium_{model.replace('-', '_')}.sh"
    steps = {before.periods[-1]: after.name for before, after in pairwise(get_benchmark("datacomp").steps)}
    started = sorted(set(paths) & set(steps))
    if started and not model.endswith("-oracle") and (ROOT / script).exists():
        return f"INIT={shlex.quote(str(paths[started[-1]]))} FIRST_STEP={steps[started[-1]]} bash {script}"
    folder = shlex.quote(str(next(iter(paths.values())).parent.parent))
    flags = f"--released {folder} --data_dir data --output_dir results/TiC-CLIP-{model}"
    return f".venv/bin/python scripts/evaluate.py {flags}"


def main() -> None:
    """Parse the arguments, fetch, and print one line a file."""
    parser = Parser(__doc__)
    parser.add_argument("output_dir", help="folder of the models")
    parser.add_argument("model", nargs="?", help=f"one of {', '.join(MODELS)} (default: all)")
    parser.add_argument("years", nargs="*", default=[], help="which of its checkpoints (default: all)")
    args = parser.parse_args()
    for line in fetch_models(args.output_dir, [args.model] if args.model else None, args.years):
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
