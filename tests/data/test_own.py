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
from tic_clip.data.tables import Columns, read_dates
from tic_clip.data.uids import make_uid
from tic_clip.storage import upload

COLUMNS = ("--image", "file", "--caption", "text", "--date", "taken")
WRITE = ("--name", "mine", "--output-path", "lists", "--test-share")
ROWS = [
    {"file": f"cats/{i}.jpg", "text": f'a "cat", {i}', "taken": f"{2014 + i % 3}-0{1 + i % 9}-01", "kind": "cat"}
    for i in range(60)
]
YEARS = ("2014", "2015", "2016")


def write_table(path, rows=ROWS):
    """Write rows as the kind of table that the suffix says."""
    name = path.name
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


def split(folder, *flags, columns=COLUMNS, write=(*WRITE, "0.25")):
    """Run the script; what it has printed, of an error only that."""
    done = call_script("dataset_creation/create_splits.py", *flags, *columns, *write, cwd=folder)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "warning: "))]
    assert (done.returncode == 1) == any(line.startswith("error: ") for line in errors), done.stderr
    return done.stdout, errors


def split_all(folder, *flags, columns=COLUMNS):
    """Run the script with all rows to train on."""
    return split(folder, *flags, columns=columns, write=(*WRITE, "0"))


def lists(folder):
    """(split, step) -> rows of the lists."""
    found = {}
    for path in sorted((folder / "lists").glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            found[tuple(path.stem.split("_batch_"))] = list(csv.DictReader(file))
    return found


def read(folder, name):
    """What is in a file beside the lists."""
    return yaml.safe_load((folder / "lists" / name).read_text())


def test_the_lists_of_a_table(tmp_path):
    write_table(tmp_path / "t.csv")
    printed, errors = split(tmp_path, "t.csv", "--every", "year")
    expected = {(kind, year): [] for kind in ("train", "test") for year in YEARS}
    for row in sorted(ROWS, key=lambda row: make_uid(f"mine/{row['file'].removesuffix('.jpg')}")):
        key = row["file"].removesuffix(".jpg")
        made = {"key": key, "image": row["file"], "caption": row["text"], "date": f"{row['taken']}T00:00:00Z"}
        expected["test" if held_out("mine", key, 0.25) else "train", row["taken"][:4]].append(made)
    assert lists(tmp_path) == expected
    counts = {year: {kind: len(expected[kind, year]) for kind in ("train", "test")} for year in YEARS}
    found = read(tmp_path, "manifest.json")
    assert (found["counts"], found["benchmark"], found["dataset"], found["read"]) == (counts, "mine", "mine", 60)
    own = {"name": "mine", "title": "mine", "cadence": "yearly", "steps": list(YEARS)}
    assert read(tmp_path, "benchmark.yaml") == {**own, "tasks": {"retrieval": "retrieval"}}
    table = [[year, str(counts[year]["train"]), str(counts[year]["test"])] for year in YEARS]
    assert [line.split() for line in printed.splitlines()][3:6] == table
    sets = ", ".join(f"{year} ({counts[year]['test']})" for year in YEARS)
    assert errors == [f"warning: test sets of fewer than 50 samples say little: {sets}; give a larger --test-share"]
    assert "already there" in split(tmp_path, "t.csv", "--every", "year")[0]


@pytest.fixture
def before(tmp_path):
    """The lists of t.csv."""
    split(tmp_path, write_table(tmp_path / "t.csv"), "--every", "year")
    return tree(tmp_path / "lists")


def check_again(folder, table, before):
    """The lists of another table are the same; the manifest has another digest of the input."""
    split(folder, table, "--every", "year", "--overwrite", "-j", "2")
    after = tree(folder / "lists")
    assert after.pop("manifest.json") != before["manifest.json"]
    assert after.items() < before.items()


@pytest.mark.parametrize("place", ["local", "cloud"])
def test_all_kinds_of_tables_give_the_same_lists(tmp_path, before, place, request):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/notes.txt").write_text("of no interest")
    kinds = ("1.parquet", "2.jsonl", "3.tsv", "4.csv.gz")
    tables = [write_table(tmp_path / "in" / name, ROWS[15 * i : 15 * i + 15]) for i, name in enumerate(kinds)]
    folder = "in"
    if place == "cloud":
        folder = f"{request.getfixturevalue('s3')}/in"
        for path in tables:
            upload(path, f"{folder}/{path.name}")
    check_again(tmp_path, folder, before)


def test_a_table_of_a_web_server(tmp_path, before):
    """Its lists are those of the file; an error of the server is one line."""
    table = write_table(tmp_path / "t.jsonl.gz").read_bytes()
    with serving_hub({"me/data": {"t.jsonl.gz": table}}) as server:
        url = f"{server.url}/datasets/me/data/resolve/main"
        check_again(tmp_path, f"{url}/t.jsonl.gz?download=true", before)
        _, (error,) = split(tmp_path, f"{url}/none.csv", "--every", "year")
    assert error == f"error: {url}/none.csv could not be fetched: HTTP Error 404: Not Found"


def test_rows_of_json_may_lack_fields(tmp_path):
    """Also the first; what is not there is empty."""
    rows = [{"file": "a.jpg", "taken": "2014"}, {"file": "b.jpg", "text": "b", "taken": "2014", "more": [1]}]
    write_table(tmp_path / "t.jsonl", [{"more": 1}, *rows])
    _, (error,) = split(tmp_path, "t.jsonl", "--every", "year")
    assert error.startswith("error: t.jsonl, line 1: the date can't be read: ''; --date-format says")
    split_all(tmp_path, "t.jsonl", "--every", "year", "--skip-bad-rows")
    assert [row["key"] for row in lists(tmp_path)["train", "2014"]] == ["b"]
    assert read(tmp_path, "manifest.json")["dropped"] == {"no caption": 1, "unusable key": 1}


DATES = {
    "2020-03-31": ["2020-03-31", 20200331, datetime.date(2020, 3, 31)],
    "2020-03-31T12": [
        *(" 2020-03-31T12:00:00 ", "2020-03-31 14:00:00+02:00", "2020-03-31T12:00:00.999Z"),
        *("1585656000", 1585656000.9, 1585656000123, datetime.datetime(2020, 3, 31, 12)),
    ],
    "2020-03-01": ["202003", "2020-03"],
    "2020-01-01": ["2020", "2020.0", 2020.0],  # as pandas writes a year beside a gap
    "1850-07-01": ["1850-07-01"],
}
FORMS = [(2020, "year", "2020-01-01"), ("1585656000123", "ms", "2020-03-31T12"), ("2020", "s", "1970-01-01T00:33:40")]
FORMS += [("31.03.2020 12h", "%d.%m.%Y %Hh", "2020-03-31T12")]


@pytest.mark.parametrize(
    ("value", "form", "expected"), [*((each, "auto", day) for day, values in DATES.items() for each in values), *FORMS]
)
def test_a_date(value, form, expected):
    assert read_date(value, form) == datetime.datetime.fromisoformat(f"{expected}+00:00").timestamp()


@pytest.mark.parametrize("value", [None, "", "soon", "2020-13-01", "nan", "1e300", float("inf"), "31.03.2020", [1]])
def test_no_date(value):
    assert read_date(value) is None


def test_the_dates_of_parquet(tmp_path):
    kinds = [pa.timestamp("ns"), pa.timestamp("ms", tz="Europe/Berlin"), pa.date32(), pa.date64()]
    days = [datetime.datetime(2014, 12, 31, tzinfo=datetime.UTC), datetime.datetime(2015, 1, 1, tzinfo=datetime.UTC)]
    pq.write_table(pa.table({str(kind): pa.array(days, kind) for kind in kinds}), tmp_path / "t.parquet")
    for kind in kinds:
        found = read_dates(Columns(date=str(kind)), str(tmp_path / "t.parquet"), None)
        assert list(found) == [day.timestamp() for day in days], kind


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
    split_all(tmp_path, "t.csv", *flags)
    found = read(tmp_path, "benchmark.yaml")
    assert (found["steps"], found["cadence"]) == (steps, cadence)
    counts = {name: len(rows) for name, rows in lists(tmp_path).items() if rows}
    assert (list(counts), sum(counts.values())) == ([("train", step) for step in steps], 3)


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
    kinds = [["cat", "dog", ""][i % 3 if i else 0] for i in range(60)]
    kinds[7] = "a  single\tbird"
    write_table(tmp_path / "t.jsonl", [{**row, "kind": kind} for row, kind in zip(ROWS, kinds, strict=True)])
    printed, errors = split(tmp_path, "t.jsonl", "--every", "year", "--label", "kind")
    found, about = lists(tmp_path), read(tmp_path, "manifest.json")
    labels = sorted(row["label"] for rows in found.values() for row in rows)
    assert labels == sorted(" ".join(kind.split()) for kind in kinds)
    assert about["classes"] == {"a single bird": 1, "cat": kinds.count("cat"), "dog": kinds.count("dog")}
    missing = {year: 3 - len({row["label"] for row in found["test", year]} - {""}) for year in YEARS}
    assert about["missing_classes"] == missing
    assert all(missing.values())
    assert printed.count("classes missing in test") == 3
    assert errors[0] == "warning: nothing to evaluate on in 2016: give a larger --test-share, or fewer steps"
    assert errors[-1] == "warning: 1 labels have one sample, such as 'a single bird'"
    assert read(tmp_path, "benchmark.yaml")["tasks"] == {"retrieval": "retrieval", "labels": "classification"}


@pytest.mark.parametrize("kind", ["bytes", "struct", "keyed"])
def test_images_in_the_table(tmp_path, kind):
    """They go to zips, and the list has their names there."""
    rows, images = [], [make_image("0"), make_image("1"), make_image("2", "PNG"), b"no image"]
    for i, data in enumerate(images):
        image = {"bytes": data, "path": f"p{i}.jpg"} if kind == "struct" else data
        rows.append({"file": image, "text": f"{i}", "taken": 2014, "id": f"k{i}"})
    table, key = write_table(tmp_path / "t.parquet", rows), ("--key", "id") if kind == "keyed" else ()
    split_all(tmp_path, table, "--every", "year", *key)
    keys = {"bytes": "t.parquet/{0}", "struct": "p{1}", "keyed": "k{1}"}[kind]
    names = [f"{i:09d}.{suffix}" for i, suffix in enumerate(("jpg", "jpg", "png", "jpg"))]
    found = {row["key"]: row["image"] for row in lists(tmp_path)["train", "2014"]}
    assert found == {keys.format(i + 1, i): name for i, name in enumerate(names)}
    with zipfile.ZipFile(tmp_path / "lists/images/00000.zip") as archive:
        assert [archive.read(name) for name in names] == images


def change(number, **values):
    """The rows with other values in one of them, or in all."""
    return [{**row, **values} if number in (i, None) else row for i, row in enumerate(ROWS)]


EVERY = "--every year"
BAD = [  # the rows, or those of a table as text; flags; a part of the error
    (ROWS, f"{EVERY} --label sort", "t.csv has no column sort; it has file, text, taken"),
    (ROWS, "--steps 2014,soon", "--steps: 'soon' is not a date such as"),
    (ROWS, "--steps 2014,201406", "--steps: 201406 begins before the end of the one"),
    (ROWS, "--steps ,", "--steps has no name of a step"),
    (ROWS[::3] + ROWS[2::3], EVERY, "step 2015 has no sample to train on (the first that has one is 2014, the last 20"),
    (ROWS, "--steps 1999", "no row that can be used; dropped: {'outside the steps': 60}"),
    (ROWS, "--suggest 99", "--suggest 99: the rows are in 9 months, so give 1 to 9"),
    (ROWS, f"{EVERY} --name emoji", "--name emoji is a benchmark of ours"),
    *((ROWS, f"{EVERY} --name {name}", f"--name: {name} is not made") for name in ("'a/b'", "''", "'..'", "'x.yaml'")),
    (ROWS, f"{EVERY} --caption ''", "--caption must be given"),
    (change(None, kind=" "), "--steps 2014 --label kind", "of labels is empty"),
    (change(1, file="cats/0.jpg"), EVERY, "the key cats/0 is in more than one row"),
    (change(0, file=" "), EVERY, "t.csv, row 1 (line 2): '' is no key"),
    (ROWS, f"{EVERY} --test-share 1", "from 0 to below 1"),
    (ROWS, "", "one of the arguments --steps --every --suggest is required"),
    (ROWS, f"{EVERY} --date-format %Y", "t.csv, row 1 (line 2): the date can't be read: '2014-01-01'"),
    (ROWS, f"{EVERY} --date-format '%d %d'", "--date-format '%d %d' is not auto, year, s, ms or a format"),
    (ROWS, f"{EVERY} --date-format day", "--date-format 'day' is not auto, year, s, ms or a format"),
    ("a.jpg,\xe9,2014", EVERY, "is not UTF-8 text (invalid continuation byte): convert it"),
    ("a.jpg,e,1", EVERY, "t.csv, row 1 (line 2): the date can't be read: '1'"),
    *((f"a.jpg,e,{day}", EVERY, "the date can't be read") for day in ("9999-12-31", "0001-01-01")),
]


@pytest.mark.parametrize(("rows", "flags", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, rows, flags, message):
    if isinstance(rows, str):
        (tmp_path / "t.csv").write_bytes(f"file,text,taken\n{rows}\n".encode("latin-1"))
    else:
        write_table(tmp_path / "t.csv", rows)
    printed, (error,) = split(tmp_path, "t.csv", write=(*WRITE, "0.25", *shlex.split(flags)))
    assert (printed, message in error) == ("", True), error
    assert not list((tmp_path / "lists").glob("*"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.txt", b"", "t.txt is not a table: give .csv"),
        ("t.parquet", b"PAR1", "t.parquet can't be read as Parquet"),
        ("t.csv.gz", b"file,text,taken\n", "t.csv.gz is cut off or damaged"),
        ("t.csv.gz", gzip.compress(b"file,text,taken" + b"\na,b,2014" * 50)[:-10], "t.csv.gz is cut off or damaged"),
        ("t.jsonl", b'[1]\n{"file": "a"}\n', "t.jsonl has no column taken; it has file"),
        ("empty", None, "empty has no table: give .csv"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, name, data, message):
    (tmp_path / name).mkdir() if data is None else (tmp_path / name).write_bytes(data)
    _, errors = split(tmp_path, name, "--every", "year")
    assert message in errors[0]


def test_dates_that_can_not_be_read_are_counted_and_left_out(tmp_path):
    rows = [{**row, "taken": f"day {i}"} if i % 10 == 3 else row for i, row in enumerate(ROWS)]
    write_table(tmp_path / "t.csv", rows)
    for cut in (EVERY.split(), ("--steps", "2014-2016")):
        _, (error,) = split(tmp_path, "t.csv", *cut)
        assert error.startswith("error: t.csv, row 4 (line 5): the date can't be read: 'day 3'; --date-format says")
        assert error.endswith("(--skip-bad-rows leaves such rows out)")
    printed, _ = split(tmp_path, "t.csv", "--every", "year", "--skip-bad-rows")
    assert "\n60 rows read; dropped: 6 impossible date\n" in printed


PEAKS = """
import resource, sys
from tic_clip.data.lists import OwnOptions
from tic_clip.data.pairs import create_own_splits
from tic_clip.data.tables import Columns

for name in ("small", "large"):
    columns = Columns(image="file", caption="text", date="taken")
    create_own_splits([f"{name}.jsonl"], columns, OwnOptions(name="mine", every="year", output_path=name))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_stream_of_rows_needs_little_memory(tmp_path):
    """A table of 60 MB, in a process that may take 40 MB more than it took for one of 60 rows."""
    write_table(tmp_path / "small.jsonl")
    row = {**ROWS[0], "note": "x" * 20_000}
    write_table(tmp_path / "large.jsonl", ({**row, "file": f"{i}.jpg"} for i in range(3000)))
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True}
    small, large = map(int, subprocess.run([sys.executable, "-c", PEAKS], cwd=tmp_path, **options).stdout.split())
    assert large - small < 40_000


@pytest.mark.parametrize("name", ["images", "benchmark.yaml", "notes.txt"])
def test_what_is_not_of_lists_is_not_replaced(tmp_path, name):
    rows = [{"file": data, "text": "x", "taken": 2014} for data in (make_image("x", "PNG"), b"y")]
    write_table(tmp_path / "t.parquet", rows)
    (tmp_path / "lists" / name).mkdir(parents=True)
    (tmp_path / "lists" / name / "mine.txt").write_text("mine")
    before = tree(tmp_path)
    _, (error,) = split_all(tmp_path, "t.parquet", "--every", "year")
    assert error == f"error: lists has {name}, which is not of lists: give another --output-path"
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "lists")
    split_all(tmp_path, "t.parquet", "--every", "year")
    split_all(tmp_path, "t.parquet", "--every", "quarter", "--overwrite")
    names = {"benchmark.yaml", "images", "manifest.json", "test_batch_2014Q1.csv", "train_batch_2014Q1.csv"}
    assert {path.name for path in (tmp_path / "lists").iterdir()} == names  # without the lists of 2014
    (tmp_path / "lists/mine.txt").write_text("mine")
    assert split_all(tmp_path, "t.parquet", "--every", "quarter")[0]  # it is there already
    before = tree(tmp_path)
    _, (error,) = split_all(tmp_path, "t.parquet", "--every", "year", "--overwrite")
    assert error.startswith("error: lists has mine.txt")


@pytest.mark.parametrize("moved", range(8))
def test_killed_while_lists_are_replaced(tmp_path, monkeypatch, moved):
    """Between old and new there is no manifest; the next run goes on, also with the folder of images."""
    rows = [{"file": make_image(str(i), "PNG"), "text": f"{i}", "taken": 2014 + i % 2} for i in range(4)]
    table, columns = str(write_table(tmp_path / "t.parquet", rows)), Columns(date="taken", image="file", caption="text")
    (tmp_path / "disk").mkdir()
    (tmp_path / "lists").symlink_to("disk")

    def make(out, **steps):
        options = OwnOptions(output_path=str(tmp_path / out), name="mine", test_share=0.0, overwrite=True, **steps)
        create_own_splits([table], columns, options)

    make("whole", every="year")
    make("lists", steps="2014-2015")
    rename, calls = os.rename, []

    def die(source, target):
        calls.append(target)
        if len(calls) > moved:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            make("lists", every="year")
    assert (tmp_path / "lists/manifest.json").exists() == (moved == 0)
    make("lists", every="year")
    assert tree(tmp_path / "lists") == tree(tmp_path / "whole")
    assert (tmp_path / "lists").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "lists", "t.parquet", "whole"}
