"""What several test files share: a tiny pool in DataComp's format, and an S3 of this machine's own."""

import hashlib
import io
import json
import logging
import os
import resource
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import require_venv  # noqa: E402, F401  as scripts do that run in this process

del sys.path[0]


def pytest_configure():
    """Ctrl-C reaches what tests start also where a shell runs the tests in the background, and so ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The pages, minutes each, come first and in the middle: of two processes each begins with one."""
    pages = [item for item in items if item.get_closest_marker("slow") and "test_readme_runs" in item.nodeid]
    others = [item for item in items if item not in pages]
    half = len(others) // 2
    items[:] = [*pages[:1], *others[:half], *pages[1:], *others[half:]]


@pytest.fixture(autouse=True)
def like_a_new_process():
    """What a process does once, and this one many times: it reads tables and benchmarks, and turns logging off."""
    forget()


def forget():
    from tic_clip.benchmarks import BENCHMARKS
    from tic_clip.cache import identify
    from tic_clip.data.split import largest_shard, read_sizes
    from tic_clip.data.tables import _fetch

    for function in (read_sizes, largest_shard, identify, _fetch):
        function.cache_clear()
    logging.disable(logging.NOTSET)
    for name in [name for name, benchmark in BENCHMARKS.items() if benchmark.text]:
        del BENCHMARKS[name]
    for name in ("train", "evaluate", "report"):  # DataComp and bench/ have scripts of the same names
        sys.modules.pop(name, None)


@contextmanager
def file_limit(size):
    """Let this process write no file of more than ``size`` bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Bomb:
    """What writes a file where a pickle of it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@dataclass
class Pool:
    """``path`` holds ``{:08d}.tar``; ``samples`` maps a UID to its members {suffix: data}, in the pool's order."""

    path: str
    samples: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def uids(self):
        return list(self.samples)


def make_png(number):
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (number % 256, number // 256, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members):
    """Write (name, data) pairs with Python's own tarfile."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read_tars(folder, pattern="**/*.tar"):
    """[(key, {suffix: data})] of the tars below a folder, in order; members of a key that follow each other."""
    samples = []
    for path in sorted(Path(folder).glob(pattern)):
        with tarfile.open(path) as tar:
            for info in filter(tarfile.TarInfo.isfile, tar):
                key, suffix = info.name.split(".", 1)
                if not samples or samples[-1][0] != key or suffix in samples[-1][1]:
                    samples.append((key, {}))
                samples[-1][1][suffix] = tar.extractfile(info).read()
    return samples


def tree(folder):
    """{path: bytes, or where a link leads} of what is below a folder, without what a killed process was writing."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in Path(folder).rglob("*")
        if (path.is_symlink() or path.is_file()) and not (path.name.startswith(".") and path.name.endswith(".tmp"))
    }


def times(folder):
    """When every file, link and folder below a folder was written."""
    return {path: path.lstat().st_mtime_ns for path in Path(folder).rglob("*")}


def wait_for(condition, seconds=60):
    """Poll until ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def run_script(script, *flags, **options):
    """Run a script of the checkout, and return what it has printed and its status."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def call_script(script, *flags, cwd="."):
    """Do as ``run_script``, but in this process, which takes a tenth of the time."""
    forget()
    handler, code, out, err = signal.getsignal(signal.SIGTERM), 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, flags)])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    errors = err.getvalue() + (f"{code}\n" if isinstance(code, str) else "")
    return SimpleNamespace(returncode=1 if isinstance(code, str) else code, stdout=out.getvalue(), stderr=errors)


@pytest.fixture
def make_pool(tmp_path):
    """Build a pool of shards with ``counts`` samples: ``make_pool((3, 2), "pool", edit)``, returns a ``Pool``.

    ``edit(number, members)``, if given, changes the members of a sample in place before they are written.
    """

    def build(counts=(3, 2), name="pool", edit=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        pool, number = Pool(str(folder)), 0
        for shard, count in enumerate(counts):
            written = []
            for i in range(count):
                key, caption = f"{shard:05d}{i:04d}", f"picture {number} of {name}"
                uid = hashlib.sha256(caption.encode()).hexdigest()[:32]
                record = {"uid": uid, "caption": caption, "key": key}
                members = {"png": make_png(number), "json": json.dumps(record).encode(), "txt": caption.encode()}
                if edit:
                    edit(number, members)
                pool.samples[uid] = members
                written += [(f"{key}.{suffix}", data) for suffix, data in members.items()]
                number += 1
            write_tar(folder / f"{shard:08d}.tar", written)
            (folder / f"{shard:08d}_stats.json").write_text(json.dumps({"successes": count}))
        return pool

    return build


@pytest.fixture(scope="session")
def s3_server():
    from cloud import serving

    with serving() as store:
        yield store


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The URL of an empty bucket of a server on this machine, which is found through the environment."""
    import boto3
    from cloudpathlib import S3Client
    from s3fs import S3FileSystem

    keys = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "ENDPOINT_URL": s3_server.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(S3Client, "_default_client", None)
    S3FileSystem.clear_instance_cache()
    bucket = boto3.resource("s3").create_bucket(Bucket="tic-test")
    yield "s3://tic-test"
    bucket.objects.delete()
    bucket.delete()


@pytest.fixture
def s3_faulty(s3, s3_server, monkeypatch):
    """The server of ``s3``, which fails as it is told (``tests/cloud.py``); few and short attempts."""
    from tic_clip import storage

    for name, value in {"ATTEMPTS": 3, "BACKOFF": 0.001, "TIMEOUT": 1.5}.items():
        monkeypatch.setattr(storage, name, value)
    s3_server.requests.clear()
    yield s3_server
    s3_server.faults.clear()
