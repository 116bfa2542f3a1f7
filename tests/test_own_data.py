"""From a user's own table or pool to the report, through the commands; docs/own_data.md does so with a CSV."""

import io
import json

import pyarrow
import pyarrow.parquet
from conftest import ROOT, call_script
from forked import Script
from PIL import Image

from tic_clip.data.tar import write_shard
from tic_clip.data.uids import make_uid

YEARS = ("2021", "2022")
SCALE = "model: ViT-Tiny-8-48\nbatch_size: 8\nsamples_per_step: 32\nwarmup: 1\ncheckpoints: 1\nworkers: 0\n"


def image(number):
    file = io.BytesIO()
    Image.new("RGB", (48, 48), (3 * number, 255 - 3 * number, number % 7)).save(file, "PNG")
    return file.getvalue()


def script(name, *arguments):
    done = call_script(f"dataset_creation/{name}", *arguments)
    assert done.returncode == 0, done.stderr


def write_parquet(folder):
    """80 images in a table as the hub has them, in two classes and two years; 2021 in milliseconds."""
    rows = []
    for n in range(80):
        kind, date = ["odd", "even"][n // 2 % 2], 1_609_500_000_000 + n % 2 * 31_536_000_000
        file = {"bytes": image(n), "path": f"{n}.png"}
        rows.append({"image": file, "text": f"image {n}", "date": date, "kind": kind})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "mine.parquet")


def test_from_parquet_with_images_to_the_report(tmp_path):
    write_parquet(tmp_path)
    columns = {"IMAGE": "image", "CAPTION": "text", "DATE": "date", "LABEL": "kind", "EVERY": "year"}
    settings = {f"TABLE_{name}": value for name, value in columns.items()} | {"TEST_SHARE": "0.4"}
    lists = tmp_path / "data/lists/mine"  # where run.sh has them, if BENCHMARK does not say it
    settings |= {"TABLE": str(tmp_path / "mine.parquet"), "SOURCE": str(lists / "images")}
    check_report(tmp_path, lists, ["retrieval", "labels"], **settings)


def test_from_a_pool_with_dates_to_the_report(tmp_path):
    """120 samples in three tars, whose UIDs and dates are in their JSON."""
    for shard in range(3):
        samples = []
        for n in range(40 * shard, 40 * shard + 40):
            record = {"uid": make_uid(str(n)), "taken": f"{YEARS[n % 2]}-05-{1 + n % 28:02d}T10:00:00Z"}
            members = {"png": image(n), "txt": f"image {n}".encode(), "json": json.dumps(record).encode()}
            samples.append((f"{n:05d}", members))
        write_shard(tmp_path / f"pool/{shard:08d}.tar", iter(samples))
    dates = ("--pool", tmp_path / "pool", "--date-field", "taken", "--steps", ",".join(YEARS))
    script("create_splits.py", *dates, "--name", "mine", "--test-share", "0.3", "--output-path", tmp_path / "mine")
    root = tmp_path / "data/tic/mine/steps"
    script("reshard.py", "-i", tmp_path / "pool", "-o", root, "-s", tmp_path / "mine/uids")
    lists = tmp_path / "mine"
    check_report(tmp_path, lists, ["retrieval"], BENCHMARK=str(lists / "benchmark.yaml"))


def check_report(folder, lists, tasks, **settings):
    """Train, evaluate and report with run.py, and look at what came out."""
    (folder / "scale.yaml").write_text(SCALE)
    settings |= {"METHOD": "cumulative", "SCALE": str(folder / "scale.yaml")}
    settings |= {"DATA_DIR": str(folder / "data"), "OUT": str(folder / "out")}
    done = Script(ROOT / "scripts/run.py", **settings).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    (lists / "benchmark.yaml").unlink()
    again = Script(ROOT / "scripts/report.py", folder / "out", "--out", folder / "out").wait()  # from its own copy
    assert again.returncode == 0, again.stderr
    summary = json.loads((folder / "out/summary.json").read_text())
    assert (summary["benchmark"], summary["steps"], list(summary["tasks"])) == ("mine", list(YEARS), tasks)
    for task in summary["tasks"].values():
        assert [[0 <= value <= 1 for value in row] for row in task["matrix"]] == [[True, True]] * 2
    assert "mine, cumulative: retrieval" in (folder / "out/report.html").read_text()
