"""Resharding in parts, again after it was cut off anywhere, on a Ray cluster and in a cloud: always the same bytes."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from socketserver import StreamRequestHandler

import boto3
import pytest
from conftest import run_script, times, tree, wait_for, write_tar
from test_reshard import SCRIPT, good, read_tars, slow_reshard, uid_of

from tic_clip import TicError
from tic_clip.data import folder
from tic_clip.data.reshard import part, reshard, writer
from tic_clip.data.split import split_sizes
from tic_clip.data.uids import parse_uids, save_uids
from tic_clip.storage import lock_folder, upload


@pytest.fixture
def job(make_pool, tmp_path):
    """A pool of five shards and two subsets; ``job(out, parts=3)`` reshards it with two samples a shard."""
    pool = make_pool((2, 3, 1, 2, 4))

    def run(out, shard_size=2, **options):
        return reshard(pool.path, str(out), str(tmp_path / "uids"), shard_size=shard_size, **options)

    run.pool, run.uids = pool, {"a": pool.uids[1:], "b": pool.uids[:9:2]}
    for name, uids in run.uids.items():
        save_uids(tmp_path / f"uids/{name}.npy", parse_uids(uids))
    return run


def test_same_bytes_in_any_number_of_parts_and_processes(job, tmp_path):
    with lock_folder(tmp_path / "flat/b"), pytest.raises(TicError, match=r"another process is writing .*/flat/b;"):
        job(tmp_path / "flat")
    splits, flat = job(tmp_path / "out", parts=3, num_workers=3), job(tmp_path / "flat")
    job(tmp_path / "flat2", num_workers=2)
    assert tree(tmp_path / "flat") == tree(tmp_path / "flat2")
    assert [path.parent.name for path in (tmp_path / "out/a").rglob("sample_ids.npy")] == ["00000"]  # the list is once
    for split, whole in zip(splits, flat, strict=True):
        assert read_tars(split.path) == slow_reshard(job.pool.path, job.uids[split.name])
        assert (split.name, split.num_samples, split.wanted) == (whole.name, whole.num_samples, whole.wanted)
        assert split.num_shards == len(list(Path(split.path).rglob("*.tar")))
    for number in (2, 0, 1):
        assert [split.reused for split in job(tmp_path / "single", parts=3, part=number)] == [False, False]
    again = job(tmp_path / "single", parts=3)
    assert [(split.reused, split.num_samples) for split in again] == [(True, 11), (True, 5)]
    assert [split.num_samples for split in job(tmp_path / "single", parts=3, part=0)] == [1, 1]
    assert tree(tmp_path / "out") == tree(tmp_path / "single")


@pytest.mark.parametrize(("before", "after", "finished"), [(1, 3, True), (1, 3, False), (3, 1, True), (3, 1, False)])
def test_another_number_of_parts(job, tmp_path, before, after, finished):
    out = tmp_path / "out"
    for number in range(before):
        with nullcontext() if finished else stopped(FINISH):
            job(out, parts=before, part=number)
    found = tree(out)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(TicError, match=r"parts.*; give --overwrite to replace it"):
            job(out, parts=after, **options)
    job(out, parts=after, dry_run=True, overwrite=True)
    assert tree(out) == found
    job(out, parts=after, overwrite=True)
    job(tmp_path / "fresh", parts=after)
    assert tree(out) == tree(tmp_path / "fresh")


CHANGES = ((os, "replace"), (os, "link"), (Path, "unlink"), (shutil, "rmtree"), (Path, "rmdir"))  # of a folder
FINISH = ((folder, "finish"),)  # when all output shards are written
WRITES = ((writer, "_write"),)  # to an output shard


@contextmanager
def stopped(calls, number=0, error=KeyboardInterrupt):
    """Stop with an error at the ``number``-th of some calls, and at all that follow; gives those done."""
    done = []

    def stopping(real):
        def call(*args, **kwargs):
            if len(done) >= number:
                raise error
            done.append(args)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt, OSError):
        for owner, name in calls:
            patch.setattr(owner, name, stopping(getattr(owner, name)))
        yield done


@pytest.mark.parametrize(("parts", "overwrite"), [(1, False), (1, True), (3, True)])
def test_stopped_anywhere_it_is_finished_later(make_pool, tmp_path, overwrite, parts):
    """With ``overwrite``, a split made with another shard size is being replaced when the program stops.

    The last sample has the UID of the first: it is dropped also if that shard is not read again after the restart.
    """

    def repeat(number, members):
        uids.append(json.loads(members["json"])["uid"])
        members["json"] = json.dumps({"uid": uids[number % 3]}).encode()

    uids, subset, out = [], str(tmp_path / "2014.npy"), tmp_path / "out"
    pool = make_pool((2, 1, 1), edit=repeat)
    save_uids(subset, parse_uids([*uids[:3], uids[1]]))
    reshard(pool.path, str(out), subset, shard_size=2, parts=parts)
    expected, samples = tree(out), read_tars(out)
    assert len(samples) == 4 + (parts > 1)
    for number in range(0, 400, parts):
        out = tmp_path / f"out{number}"
        if overwrite:
            reshard(pool.path, str(out), subset, shard_size=1, parts=parts)
        with stopped(CHANGES, number) as done:
            reshard(pool.path, str(out), subset, shard_size=2, parts=parts, overwrite=overwrite)
        metas = list(out.rglob("meta.json"))
        if len(metas) == parts:  # the old split or the new one, or parts of either, but whole
            assert read_tars(out) == samples
        reshard(pool.path, str(out), subset, shard_size=2, parts=parts, overwrite=overwrite and bool(metas))
        made = {name: data for name, data in tree(out).items() if ".reshard/" not in name}
        assert made == expected
        if len(done) < number:
            break
    assert 15 < number < 399


def test_stopped_and_replaced_by_turns(job, tmp_path):
    """What the journal of one command says is not taken for the work of another one."""
    subset = tmp_path / "2014.npy"

    def run(chosen, folder):
        save_uids(subset, parse_uids(chosen))
        reshard(job.pool.path, str(folder), str(subset), shard_size=2, overwrite=True)

    mine, others = job.pool.uids[:6], job.pool.uids[6:]  # shards of the same sizes
    run(mine, tmp_path / "whole")
    for number in range(0, 40, 3):
        out = tmp_path / f"out{number}"
        with stopped(FINISH):
            run(mine, out)
        with stopped(CHANGES, number):
            run(others, out)
        run(mine, out)
        assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "data"),
    [("b/00000001.tar", None), ("b/00000001.tar", bytes(512)), (".reshard/00000/journal-00000000", b"\x81\xa5first")],
)
def test_a_file_that_was_harmed_meanwhile(job, tmp_path, name, data):
    """The machine went down before all of it was on the disk; without a journal, nobody knows whose the shards are."""
    out = tmp_path / "out"
    job(tmp_path / "whole")
    with stopped(FINISH):
        job(out)
    (out / name).unlink()
    if data is not None:
        (out / name).write_bytes(data)
    if "journal" in name:
        with pytest.raises(TicError, match="has shards of something else; give another output folder or --overwrite"):
            job(out)
    job(out, overwrite="journal" in name)
    assert tree(out) == tree(tmp_path / "whole")


def test_disk_full_at_any_write(job, tmp_path):
    job(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    for number in range(0, 1000, 3):
        out = tmp_path / f"out{number}"
        with stopped(WRITES, number, OSError(errno.ENOSPC, "No space left on device")) as done:
            job(out)
        left = tree(out)
        assert not [name for name in left if "unfinished" in name]
        assert {name: data for name, data in left.items() if name.endswith(".tar")}.items() <= whole.items()
        is_finished = (out / "a/meta.json").exists()
        assert is_finished or len(done) == number
        job(out)
        assert tree(out) == whole
        if is_finished:
            break
    assert 20 < number < 999


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A pool that takes a moment: 40 shards of 20 samples with 30 kB each, and what it becomes, 6 samples a shard."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "pool").mkdir()
    keys = [f"{number:04d}" for number in range(800)]
    for shard in range(40):
        samples = (good(key, png=os.urandom(30_000)) for key in keys[20 * shard : 20 * shard + 20])
        write_tar(folder / f"pool/{shard:08d}.tar", [member for sample in samples for member in sample])
    save_uids(folder / "uids.npy", parse_uids(map(uid_of, keys)))
    reshard(f"{folder}/pool", f"{folder}/whole", f"{folder}/uids.npy", shard_size=6)
    return folder


def start(folder, out, *flags):
    """Begin to make ``large``'s split in ``out``, as a group of processes."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    arguments = ("-i", folder / "pool", "-o", out, "-s", folder / "uids.npy", "--shard-size", "6", *flags)
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], **options)


def tars_in(out):
    files = (Path(folder, name) for folder, _, names in os.walk(out) for name in names)
    return [path for path in files if path.suffix == ".tar" and len(path.stem) == 8]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def title(pid):
    """The command line of a process; nothing if it has ended."""
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_it_goes_on_where_it_was(large, tmp_path, signum):
    out = tmp_path / "out"
    process = start(large, out, "-j", "2")
    wait_for(lambda: len(tars_in(out)) >= 50)
    workers = children(process.pid)
    if signum == signal.SIGINT:  # Ctrl-C reaches all of a shell's job
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    stderr = process.communicate(timeout=60)[1]
    assert "Traceback" not in stderr
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[signum]
    assert (signum != signal.SIGKILL) == ("interrupted: run the same command again to resume" in stderr)
    assert len(workers) >= 2
    wait_for(lambda: not any(map(title, workers)), 20)
    assert not (out / "meta.json").exists()
    for path in tars_in(out):
        assert path.read_bytes() == (large / "whole" / path.name).read_bytes()
    written = part.read_journal(str(out / ".reshard/00000")).written[0]
    numbers = itertools.takewhile(written.__contains__, itertools.count())  # threads may name a later one first
    names = {f"{number:08d}.tar" for number in numbers}
    known = {path: time for path, time in times(out).items() if path.name in names}
    reshard(f"{large}/pool", str(out), f"{large}/uids.npy", shard_size=6, num_workers=2)
    assert tree(out) == tree(large / "whole")
    assert known
    assert known.items() <= times(out).items()


CLUSTER = """
import os, signal, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
print(cluster.address, *(process.process.pid for process in node.all_processes["raylet"]), flush=True)
for worker in map(int, sys.stdin):  # what it is at is neither finished nor noticed before the node is gone
    os.kill(worker, signal.SIGSTOP)
    cluster.remove_node(node, allow_graceful=False)
    os.kill(worker, signal.SIGKILL)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes: its address, the second node's raylet, and a function that kills it with a worker."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], text=True, **pipes)

    def kill(worker):
        process.stdin.write(f"{worker}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "removed\n"

    address, raylet = process.stdout.readline().split()
    yield address, int(raylet), kill
    process.communicate(timeout=60)


def test_an_error_on_ray_is_one_line(job, tmp_path, cluster):
    bad = Path(job.pool.path, "00000003.tar")
    bad.write_bytes(bad.read_bytes().replace(b".json", b".jsom", 1))
    arguments = ("-i", job.pool.path, "-o", tmp_path / "ray", "-s", tmp_path / "uids", "--shard-size", "2")
    done = run_script(SCRIPT, *arguments, "--parts", "3", "--engine", "ray", "--ray-address", cluster[0], timeout=120)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    assert done.stderr.splitlines()[-1].startswith(f"error: pool shards that can't be read: 1 ({bad}: wrong header che")
    assert len(list((tmp_path / "ray/a").rglob("meta.json"))) == 2


def test_a_node_is_lost(large, tmp_path, cluster):
    """Its parts are made again elsewhere, and the bytes are those of a run on this machine."""
    address, raylet, kill = cluster
    flags = ("--parts", "40", "--shard-size", "1", "--engine", "ray", "--ray-address", address)
    process = start(large, tmp_path / "out", *flags)

    def at_work():
        return [pid for pid in children(raylet) if title(pid).startswith("ray::run_part")]

    wait_for(lambda: len(tars_in(tmp_path / "out")) > 50 and at_work())
    kill(at_work()[0])
    stderr = process.communicate(timeout=240)[1]
    assert process.returncode == 0, stderr
    reshard(f"{large}/pool", f"{tmp_path}/local", f"{large}/uids.npy", shard_size=1, parts=40)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.fixture
def cloud_job(job, s3_faulty, tmp_path, monkeypatch):
    """``job`` with the pool and the subsets in a bucket; temporary files go to a folder of their own."""
    for source, name in ((job.pool.path, "pool"), (tmp_path / "uids", "uids")):
        for path in sorted(Path(source).rglob("*.*")):
            upload(path, f"s3://tic-test/{name}/{path.relative_to(source)}")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(StreamRequestHandler, "disable_nagle_algorithm", True)  # saves 40 ms a request
    s3_faulty.requests.clear()

    def run(**options):
        return reshard("s3://tic-test/pool", "s3://tic-test/out", "s3://tic-test/uids", shard_size=4, **options)

    run.store = s3_faulty
    yield run
    assert list((tmp_path / "temporary").glob("tic-clip-*")) == []


def objects(prefix="out/"):
    found = boto3.resource("s3").Bucket("tic-test").objects.filter(Prefix=prefix)
    return {item.key.removeprefix(prefix): item.get()["Body"].read() for item in found}


def without_inputs(files):
    """A tree without the lines of ``meta.json`` that say where the inputs lie."""
    return {name: re.sub(rb'.*"(input_dir|subset_file)": .*\n', b"", data) for name, data in files.items()}


@pytest.mark.parametrize(("num_workers", "parts"), [(2, 1), (1, 3)])
def test_from_cloud_to_cloud(job, cloud_job, tmp_path, num_workers, parts):
    job(tmp_path / "local", parts=parts, shard_size=4)
    splits = cloud_job(num_workers=num_workers, parts=parts)
    assert [(split.path, split.num_samples) for split in splits] == [
        ("s3://tic-test/out/a", 11),
        ("s3://tic-test/out/b", 5),
    ]
    assert without_inputs(objects()) == without_inputs(tree(tmp_path / "local"))
    assert sum(split_sizes("s3://tic-test/out/a").values()) == 11
    assert [split.reused for split in cloud_job(parts=parts)] == [True, True]
    assert [cloud_job.store.count("GET", f"/pool/{i:08d}.tar") for i in range(5)] == [1] * 5  # in both runs


def test_no_access_is_not_a_bad_shard(cloud_job):
    """``--skip-bad-shards`` leaves out what is wrong with the bytes, and a login that has ended is not that."""
    cloud_job.store.fail("GET", "/pool/00000001.tar", 403, times=1_000)
    with pytest.raises(OSError, match=r"pool/00000001\.tar: planned"):
        cloud_job(skip_bad_shards=True)
    assert [name for name in objects() if "meta.json" in name] == []
    cloud_job.store.faults.clear()
    assert [split.num_bad for split in cloud_job(skip_bad_shards=True)] == [0, 0]


def test_upload_that_fails_and_goes_on(job, cloud_job, tmp_path):
    """Nothing is there under its name that is not whole, and what is there is not sent or fetched again."""
    job(tmp_path / "local", shard_size=4)
    cloud_job.store.fail("PUT", "out/a/00000002.tar", 503, times=1_000)
    with pytest.raises(OSError, match=r"s3://tic-test/out/a/00000002\.tar could not be reached"):
        cloud_job()
    there = {name: data for name, data in objects().items() if name.endswith(".tar")}
    assert 0 < len(there) < 5
    assert there.items() <= tree(tmp_path / "local").items()
    assert "a/00000002.tar" not in there
    cloud_job.store.faults.clear()
    cloud_job.store.requests.clear()
    cloud_job()
    assert [name for name in there if cloud_job.store.count("PUT", f"/out/{name}")] == []
    assert [cloud_job.store.count("GET", f"/pool/0000000{i}.tar") for i in (0, 4)] == [0, 1]
    assert without_inputs(objects()) == without_inputs(tree(tmp_path / "local"))
