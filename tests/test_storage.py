import errno
import os
import pickle
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cloud import CLOSE, FOREVER, HANG, LOST, TRUNCATE, Memory, serving
from cloudpathlib import AzureBlobClient, GSClient, S3Client

from tic_clip import TicError, clouds
from tic_clip.clouds import NotFoundError, StorageError
from tic_clip.storage import (
    atomic_open,
    download,
    exists,
    is_dir,
    is_remote,
    list_files,
    list_folders,
    local_copy,
    open_random,
    read_bytes,
    read_json,
    remove,
    size,
    to_path,
    upload,
    write_json,
    write_text,
)


def test_paths_and_urls():
    assert to_path("a/b") == to_path(Path("a/b")) == Path("a/b")
    assert not is_remote("a/b")
    assert not is_remote("/s3/b")
    assert is_remote("s3://bucket/key")
    with pytest.raises(TicError, match=r"ftp://host/file is no local path and no s3://"):
        to_path("ftp://host/file")


def test_json_comes_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": "größe"}
    write_json(tmp_path / "new" / "folder" / "x.json", value)
    path = tmp_path / "new/folder/x.json"
    assert read_json(path) == value
    assert path.read_text().startswith('{\n  "b": [\n')
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00rubbish", b"[1] [2]", b'["\xff"]'])
def test_rubbish_is_no_json(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(TicError, match=r"x\.json is not valid JSON") as error:
        read_json(path)
    assert str(tmp_path) in str(error.value)


def test_missing_json(tmp_path):
    with pytest.raises(TicError, match=r"x.json is missing"):
        read_json(tmp_path / "x.json")


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "x"
    write_text(path, "old")
    with atomic_open(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_in_the_midst(path, error):
    with atomic_open(path) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "x"
    if old:
        path.write_text(old)
    with pytest.raises(type(error)):
        fail_in_the_midst(path, error)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("x", "old")] if old else [])


@pytest.mark.parametrize("size", [2000, 200_000])  # fails when the file is closed, and in the midst of the write
def test_a_full_disk_leaves_what_was_there(tmp_path, size):
    path = tmp_path / "x"
    path.write_text("old")
    program = (
        "import resource, sys; from tic_clip.storage import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_text(sys.argv[1], 'n' * int(sys.argv[2]))\n"
        "except OSError as error: print(error.strerror)"
    )
    done = subprocess.run([sys.executable, "-c", program, path, str(size)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "old")]


def test_cloud_objects(s3):
    url = f"{s3}/folder/x.json"
    with pytest.raises(TicError, match=r"s3://tic-test/folder/x.json is missing"):
        read_json(url)
    write_json(url, [1])
    assert read_json(url) == [1]
    write_json(url, [2])  # within the same second, too
    assert read_json(url) == [2]
    assert str(to_path(s3) / "folder" / "x.json") == url


def test_an_error_leaves_the_cloud_object_that_was_there(s3):
    write_text(f"{s3}/old", "old")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            fail_in_the_midst(f"{s3}/{name}", KeyboardInterrupt())
    assert [(path.name, path.read_text()) for path in to_path(s3).iterdir()] == [("old", "old")]


@pytest.fixture
def short(monkeypatch):
    """Few and short attempts."""
    for name, value in {"ATTEMPTS": 3, "BACKOFF": 0.001, "TIMEOUT": 1.5}.items():
        monkeypatch.setattr(clouds, name, value)


@pytest.fixture(params=["gs", "az"])
def memory(request, monkeypatch, short):
    """(store, URL of a bucket): a server of this machine's own, asked through Google's or Azure's own package."""
    with serving(Memory()) as store:
        if request.param == "gs":
            google = pytest.importorskip("google.cloud.storage")
            credentials = pytest.importorskip("google.auth.credentials").AnonymousCredentials()
            where = {"api_endpoint": store.url}
            client = google.Client(project="p", credentials=credentials, client_options=where)
            monkeypatch.setattr(GSClient, "_default_client", GSClient(storage_client=client))
        else:
            pytest.importorskip("azure.storage.blob")
            text = (
                f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey=a2V5;BlobEndpoint={store.url}/account;"
            )
            monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
            monkeypatch.setattr(AzureBlobClient, "_default_client", None)
        yield store, f"{request.param}://bucket"


FAULTS = [500, 503, 429, CLOSE, TRUNCATE, HANG, LOST]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_paths_with_slashes_too_many(s3):
    write_text(f"{s3}//a/b//x.txt", "x")
    assert str(to_path(f"{s3}/a//b/")) == f"{s3}/a/b"
    for folder in (f"{s3}/a/b", f"{s3}/a/b/", f"{s3}//a//b//", f"S3{s3[2:]}/a/b/"):
        assert list_files(folder) == [(f"{s3}/a/b/x.txt", 1)]
        assert read_bytes(f"{folder}/x.txt") == b"x"
        assert is_dir(folder)
        assert exists(folder)
    for bucket in (s3, f"{s3}/"):
        assert list_folders(bucket) == [f"{s3}/a"]
        assert list_files(bucket) == []
        assert list_files(bucket, "**/*.txt") == [(f"{s3}/a/b/x.txt", 1)]
        assert is_dir(bucket)
        assert exists(bucket)


@pytest.mark.parametrize("url", ["s3://", "s3:///", "gs://", "https://host/file", "file:///tmp/x", "://x"])
def test_urls_of_no_cloud(url):
    with pytest.raises(TicError, match=r"names no bucket|is no local path and no s3://") as error:
        to_path(url)
    assert str(error.value).startswith(url)


def tree_of_files(folder):
    """Files and folders, some of them hidden; in a cloud, one folder has an object of its own."""
    for name in ("b.tar", "a.tar", "a.json", ".c.tar", "1/a.tar", "1-x/a.tar", "1/2/a.tar", ".h/a.tar", "1/.h.tar"):
        write_text(f"{folder}/{name}", name)


@pytest.mark.parametrize("where", ["local", "cloud"])
def test_listing(where, tmp_path, request):
    folder = tmp_path / "f" if where == "local" else request.getfixturevalue("s3") + "/f"
    tree_of_files(folder)
    if where == "cloud":
        write_text(f"{folder}-other/x.tar", "")
        to_path(folder).client.client.put_object(Bucket="tic-test", Key="f/")  # as the console marks a folder
        to_path(folder).client.client.put_object(Bucket="tic-test", Key="f/empty.tar/")
    else:
        (folder / "empty.tar").mkdir()
        (folder / "broken.tar").symlink_to("nothing")

    def names(pattern):
        return [(path.removeprefix(f"{folder}/"), size) for path, size in list_files(folder, pattern)]

    to_nothing = [("broken.tar", 0)] if where == "local" else []  # whoever reads it will say that it is missing
    assert names("*.tar") == [("a.tar", 5), ("b.tar", 5), *to_nothing]
    assert names("*/*.tar") == [("1/a.tar", 7), ("1-x/a.tar", 9)]
    assert names("**/a.tar") == [("1/2/a.tar", 9), ("1/a.tar", 7), ("1-x/a.tar", 9), ("a.tar", 5)]
    assert names("1*/?.tar") == [("1/a.tar", 7), ("1-x/a.tar", 9)]
    assert names("*.npy") == []
    assert [path.removeprefix(f"{folder}/") for path in list_folders(folder)] == ["1", "1-x", "empty.tar"]


@pytest.mark.parametrize("where", ["local", "cloud"])
def test_what_is_not_there(where, tmp_path, request):
    folder = tmp_path if where == "local" else request.getfixturevalue("s3")
    write_text(f"{folder}/x/file", "text")
    assert exists(f"{folder}/x/file")
    assert exists(f"{folder}/x")
    assert is_dir(f"{folder}/x")
    assert not is_dir(f"{folder}/x/file")
    assert size(f"{folder}/x/file") == 4
    for name in ("x/fil", "y", "x/file/z"):
        assert not exists(f"{folder}/{name}")
        assert not is_dir(f"{folder}/{name}")
        for call in (list_files, list_folders):
            with pytest.raises(NotFoundError, match=f"{folder}/{name} is missing or no folder"):
                call(f"{folder}/{name}")
        for call in (read_bytes, size, lambda path: open_random(path).__enter__()):
            with pytest.raises(FileNotFoundError, match=f"^{folder}/{name} is missing$"):
                call(f"{folder}/{name}")
    remove(f"{folder}/x/file")
    remove(f"{folder}/x/file")
    assert not exists(f"{folder}/x/file")


def test_missing_survives_the_way_between_processes():
    assert str(pickle.loads(pickle.dumps(NotFoundError("x is missing")))) == "x is missing"
    assert str(pickle.loads(pickle.dumps(StorageError("no")))) == "no"


def test_a_listing_of_many_pages(s3_faulty, s3, monkeypatch):
    monkeypatch.setattr(clouds, "PAGE", 2)
    for name in "edcba":
        write_text(f"{s3}/f/{name}.tar", name)
    s3_faulty.fail("GET", "list-type", 503, 1)
    s3_faulty.fail("GET", "continuation-token", CLOSE, 2)
    assert [path[-5:] for path, _ in list_files(f"{s3}/f")] == ["a.tar", "b.tar", "c.tar", "d.tar", "e.tar"]
    assert s3_faulty.count("GET", "list-type") == s3_faulty.count("GET", "delimiter") == 3 + 3
    assert s3_faulty.count("HEAD") == 0


CALLS = {
    "read": (read_json, "GET", "x.json", FAULTS),
    "write": (lambda url: write_text(url, "[2]"), "PUT", "x.json", FAULTS),
    "size": (size, "HEAD", "x.json", [500, 503, 429, CLOSE]),
    "list": (lambda url: list_files(url.rpartition("/")[0]), "GET", "list-type", [500, 503, 429, CLOSE]),
    "remove": (remove, "DELETE", "x.json", [500, 503, 429, CLOSE, LOST]),
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in CALLS for fault in CALLS[name][3]])
def test_requests_are_tried_again(s3_faulty, s3, name, fault, tmp_path, monkeypatch):
    call, method, text, _ = CALLS[name]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    url = f"{s3}/folder/x.json"
    write_text(url, "[1, 2, 3]")
    expected = call(url)
    write_text(url, "[1, 2, 3]")
    before = s3_faulty.count(method, text)
    s3_faulty.fail(method, text, fault, 2)
    began = time.monotonic()
    assert call(url) == expected
    assert time.monotonic() - began < 5  # two hang-ups of our own, not of the server's
    assert s3_faulty.count(method, text) - before == (3 if (method, fault) != ("PUT", TRUNCATE) else 1)
    s3_faulty.fail(method, text, fault, FOREVER)
    if (method, fault) != ("PUT", TRUNCATE):  # an answer without a body has nothing to lose
        with pytest.raises(StorageError) as error:
            call(url)
        assert re.fullmatch(f"{s3}/folder(/x.json)? could not be reached, tried 3 times: .+", str(error.value))
        assert before + 6 == s3_faulty.count(method, text)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT"])
def test_no_access_is_not_tried_again(s3_faulty, s3, method):
    call = {"GET": read_bytes, "HEAD": exists, "PUT": lambda url: write_text(url, "")}[method]
    s3_faulty.fail(method, "secret", 403)
    with pytest.raises(TicError, match=rf"^{s3}/secret: no access \((AccessDenied planned|403 Forbidden)\)$"):
        call(f"{s3}/secret")
    assert len(s3_faulty.requests) == 1


def test_no_such_bucket(s3):
    for call in (read_bytes, list_files, is_dir, lambda url: write_text(url, "x")):
        with pytest.raises(TicError, match=r"^s3://no-such-bucket/a: no such bucket \(NoSuchBucket The"):
            call("s3://no-such-bucket/a")


def test_no_server(s3, short, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(StorageError, match=f"^{s3}/x could not be reached, tried 3 times: Could not connect"):
        read_json(f"{s3}/x")


def test_no_credentials(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(TicError, match=f"^{s3}/x: Unable to locate credentials$"):
        read_bytes(f"{s3}/x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(TicError, match=rf"^{s3}/x: .*\(nobody\) could not be found$"):
        to_path(f"{s3}/x")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(TicError, match=f"^{s3}/x: Invalid endpoint: nonsense$"):
        to_path(f"{s3}/x")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_package_that_is_missing(scheme):
    program = (
        "import sys; sys.modules |= dict.fromkeys(['google.auth', 'google.cloud', 'azure', 'azure.core'])\n"
        "from tic_clip import TicError, storage\n"
        "for call in storage.to_path, storage.read_json, storage.list_files, storage.exists:\n"
        "    try: call(sys.argv[1])\n"
        "    except TicError as error: print(error)"
    )
    url = f"{scheme}://bucket/x"
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True)
    message = f"{url} needs a package that is not there: pip install 'tic-clip[{scheme}]'\n"
    assert (done.stdout, done.stderr) == (4 * message, "")


def test_azure_without_credentials(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setattr(AzureBlobClient, "_default_client", None)
    with pytest.raises(TicError, match=r"^az://bucket/x: AzureBlobClient does not support anonymous"):
        read_bytes("az://bucket/x")


def test_a_download_in_parts(s3_faulty, s3, tmp_path, monkeypatch):
    data = random.Random(0).randbytes(1000)
    with atomic_open(f"{s3}/x.tar") as file:
        file.write(data)
    monkeypatch.setattr(clouds, "PART", 300)
    monkeypatch.setattr(clouds, "ATTEMPTS", 4)
    for fault in (503, TRUNCATE, CLOSE):
        s3_faulty.fail("GET", "x.tar", fault)
    download(f"{s3}/x.tar", tmp_path / "new/x.tar")
    assert (tmp_path / "new/x.tar").read_bytes() == data
    assert files_below(tmp_path) == ["new", "new/x.tar"]
    assert s3_faulty.count("GET") == 4 + 3  # one good request a part, and the three that failed
    s3_faulty.fail("GET", "x.tar", TRUNCATE, FOREVER)
    with pytest.raises(StorageError, match=f"^{s3}/x.tar could not be reached, tried 4 times: .*IncompleteRead"):
        download(f"{s3}/x.tar", tmp_path / "y.tar")
    assert files_below(tmp_path) == ["new", "new/x.tar"]


def test_too_few_bytes_are_no_answer(s3, tmp_path, monkeypatch, short):
    write_text(f"{s3}/x", "0123456789")
    monkeypatch.setattr(clouds._S3, "read", lambda *args: b"0123")
    with pytest.raises(StorageError, match=f"^{s3}/x could not be reached, tried 3 times: 4 of 10 bytes came$"):
        download(f"{s3}/x", tmp_path / "x")
    assert files_below(tmp_path) == []


def test_a_copy_is_fetched_once(s3_faulty, s3, tmp_path):
    assert local_copy(tmp_path / "x.tar", tmp_path / "copies") == tmp_path / "x.tar"
    for folder in "ab":
        write_text(f"{s3}/{folder}/0.tar", folder)
    copies = [local_copy(f"{s3}/{folder}/0.tar", tmp_path / "copies") for folder in "abab"]
    assert [copy.read_text() for copy in copies] == ["a", "b", "a", "b"]
    assert {copy.name for copy in copies} == {"0.tar"}
    assert s3_faulty.count("GET") == 2
    with pytest.raises(NotFoundError, match=f"^{s3}/c/0.tar is missing$"):
        local_copy(f"{s3}/c/0.tar", tmp_path / "copies")


def test_an_upload_in_parts(s3_faulty, s3, tmp_path, monkeypatch):
    data = random.Random(0).randbytes(12 << 20)  # S3 wants parts of 5 MiB at least
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(clouds, "PART", 5 << 20)
    monkeypatch.setattr(clouds, "TIMEOUT", 20)
    s3_faulty.fail("PUT", "partNumber=2", 503)
    s3_faulty.fail("PUT", "partNumber=3", CLOSE)
    s3_faulty.fail("POST", "uploads", 500)
    upload(tmp_path / "x", f"{s3}/x")
    assert read_bytes(f"{s3}/x") == data
    assert s3_faulty.count("PUT") == 3 + 2
    s3_faulty.fail("PUT", "partNumber=3", 503, FOREVER)
    with pytest.raises(StorageError, match=f"^{s3}/y could not be reached"):
        upload(tmp_path / "x", f"{s3}/y")
    assert list_files(s3) == [(f"{s3}/x", len(data))]
    assert s3_faulty.count("DELETE", "uploadId") == 1  # what was there of it is given up
    with pytest.raises(FileNotFoundError, match="nothing"):
        upload(tmp_path / "nothing", f"{s3}/z")


def test_an_object_that_changes_while_it_is_read(s3, tmp_path, monkeypatch):
    write_text(f"{s3}/x", "0123456789")
    monkeypatch.setattr(clouds, "BLOCK", 5)
    with open_random(f"{s3}/x") as file:
        assert file.read_at(0, 3) == b"012"
        write_text(f"{s3}/x", "abcdefghij")
        with pytest.raises(TicError, match=f"^{s3}/x: changed while it was read"):
            file.read_at(8, 2)
    assert open_random(f"{s3}/x").__enter__().read_at(8, 2) == b"ij"


def check_random(path, data):
    choose = random.Random(1)
    with open_random(path) as file:
        assert (file.size, len(file)) == (len(data), len(data))
        for _ in range(60):
            start, count = choose.randrange(len(data) + 5), choose.randrange(40)
            assert file.read_at(start, count) == data[start : start + count] == file[start : start + count]
        assert file[-3:] == data[-3:]


@pytest.mark.parametrize("where", ["local", "cloud"])
def test_bytes_by_their_position(where, tmp_path, request, monkeypatch):
    monkeypatch.setattr(clouds, "BLOCK", 16)
    folder = tmp_path if where == "local" else request.getfixturevalue("s3")
    data = random.Random(0).randbytes(500)
    with atomic_open(f"{folder}/x") as file:
        file.write(data)
    write_text(f"{folder}/empty", "")
    check_random(f"{folder}/x", data)
    with open_random(f"{folder}/empty") as file:
        assert (file.size, file.read_at(0, 10)) == (0, b"")


def test_only_what_is_near_is_fetched(s3_faulty, s3, monkeypatch):
    write_text(f"{s3}/x", "".join(f"{i:05d}" for i in range(400)))
    monkeypatch.setattr(clouds, "BLOCK", 10)
    monkeypatch.setattr(clouds, "PART", 160)
    with open_random(f"{s3}/x") as file:
        assert [file.read_at(start, 5) for start in range(0, 300, 5)] == [b"%05d" % i for i in range(60)]
        one_after_the_other = s3_faulty.count("GET")
        assert [file.read_at(start, 5) for start in (500, 1000, 1500)] == [b"00100", b"00200", b"00300"]
    assert one_after_the_other == 9  # 10, 20, 40, … 40 bytes
    assert s3_faulty.count("GET") - one_after_the_other == 3


def test_nothing_stays_in_a_cache(s3, tmp_path):
    write_text(f"{s3}/x", "text")
    read_bytes(f"{s3}/x")
    download(f"{s3}/x", tmp_path / "x")
    assert files_below(to_path(s3).client._local_cache_dir) == []


def test_googles_and_azures_packages(memory, tmp_path):
    store, url = memory
    tree_of_files(f"{url}/f")
    assert store.objects["bucket", "f/a.tar"][0] == b"a.tar"
    assert list_files(f"{url}/f/", "*.tar") == [(f"{url}/f/a.tar", 5), (f"{url}/f/b.tar", 5)]
    assert list_files(f"{url}/f", "*/*.tar") == [(f"{url}/f/1/a.tar", 7), (f"{url}/f/1-x/a.tar", 9)]
    assert list_folders(f"{url}/f") == [f"{url}/f/1", f"{url}/f/1-x"]
    assert (exists(f"{url}/f"), is_dir(f"{url}/f"), is_dir(url)) == (True, True, True)
    assert (exists(f"{url}/g"), is_dir(f"{url}/f/a.tar"), size(f"{url}/f/a.tar")) == (False, False, 5)
    data = random.Random(0).randbytes(500)
    with atomic_open(f"{url}/x") as file:
        file.write(data)
    assert read_bytes(f"{url}/x") == data
    check_random(f"{url}/x", data)
    download(f"{url}/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    for call in (read_bytes, size, list_files):
        with pytest.raises(NotFoundError, match=f"^{url}/nothing is missing"):
            call(f"{url}/nothing")
    for _ in range(2):
        remove(f"{url}/x")
    assert ("bucket", "x") not in store.objects


def test_pages_of_google_and_azure(memory, monkeypatch):
    store, url = memory
    monkeypatch.setattr(clouds, "PAGE", 2)
    tree_of_files(f"{url}/f")
    store.requests.clear()
    store.fail("GET", "prefix=", 503)
    assert [path.removeprefix(url) for path, _ in list_files(f"{url}/f", "**/a.tar")] == [
        *("/f/1/2/a.tar", "/f/1/a.tar", "/f/1-x/a.tar", "/f/a.tar")
    ]
    assert store.count("GET", "prefix=") == 5 + 1
    assert list_folders(f"{url}/f") == [f"{url}/f/1", f"{url}/f/1-x"]


@pytest.mark.parametrize("fault", [500, 503, 429, CLOSE, TRUNCATE, HANG])
def test_google_and_azure_are_tried_again(memory, fault):
    store, url = memory
    write_text(f"{url}/x.json", "[1, 2, 3]")
    store.fail(
        "GET", "x.json", fault, 4 if (fault, url[:2]) == (TRUNCATE, "az") else 2
    )  # its package tries three times
    assert read_json(f"{url}/x.json") == [1, 2, 3]
    if fault in (TRUNCATE, HANG):
        return  # Azure's package makes pauses of its own
    store.fail("GET", "x.json", fault, FOREVER)
    with pytest.raises(StorageError, match=f"^{url}/x.json could not be reached, tried 3 times: .") as error:
        read_json(f"{url}/x.json")
    assert "\n" not in str(error.value)


def test_google_and_azure_refuse(memory):
    store, url = memory
    store.fail("GET", "secret", 403)
    with pytest.raises(TicError, match=f"^{url}/secret: no access"):
        read_bytes(f"{url}/secret")
    assert store.count("GET", "secret") == 1
    write_text(f"{url}/x", "0123456789")
    with open_random(f"{url}/x") as file:
        write_text(f"{url}/x", "abcdefghij")
        with pytest.raises(TicError, match=f"^{url}/x: changed while it was read"):
            file.read_at(0, 5)


def test_a_fork_makes_connections_of_its_own(s3):
    write_text(f"{s3}/x", "text")
    client, cache = S3Client._default_client, S3Client._default_client._local_cache_dir
    child = os.fork()
    if child == 0:
        fine = S3Client._default_client is None and read_bytes(f"{s3}/x") == b"text"
        os._exit(0 if fine and S3Client._default_client is not client and cache.exists() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert S3Client._default_client is client


def test_threads_share_one_client(s3, monkeypatch):
    write_text(f"{s3}/x", "text")
    monkeypatch.setattr(S3Client, "_default_client", None)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda i: read_bytes(f"{s3}/x"), range(32))) == {b"text"}
        assert len(set(pool.map(lambda i: id(to_path(s3).client), range(32)))) == 1
