"""Published lists and models from a hub on this machine."""

import io
import json
import re
import subprocess
from collections import Counter

import numpy as np
import pytest
from cloud import CLOSE, FOREVER
from conftest import ROOT, tree
from hub import serving_hub
from huggingface_hub import constants

from tic_clip import TicError
from tic_clip.benchmarks import MONTHS
from tic_clip.data import released
from tic_clip.data.released import DATASET, MONTHLY, TABLES, YEARLY, YEARS, download_lists, download_models
from tic_clip.data.uids import UID, save_uids
from tic_clip.models import RELEASED

TENCH, UIDS = "n01440764", [f"{number:032x}" for number in range(4)]
TABLE = {"retrieval": {"2014": UIDS[:2]}, "datacompnet": {"2014": {TENCH: UIDS[2:3], "n01443537": []}}}
RETRIEVAL, DATACOMPNET = (f"{name}.json" for name in TABLES.values())
CUMULATIVE = RELEASED["basic-cumulative"]


def uid_file(count):
    file = io.BytesIO()
    np.save(file, np.zeros(count, UID))
    return file.getvalue()


LISTS = {name: json.dumps(TABLE[task]).encode() for task, name in zip(TABLES, (RETRIEVAL, DATACOMPNET), strict=True)}
LISTS |= {f"{YEARLY}/{year}.npy": uid_file(int(year) - 2010) for year in YEARS}
LISTS |= {f"{MONTHLY}/{month}.npy": uid_file(int(month[4:])) for month in MONTHS}


def checkpoints(*years):
    return {f"checkpoints/{year}.pt": f"{year} ".encode() * 500 for year in years}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr(released, "PAUSE", 0.0)
    files = {repository: {"README.md": b"#", **checkpoints(2022)} for repository in RELEASED.values()}
    files |= {DATASET: dict(LISTS), CUMULATIVE: {"README.md": b"#", **checkpoints(2016, 2017, 2022)}}
    with serving_hub(files) as server:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for name, value in {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_ENDPOINT": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


def files(folder):
    """The files in a folder, {name: bytes}, without huggingface_hub's notes."""
    return {name: data for name, data in tree(folder).items() if ".cache" not in name}


def transfers(hub):
    """The files that were sent, and how often."""
    return Counter(
        re.sub(".*/resolve/[a-z]+/", "", path) for what, path in hub.requests if what == "GET" and "/resolve/" in path
    )


def fetch(folder, *lists, years=("2014", "2016")):
    return list(download_lists(str(folder), lists or released.LISTS, years))


def test_all_lists_and_a_second_run_asks_for_nothing(hub, tmp_path):
    names = [RETRIEVAL, DATACOMPNET, *(f"{YEARLY}/{year}.npy" for year in (2014, 2016))]
    names += [f"{MONTHLY}/{month}.npy" for month in MONTHS if month[:4] in ("2014", "2016")]
    assert fetch(tmp_path) == [f"{tmp_path}/{name}: downloaded" for name in names]
    assert files(tmp_path) == {name: LISTS[name] for name in names}
    hub.requests.clear()
    assert fetch(tmp_path) == [f"{tmp_path}/{name}: already there" for name in names]
    assert hub.requests == []


def test_only_what_is_missing_is_downloaded(hub, tmp_path):
    """Files that were downloaded by hand: a month in its year's folder, and a link into the hub's cache."""
    save_uids(tmp_path / MONTHLY / "2014/201403.npy", np.zeros(9, UID))
    save_uids(tmp_path / YEARLY / "blob", np.zeros(4, UID))
    (tmp_path / YEARLY / "2014.npy").symlink_to("blob")
    lines = fetch(tmp_path, years=("2014",))
    assert sum(line.endswith("already there") for line in lines) == 2
    assert set(transfers(hub)) == {RETRIEVAL, DATACOMPNET, *(f"{MONTHLY}/{month}.npy" for month in MONTHS[1:8])}
    assert (tmp_path / YEARLY / "2014.npy").is_symlink()


LOGIN = b"<html>Please log in</html>"


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        *((RETRIEVAL, body, "is not a table of evaluation UIDs: ") for body in (LOGIN, b"{}")),
        (DATACOMPNET, LISTS[RETRIEVAL], "is not a table of evaluation UIDs: "),
        (f"{YEARLY}/2014.npy", uid_file(4)[:-1], "2014.npy "),
    ],
)
def test_a_download_that_is_not_a_list_is_removed(hub, tmp_path, name, body, message):
    """A login page with status 200, and another; the next run downloads both again."""
    hub.files[DATASET] |= {f"{YEARLY}/2022.npy": LOGIN, name: body}
    with pytest.raises(TicError, match=f"{message}.*run the same command to download it again"):
        fetch(tmp_path, "eval", "yearly", years=("2014", "2022"))
    assert len(files(tmp_path)) == 2
    hub.files[DATASET] = LISTS
    lines = fetch(tmp_path, "eval", "yearly", years=("2014", "2022"))
    assert {f"{tmp_path / name}: downloaded", f"{tmp_path / YEARLY}/2022.npy: downloaded"} <= set(lines)
    (tmp_path / name).write_bytes(body)  # one that was there before is the user's own
    with pytest.raises(TicError, match="delete it to download it again"):
        fetch(tmp_path, "eval", "yearly")
    assert (tmp_path / name).read_bytes() == body


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_hub_is_asked_again(hub, tmp_path, method):
    hub.fail(method, "2014.npy", 503, times=5)
    fetch(tmp_path, "yearly", years=("2014",))
    assert files(tmp_path) == {f"{YEARLY}/2014.npy": LISTS[f"{YEARLY}/2014.npy"]}


@pytest.mark.parametrize(
    ("method", "fault", "message"),
    [
        *(("HEAD", status, f"the hub answers {status}") for status in (401, 404, 503)),
        *(("GET", fault, message) for fault, message in ((403, "the hub answers 403"), (CLOSE, "disconnected"))),
    ],
)
def test_a_hub_that_fails_is_one_line(hub, tmp_path, method, fault, message):
    """The file that was not downloaded is named; the others are kept."""
    hub.fail(method, "2016.npy", fault, FOREVER)
    line = f"^{hub.url}/{DATASET}/.*/2016.npy: .*{message}.*HF_TOKEN.*HF_ENDPOINT"
    with pytest.raises(TicError, match=line) as error:
        fetch(tmp_path, "yearly")
    assert "\n" not in str(error.value)
    assert list(files(tmp_path)) == [f"{YEARLY}/2014.npy"]


def test_one_model_and_more_years_later(hub, tmp_path):
    folder = tmp_path / "TiC-CLIP-basic-cumulative"
    assert list(download_models(str(tmp_path), "basic-cumulative", ["2016"])) == [folder / "checkpoints/2016.pt"]
    assert files(folder) == checkpoints(2016)
    hub.requests.clear()
    assert len(list(download_models(str(tmp_path), "basic-cumulative"))) == 3
    assert files(folder) == checkpoints(2016, 2017, 2022)
    assert set(transfers(hub)) == {"checkpoints/2017.pt", "checkpoints/2022.pt"}


def test_unknown_models_and_years_list_the_valid_ones(hub, tmp_path):
    with pytest.raises(TicError, match=r"^unknown model 'basic'; the models are basic-cumulative, basic-sequential, "):
        list(download_models(str(tmp_path), "basic"))
    with pytest.raises(TicError, match=f"unknown year of {CUMULATIVE} .*; the years are 2016, 2017, 2022$"):
        list(download_models(str(tmp_path), "basic-cumulative", ["2016", "*"]))
    assert list(tmp_path.iterdir()) == []


def test_the_script_of_models(hub, tmp_path):
    """A relative folder counts from where the user stands."""
    command = ["bash", ROOT / "scripts/fetch_models.sh", "models", "basic-cumulative", "2016"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    name, size = "TiC-CLIP-basic-cumulative/checkpoints/2016.pt", len(checkpoints(2016)["checkpoints/2016.pt"])
    assert (done.returncode, done.stdout) == (0, f"models/{name}: {size / 1e6:.1f} MB\n")
    assert files(tmp_path / "models/TiC-CLIP-basic-cumulative") == checkpoints(2016)
