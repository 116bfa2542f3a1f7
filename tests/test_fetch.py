"""Fetching models from a server of this machine's own that speaks what huggingface_hub asks the hub for."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hub import FILE, INFO, serving_hub
from huggingface_hub import constants

from tic_clip import TicError
from tic_clip.data import fetch
from tic_clip.data.fetch import MODELS, fetch_models, next_command

ROOT = Path(__file__).parent.parent
YEARS = ("2016", "2017", "2022")


def content(repository, name):
    return f"{repository} {name} ".encode() * 500


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # the waits between attempts
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    files = {
        repository: {"README.md": b"#", **{name: content(repository, name) for name in map(checkpoint, YEARS)}}
        for repository in MODELS.values()
    }
    with serving_hub(files) as server:
        yield server


@pytest.fixture
def get(hub, tmp_path):
    """Fetch as the command line would; returns the lines."""

    def call(*models, years=()):
        return list(fetch_models(str(tmp_path / "models"), list(models), list(years), endpoint=hub.url))

    return call


def checkpoint(year):
    return f"checkpoints/{year}.pt"


def there(tmp_path):
    """The files that are there, {path: bytes}, without the library's notes."""
    found = [path for path in (tmp_path / "models").rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(path.relative_to(tmp_path / "models")): path.read_bytes() for path in found}


def expected(models, years):
    names = [(model, checkpoint(year)) for model in models for year in years]
    return {f"TiC-CLIP-{model}/{name}": content(MODELS[model], name) for model, name in names}


def transfers(hub):
    return [path.rpartition("/")[2] for command, path, _ in hub.requests if command == "GET" and FILE.fullmatch(path)]


def test_one_model(get, hub, tmp_path):
    lines = get("basic-cumulative")
    assert there(tmp_path) == expected(["basic-cumulative"], YEARS)
    folder = tmp_path / "models/TiC-CLIP-basic-cumulative/checkpoints"
    size = len(content(MODELS["basic-cumulative"], checkpoint("2016"))) / 1e6
    assert lines[:3] == [f"{folder}/{year}.pt: {size:.1f} MB" for year in YEARS]
    assert lines[3:] == [f"next: INIT={folder}/2017.pt FIRST_STEP=2018 bash scripts/run_medium_basic_cumulative.sh"]


def test_some_years(get, tmp_path):
    lines = get("bestpool-oracle", years=("2022", "2016", "2022"))
    assert there(tmp_path) == expected(["bestpool-oracle"], ("2016", "2022"))
    assert len(lines) == 3


def test_all_models(get, tmp_path):
    lines = get()
    assert len(MODELS) == 6
    assert there(tmp_path) == expected(MODELS, YEARS)
    assert len(lines) == 6 * (len(YEARS) + 1)


def test_a_second_run_downloads_nothing(get, hub, tmp_path):
    first = get("basic-sequential")
    hub.requests.clear()
    assert get("basic-sequential") == first
    assert [INFO.fullmatch(path)[1] for _, path, _ in hub.requests] == [MODELS["basic-sequential"]]


def test_more_years_are_added(get, hub, tmp_path):
    get("basic-sequential", years=("2016",))
    hub.requests.clear()
    get("basic-sequential")
    assert transfers(hub) == ["2017.pt", "2022.pt"]
    assert there(tmp_path) == expected(["basic-sequential"], YEARS)


def test_after_a_failure_the_same_command_goes_on(get, hub, tmp_path):
    hub.faults["GET", "2017.pt"] = 500
    with pytest.raises(
        TicError, match=r"^apple/TiC-CLIP-basic-sequential/checkpoints/2017.pt: .*500.*goes on from here"
    ):
        get("basic-sequential")
    assert there(tmp_path) == expected(["basic-sequential"], ("2016",))
    hub.faults.clear()
    hub.requests.clear()
    get("basic-sequential")
    assert transfers(hub) == ["2017.pt", "2022.pt"]
    assert there(tmp_path) == expected(["basic-sequential"], YEARS)


def test_what_is_cut_off_goes_on_where_it_was(get, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)

    def cut(handler):
        del hub.faults["GET", "2016.pt"]
        handler.answer(200, hub.files[MODELS["basic-oracle"]][checkpoint("2016")], sent=1000)

    hub.faults["GET", "2016.pt"] = cut
    get("basic-oracle", years=("2016",))
    assert there(tmp_path) == expected(["basic-oracle"], ("2016",))
    assert [wanted for command, path, wanted in hub.requests if (command, path[-7:]) == ("GET", "2016.pt")] == [
        None,
        "bytes=1000-",
    ]


def test_a_damaged_file_is_fetched_again(get, hub, tmp_path):
    get("basic-oracle")
    damaged = tmp_path / "models/TiC-CLIP-basic-oracle/checkpoints/2017.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    os.utime(damaged, (time.time() + 10,) * 2)
    hub.requests.clear()
    get("basic-oracle")
    assert transfers(hub) == ["2017.pt"]
    assert there(tmp_path) == expected(["basic-oracle"], YEARS)


def test_a_new_commit_brings_what_it_changed(get, hub, tmp_path):
    get("basic-oracle")
    hub.requests.clear()
    hub.commit, hub.files[MODELS["basic-oracle"]][checkpoint("2017")] = "b" * 40, b"new"
    get("basic-oracle")
    assert transfers(hub) == ["2017.pt"]
    assert there(tmp_path)["TiC-CLIP-basic-oracle/checkpoints/2017.pt"] == b"new"


def test_an_old_file_is_not_taken_for_the_new_one(get, hub, tmp_path):
    """The library falls back to it where the hub fails."""
    get("basic-oracle")
    hub.commit, hub.files[MODELS["basic-oracle"]][checkpoint("2017")] = "b" * 40, b"new"
    hub.faults["HEAD", "2017.pt"] = 500
    with pytest.raises(TicError, match=r"2017.pt has \d+ bytes, not 3; delete it"):
        get("basic-oracle")


def test_a_token_is_sent(get, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get("basic-oracle", years=("2016",))
    assert hub.tokens == {"Bearer hf_secret"}


def test_an_unknown_model_asks_nobody(get, hub, tmp_path):
    with pytest.raises(TicError, match="unknown model 'basic'; the models are basic-cumulative, "):
        get("basic")
    assert hub.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("year", ["2014", "*", "../2016", "2016.pt", ""])
def test_a_year_that_is_not_there(get, hub, tmp_path, year):
    message = f"apple/TiC-CLIP-basic-oracle has no checkpoints/{year}.pt; its years are 2016, 2017, 2022"
    with pytest.raises(TicError, match=f"^{re.escape(message)}$"):
        get("basic-oracle", years=("2016", year))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_fetched_unless_all_models_are_there(get, hub, tmp_path):
    del hub.files[MODELS["bestpool-oracle"]]
    with pytest.raises(TicError, match=r"apple/TiC-CLIP-bestpool-oracle has no checkpoints/\{year\}.pt"):
        get()
    assert list(tmp_path.iterdir()) == []


def no_json(handler):
    handler.answer(200, b"<html>")


def hang_up(handler):
    handler.close_connection = True


def silence(handler):
    threading.Event().wait(0.5)
    handler.close_connection = True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (401, "the server answers 401 Unauthorized .*HF_TOKEN"),
        (403, "the server answers 403 Forbidden .*HF_TOKEN"),
        (404, "the server answers 404 Not Found$"),
        (500, "the server answers 500 Internal Server Error$"),
        (503, "the server answers 503 Service Unavailable$"),
        (no_json, "."),
        (hang_up, "disconnected"),
        (silence, "timed out"),
    ],
)
def test_a_server_that_fails_is_one_line(get, hub, tmp_path, monkeypatch, fault, message):
    monkeypatch.setattr(fetch, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.faults["all"] = fault
    with pytest.raises(TicError, match=f"^{hub.url}/apple/TiC-CLIP-basic-oracle: .*{message}") as error:
        get("basic-oracle")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fault", "message"), [(404, "answers 404"), (500, "answers 500"), (hang_up, "disconnected")])
@pytest.mark.parametrize("command", ["HEAD", "GET"])
def test_a_file_that_fails_is_one_line(get, hub, tmp_path, command, fault, message):
    hub.faults[command, "2016.pt"] = fault
    with pytest.raises(TicError, match=rf"^apple/TiC-CLIP-basic-oracle/checkpoints/2016.pt: .*{message}") as error:
        get("basic-oracle")
    assert "\n" not in str(error.value)
    assert there(tmp_path) == {}


def test_only_local_folders():
    with pytest.raises(TicError, match="s3://bucket/models is not local"):
        list(fetch_models("s3://bucket/models"))


@pytest.mark.parametrize(
    ("model", "years", "command"),
    [
        (
            "basic-cumulative",
            ("2018",),
            "INIT=m/c/2018.pt FIRST_STEP=2019 bash scripts/run_medium_basic_cumulative.sh",
        ),
        (
            "basic-sequential",
            YEARS,
            "INIT=m/c/2017.pt FIRST_STEP=2018 bash scripts/run_medium_basic_sequential.sh",
        ),
        (
            "basic-cumulative",
            ("2016",),
            "INIT=m/c/2016.pt FIRST_STEP=2017 bash scripts/run_medium_basic_cumulative.sh",
        ),
        ("basic-cumulative", ("2022",), "evaluate"),  # no step after it
        ("basic-oracle", YEARS, "evaluate"),  # starts from scratch
    ],
)
def test_next_command(model, years, command):
    paths = {year: Path(f"m/checkpoints/{year}.pt") for year in years}
    evaluation = f"--released m --data_dir data --output_dir results/TiC-CLIP-{model}"
    command = command.replace("evaluate", f".venv/bin/python scripts/evaluate.py {evaluation}")
    assert next_command(model, paths) == command.replace("m/c/", "m/checkpoints/")


def test_next_command_names_a_script_that_exists():
    for model in MODELS:
        command = next_command(model, {"2018": Path("a folder/checkpoints/2018.pt")})
        assert (ROOT / re.search(r"scripts/\w+\.(py|sh)", command)[0]).exists()
        assert "'" in command


def script(*arguments, **environment):
    python = [sys.executable, "-m", "tic_clip.data.fetch"]
    command = python if "bash" not in environment else ["bash", environment["bash"]]
    settings = {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings}
    )


def test_the_script(hub, tmp_path):
    arguments, settings = (str(tmp_path / "models"), "basic-cumulative", "2016", "2017"), {"HF_ENDPOINT": hub.url}
    done = script(*arguments, **settings, bash="scripts/fetch_models.sh")
    assert done.returncode == 0, done.stderr
    assert there(tmp_path) == expected(["basic-cumulative"], ("2016", "2017"))
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith(
        f"next: INIT={arguments[0]}/TiC-CLIP-basic-cumulative/checkpoints/2017.pt FIRST_STEP=2018"
    )
    hub.requests.clear()
    again = script(*arguments, **settings)
    assert (again.stdout, again.stderr, transfers(hub)) == (done.stdout, "", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: output_dir (--help shows the flags)"),
        (("nonsense",), "unknown model 'nonsense'; the models are"),
        (("basic-cumulative", "2013"), "apple/TiC-CLIP-basic-cumulative has no checkpoints/2013.pt"),
    ],
)
def test_a_mistake_is_one_line(hub, tmp_path, arguments, message):
    done = script(*((str(tmp_path / "models"), *arguments) if arguments else ()), HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_line(tmp_path):
    done = script(str(tmp_path / "models"), HF_ENDPOINT="http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: http://127.0.0.1:1/apple/TiC-CLIP-basic-cumulative: [Errno 111] Connection refused\n"
    assert list(tmp_path.iterdir()) == []
