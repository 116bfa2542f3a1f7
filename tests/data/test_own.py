"""A user's own table to lists by step: kinds of tables, dates, steps, labels, bad input; through the command."""

import csv
import datetime
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, call_script, tree
from hub import serving_hub
from miniature import held_out, make_image

from tic_clip.data.dates import read_date
from tic_clip.data.lists import OwnOptions
from tic_clip.data.pairs import create_own_splits
from tic_clip.data.tables import Columns
from tic_clip.data.uids import make_uid

SCRIPT = "dataset_creation/create_splits.py"
COLUMNS = ("--image", "file", "--caption", "text", "--date", "taken")
WRITE = ("--name", "mine", "--output-path", "lists", "--test-share", "0.25")
ROWS = [
    {"file": f"cats/{i}.jpg", "text": f'a "cat", {i}', "taken": f"{2014 + i % 3}-0{1 + i % 9}-01", "kind": "cat"}
    for i in range(60)
]


def write_table(path, rows=ROWS):
    """Write rows as the kind of table that the suffix says."""
    path, name = Path(path), Path(path).name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    with (gzip.open if name.endswith(".gz") else open)(path, "wt", newline="", encoding="utf-8") as file:
        if "jsonl" in name:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if ".tsv" in name else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def split(folder, *flags, columns=COLUMNS, write=WRITE):
    """Run the script; what it has printed, of an error only that."""
    done = call_script(SCRIPT, *flags, *columns, *write, cwd=folder)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "warning: "))]
    assert (done.returncode == 1) == any(line.startswith("error: ") for line in errors), done.stderr
    return done.stdout, errors


def lists(folder, name="lists"):
    """(split, step) -> rows of the lists."""
    found = {}
    for path in sorted((folder / name).glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            found[tuple(path.stem.split("_batch_"))] = list(csv.DictReader(file))
    return found


def manifest(folder, name="lists"):
    return json.loads((folder / name / "manifest.json").read_text())


def test_the_lists_of_a_table(tmp_path):
    write_table(tmp_path / "t.csv")
    printed, errors = split(tmp_path, "t.csv", "--every", "year")
    expected = {(kind, str(year)): [] for kind in ("train", "test") for year in (2014, 2015, 2016)}
    for row in sorted(ROWS, key=lambda row: make_uid(f"mine/{row['file'].removesuffix('.jpg')}")):
        key = row["file"].removesuffix(".jpg")
        made = {"key": key, "image": row["file"], "caption": row["text"], "date": f"{row['taken']}T00:00:00Z"}
        expected["test" if held_out("mine", key, 0.25) else "train", row["taken"][:4]].append(made)
    assert lists(tmp_path) == expected
    counts = {
        year: {kind: len(expected[kind, year]) for kind in ("train", "test")} for year in ("2014", "2015", "2016")
    }
    found = manifest(tmp_path)
    assert (found["counts"], found["benchmark"], found["dataset"], found["read"]) == (counts, "mine", "mine", 60)
    assert yaml.safe_load((tmp_path / "lists/benchmark.yaml").read_text()) == {
        "name": "mine",
        "title": "mine",
        "cadence": "yearly",
        "steps": ["2014", "2015", "2016"],
        "tasks": {"retrieval": "retrieval"},
    }
    assert [line.split() for line in printed.splitlines()][3:6] == [
        [year, str(counts[year]["train"]), str(counts[year]["test"])] for year in counts
    ]
    sets = ", ".join(f"{year} ({counts[year]['test']})" for year in counts)
    assert errors == [f"warning: test sets of fewer than 50 samples say little: {sets}; give a larger --test-share"]
    assert "already there" in split(tmp_path, "t.csv", "--every", "year")[0]


@pytest.mark.parametrize("name", ["t.tsv", "t.jsonl", "t.csv.gz", "t.jsonl.gz", "t.parquet", "folder"])
def test_all_kinds_of_tables_give_the_same_lists(tmp_path, name):
    write_table(tmp_path / "t.csv")
    split(tmp_path, "t.csv", "--steps", "2014,2015-2016")
    before = tree(tmp_path / "lists")
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / "folder/notes.txt").write_text("of no interest")
        write_table(tmp_path / "folder/1.parquet", ROWS[:20])
        write_table(tmp_path / "folder/2.jsonl", ROWS[20:])
    else:
        write_table(tmp_path / name)
    split(tmp_path, name, "--steps", "2014,2015-2016", "--overwrite", "-j", "2")
    after = tree(tmp_path / "lists")
    assert after.pop("manifest.json") != before.pop("manifest.json")  # the input's digest
    assert after == before


def test_rows_of_json_may_lack_fields(tmp_path):
    """Also the first; what is not there is empty."""
    rows = [{"file": "a.jpg", "taken": "2014"}, {"file": "b.jpg", "text": "b", "taken": "2014", "more": [1]}]
    write_table(tmp_path / "t.jsonl", [{"more": 1}, *rows])
    _, (error,) = split(tmp_path, "t.jsonl", "--every", "year")
    assert error.startswith("error: t.jsonl, line 1: the date can't be read: ''; --date-format says")
    split(tmp_path, "t.jsonl", "--every", "year", "--skip-bad-rows", write=(*WRITE[:4], "--test-share", "0"))
    assert [row["key"] for row in lists(tmp_path)["train", "2014"]] == ["b"]
    assert manifest(tmp_path)["dropped"] == {"no caption": 1, "unusable key": 1}


def test_a_table_in_a_cloud(tmp_path, s3):
    write_table(tmp_path / "t.csv.gz")
    write_table(tmp_path / "t.parquet")
    from tic_clip.storage import upload

    for name in ("t.csv.gz", "t.parquet"):
        upload(tmp_path / name, f"{s3}/tables/{name}")
        split(tmp_path, f"{s3}/tables/{name}", "--every", "year", write=(*WRITE[:2], "--output-path", f"of {name}"))
    split(tmp_path, "t.csv.gz", "--every", "year", write=(*WRITE[:2], "--output-path", "local"))
    assert lists(tmp_path, "of t.csv.gz") == lists(tmp_path, "of t.parquet") == lists(tmp_path, "local")
    assert manifest(tmp_path, "of t.csv.gz") == manifest(tmp_path, "local")


UTC = datetime.UTC
NOON = datetime.datetime(2020, 3, 31, 12, tzinfo=UTC)
MIDNIGHT = datetime.datetime(2020, 3, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        ("2020-03-31", "auto", MIDNIGHT),
        (" 2020-03-31T12:00:00 ", "auto", NOON),
        ("2020-03-31 14:00:00+02:00", "auto", NOON),
        ("2020-03-31T12:00:00.999Z", "auto", NOON),
        ("20200331", "auto", MIDNIGHT),
        (20200331, "auto", MIDNIGHT),
        ("202003", "auto", datetime.datetime(2020, 3, 1, tzinfo=UTC)),
        ("2020", "auto", datetime.datetime(2020, 1, 1, tzinfo=UTC)),
        ("2020.0", "auto", datetime.datetime(2020, 1, 1, tzinfo=UTC)),  # as pandas writes a year beside a gap
        (2020.0, "auto", datetime.datetime(2020, 1, 1, tzinfo=UTC)),
        ("2021-03", "auto", datetime.datetime(2021, 3, 1, tzinfo=UTC)),
        (2020, "year", datetime.datetime(2020, 1, 1, tzinfo=UTC)),
        ("1585656000", "auto", NOON),
        (1585656000.9, "auto", NOON),
        (1585656000123, "auto", NOON),
        ("1585656000123", "ms", NOON),
        ("2020", "s", datetime.datetime(1970, 1, 1, 0, 33, 40, tzinfo=UTC)),
        ("31.03.2020 12h", "%d.%m.%Y %Hh", NOON),
        ("1850-07-01", "auto", datetime.datetime(1850, 7, 1, tzinfo=UTC)),
        (datetime.date(2020, 3, 31), "auto", MIDNIGHT),
        (datetime.datetime(2020, 3, 31, 12), "auto", NOON),
    ],
)
def test_a_date(value, form, expected):
    assert read_date(value, form) == expected.timestamp()


@pytest.mark.parametrize("value", [None, "", "soon", "2020-13-01", "nan", "1e300", float("inf"), "31.03.2020", [1]])
def test_no_date(value):
    assert read_date(value) is None


@pytest.mark.parametrize(
    "kind", [pa.timestamp("ns"), pa.timestamp("ms", tz="Europe/Berlin"), pa.date32(), pa.date64(), pa.int64()]
)
def test_the_dates_of_parquet(tmp_path, kind):
    day = int(datetime.datetime(2015, 1, 1, tzinfo=UTC).timestamp()) // 86400
    numbers = [day - 1, day]
    scale = {"timestamp[ns]": 86400 * 10**9, "date32[day]": 1, "int64": 86400}.get(str(kind), 86400_000)
    integers = pa.array(
        [number * scale for number in numbers], pa.int32() if str(kind) == "date32[day]" else pa.int64()
    )
    columns = {"file": ["a.jpg", "b.jpg"], "text": ["a", "b"], "taken": integers.cast(kind)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    split(tmp_path, "t.parquet", "--every", "year", write=(*WRITE[:4], "--test-share", "0"))
    found = {name: [row["date"] for row in rows] for name, rows in lists(tmp_path).items() if rows}
    assert found == {("train", "2014"): ["2014-12-31T00:00:00Z"], ("train", "2015"): ["2015-01-01T00:00:00Z"]}


@pytest.mark.parametrize(
    ("flags", "steps", "cadence"),
    [
        (("--every", "quarter"), ["2014Q4", "2015Q1"], "quarterly"),
        (("--every", "month"), ["201411", "201412", "201501"], "monthly"),
        (("--steps", "2014, 20150101"), ["2014", "20150101"], "steps"),
    ],
)
def test_steps(tmp_path, flags, steps, cadence):
    days = ("2014-11-30T23:59:59Z", "2014-12-01", "2015-01-01T23:59:59Z")
    write_table(tmp_path / "t.csv", [{"file": f"{day}.png", "text": "a", "taken": day} for day in days])
    split(tmp_path, "t.csv", *flags, write=(*WRITE[:4], "--test-share", "0"))
    found = yaml.safe_load((tmp_path / "lists/benchmark.yaml").read_text())
    assert (found["steps"], found["cadence"]) == (steps, cadence)
    assert sum(len(rows) for rows in lists(tmp_path).values()) == 3
    assert all(rows for (kind, _), rows in lists(tmp_path).items() if kind == "train")


def test_suggested_steps(tmp_path):
    """Of 10 + 1 + 5 + 8 rows, halves are 11 and 13; the first begins and the last ends with its month."""
    months = ["2014-02"] * 10 + ["2014-03"] + ["2014-12"] * 5 + ["2015-01"] * 8
    write_table(tmp_path / "t.csv", [{"taken": f"{month}-10"} for month in months])
    printed, _ = split(tmp_path, "t.csv", "--suggest", "2", columns=COLUMNS[-2:], write=())
    steps = [["201402-201411", "11"], ["201412-201501", "13"], [], ["--steps", "201402-201411,201412-201501"]]
    assert [line.split() for line in printed.splitlines()] == steps
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    printed, _ = split(tmp_path, "t.csv", "--suggest", "4", columns=COLUMNS[-2:], write=())
    assert printed.splitlines()[-1] == "--steps 201402,201403-201411,201412,201501"


def test_labels(tmp_path):
    """Classes are counted over all steps; a label with one sample, and classes without a test image, are said."""
    rows = [{**row, "kind": ["cat", "dog", ""][i % 3 if i else 0]} for i, row in enumerate(ROWS)]
    rows[7]["kind"] = "a  single\tbird"
    write_table(tmp_path / "t.jsonl", rows)
    printed, errors = split(tmp_path, "t.jsonl", "--every", "year", "--label", "kind")
    kinds = [row["kind"] for row in rows]
    found = lists(tmp_path)
    assert sorted(row["label"] for rows in found.values() for row in rows if row["label"] != "a single bird") == sorted(
        kind for kind in kinds if "bird" not in kind
    )
    assert manifest(tmp_path)["classes"] == {"a single bird": 1, "cat": kinds.count("cat"), "dog": kinds.count("dog")}
    missing = {year: 3 - len({row["label"] for row in found["test", year]} - {""}) for year in ("2014", "2015", "2016")}
    assert manifest(tmp_path)["missing_classes"] == missing
    assert all(missing.values())
    assert printed.count("classes missing in test") == 3
    assert errors[0] == "warning: nothing to evaluate on in 2016: give a larger --test-share, or fewer steps"
    assert errors[-1] == "warning: 1 labels have one sample, such as 'a single bird'"
    tasks = yaml.safe_load((tmp_path / "lists/benchmark.yaml").read_text())["tasks"]
    assert tasks == {"retrieval": "retrieval", "labels": "classification"}


@pytest.mark.parametrize("kind", ["bytes", "struct", "keyed"])
def test_images_in_the_table(tmp_path, kind):
    """They go to zips, and the list has their names there."""
    rows = []
    for i in range(4):
        data = make_image(str(i), "PNG" if i == 2 else "JPEG") if i != 3 else b"no image"
        image = {"bytes": data, "path": f"p{i}.jpg"} if kind == "struct" else data
        rows.append({"file": image, "text": f"{i}", "taken": 2014, "id": f"k{i}"})
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in/t.parquet", rows)
    flags = ("--key", "id") if kind == "keyed" else ()
    split(tmp_path, "in/t.parquet", "--every", "year", *flags, write=(*WRITE[:4], "--test-share", "0"))
    keys = {"bytes": "t.parquet/{0}", "struct": "p{1}", "keyed": "k{1}"}[kind]
    suffixes = ("jpg", "jpg", "png", "jpg")
    found = {row["key"]: row["image"] for row in lists(tmp_path)["train", "2014"]}
    assert found == {keys.format(i + 1, i): f"{i:09d}.{suffix}" for i, suffix in enumerate(suffixes)}
    with zipfile.ZipFile(tmp_path / "lists/images/00000.zip") as archive:
        images = [archive.read(f"00000000{i}.{suffixes[i]}") for i in range(3)]
    assert images == [make_image("0"), make_image("1"), make_image("2", "PNG")]
    assert set(tree(tmp_path / "lists")) >= {"images/00000.zip", "benchmark.yaml", "manifest.json"}


def test_the_folder_of_img2dataset(tmp_path):
    (tmp_path / "in").mkdir()
    status, rows = ["failed_to_download", "success", "success"], []
    for i in range(3):
        rows.append({"key": f"00000{i:04d}", "caption": f"{i}", "status": status[i], "taken": "2014-01-01"})
    write_table(tmp_path / "in/00000.parquet", rows)
    for name in ("00000.tar", "00000_stats.json"):
        (tmp_path / "in" / name).touch()
    columns = ("--image", "key", "--caption", "caption", "--date", "taken")
    split(tmp_path, "in", "--every", "year", columns=columns, write=(*WRITE[:4], "--test-share", "0"))
    assert sorted(row["key"] for row in lists(tmp_path)["train", "2014"]) == ["000000001", "000000002"]
    assert manifest(tmp_path)["dropped"] == {"not downloaded": 1}


def change(number, **values):
    """The rows with other values in one of them, or in all."""
    return [{**row, **values} if number in (i, None) else row for i, row in enumerate(ROWS)]


GAP = [row for row in ROWS if row["taken"][:4] != "2015"]
BAD = [  # the rows, or those of a table as text; flags; a part of the error
    (ROWS, "--every year --label sort", "t.csv has no column sort; it has file, text, taken"),
    (ROWS, "--steps 2014,soon", "--steps: 'soon' is not a date such as"),
    (ROWS, "--steps 2014,201406", "--steps: 201406 begins before the end of the one"),
    (ROWS, "--steps ,", "--steps has no name of a step"),
    (GAP, "--every year", "step 2015 has no sample to train on (the first that has one is 2014, the last 2016)"),
    (ROWS, "--steps 1999", "no row that can be used; dropped: {'outside the steps': 60}"),
    (ROWS, "--suggest 99", "--suggest 99: the rows are in 9 months, so give 1 to 9"),
    (ROWS, "--every year --name emoji", "--name emoji is a benchmark of ours"),
    *(
        (ROWS, f"--every year --name {name}", f"--name: {name} is not made")
        for name in ("'a/b'", "''", "'..'", "'x.yaml'")
    ),
    (ROWS, "--every year --caption ''", "--caption must be given"),
    (change(None, kind=" "), "--steps 2014 --label kind", "of labels is empty"),
    (change(1, file="cats/0.jpg"), "--every year", "the key cats/0 is in more than one row"),
    (change(0, file=" "), "--every year", "t.csv, row 1 (line 2): '' is no key"),
    (ROWS, "--every year --test-share 1", "from 0 to below 1"),
    (ROWS, "", "one of the arguments --steps --every --suggest is required"),
    (ROWS, "--every year --date-format %Y", "t.csv, row 1 (line 2): the date can't be read: '2014-01-01'"),
    *(
        (ROWS, f"--every year --date-format '{form}'", f"--date-format '{form}' is not auto, year, s, ms or a format")
        for form in ("%d %d", "day")
    ),
    ("a.jpg,\xe9,2014", "--every year", "is not UTF-8 text (invalid continuation byte): convert it"),
    ("a.jpg,e,1", "--every year", "t.csv, row 1 (line 2): the date can't be read: '1'"),
    *((f"a.jpg,e,{day}", "--every year", "the date can't be read") for day in ("9999-12-31", "0001-01-01")),
]


@pytest.mark.parametrize(("rows", "flags", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, rows, flags, message):
    if isinstance(rows, str):
        (tmp_path / "t.csv").write_bytes(f"file,text,taken\n{rows}\n".encode("latin-1"))
    else:
        write_table(tmp_path / "t.csv", rows)
    done = call_script(SCRIPT, "t.csv", *COLUMNS, *WRITE, *shlex.split(flags), cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    assert line.startswith("error: ")
    assert message in line
    assert not list((tmp_path / "lists").glob("*"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"", "t.txt is not a table: give .csv"),
        ("t.parquet", b"PAR1", "t.parquet can't be read as Parquet"),
        ("t.csv.gz", b"file,text,taken\n", "t.csv.gz is cut off or damaged"),
        (
            "t.csv.gz",
            gzip.compress(b"file,text,taken" + b"\na,b,2014" * 50, mtime=0)[:-10],
            "t.csv.gz is cut off or dam",
        ),
        ("t.jsonl", b'[1]\n{"file": "a"}\n', "t.jsonl has no column taken; it has file"),
        ("t.csv", b"", "t.csv has no column taken; it has none"),
        ("empty", None, "empty has no table: give .csv"),
        ("none.csv", None, "none.csv"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, name, data, message):
    (tmp_path / "empty").mkdir()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    for flags in (("--every", "year"), ("--suggest", "1")):
        _, errors = split(tmp_path, name, *flags)
        assert message in errors[0]


def test_dates_that_can_not_be_read_are_counted_and_left_out(tmp_path):
    rows = [{**row, "taken": f"day {i}"} if i % 10 == 3 else row for i, row in enumerate(ROWS)]
    write_table(tmp_path / "t.csv", rows)
    for cut in (("--every", "year"), ("--steps", "2014-2016")):
        _, (error,) = split(tmp_path, "t.csv", *cut)
        assert error.startswith("error: t.csv, row 4 (line 5): the date can't be read: 'day 3'; --date-format says")
        assert error.endswith("(--skip-bad-rows leaves such rows out)")
    printed, _ = split(tmp_path, "t.csv", "--every", "year", "--skip-bad-rows")
    assert "\n60 rows read; dropped: 6 impossible date\n" in printed


def test_a_stream_of_rows_needs_little_memory(tmp_path):
    """A table of 60 MB, in a process that may have 40 MB more than it has with one of 60 rows."""
    long = "x" * 20_000
    write_table(tmp_path / "small.jsonl")
    with open(tmp_path / "large.jsonl", "w") as file:
        file.writelines(json.dumps({**ROWS[0], "file": f"{i}.jpg", "note": long}) + "\n" for i in range(3000))
    peaks = []
    for name in ("small", "large"):
        flags = [f"{name}.jsonl", *COLUMNS, "--name", "mine", "--every", "year", "--output-path", name]
        code = f"import atexit, resource, sys\nsys.argv = ['x', *{flags!r}]\n"
        code += "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
        code += (ROOT / SCRIPT).read_text()
        options = {"env": {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}, "capture_output": True, "text": True}
        peaks.append(int(subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **options).stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 40_000


@pytest.mark.parametrize("name", ["images", "benchmark.yaml", "notes.txt"])
def test_what_is_not_of_lists_is_not_replaced(tmp_path, name):
    image = [{"file": make_image("x", "PNG"), "text": "x", "taken": 2014}, {"file": b"y", "text": "y", "taken": 2014}]
    write_table(tmp_path / "t.parquet", image)
    (tmp_path / "lists" / name).mkdir(parents=True)
    (tmp_path / "lists" / name / "mine.txt").write_text("mine")
    before, write = tree(tmp_path), (*WRITE[:4], "--test-share", "0")
    _, (error,) = split(tmp_path, "t.parquet", "--every", "year", write=write)
    assert error == f"error: lists has {name}, which is not of lists: give another --output-path"
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "lists")
    split(tmp_path, "t.parquet", "--every", "year", write=write)
    split(tmp_path, "t.parquet", "--every", "quarter", "--overwrite", write=write)
    names = {"benchmark.yaml", "images", "manifest.json", "test_batch_2014Q1.csv", "train_batch_2014Q1.csv"}
    assert {path.name for path in (tmp_path / "lists").iterdir()} == names  # without the lists of 2014
    (tmp_path / "lists/mine.txt").write_text("mine")
    assert split(tmp_path, "t.parquet", "--every", "quarter", write=write)[0]  # it is there already
    before = tree(tmp_path)
    _, (error,) = split(tmp_path, "t.parquet", "--every", "year", "--overwrite", write=write)
    assert error.startswith("error: lists has mine.txt")
    assert tree(tmp_path) == before


def test_a_table_of_a_web_server(tmp_path):
    """Its lists are those of the file; an error of the server is one line."""
    write_table(tmp_path / "t.csv")
    files = {"me/data": {"t.csv": (tmp_path / "t.csv").read_bytes()}}
    with serving_hub(files) as server:
        url = f"{server.url}/datasets/me/data/resolve/main"
        assert split(tmp_path, f"{url}/t.csv?download=true", "--every", "year")[0]
        _, (error,) = split(tmp_path, f"{url}/none.csv", "--every", "year")
    assert error == f"error: {url}/none.csv could not be fetched: HTTP Error 404: Not Found"
    found = lists(tmp_path)
    split(tmp_path, "t.csv", "--every", "year", "--overwrite")
    assert lists(tmp_path) == found
    _, (error,) = split(tmp_path, f"{url}/t.csv", "--every", "year", "--overwrite")
    assert error.startswith(f"error: {url}/t.csv could not be fetched: <urlopen error ")


@pytest.mark.parametrize("moved", range(2))
def test_killed_while_lists_are_replaced(tmp_path, monkeypatch, moved):
    """Between old and new there are none; the next run makes them, also the folder of images."""
    rows = [{"file": make_image(str(i), "PNG"), "text": f"{i}", "taken": 2014 + i % 2} for i in range(4)]
    table, columns = str(write_table(tmp_path / "t.parquet", rows)), Columns(date="taken", image="file", caption="text")
    (tmp_path / "disk").mkdir()
    (tmp_path / "lists").symlink_to("disk")

    def make(out, **steps):
        options = OwnOptions(output_path=str(tmp_path / out), name="mine", test_share=0.0, overwrite=True, **steps)
        create_own_splits([table], columns, options)

    make("whole", every="year")
    make("lists", steps="2014-2015")
    before, rename, calls = tree(tmp_path / "lists"), os.rename, []

    def die(source, target):
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            make("lists", every="year")
    assert (tree(tmp_path / "lists") == before) if moved == 0 else not (tmp_path / "lists").exists()
    make("lists", every="year")
    assert tree(tmp_path / "lists") == tree(tmp_path / "whole")
    assert (tmp_path / "lists").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "lists", "t.parquet", "whole"}
