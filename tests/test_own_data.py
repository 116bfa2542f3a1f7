"""From a user's own table with images in it to the report, through the command; docs/own_data.md has other tables."""

import io
import json

import pyarrow
import pyarrow.parquet
from conftest import ROOT
from forked import Script
from PIL import Image

YEARS = ["2021", "2022"]
SCALE = "model: ViT-Tiny-8-48\nbatch_size: 8\nsamples_per_step: 32\nwarmup: 1\ncheckpoints: 1\nworkers: 0\n"


def image(number):
    file = io.BytesIO()
    Image.new("RGB", (48, 48), (3 * number, 255 - 3 * number, number % 7)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path):
    """80 images in a table as the hub has them, in two classes and two years; 2021 in milliseconds."""
    rows = []
    for n in range(80):
        kind, date = ["odd", "even"][n // 2 % 2], 1_609_500_000_000 + n % 2 * 31_536_000_000
        file = {"bytes": image(n), "path": f"{n}.png"}
        rows.append({"image": file, "text": f"image {n}", "date": date, "kind": kind})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_from_parquet_with_images_to_the_report(tmp_path):
    write_parquet(tmp_path / "mine.parquet")
    (tmp_path / "scale.yaml").write_text(SCALE)
    lists = tmp_path / "data/lists/mine"  # where run.sh has them, if BENCHMARK does not say it
    columns = {"IMAGE": "image", "CAPTION": "text", "DATE": "date", "LABEL": "kind", "EVERY": "year"}
    settings = {f"TABLE_{name}": value for name, value in columns.items()} | {"TEST_SHARE": "0.4"}
    settings |= {"TABLE": str(tmp_path / "mine.parquet"), "SOURCE": str(lists / "images"), "METHOD": "cumulative"}
    settings |= {
        "SCALE": str(tmp_path / "scale.yaml"),
        "DATA_DIR": str(tmp_path / "data"),
        "OUT": str(tmp_path / "out"),
    }
    done = Script(ROOT / "scripts/run.py", **settings).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    (lists / "benchmark.yaml").unlink()
    again = Script(ROOT / "scripts/report.py", tmp_path / "out", "--out", tmp_path / "out").wait()  # from its own copy
    assert again.returncode == 0, again.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["benchmark"], summary["steps"], list(summary["tasks"])) == ("mine", YEARS, ["retrieval", "labels"])
    for task in summary["tasks"].values():
        assert [[0 <= value <= 1 for value in row] for row in task["matrix"]] == [[True, True]] * 2
    assert "mine, cumulative: retrieval" in (tmp_path / "out/report.html").read_text()
