"""Local paths and an S3 server on this machine through the same functions, and requests that fail."""

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from cloud import CLOSE, FOREVER, HANG, LOST, TRUNCATE
from forked import Script
from s3fs import S3FileSystem

from tic_clip import TicError, storage
from tic_clip.parallel import map_on_ray, map_ordered
from tic_clip.storage import NotFoundError, StorageError, list_files, read_bytes, write_text
from tic_clip.training.config import Config
from tic_clip.training.step import check_ready

RUN = {"method": "cumulative", "scale": "tic_tiny", "step": "all", "data_dir": "data", "output_dir": "out"}


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "f") if request.param == "local" else request.getfixturevalue("s3") + "/f"


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


# --- The same for both ---


def test_what_is_written_is_read(folder):
    for value in {"b": [1, 2.5, None], "a": "größe"}, {}:  # within the same second
        storage.write_json(f"{folder}/new/x.json", value)
        assert storage.read_json(f"{folder}/new/x.json") == value


def test_what_is_missing(folder):
    path = f"{folder}/x/file"
    write_text(path, "text")
    assert (storage.exists(path), storage.is_dir(path), storage.size(path)) == (True, False, 4)
    assert (storage.exists(f"{folder}/x"), storage.is_dir(f"{folder}/x")) == (True, True)
    reads = (read_bytes, storage.size, storage.open_file, storage.read_json)
    lists = (list_files, storage.list_folders)
    for missing in (f"{folder}/x/fil", f"{folder}/y", f"{path}/z"):
        assert (storage.exists(missing), storage.is_dir(missing)) == (False, False)
        for call in (*reads, *lists):
            with pytest.raises(NotFoundError, match=f"^{missing} is missing( or not a folder)?$"):
                call(missing)
    for call in lists:
        with pytest.raises(NotFoundError, match=f"^{path} is missing( or not a folder)?$"):
            call(path)
    for _ in range(2):
        storage.remove(path)
    assert not storage.exists(path)


def test_listing(folder):
    for name in ("b.tar", "a.tar", "a.json", ".c.tar", "1/a.tar", "1-x/a.tar", "1/2/a.tar", ".h/a.tar", "1/.h.tar"):
        write_text(f"{folder}/{name}", name)
    to_nothing = []
    if storage.is_remote(folder):
        import boto3

        write_text(f"{folder}-other/x.tar", "")
        for key in ("f/", "f/empty.tar/"):  # as the console marks a folder
            boto3.client("s3").put_object(Bucket="tic-test", Key=key)
    else:
        Path(folder, "empty.tar").mkdir()
        Path(folder, "broken.tar").symlink_to("nothing")
        to_nothing = [("broken.tar", 0)]  # whoever reads it will say that it is missing

    def names(pattern):
        return [(path.removeprefix(f"{folder}/"), size) for path, size in list_files(folder, pattern)]

    assert names("*.tar") == [("a.tar", 5), ("b.tar", 5), *to_nothing]
    assert names("*/*.tar") == [("1/a.tar", 7), ("1-x/a.tar", 9)]
    assert names("**/a.tar") == [("1/2/a.tar", 9), ("1/a.tar", 7), ("1-x/a.tar", 9), ("a.tar", 5)]
    assert names("1*/?.tar") == [("1/a.tar", 7), ("1-x/a.tar", 9)]
    assert names("*.npy") == []
    assert [path.removeprefix(f"{folder}/") for path in storage.list_folders(folder)] == ["1", "1-x", "empty.tar"]


def test_bytes_by_their_position(folder):
    data = random.Random(0).randbytes(5000)
    with storage.atomic_open(f"{folder}/x") as file:
        file.write(data)
    with storage.open_file(f"{folder}/x", 64) as file:
        for start, count in ((4000, 9), (0, 63), (63, 400), (10, 1), (4990, 20), (5003, 1), (0, -1)):
            file.seek(start)
            assert file.read(count) == data[start:][: count if count >= 0 else None]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_what_was_there(folder, error):
    write_text(f"{folder}/x", "old")
    for name in "xy":
        with pytest.raises(type(error)), storage.atomic_open(f"{folder}/{name}") as file:  # noqa: PT012
            file.write(b"half")
            raise error
    assert list_files(folder) == [(f"{folder}/x", 3)]
    assert storage.is_remote(folder) or files_below(folder) == ["x"]


def test_download_and_copies(folder, tmp_path):
    for name in "ab":
        write_text(f"{folder}/{name}/0.tar", name)
    storage.download(f"{folder}/a/0.tar", tmp_path / "new/x.tar")
    storage.upload(tmp_path / "new/x.tar", f"{folder}/c/0.tar")
    copies = [storage.local_copy(f"{folder}/{name}/0.tar", tmp_path / "copies") for name in "abcab"]
    assert [(copy.read_text(), copy.name) for copy in copies] == [(text, "0.tar") for text in "abaab"]
    with pytest.raises(NotFoundError, match=f"^{folder}/e/0.tar is missing$"):
        storage.download(f"{folder}/e/0.tar", tmp_path / "e.tar")
    assert not (tmp_path / "e.tar").exists()


def test_what_is_not_json(tmp_path):
    for content, kind in ((b"", "valid JSON"), (b'{"a": "\xff"}', "valid JSON"), (b"[]", "a JSON object")):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(TicError, match=rf"^{tmp_path}/x is not {kind}"):
            storage.read_json(tmp_path / "x")


# --- URLs ---


def test_paths_and_urls(s3):
    assert storage.to_path("a/b") == storage.to_path(Path("a/b")) == Path("a/b")
    assert not storage.is_remote("/s3/b")
    write_text(f"{s3}//a/b//x.txt", "x")
    assert str(storage.to_path(f"{s3}/a//b/") / "x") == f"{s3}/a/b/x"
    for folder in (f"{s3}//a//b//", f"S3{s3[2:]}/a/b"):
        assert list_files(folder) == [(f"{s3}/a/b/x.txt", 1)]
        assert read_bytes(f"{folder}/x.txt") == b"x"
    assert storage.list_folders(f"{s3}/") == [f"{s3}/a"]
    assert list_files(s3, "**/*.txt") == [(f"{s3}/a/b/x.txt", 1)]
    assert storage.is_dir(s3)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("gcsfs", lambda: storage.read_bytes("gs://bucket/x")),
        ("adlfs", lambda: storage.to_path("az://bucket/x")),
        ("ray", lambda: next(map_on_ray(len, ["x"], num_cpus=1, address=None))),
        ("wandb", lambda: check_ready(Config(**RUN, report_to="all"))),
    ],
)
def test_a_package_that_a_plain_set_up_leaves_out(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TicError, match=f"{package} is not installed: run bash setup.sh --all"):
        call()


@pytest.mark.parametrize("url", ["s3://", "s3:///", "gs://", "https://host/file", "file:///tmp/x", "://x", "s3:/b/x"])
def test_urls_of_no_cloud(url):
    message = "is neither a local path nor the URL of|a URL has two slashes: s3://b/x"
    for call in (storage.to_path, read_bytes, list_files, lambda url: write_text(url, "")):
        with pytest.raises(TicError, match=rf"^{url} .*({message})"):
            call(url)


# --- Requests that fail ---

CALLS = {
    "read": (storage.read_json, "GET", "x.json", [500, 503, 429, CLOSE, TRUNCATE, HANG, LOST]),
    "download": (lambda url: storage.download(url, Path(tempfile.gettempdir(), "x")), "GET", "x.json", [503, TRUNCATE]),
    "write": (lambda url: write_text(url, "{}"), "PUT", "x.json", [500, CLOSE, LOST]),
    "size": (storage.size, "HEAD", "x.json", [429]),
    "list": (lambda url: list_files(url.rpartition("/")[0]), "GET", "list-type", [503, TRUNCATE]),
    "remove": (storage.remove, "DELETE", "x.json", [503, LOST]),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in CALLS for fault in CALLS[name][3]])
def test_requests_are_tried_again(s3_faulty, s3, name, fault, tmp_path, monkeypatch):
    call, method, text, _ = CALLS[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = f"{s3}/folder/x.json"
    write_text(url, '{"a": 1}')
    expected = call(url)
    lasting = pytest.raises(StorageError, match=rf"^{s3}/folder(/x\.json)? could not be reached, tried 3 times: .+$")
    for times, outcome in ((2, nullcontext()), (FOREVER, lasting)):
        write_text(url, '{"a": 1}')
        before = s3_faulty.count(method, text)
        s3_faulty.fail(method, text, fault, times)
        with outcome:
            assert call(url) == expected
        tries = s3_faulty.count(method, text) - before
        assert tries == 3 or (fault in (CLOSE, LOST) and 3 < tries <= 6)  # aiohttp tries these once more
    assert files_below(tmp_path) in ([], ["x"])


def test_one_get_for_an_object(s3_faulty, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "TIMEOUT", 60.0)
    data = random.Random(0).randbytes(60 << 20)  # more than one block of s3fs
    (tmp_path / "x").write_bytes(data)
    storage.upload(tmp_path / "x", f"{s3}/x")
    storage.download(f"{s3}/x", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == data
    assert (s3_faulty.count("GET", "/x"), s3_faulty.count("HEAD")) == (1, 0)


@pytest.mark.parametrize(("method", "status"), [("GET", 403), ("HEAD", 403), ("PUT", 403), ("GET", 400)])
def test_lasting_errors_are_not_tried_again(s3_faulty, s3, method, status):
    call = {"GET": read_bytes, "HEAD": storage.exists, "PUT": lambda url: write_text(url, "")}[method]
    s3_faulty.fail(method, "secret", status, FOREVER)
    with pytest.raises(StorageError, match=f"^{s3}/secret: .*(planned|Forbidden)$"):
        call(f"{s3}/secret")
    assert len(s3_faulty.requests) == 1


def test_no_such_bucket(s3):
    for call in (read_bytes, list_files, lambda url: write_text(url, "x")):
        with pytest.raises(OSError, match=r"^s3://no-such-bucket/a(: The specified bucket does not exist| is missing)"):
            call("s3://no-such-bucket/a")


def test_credentials_of_a_profile(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    settings = {"EC2_METADATA_DISABLED": "true", "SHARED_CREDENTIALS_FILE": str(tmp_path / "keys"), "PROFILE": "mine"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)

    def write(profile):
        (tmp_path / "keys").write_text(profile)
        S3FileSystem.clear_instance_cache()
        write_text(f"{s3}/x", "x")

    for profile, message in (("[other]", r"profile \(mine\) could not be found"), ("[mine]", "Unable to locate cred")):
        with pytest.raises(StorageError, match=rf"^{s3}/x: .*{message}"):
            write(profile)
    write("[mine]\naws_access_key_id = x\naws_secret_access_key = x\n")


def test_ranges_are_tried_again_and_never_of_two_versions(s3_faulty, s3):
    write_text(f"{s3}/x", "0123456789")
    with storage.open_file(f"{s3}/x", 1) as file:
        for fault in (503, CLOSE):
            s3_faulty.fail("GET", "/x", fault)
        assert file.read(3) == b"012"
        write_text(f"{s3}/x", "abcdefghij")
        file.seek(8)
        with pytest.raises(StorageError, match=f"^{s3}/x: .* no longer exists"):
            file.read(2)


def test_a_forked_process_has_connections_of_its_own(s3):
    write_text(f"{s3}/x", "text")
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        with storage.open_file(f"{s3}/x", 1) as file:
            file.seek(2)
            os._exit((read_bytes(f"{s3}/x"), file.read(2)) != (b"text", b"xt"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read_bytes(f"{s3}/x") == b"text"


# --- Full disks, locks, temporary folders ---


@pytest.mark.parametrize(  # it shows when the file is closed, or in the midst of the write
    ("length", "call"), [(2000, "download(url, path)"), (200_000, "write_text(path, read_bytes(url).decode())")]
)
def test_a_full_disk_leaves_what_was_there(s3, tmp_path, length, call):
    path, url = tmp_path / "x/x", f"{s3}/x"
    write_text(path, "old")
    write_text(url, "n" * length)
    (tmp_path / "script.py").write_text(
        "import resource, sys; from tic_clip.storage import *; path, url = sys.argv[1:]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: {call}\nexcept OSError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    done = Script(tmp_path / "script.py", path, url, **environment).wait()
    assert (done.stdout, done.stderr) == (f"[Errno 27] File too large: '{path}'\n", "")
    assert [(file.name, file.read_text()) for file in path.parent.iterdir()] == [("x", "old")]


def test_one_holds_a_folder(tmp_path):
    lock, held = partial(storage.lock_folder, tmp_path / "x"), ExitStack()
    held.enter_context(lock())
    with pytest.raises(TicError, match=rf"^another process is writing {tmp_path}/x; wait for it or end it$"), lock():
        pass
    threading.Timer(0.2, held.close).start()
    with lock(timeout=10):
        assert (tmp_path / "x").is_dir()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage.fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with storage.lock_folder(tmp_path / "x"):
        note = "no lock (No locks available); do not start two processes for this folder"
        assert capsys.readouterr().err == f"warning: {tmp_path}/x: {note}\n"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage.temporary_folder(), storage.temporary_folder():  # who could say whose process lives?
        assert len(files_below(tmp_path)) == 3
    assert (files_below(tmp_path), capsys.readouterr().err) == (["x"], "")


def test_what_a_killed_process_left_in_tmpdir_is_removed(tmp_path, monkeypatch):
    program = "import os\nfrom tic_clip.storage import *\nwith temporary_folder(): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    (left,) = files_below(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with storage.temporary_folder() as mine, storage.temporary_folder() as other:
        assert files_below(tmp_path) == sorted([mine.name, other.name])
    assert left not in (mine.name, other.name)
    assert files_below(tmp_path) == []


def test_a_folder_is_not_a_leftover_before_it_is_locked(tmp_path, monkeypatch):
    def make_folders(_):
        for _ in range(300):
            with storage.temporary_folder() as folder:
                (folder / "x").touch()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    list(map_ordered(make_folders, range(4), 4))
    assert files_below(tmp_path) == []
