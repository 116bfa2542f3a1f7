"""Downloads against a server of this machine's own that fails in every way a test asks for."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tic_clip import TicError
from tic_clip.benchmarks import MONTHS
from tic_clip.data import download
from tic_clip.data.download import Absent, download_lists, fetch, unpack
from tic_clip.data.released import MONTHLY, TABLES, YEARLY
from tic_clip.data.uids import UID, check_size, save_uids

ROOT = Path(__file__).parent.parent
BODY = bytes(range(256)) * 40
RETRIEVAL, DATACOMPNET = TABLES.values()


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``; each request takes one fault from ``server.faults`` while there are any."""

    def do_GET(self):
        server, fault = self.server, self.server.faults.pop(0) if self.server.faults else None
        server.requests.append((self.path, self.headers.get("Range")))
        body = server.files.get(self.path)
        if isinstance(fault, int):
            return self.send_error(fault)
        if body is None:
            return self.send_error(server.missing)
        etag = f'"{hashlib.sha256(body).hexdigest()[:8]}"'
        start = self.start(etag, fault)
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.validators:
            self.send_header("ETag", etag)
        part = body[start:]
        if fault != "no length":
            self.send_header("Content-Length", str(len(part) + (7 if fault == "too long" else 0)))
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)

    def start(self, etag, fault):
        """Where the client wants to go on, as far as this server cares."""
        wanted = self.headers.get("Range")
        same = fault == "ignore If-Range" or self.headers.get("If-Range") == etag
        return int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and same and fault != "ignore Range" else 0

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.validators, server.missing = {}, [], [], True, 404
    server.url = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def get(server, tmp_path):
    """Serve BODY as /x, with the given faults in turn, and fetch it; returns whether it was fetched."""

    def call(*faults, body=BODY, check=None):
        server.files["/x"], server.faults[:] = body, list(faults)
        return fetch(f"{server.url}/x", tmp_path / "x", check, wait=0)

    return call


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def ranges(server):
    return [wanted for _, wanted in server.requests]


def test_a_file_is_fetched_once(get, server, tmp_path):
    assert get()
    assert (tmp_path / "x").read_bytes() == BODY
    assert not get()
    assert len(server.requests) == 1
    assert files(tmp_path) == ["x"]


@pytest.mark.parametrize("body", [b"", b"1", BODY])
@pytest.mark.parametrize("fault", [None, "no length"])
def test_any_length(get, tmp_path, body, fault):
    assert get(fault, body=body)
    assert (tmp_path / "x").read_bytes() == body


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(get, server, tmp_path, status):
    assert get(status, status)
    assert (tmp_path / "x").read_bytes() == BODY
    assert len(server.requests) == 3


def test_what_was_cut_off_goes_on(get, server, tmp_path):
    assert get("cut", 500, "cut", "cut")
    assert (tmp_path / "x").read_bytes() == BODY
    assert ranges(server) == [None, *[f"bytes={n}-" for n in (5120, 5120, 7680, 8960)]]


def test_it_gives_up_in_the_end_and_the_next_run_goes_on(get, server, tmp_path):
    with pytest.raises(TicError, match="gave up after 6 attempts") as error:
        get("cut", *[500] * 9)
    assert f"{server.url}/x: the server answers 500" in str(error.value)
    assert len(server.requests) == 1 + 5  # the first brought something
    assert files(tmp_path) == ["x.part", "x.part.json"]
    server.requests.clear()
    assert get()
    assert (tmp_path / "x").read_bytes() == BODY
    assert ranges(server) == ["bytes=5120-"]


def test_progress_starts_the_count_of_attempts_again(get, tmp_path):
    assert get(*["cut", 500, 500, 500] * 4)
    assert (tmp_path / "x").read_bytes() == BODY


def test_a_server_that_always_sends_the_first_half(get, server):
    server.validators = False
    with pytest.raises(TicError, match="5120 of 10240 bytes came"):
        get(*["cut"] * 99)
    assert len(server.requests) == 6


def test_a_server_without_ranges_sends_it_all_again(get, server, tmp_path):
    assert get("cut", "ignore Range")
    assert (tmp_path / "x").read_bytes() == BODY
    assert ranges(server)[1] == "bytes=5120-"


def test_without_a_validator_nothing_is_glued(get, server, tmp_path):
    server.validators = False
    assert get("cut")
    assert (tmp_path / "x").read_bytes() == BODY
    assert ranges(server) == [None, None]


@pytest.mark.parametrize("fault", [None, "ignore If-Range"])
@pytest.mark.parametrize("new", [BODY[::-1], BODY[::-1] + b"more", b"short"])
def test_a_file_that_changed_in_between_is_not_glued(get, tmp_path, fault, new):
    with pytest.raises(TicError):
        get("cut", *[500] * 9)
    assert get(*[fault] * 9, body=new)
    assert (tmp_path / "x").read_bytes() == new


@pytest.mark.parametrize("have", [BODY[:5120], BODY])
def test_another_server_starts_again(get, server, tmp_path, have):
    with pytest.raises(TicError):
        get("cut", *[500] * 9)
    (tmp_path / "x.part").write_bytes(have)
    server.files["/y"] = b"other" * 2000
    assert fetch(f"{server.url}/y", tmp_path / "x", wait=0)
    assert (tmp_path / "x").read_bytes() == b"other" * 2000


def test_killed_after_the_last_byte(get, server, tmp_path):
    with pytest.raises(TicError):
        get("cut", *[500] * 9)
    (tmp_path / "x.part").write_bytes(BODY)
    server.requests.clear()
    assert get()
    assert (tmp_path / "x").read_bytes() == BODY
    assert server.requests == []


def test_killed_before_the_first_note(get, tmp_path):
    (tmp_path / "x.part").write_bytes(b"of another file")
    assert get()
    assert (tmp_path / "x").read_bytes() == BODY


def test_wrong_length(get, tmp_path):
    with pytest.raises(TicError, match="gave up after 6 attempts"):
        get(*["too long"] * 20)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_absent_file_is_not_asked_for_again(get, server, tmp_path, status):
    with pytest.raises(Absent, match=f"{server.url}/x: the server answers {status}"):
        get(status)
    assert len(server.requests) == 1
    assert files(tmp_path) == []


def test_other_answers_are_errors(get, server):
    with pytest.raises(TicError, match="/x: the server answers 400"):
        get(400)
    assert len(server.requests) == 1


def test_no_server(tmp_path, monkeypatch):
    with pytest.raises(TicError, match=r"http://127.0.0.1:1/x: .*Connection refused"):
        fetch("http://127.0.0.1:1/x", tmp_path / "x", wait=0)


def test_no_url(tmp_path):
    with pytest.raises(TicError, match="is no URL"):
        fetch("lists/x", tmp_path / "x", wait=0)


def uid_file(count, month="x"):
    file = io.BytesIO()
    rows = np.zeros(count, UID)
    rows["f0"], rows["f1"] = np.arange(count), int(month) if month.isdigit() else 0
    np.save(file, rows)
    return file.getvalue()


@pytest.mark.parametrize("body", [b"<html>", b"", uid_file(3)[:-1], uid_file(3) + b"\n"])
def test_what_is_no_uid_file_is_not_kept(get, server, tmp_path, body):
    with pytest.raises(TicError, match=f"^{server.url}/x: "):
        get(body=body, check=check_size)
    assert files(tmp_path) == []


def test_a_damaged_file_of_an_earlier_run_is_named(get, tmp_path):
    (tmp_path / "x").write_bytes(uid_file(3)[:-1])
    with pytest.raises(TicError, match=r"/x is no .*; delete it to fetch it again"):
        get(check=check_size)


def tar_of(members, format=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                tar.addfile(info)
    return file.getvalue()


def months_of(year):
    return [month for month in MONTHS if month.startswith(year)]


@pytest.fixture
def release(server):
    """A whole release of two years as the first source has it: tars of months, tables as pickles."""
    for year in ("2014", "2016"):
        server.files[f"/{YEARLY}/{year}.npy"] = uid_file(int(year) - 2010)
        tar = {f"./{year}": (tarfile.DIRTYPE, ""), f"./{year}/._{year}04.npy": b"macOS"}
        months = {f"{year}/{month}.npy": uid_file(int(month[4:]), month) for month in months_of(year)}
        server.files[f"/{MONTHLY}/{year}.tar"] = tar_of(tar | months)
    server.files[f"/{YEARLY}/sizes.json"] = json.dumps({"2014": 4, "2016": 6}).encode()
    for table in (RETRIEVAL, DATACOMPNET):
        server.files[f"/{table}.pkl"] = b"pickle"
    return server


def lists(server, folder, **options):
    return list(download_lists(str(folder), sources=(server.url,), **{"years": ("2014", "2016"), **options}))


def test_all_lists(release, tmp_path):
    found = lists(release, tmp_path)
    names = [name for name, _ in found]
    assert names[:4] == [f"{RETRIEVAL}.pkl", f"{DATACOMPNET}.pkl", f"{YEARLY}/2014.npy", f"{YEARLY}/2016.npy"]
    assert names[4:] == [f"{MONTHLY}/{month[:4]}/{month}.npy" for month in months_of("2014") + months_of("2016")]
    assert all(new for _, new in found)
    assert all((tmp_path / name).exists() for name in names)
    assert len(np.load(tmp_path / YEARLY / "2016.npy")) == 6
    assert np.load(tmp_path / MONTHLY / "2016/201612.npy").tolist() == [(i, 201612) for i in range(12)]
    assert files(tmp_path / MONTHLY) == ["2014", "2016"]  # the tars are gone


def test_a_second_run_asks_for_nothing(release, tmp_path):
    lists(release, tmp_path)
    release.requests.clear()
    assert not any(new for _, new in lists(release, tmp_path))
    assert release.requests == []


def test_only_what_is_asked_for(release, tmp_path):
    assert lists(release, tmp_path, lists=("yearly",), years=("2016",)) == [(f"{YEARLY}/2016.npy", True)]


def test_json_comes_first(release, tmp_path):
    release.files[f"/{DATACOMPNET}.json"] = b"{}"
    assert [name for name, _ in lists(release, tmp_path, lists=("eval",))] == [
        f"{RETRIEVAL}.pkl",
        f"{DATACOMPNET}.json",
    ]


def test_the_second_source_is_asked_for_what_the_first_lacks(release, tmp_path):
    """Such as months one by one, where there is no tar of the year."""
    for month in months_of("2015"):
        release.files[f"/second/{MONTHLY}/{month}.npy"] = uid_file(1)
    release.files[f"/second/{RETRIEVAL}.json"] = b"{}"
    sources = (f"{release.url}/", f"{release.url}/second/")
    found = list(download_lists(str(tmp_path), sources=sources, lists=("monthly", "eval"), years=("2015",)))
    assert found[:2] == [(f"{RETRIEVAL}.json", True), (f"{DATACOMPNET}.pkl", True)]
    assert found[2:] == [(f"{MONTHLY}/2015/{month}.npy", True) for month in months_of("2015")]


def test_the_last_error_names_the_urls(server, tmp_path):
    server.missing = 403
    with pytest.raises(TicError, match=f"{server.url}/a/{RETRIEVAL}.pkl: .* 403 .*; {server.url}/b/{RETRIEVAL}.pkl"):
        list(download_lists(str(tmp_path), sources=(f"{server.url}/a", f"{server.url}/b"), lists=("eval",)))


def test_the_table_of_sizes_is_believed(release, tmp_path):
    release.files[f"/{YEARLY}/sizes.json"] = b'{"2014": 5}'
    with pytest.raises(TicError, match=r"2014.npy: .* holds 4 UIDs, not 5"):
        lists(release, tmp_path, lists=("yearly",))
    assert not (tmp_path / YEARLY / "2014.npy").exists()


def test_a_tar_without_one_of_the_months(release, tmp_path):
    release.files[f"/{MONTHLY}/2014.tar"] = tar_of({"2014/201403.npy": uid_file(1)})
    with pytest.raises(TicError, match=r"2014.tar holds no 2014/201404.npy"):
        lists(release, tmp_path, lists=("monthly",))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("../2014/201403.npy", b"x"),
        ("/2014/201403.npy", b"x"),
        ("2014/../../201403.npy", b"x"),
        ("2014/201403.npy/../../evil", b"x"),
        ("2014/201403.npz", b"x"),
        ("2014/201503.npy", b"x"),
        ("2015/201503.npy", b"x"),
        ("201403.npy", b"x"),
        ("2014/sub/201403.npy", b"x"),
        ("2014/٢٠1403.npy", b"x"),
        ("2014/201403.npy\n", b"x"),
        ("2014/201403.npy", (tarfile.SYMTYPE, "/etc/passwd")),
        ("2014/201403.npy", (tarfile.LNKTYPE, "../../secret")),
        ("2014/201403.npy", (tarfile.FIFOTYPE, "")),
        ("2014", (tarfile.SYMTYPE, "/tmp")),
    ],
)
def test_a_tar_chooses_no_path(tmp_path, name, data):
    tar, folder = tmp_path / "2014.tar", tmp_path / "a" / "b"
    tar.write_bytes(tar_of({"2014/201404.npy": uid_file(1), name: data}))
    with pytest.raises(TicError, match="only files 2014/"):
        unpack(tar, folder, "2014")
    assert files(tmp_path) == ["2014.tar"]


@pytest.mark.parametrize("damage", [lambda data: data[:700], lambda data: b"<html>" * 200])
def test_a_damaged_tar(tmp_path, damage):
    (tmp_path / "2014.tar").write_bytes(damage(tar_of({"2014/201404.npy": uid_file(100)})))
    with pytest.raises(TicError, match=r"2014.tar is damaged .*delete it"):
        unpack(tmp_path / "2014.tar", tmp_path, "2014")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["2014.tar"]


def test_unpacking_goes_on(release, tmp_path):
    folder = tmp_path / MONTHLY
    save_uids(folder / "2014/201403.npy", np.zeros(2, UID))
    lists(release, tmp_path, lists=("monthly",), years=("2014",))
    assert len(np.load(folder / "2014/201403.npy")) == 2
    assert len(np.load(folder / "2014/201412.npy")) == 12


def test_only_local_folders(server):
    with pytest.raises(TicError, match="not local"):
        list(download_lists("s3://bucket/lists", sources=(server.url,)))


def run(*flags):
    script = ROOT / "dataset_creation/tic-datacomp/download_uids.py"
    return subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True)


def test_the_script(release, tmp_path):
    flags = ("--output-path", str(tmp_path / "lists"), "--base-url", release.url)
    years = ("--lists", "yearly", "--years", "2014", "2016")
    lines = [f"{tmp_path}/lists/{YEARLY}/{year}.npy: " for year in (2014, 2016)]
    assert run(*flags, *years).stdout.splitlines() == [line + "downloaded" for line in lines]
    assert run(*flags, *years).stdout.splitlines() == [line + "already there" for line in lines]
    done = run(*flags, "--lists", "monthly", "--years", "2015")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert f"error: {release.url}/{MONTHLY}/201501.npy: the server answers 404" in done.stderr
