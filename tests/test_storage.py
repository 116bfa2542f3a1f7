import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tic_clip import TicError
from tic_clip.storage import atomic_open, is_remote, read_json, to_path, write_json, write_text


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
