"""What TiC-CLIP's authors published: lists of UIDs and models, on the Hugging Face Hub and in a local folder."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError

from tic_clip import TicError, lookup
from tic_clip.benchmarks import MONTHS
from tic_clip.data.uids import open_uids
from tic_clip.models import RELEASED
from tic_clip.parallel import map_ordered
from tic_clip.storage import local_folder

DATASET = "apple/TiC-DataComp"
YEARLY, MONTHLY = "tic-datacomp_training_yearly_noeval", "tic-datacomp_training_monthly"
TABLES = {"retrieval": "tic-datacomp_retrieval_evals_year2uids", "datacompnet": "tic-datacompnet_year2uids"}
LISTS = ("yearly", "monthly", "eval")
YEARS = tuple(dict.fromkeys(month[:4] for month in MONTHS))
DOWNLOAD = "python dataset_creation/tic-datacomp/download_uids.py --output-path"

ATTEMPTS = 6
PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
SHAPES = {
    "retrieval": Annotated[dict[str, list[str]], msgspec.Meta(min_length=1)],
    "datacompnet": Annotated[dict[str, dict[str, list[str]]], msgspec.Meta(min_length=1)],
}


def year_list(lists: Path, year: str) -> Path:
    """Return the path of a year's training list; the authors have removed evaluation UIDs from it."""
    return lists / YEARLY / f"{year}.npy"


def month_list(lists: Path, month: str) -> Path:
    """Return the path of a month's training list: as on the hub, or in a year's folder if it exists there."""
    in_year = lists / MONTHLY / month[:4] / f"{month}.npy"
    return in_year if in_year.exists() else lists / MONTHLY / f"{month}.npy"


def table_path(lists: Path, task: str) -> Path:
    """Return the path of a task's table of evaluation UIDs."""
    return lists / f"{TABLES[task]}.json"


def download_lists(output_path: str, lists: Iterable[str] = LISTS, years: Iterable[str] = YEARS) -> Iterator[str]:
    """Download the lists that ``output_path`` lacks and check all that were asked for; yield a line for each file."""
    folder = local_folder(output_path)
    checks = {table_path(folder, task): partial(read_table, folder, task) for task in TABLES if "eval" in lists}
    arrays = [year_list(folder, year) for year in years if "yearly" in lists]
    arrays += [month_list(folder, month) for month in MONTHS if month[:4] in years and "monthly" in lists]
    checks |= {path: partial(open_uids, path) for path in arrays}
    missing = [path for path in checks if not path.exists()]
    _download(DATASET, [str(path.relative_to(folder)) for path in missing], folder, "dataset")
    errors = []
    for path, check in checks.items():
        try:
            check()
            yield f"{path}: {'downloaded' if path in missing else 'already there'}"
        except TicError as error:
            advice = "run the same command" if path in missing else "delete it"
            errors.append(f"{error} ({advice} to download it again)")
            if path in missing:
                path.unlink()
    if errors:
        raise TicError(errors[0])


def download_models(output_dir: str, model: str | None = None, years: Iterable[str] = ()) -> Iterator[Path]:
    """Download checkpoints that ``output_dir`` lacks and yield the path of each; no model or years means all."""
    folder = local_folder(output_dir)
    for name in [model] if model else RELEASED:
        repository = lookup(RELEASED, "model", name)
        files = _retry(repository, HfApi().list_repo_files, repository)
        known = {file[12:16]: file for file in sorted(files) if re.fullmatch(r"checkpoints/\d{4}\.pt", file)}
        names = [lookup(known, f"year of {repository}", year, "years") for year in sorted(set(years) or known)]
        target = folder / repository.partition("/")[2]
        _download(repository, names, target, "model")
        yield from (target / name for name in names)


def _download(repository: str, names: Iterable[str], folder: Path, repo_type: str) -> None:
    """Download files of a repository into ``folder``, except those that are there and have not changed on the hub."""
    download = partial(hf_hub_download, repository, repo_type=repo_type, local_dir=folder)
    list(map_ordered(lambda name: _retry(f"{repository}/{name}", download, name), names, num_workers=4))


def _retry(name: str, request: Callable[[str], Any], argument: str) -> Any:
    """Return ``request(argument)``, tried up to ``ATTEMPTS`` times: huggingface_hub repeats no GET that fails."""
    for attempt in range(ATTEMPTS):
        try:
            return request(argument)
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: hf_xet; ValueError: not JSON
            if getattr(error, "errno", None):
                raise  # of the disk
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            reason = f"the hub answers {status}" if status else " ".join(str(cause).split()) or type(cause).__name__
            if status in (401, 403, 404) or attempt == ATTEMPTS - 1:
                break
            time.sleep(PAUSE * 2**attempt)
    hint = "HF_TOKEN sets a login, HF_ENDPOINT a mirror; run the same command again to resume"
    raise TicError(f"{HfApi().endpoint}/{name}: {reason} ({hint})")


def read_table(lists: Path, task: str) -> dict[str, Any]:
    """Return a table of evaluation UIDs: year -> [uid] for retrieval, year -> synset -> [uid] for datacompnet."""
    path = table_path(lists, task)
    if not path.exists():
        raise TicError(f"{lists} has no {path.name}; to download it: {DOWNLOAD} {lists} --lists eval")
    try:
        return msgspec.json.decode(path.read_bytes(), type=SHAPES[task])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TicError(f"{path} is not a table of evaluation UIDs: {error}") from None
