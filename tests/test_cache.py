"""Copies of an S3 server's objects on this disk: how often each is fetched, what goes first, and what goes wrong."""

import errno
import os
import signal
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from cloud import HANG
from conftest import ROOT, call_script, make_png
from forked import Script

from tic_clip import TicError, cache
from tic_clip.benchmarks import get_benchmark
from tic_clip.cache import Cache, open_cache
from tic_clip.data.tar import write_shard
from tic_clip.parallel import make_pool, map_ordered
from tic_clip.storage import NotFoundError, StorageError, upload, write_json, write_text


@pytest.fixture
def bucket(s3, s3_faulty):
    """Give the URL of ``{letter}.tar`` for a to e, 100 bytes each."""
    for letter in "abcde":
        write_text(f"{s3}/x/{letter}.tar", letter * 100)
    s3_faulty.requests.clear()
    return f"{s3}/x"


def read(kept, url):
    with kept.open(url) as file:
        return file.read()


def copies(folder):
    """The first letter of each copy, in order; all else in the folder is its lock."""
    files = {path.name: path.read_text() for path in Path(folder).iterdir()}
    assert files.pop("lock") == ""
    assert all(name.endswith(".tar") for name in files)
    return "".join(sorted(text[0] for text in files.values()))


def read_all(job):
    """Read objects in a process of its own, or in threads of it."""
    folder, urls = job
    kept = open_cache({"cache": folder, "cache_gb": 1})
    return list(map_ordered(lambda url: read(kept, url).decode()[0], urls, 2))


def test_many_processes_and_threads_fetch_each_object_once(bucket, s3_faulty, tmp_path):
    urls = [f"{bucket}/{letter}.tar" for letter in "abcde"]
    jobs = [(str(tmp_path / "new/cache"), urls[i:] + urls[:i] + urls) for i in range(3)]
    with make_pool(3, fork=True) as pool:
        found = list(pool.map(read_all, jobs))
    assert found == [list("abcdeabcde")[i : i + 5] + list("abcde") for i in range(3)]
    assert [s3_faulty.count("GET", url.removeprefix("s3:/")) for url in urls] == [1] * 5
    assert s3_faulty.count("HEAD") <= 3 * 2 * 5
    assert copies(tmp_path / "new/cache") == "abcde"


def test_the_least_recently_used_copy_goes_first(bucket, s3_faulty, tmp_path):
    (tmp_path / "notes.tar").write_text("a file of the user's")
    kept, order = Cache(tmp_path, 250), "abacaab"
    for letter in order:
        assert read(kept, f"{bucket}/{letter}.tar") == letter.encode() * 100
        time.sleep(0.01)
    (tmp_path / "notes.tar").unlink()  # still there
    assert copies(tmp_path) == "ab"
    assert [s3_faulty.count("GET", f"{letter}.tar") for letter in "abc"] == [1, 2, 1]
    with kept.open(f"{bucket}/a.tar") as file:
        read(kept, f"{bucket}/c.tar")
        read(kept, f"{bucket}/d.tar")
        assert copies(tmp_path) == "cd"
        assert file.read() == b"a" * 100  # it has gone while it was read


def test_objects_that_do_not_fit_together_are_fetched_one_after_another(bucket, tmp_path):
    kept, urls = Cache(tmp_path, 150), [f"{bucket}/{letter}.tar" for letter in "abcde"] * 3
    assert "".join(map_ordered(lambda url: read(kept, url).decode()[0], urls, 5)) == "abcde" * 3
    assert len(copies(tmp_path)) == 1


def test_the_next_object_is_fetched_while_one_is_read(bucket, s3_faulty, tmp_path):
    kept = Cache(tmp_path, 1000)
    letters = kept.ahead(iter("abc"), lambda letter: f"{bucket}/{letter}.tar")
    s3_faulty.fail("GET", "b.tar", 403)
    for _ in range(3):
        letter, end = next(letters), time.monotonic() + 10
        following = chr(ord(letter) + 1)
        while following < "d" and not s3_faulty.count("GET", f"{following}.tar"):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert s3_faulty.count("GET", "a.tar") == 0  # nobody has opened it
    assert read(kept, f"{bucket}/b.tar") == b"b" * 100  # the error was not for us
    assert list(kept.ahead(["x"], lambda _: "/local/x.tar")) == ["x"]


def test_an_object_that_changes_is_fetched_again(bucket, tmp_path):
    kept = Cache(tmp_path, 1000)
    assert read(kept, f"{bucket}/a.tar") == b"a" * 100
    write_text(f"{bucket}/a.tar", "A" * 100)  # of the same size
    cache.identify.cache_clear()  # as in a new process
    assert read(kept, f"{bucket}/a.tar") == b"A" * 100
    cache.identify(f"{bucket}/b.tar")
    write_text(f"{bucket}/b.tar", "b" * 99)
    with pytest.raises(StorageError, match=f"^{bucket}/b.tar changed while it was read: start again$"):
        kept.open(f"{bucket}/b.tar")
    cache.identify.cache_clear()
    assert len(read(kept, f"{bucket}/b.tar")) == 99
    assert copies(tmp_path) == "Aab"


def test_what_a_killed_process_or_a_power_cut_leaves_is_fetched_again(bucket, s3_faulty, tmp_path):
    s3_faulty.fail("GET", "a.tar", HANG)
    process = get_context("fork").Process(target=read_all, args=((str(tmp_path), [f"{bucket}/a.tar"]),))
    process.start()
    while not s3_faulty.count("GET", "a.tar"):
        assert process.is_alive()
        time.sleep(0.01)
    kept, found = Cache(tmp_path, 1000), []
    waiting = threading.Thread(target=lambda: found.append(read(kept, f"{bucket}/a.tar")))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    waiting.join(10)
    assert found == [b"a" * 100]
    (copy,) = tmp_path.glob("*.tar")
    copy.write_bytes(b"a" * 99)
    assert read(kept, f"{bucket}/a.tar") == b"a" * 100
    assert copies(tmp_path) == "a"
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_makes_room_from_the_cache_alone(bucket, tmp_path, monkeypatch):
    kept = Cache(tmp_path, 1000)
    read(kept, f"{bucket}/a.tar")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50))
    read(kept, f"{bucket}/b.tar")
    assert copies(tmp_path) == "b"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    write_text(f"{bucket}/f.tar", "f" * 101)
    with pytest.raises(TicError, match=rf"f.tar has 1\.01e-07 GB, more than fits into the cache {tmp_path}: .* 0 GB"):
        kept.open(f"{bucket}/f.tar")
    assert copies(tmp_path) == ""


@pytest.mark.parametrize(
    ("limit", "name", "patch", "error", "message"),
    [
        (99, "a", None, TicError, r"a\.tar has 1e-07 GB, more than fits into the cache \S+: at most 9\.9e-08 GB"),
        (100, "z", None, NotFoundError, r"/x/z\.tar is missing$"),
        (100, "", None, NotFoundError, r"/x is missing$"),
        (
            100,
            "a",
            ("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))),
            TicError,
            r"/lock: No locks available: give a --cache on a local disk",
        ),
    ],
)
def test_an_error_is_one_line_and_leaves_no_copy(bucket, tmp_path, monkeypatch, limit, name, patch, error, message):
    if patch:
        monkeypatch.setattr(*patch)
    with pytest.raises(error, match=message):
        Cache(tmp_path, limit).open(f"{bucket}/{name}.tar" if name else bucket)
    assert copies(tmp_path) == "" if (tmp_path / "lock").exists() else not list(tmp_path.iterdir())


# --- In training ---


@pytest.fixture
def data(s3, s3_server, tmp_path):
    """Give the URL of two steps of TiC-Emoji with three shards each."""
    for number, step in enumerate(get_benchmark("emoji").steps[:2]):
        folder = f"{get_benchmark('emoji').root}/train/{step.name}"
        for shard in range(3):
            content = [(f"{number}{shard}{i}", {"png": make_png(i), "txt": b"a picture"}) for i in range(30)]
            write_shard(tmp_path / "x.tar", content)
            upload(tmp_path / "x.tar", f"{s3}/{folder}/{shard:08d}.tar")
        write_json(f"{s3}/{folder}/sizes.json", {f"{shard:08d}.tar": 30 for shard in range(3)})
    s3_server.requests.clear()
    return s3


def train_flags(data, folder, *more):
    flags = ["--benchmark", "emoji", "--scale", "tic_tiny", "--samples_per_step", "256", "--data_dir", data]
    return [*flags, "--output_dir", folder / "out", "--resume_every", "1", "--cache", folder / "cache", *more]


def test_sampling_with_replacement_reads_through_the_cache(data, s3_server, tmp_path):
    flags = ("--method", "oracle", "--step", "2015", "--resampled", "--workers", "1", "--cache_gb", "0.01")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    done = Script(ROOT / "scripts/train.py", *train_flags(data, tmp_path, *flags), **environment).wait()
    assert done.returncode == 0, done.stderr
    gets = Counter(url for method, url in s3_server.requests if method == "GET" and url.endswith(".tar"))
    assert set(gets.values()) == {1}
    assert len(gets) == len(list((tmp_path / "cache").glob("*.tar"))) > 3


def test_a_cache_smaller_than_a_shard_is_refused_before_anything_is_written(data, tmp_path):
    for more, message in (
        (("--cache_gb", "0.00001"), "--cache_gb 1e-05 is less than a shard: "),
        ((), "--cache and --cache_gb go together"),
        (("--cache_gb", "1", "--cache", data), f"argument --cache: '{data}' is not a folder on a local disk"),
    ):
        flags = train_flags(data, tmp_path, "--method", "cumulative", "--step", "2014", *more)
        done = call_script("scripts/train.py", *flags)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert message in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
