"""TiC-YFCC15M's and TiC-RedCaps' lists by step: captions, dates, who is held out, and both scripts, bad input too."""

import csv
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tic_clip import TicError
from tic_clip.benchmarks import get_benchmark
from tic_clip.data import annotations
from tic_clip.data.annotations import BadRow, Inputs, Row, find_yfcc15m, parse_seconds, read_redcaps, read_yfcc15m
from tic_clip.data.captions import clean_field, decode, mend, plain_caption, remove_tags, yfcc_caption
from tic_clip.data.pairs import CHUNK, Seen, Settings, create_splits
from tic_clip.storage import lock_folder

ROOT = Path(__file__).parents[1]
SCRIPTS = {name: ROOT / f"dataset_creation/tic-{name}/create_splits.py" for name in ("yfcc15m", "redcaps")}
HEADER = "key,title,description,usertags,dateuploaded"
TIMES = {"2004-2008": 1_200_000_000, "2009-2010": 1_262_304_000, "2011-2012": 1_325_376_000, "2013-2014": 1_393_675_200}
KEYS = [hashlib.md5(str(i).encode()).hexdigest() for i in range(400)]


def run_script(name, *arguments, env=None):
    command = [sys.executable, SCRIPTS[name], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})


def yfcc(path, out, *flags, env=None):
    return run_script("yfcc15m", "--csv-path", path, "--output-path", out, *flags, env=env)


def redcaps(folder, out, *flags, env=None):
    return run_script("redcaps", "--annotations-path", folder, "--output-path", out, *flags, env=env)


def said(result):
    """The one line of an error, without the progress bar before it; the script must have failed."""
    assert result.returncode == 1, result
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    return line.removeprefix("error: ")


def tree(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_list(path):
    """The rows of a list, as Python's own csv reads them."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def manifest(folder):
    return json.loads(Path(folder, "manifest.json").read_text())


def write_table(path, rows, header=HEADER):
    """Write a yfcc15m.csv of (key, title, description, usertags, dateuploaded)."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(f"{header}\n{text.getvalue()}", encoding="utf-8", newline="")
    return path


@pytest.fixture
def table(tmp_path):
    """Rows in all steps, two more years that are in none, one row without a caption."""
    random.seed(0)
    times = [*TIMES.values(), 1_000_000_000, 1_500_000_000]
    rows = [(key, f"title+{i}", "", "a,b+c", times[i % 6] + i) for i, key in enumerate(KEYS)]
    rows[7] = (KEYS[7], "", "%3Cb%3E+%3C%2Fb%3E", " ", TIMES["2004-2008"])
    return write_table(tmp_path / "yfcc15m.csv", rows)


def write_annotations(folder, files):
    """Write {file name: [annotation]} as RedCaps has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        (folder / name).write_text(json.dumps({"info": {"version": "1.0"}, "annotations": found}))
    return folder


def annotation(image_id, created_utc=1_546_300_800, subreddit="cats", caption="a cat", **more):
    return {
        "image_id": image_id,
        "author": "someone",
        "subreddit": subreddit,
        "caption": caption,
        "raw_caption": "A CAT",
        "created_utc": created_utc,
        "crosspost_parents": None,
        **more,
    }


# --- Captions ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello+World", "Hello World"),
        ("canon,canon+powershot+hs+310", "canon,canon powershot hs 310"),
        ("C%2B%2B+code", "C++ code"),
        ("1+1 is two", "1+1 is two"),
        ("50%25 off", "50% off"),
        ("100% wool", "100% wool"),
        ("caf%C3%A9+%F0%9F%98%80", "café 😀"),
        ("caf%C3%83%C2%A9", "café"),  # mojibake: UTF-8 read as Latin-1, and written as UTF-8 again
        ("caf%E9", "caf\ufffd"),  # Latin-1, which can't be told from what it is not
        ("%E2%80%9CNice%E2%80%9D", '"Nice"'),
        ("fish &amp; chips", "fish & chips"),
        ("fish+%26amp%3B+chips", "fish & chips"),
        ("&lt;b&gt;bold&lt;/b&gt; &copy;&nbsp;me", "bold © me"),
        ("AT&T R&D", "AT&T R&D"),
        ("<b>bold</b>face", "boldface"),
        ('see <a href="http://x.org/?a=b&amp;c=d" rel="nofollow">my site</a>.', "see my site."),
        ("<a title='a > b' href=x>link</a>", "link"),
        ("one<br>two<br/>three<p>four</p>five", "one two three four five"),
        ("a <!-- a <b>hidden</b>\nnote --> b", "a b"),
        ("a<IMG SRC=x.jpg />b", "ab"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("I <3 you", "I <3 you"),
        ("i%3C3u", "i<3u"),
        ("a <- b -> c", "a <- b -> c"),
        ("<me@home.org> <http://x.org/>", "<me@home.org> <http://x.org/>"),
        ("no end <b", "no end <b"),
        ("no end <!-- of it", "no end <!-- of it"),
        ("it's <b class=it's>so</b>", "it's so"),
        ("two\n\nlines\tand\r\nmore\u2028here", "two lines and more here"),
        ("nul\x00 and \x07bell", "nul and bell"),
        ("  ", ""),
        ("<b></b>", ""),
    ],
)
def test_a_field(text, expected):
    assert clean_field(text) == expected


def test_a_caption_of_yfcc_has_its_fields_that_are_not_empty():
    assert yfcc_caption(("a+title", "some text", "x,y+z")) == "a title. some text. x,y z"
    assert yfcc_caption(("", "some text", "")) == "some text"
    assert yfcc_caption(("a", "<img src=x>", "b")) == "a. b"
    assert yfcc_caption(("", "%20", "<b> </b>")) == ""


def test_a_caption_of_yfcc_has_its_first_500_characters():
    assert yfcc_caption(("é" * 498, "abc", "")) == "é" * 498 + ". "
    assert yfcc_caption(("%C3%A9" * 500, "", "")) == "é" * 500
    assert len(yfcc_caption(("😀" * 501, "", ""))) == 500


def test_a_caption_of_redcaps_is_as_it_is_given():
    assert plain_caption((" <b>1&amp;2</b>+\n%20  caf\u00c3\u00a9 ",)) == "<b>1&amp;2</b>+ %20 cafÃ©"
    assert plain_caption(("x" * 600,)) == "x" * 600


@given(st.text(st.characters(max_codepoint=0x7F)))
def test_what_is_not_given_to_ftfy_would_not_change(text):
    same = ftfy.fix_text(text, unescape_html=True)
    assert " ".join(mend(text).split()) == " ".join(same.split())


@given(st.text("<>!-/abr\"' =\n", max_size=60))
def test_tags_are_removed_from_anything(text):
    assert not {"<b>", "<br>", "</a>"} & {remove_tags(text)}
    assert remove_tags(text.replace("<", "")) == text.replace("<", "")


@pytest.mark.parametrize("piece", ["<a ", "<a '", '<a "', "<!--", "<br '\"", "<a b='", "</"])
def test_tags_that_never_end(piece):
    """A pattern that goes back and forth would not come to an end either."""
    assert remove_tags(piece * 20_000) == piece * 20_000


# --- Dates, and who is held out ---


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (0, 0),
        ("1393675200", 1393675200),
        (" 1393675200 ", 1393675200),
        (1393675200.9, 1393675200),
        ("1393675200.0", 1393675200),
        ("1.3936752e9", 1393675200),
        (253402300799, 253402300799),
        (253402300800, None),
        (1393675200000, None),  # milliseconds
        (-1, None),
        ("-0.5", None),
        ("", None),
        (None, None),
        ("2014-03-01", None),
        ("1_393_675_200", None),
        ("nan", None),
        ("inf", None),
        (10**400, None),
    ],
)
def test_seconds(timestamp, expected):
    assert parse_seconds(timestamp) == expected


@pytest.mark.parametrize(("benchmark", "years"), [("yfcc15m", "2004-2014"), ("yfcc15m_2011", "2008-2014")])
def test_every_year_has_its_step(benchmark, years):
    steps = Settings(benchmark=benchmark, dataset="yfcc15m").steps_by_year()
    assert sorted(steps) == list(range(int(years[:4]), int(years[5:]) + 1))
    assert steps[2008] == get_benchmark(benchmark).steps[0].name
    assert {name for name in steps.values()} == {step.name for step in get_benchmark(benchmark).steps}


def test_the_share_that_is_held_out():
    """The hashes are those of ``printf 0/yfcc15m/abc | sha256sum`` and its like."""
    settings = Settings(benchmark="yfcc15m", dataset="yfcc15m")
    assert f"{settings.hash_of('abc'):016x}" == "ce4955b732ba6162"
    assert f"{Settings(benchmark='redcaps', dataset='redcaps', seed=7).hash_of('abc'):016x}" == "4231f7f583fd8792"
    quarter = Settings(benchmark="yfcc15m", dataset="yfcc15m", test_share=0.25)
    assert [quarter.split_of(hashed) for hashed in (0, (1 << 62) - 1, 1 << 62, (1 << 64) - 1)] == [
        *("test", "test", "train", "train")
    ]
    held_out = sum(settings.split_of(settings.hash_of(str(i))) == "test" for i in range(100_000))
    assert abs(held_out - 1000) < 4 * 31.5  # standard deviations


@pytest.mark.parametrize("share", [-0.1, 1, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(TicError, match="from 0 to below 1"):
        Settings(benchmark="redcaps", dataset="redcaps", test_share=share)


def test_keys_that_have_been_before():
    rng = np.random.default_rng(0)
    seen, before = Seen(), set()
    for _ in range(200):
        hashes = rng.integers(0, 20_000, rng.integers(0, 300), dtype=np.uint64) << np.uint64(40)
        slow = []
        for value in hashes.tolist():
            slow.append(value in before)
            before.add(value)
        assert seen.add(hashes).tolist() == slow
    assert sum(map(len, seen.runs)) == len(before)
    assert len(seen.runs) < 20


# --- Reading ---


def rows_of(path):
    return list(read_yfcc15m(find_yfcc15m(str(path))))


@pytest.mark.parametrize("block", [1, 2, 7, 1 << 20])
def test_a_table_in_all_its_forms(tmp_path, monkeypatch, block):
    """A byte order mark, both ends of lines, quotes, line breaks and NUL in fields, an empty line, none at the end."""
    monkeypatch.setattr(annotations, "BLOCK", block)
    text = (
        "\ufeffdateuploaded,userid,usertags, key ,title,description\r\n"
        '1,7,"a,b",k1,"say ""hi"" é","two\r\nlines"\r\n'
        "\r\n"
        '2,7,c,k2,a\rb,x"y\n'
        "3,7,\x00,k3,,"
    )
    (tmp_path / "t.csv").write_bytes(text.encode() + b"\xff")
    found = rows_of(tmp_path / "t.csv")
    path = tmp_path / "t.csv"
    assert found == [
        Row("k1", "k1//k1.jpg", ('say "hi" é', "two\nlines", "a,b"), 1, f"{path}, row 1 (line 2)"),
        Row("k2", "k2//k2.jpg", ("a b", 'x"y', "c"), 2, f"{path}, row 2 (line 5)"),
        Row("k3", "k3//k3.jpg", ("", "\ufffd", "\x00"), 3, f"{path}, row 3 (line 6)"),
    ]


def test_a_long_field(tmp_path):
    path = write_table(tmp_path / "t.csv", [("k", "x" * 1_000_000, "", "", 1)])
    assert len(rows_of(path)[0].texts[0]) == 1_000_000


def test_a_quote_without_an_end_does_not_swallow_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "MAX_FIELD", 1000)
    path = tmp_path / "t.csv"
    path.write_text(f'{HEADER}\nk,"t,,,1\n' + "l,t,,,1\n" * 1000)
    with pytest.raises(TicError, match=r"t\.csv: the row that begins in line 2 can't be read: field larger"):
        rows_of(path)
    path.write_text(f"{HEADER}\n" + "x" * 2000)
    with pytest.raises(TicError, match="a line has more than 1000 characters"):
        rows_of(path)


def test_annotations_in_all_their_types(tmp_path):
    files = {
        "dog_and_cat_2018.json": [
            annotation("a1", "1546300800", subreddit=17),
            annotation(123, 1546300800.0, subreddit="Cats"),
            annotation(45.0, 1546300799.5, caption=7),
            annotation("b", subreddit=None, caption=None),
            {"image_id": "c", "created_utc": 1},
            annotation("e", caption=["a cat"]),
        ],
        "birds_2020-01.json": [annotation("d", subreddit=0)],
    }
    folder = write_annotations(tmp_path / "annotations", files)
    (folder / "birds_2020-01.json").write_bytes(b"\xef\xbb\xbf" + (folder / "birds_2020-01.json").read_bytes())
    found = list(read_redcaps(annotations.find_redcaps(str(folder))))
    assert [row[:4] for row in found] == [
        ("d", "birds/d.jpg", ("a cat",), 1546300800),
        ("a1", "dog_and_cat/a1.jpg", ("a cat",), 1546300800),
        ("123", "Cats/123.jpg", ("a cat",), 1546300800),
        ("45", "cats/45.jpg", ("7",), 1546300799),
        ("b", "dog_and_cat/b.jpg", ("",), 1546300800),
        ("c", "dog_and_cat/c.jpg", ("",), 1),
        ("e", "cats/e.jpg", ("",), 1546300800),
    ]
    assert found[2].where == f"{folder}/dog_and_cat_2018.json, annotation 2"


def test_half_a_surrogate_pair_is_no_character(tmp_path):
    found = [annotation("a", caption="a \ud83d cat"), annotation("b", caption="a \ud83d\ude00")]
    folder = write_annotations(tmp_path / "annotations", {"cats_2019.json": found})
    assert b"a \\ud83d cat" in (folder / "cats_2019.json").read_bytes()
    rows = list(read_redcaps(annotations.find_redcaps(str(folder))))
    assert [row.texts for row in rows] == [("a \ufffd cat",), ("a \U0001f600",)]


# --- The lists ---


def test_the_lists_of_yfcc15m(tmp_path):
    keys = [f"{i}bcdef{i}" for i in range(6)]
    times = [1230767999, 1230768000, 1420070399, 1420070400, 1072915199, 1072915200]
    path = write_table(tmp_path / "t.csv", [(key, "a,b", "", "", t) for key, t in zip(keys, times, strict=True)])
    done = yfcc(path, tmp_path / "out", env={"TZ": "Pacific/Kiritimati"})
    assert done.returncode == 0, done
    names = {f"{split}_batch_{step}.csv" for split in ("train", "test") for step in TIMES}
    assert set(tree(tmp_path / "out")) == names | {"manifest.json"}
    lines = (tmp_path / "out/train_batch_2004-2008.csv").read_bytes()
    assert lines == (
        b"key,image,caption,date\n"
        b'0bcdef0,0bc/def/0bcdef0.jpg,"a,b",2008-12-31T23:59:59Z\n'
        b'5bcdef5,5bc/def/5bcdef5.jpg,"a,b",2004-01-01T00:00:00Z\n'
    )
    assert [row["key"] for row in read_list(tmp_path / "out/train_batch_2009-2010.csv")] == [keys[1]]
    assert [row["date"] for row in read_list(tmp_path / "out/train_batch_2013-2014.csv")] == ["2014-12-31T23:59:59Z"]
    assert (tmp_path / "out/test_batch_2011-2012.csv").read_bytes() == b"key,image,caption,date\n"
    assert manifest(tmp_path / "out") == {
        "benchmark": "yfcc15m",
        "dataset": "yfcc15m",
        "seed": 0,
        "test_share": 0.01,
        "input": {"t.csv": hashlib.sha256(path.read_bytes()).hexdigest()},
        "counts": {
            "2004-2008": {"train": 2, "test": 0},
            "2009-2010": {"train": 1, "test": 0},
            "2011-2012": {"train": 0, "test": 0},
            "2013-2014": {"train": 1, "test": 0},
        },
        "read": 6,
        "dropped": {"outside the steps": 2},
        "files": {name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in sorted(names)},
    }
    assert done.stdout.splitlines() == [
        str(tmp_path / "out"),
        "",
        "step       train  test",
        "2004-2008      2     0",
        "2009-2010      1     0",
        "2011-2012      0     0",
        "2013-2014      1     0",
        "all            4     0",
        "",
        "6 rows read; dropped: 2 outside the steps",
    ]


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago"])  # 14 hours ahead, 11 behind
def test_the_lists_of_redcaps(tmp_path, zone):
    files = {
        "old_cats_2019.json": [annotation("a", 1514764799, "old_cats"), annotation("b", 1514764800, "old_cats")],
        "cats_2017.json": [annotation("c", 1609459199, caption="two\nlines "), annotation("d", 1609459200)],
        "dogs_2011.json": [annotation("e", 1293839999), annotation("f", 1293840000), annotation("g", caption=" ")],
    }
    folder = write_annotations(tmp_path / "annotations", files)
    done = redcaps(folder, tmp_path / "out", "-j", 2, env={"TZ": zone})
    assert done.returncode == 0, done
    lists = {path.name: read_list(path) for path in sorted((tmp_path / "out").glob("*.csv"))}
    assert {name: [row["image"] for row in rows] for name, rows in lists.items() if rows} == {
        "train_batch_2011-2017.csv": ["cats/f.jpg", "old_cats/a.jpg"],
        "train_batch_2018.csv": ["old_cats/b.jpg"],
        "train_batch_2020.csv": ["cats/c.jpg"],
    }
    assert lists["train_batch_2020.csv"][0] == {
        **{"key": "c", "image": "cats/c.jpg", "caption": "two lines", "date": "2020-12-31T23:59:59Z"}
    }
    found = manifest(tmp_path / "out")
    assert (found["benchmark"], found["dataset"], found["read"]) == ("redcaps", "redcaps", 7)
    assert found["dropped"] == {"no caption": 1, "outside the steps": 2}
    assert set(found["input"]) == set(files)


def test_the_bytes_do_not_depend_on_the_workers(table, tmp_path):
    rows = [(f"{key}{i}", "caf%C3%A9 <b>x</b>", "", "", TIMES["2009-2010"]) for i in range(20) for key in KEYS]
    assert len(rows) > 3 * CHUNK
    table = write_table(table, rows)
    for workers in 1, 2:
        assert yfcc(table, tmp_path / f"out{workers}", "-j", workers).returncode == 0
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")
    kept = read_list(tmp_path / "out1/train_batch_2009-2010.csv") + read_list(
        tmp_path / "out1/test_batch_2009-2010.csv"
    )
    assert sorted(row["key"] for row in kept) == sorted(row[0] for row in rows)
    order = {row[0]: i for i, row in enumerate(rows)}
    for name in "train", "test":
        places = [order[row["key"]] for row in read_list(tmp_path / f"out1/{name}_batch_2009-2010.csv")]
        assert places == sorted(places)


def held_out(folder):
    return {row["key"] for path in Path(folder).glob("test_*.csv") for row in read_list(path)}


def test_who_is_held_out_depends_on_nothing_but_the_key(table, tmp_path):
    """Not on the order, on which rows are there, or on the benchmark."""
    flags = ("--test-share", "0.2")
    yfcc(table, tmp_path / "out", *flags)
    steps = {row["key"] for path in (tmp_path / "out").glob("*.csv") for row in read_list(path)}
    chosen = held_out(tmp_path / "out")
    fractions = {key: int(hashlib.sha256(f"0/yfcc15m/{key}".encode()).hexdigest(), 16) / 2**256 for key in steps}
    assert chosen == {key for key, fraction in fractions.items() if fraction < 0.2}
    assert 30 < len(chosen) < 75
    yfcc(table, tmp_path / "other", *flags, "--benchmark", "yfcc15m_2011")
    assert held_out(tmp_path / "other") == chosen
    header, *lines = table.read_text().splitlines()
    random.shuffle(lines)
    table.write_text("\n".join([header, *lines[:200]]))
    yfcc(table, tmp_path / "part", *flags)
    there = {line.split(",")[0] for line in lines[:200]}
    assert held_out(tmp_path / "part") == chosen & there
    yfcc(table, tmp_path / "seed", *flags, "--seed", "1")
    assert held_out(tmp_path / "seed") != chosen & there


# --- Again, otherwise, and killed ---


def test_again_and_otherwise(table, tmp_path):
    out = tmp_path / "out"
    first = yfcc(table, out)
    before = tree(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = yfcc(table, out, "-j", 2, "--overwrite")
    assert (again.returncode, again.stdout) == (0, first.stdout.replace(str(out), f"{out}: already there"))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = table.rename(moved / table.name)
    assert "already there" in yfcc(copy, out).stdout
    assert said(yfcc(copy, out, "--seed", 1)) == (
        f"{out} was made with another seed (0, now 1); give --overwrite to replace it"
    )
    line = said(yfcc(copy, out, "--test-share", 0.5, "--benchmark", "yfcc15m_2011"))
    assert "another benchmark (yfcc15m, now yfcc15m_2011) and another test_share (0.01, now 0.5);" in line
    copy.write_text(copy.read_text() + f"new,title,,,{TIMES['2009-2010']}\n")
    assert "made with another input (yfcc15m.csv);" in said(yfcc(copy, out))
    assert tree(out) == before
    assert yfcc(copy, out, "--overwrite", "--benchmark", "yfcc15m_2011").returncode == 0
    steps = ("2008-2011", "2012", "2013", "2014")
    names = {f"{split}_batch_{step}.csv" for split in ("train", "test") for step in steps}
    assert set(tree(out)) == names | {"manifest.json"}
    assert manifest(out)["dataset"] == "yfcc15m"


def test_a_list_that_was_changed(table, tmp_path):
    out = tmp_path / "out"
    yfcc(table, out)
    before = tree(out)
    with open(out / "train_batch_2009-2010.csv", "a") as file:
        file.write("x,x,x,x\n")
    assert "has a train_batch_2009-2010.csv that is not as it was made; give --overwrite" in said(yfcc(table, out))
    assert yfcc(table, out, "--overwrite").returncode == 0
    assert tree(out) == before
    (out / "test_batch_2009-2010.csv").unlink()
    assert "has a test_batch_2009-2010.csv that is not as it was made" in said(yfcc(table, out))


def test_a_bad_row_leaves_the_old_lists(table, tmp_path):
    out = tmp_path / "out"
    yfcc(table, out)
    before = tree(out)
    with open(table, "a") as file:
        file.write("key,title,,,never\n")
    assert "the date of key" in said(yfcc(table, out, "--overwrite"))
    assert tree(out) == before


def test_lists_made_without_bad_rows(table, tmp_path):
    with open(table, "a") as file:
        file.write("key,title,,,never\n")
    assert yfcc(table, tmp_path / "out", "--skip-bad-rows").returncode == 0
    assert "made without 1 bad rows; --skip-bad-rows leaves it so" in said(yfcc(table, tmp_path / "out"))
    assert "already there" in yfcc(table, tmp_path / "out", "--skip-bad-rows").stdout


def test_lists_that_are_replaced_are_not_finished(table, tmp_path, monkeypatch):
    """A run that ends between its first list and its manifest leaves no manifest of an earlier one."""

    def make(seed):
        inputs, settings = find_yfcc15m(str(table)), Settings(benchmark="yfcc15m", dataset="yfcc15m", seed=seed)
        create_splits(read_yfcc15m(inputs), inputs, str(tmp_path / "out"), settings, yfcc_caption, overwrite=True)

    make(0)
    before = tree(tmp_path / "out")
    monkeypatch.setattr("tic_clip.data.pairs.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(1)
    assert tree(tmp_path / "out") != before
    assert "manifest.json" not in tree(tmp_path / "out")


def is_running(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment(tmp_path, sent):
    """What is there without a manifest is of a run that was killed, and is replaced."""
    rows = [(f"{i}", "title+%C3%A9" * 50, "", "", TIMES["2009-2010"]) for i in range(40_000)]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    command = [sys.executable, SCRIPTS["yfcc15m"], "--csv-path", table, "--output-path", out, "-j", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out.exists() and any(path.stat().st_size > 1000 for path in out.iterdir())):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(sent)
    assert ("interrupted: run the same command again to start over" in process.communicate()[1]) == (
        sent == signal.SIGINT
    )
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]
    while any(map(is_running, children)):
        time.sleep(0.01)
    (out / "train_batch_2009-2010.csv").write_text("of another run")
    write_table(tmp_path / "t.csv", rows[:10])
    assert yfcc(table, out).returncode == 0
    assert set(tree(out)) == {*manifest(out)["files"], "manifest.json"}
    assert [row["key"] for row in read_list(out / "test_batch_2009-2010.csv")] == ["6"]
    assert len(read_list(out / "train_batch_2009-2010.csv")) == 9


# --- Bad input ---


GOOD = f"good,title,,,{TIMES['2009-2010']}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column key and no column title and no column description and no column usertags and no column"),
        (
            "key,title,description,tags,date\n",
            "no column usertags and no column dateuploaded; its columns are key, title,",
        ),
        (f"{HEADER}\n", "has no row that can be used (it has none at all)"),
        (f"{HEADER}\nk,,,,{TIMES['2009-2010']}\nl,t,,,0\n", "can be used (1 no caption, 1 outside the steps)"),
        (f'{HEADER}\n{GOOD}\nk,"t,,,1', "the row that begins in line 3 can't be read: unexpected end of data"),
        (f'{HEADER}\n{GOOD}\nk,"t"x,,,1', "the row that begins in line 3 can't be read: ',' expected after '\"'"),
    ],
)
def test_a_table_that_is_none(tmp_path, text, expected):
    path, out = tmp_path / "t.csv", tmp_path / "out"
    path.write_text(text)
    line = said(yfcc(path, out, "--skip-bad-rows"))
    assert str(path) in line
    assert expected in line
    assert not out.exists() or not list(out.iterdir())


BAD_ROWS = {
    "a date that is no number": ("k1,t,,,yesterday", "impossible date", "row 2 (line 3): the date of k1 is no time"),
    "a negative date": ("k1,t,,,-5", "impossible date", "since 1970: '-5'"),
    "a date beyond 9999": ("k1,t,,,253402300800", "impossible date", "'253402300800'"),
    "too few fields": ("k1,t,,", "wrong number of fields", "row 2 (line 3) has 4 fields, not 5 (key 'k1')"),
    "too many fields": ("k1,t,,,,1", "wrong number of fields", "row 2 (line 3) has 6 fields, not 5 (key 'k1')"),
    "an empty key": (" ,t,,,1", "unusable key", "row 2 (line 3): '' is no name of a file"),
    "a key with a slash": ("a/b,t,,,1", "unusable key", "'a/b' is no name"),
    "a key that goes up": ("a..,t,,,1", "unusable key", "'a..' is no name"),
    "a key that is a dot": (".,t,,,1", "unusable key", "'.' is no name"),
    "a key of two lines": ('"a\nb",t,,,1', "unusable key", r"'a\nb' is no name"),
    "a key again": (GOOD.replace("title", "other"), "duplicate key", "row 2 (line 3): the key good has been before"),
    "a key in another step": (f"good,t,,,{TIMES['2004-2008']}", "duplicate key", "the key good has been before"),
    "a key in no step": ("good,t,,,1", "duplicate key", "the key good has been before"),
}


def test_what_is_no_text_is_not_poured_into_the_error(tmp_path):
    (tmp_path / "t.csv").write_bytes(bytes(range(14, 256)).replace(b'"', b"") * 100)
    line = said(yfcc(tmp_path / "t.csv", tmp_path / "out"))
    assert "has no column key" in line
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize(("line", "reason", "expected"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row(tmp_path, line, reason, expected):
    path, out = tmp_path / "t.csv", tmp_path / "out"
    path.write_text(f"{HEADER}\n{GOOD}\n{line}\nlast,title,,,{TIMES['2009-2010']}\n")
    message = said(yfcc(path, out))
    assert message.startswith(f"{path}, row 2 (line 3)")
    assert expected in message
    assert message.endswith("(--skip-bad-rows leaves such rows out)")
    assert not list(out.iterdir())
    done = yfcc(path, out, "--skip-bad-rows")
    assert (done.returncode, manifest(out)["dropped"], manifest(out)["read"]) == (0, {reason: 1}, 3)
    kept = read_list(out / "train_batch_2009-2010.csv")
    assert [(row["key"], row["caption"]) for row in kept] == [("good", "title"), ("last", "title")]
    assert f"3 rows read; dropped: 1 {reason}" in done.stdout


def test_a_key_again_in_another_chunk(tmp_path):
    rows = [(f"{i}", "t", "", "", TIMES["2009-2010"]) for i in range(2 * CHUNK)] + [("3", "t", "", "", 1)]
    table = write_table(tmp_path / "t.csv", rows)
    assert f"row {2 * CHUNK + 1} (line {2 * CHUNK + 2}): the key 3 has been before" in said(
        yfcc(table, tmp_path / "out")
    )


def test_a_bad_row_that_is_dropped_does_not_take_its_key(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(f"{HEADER}\ngood,first,,,never\n{GOOD}\n")
    assert yfcc(path, tmp_path / "out", "--skip-bad-rows").returncode == 0
    assert read_list(tmp_path / "out/train_batch_2009-2010.csv")[0]["caption"] == "title"


@pytest.mark.parametrize(
    ("found", "reason", "expected"),
    [
        (annotation("a", "soon"), "impossible date", "the date of a is no time"),
        (annotation("a", None), "impossible date", "the date of a is no time"),
        (annotation("a", True), "impossible date", "the date of a is no time"),
        (annotation("a", float("nan")), "impossible date", "the date of a is no time"),
        (annotation("a\ud83d"), "unusable key", "'a\ufffd' is no name of a file"),
        (annotation({"a": "b"}), "unusable key", "'' is no name of a file"),
        (annotation(None), "unusable key", "'' is no name of a file"),
        (annotation("../a"), "unusable key", "'../a' is no name of a file"),
        (annotation("a", subreddit="../.."), "unusable key", "'../..' is no name of a file"),
        (annotation("a", subreddit=" "), "unusable key", "'' is no name of a file"),
        (annotation("good"), "duplicate key", "the key good has been before"),
    ],
)
def test_a_bad_annotation(tmp_path, found, reason, expected):
    files = {"cats_2019.json": [annotation("good")], "dogs_2019.json": [annotation("x"), found, annotation("y")]}
    folder, out = write_annotations(tmp_path / "annotations", files), tmp_path / "out"
    message = said(redcaps(folder, out))
    assert message.startswith(f"{folder}/dogs_2019.json, annotation 2: {expected}")
    assert not list(out.iterdir())
    assert redcaps(folder, out, "--skip-bad-rows").returncode == 0
    assert manifest(out)["dropped"] == {reason: 1}
    assert [row["key"] for row in read_list(out / "train_batch_2019.csv")] == ["good", "x", "y"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data.replace(b"annotations", b"metadata"),
        lambda data: b"[]",
        lambda data: data.replace(b"a cat", b"a \xff"),
        lambda data: data.replace(b'{"image_id"', b'17, {"image_id"'),
        lambda data: b'{"info": ' + b"[" * 100_000 + b"]" * 100_000 + b', "annotations": []}',
    ],
    ids=["cut", "empty", "other", "list", "latin", "type", "deep"],
)
def test_an_annotation_file_that_is_none(tmp_path, damage):
    files = {"cats_2019.json": [annotation("a")], "dogs_2019.json": [annotation("b")]}
    folder, out = write_annotations(tmp_path / "annotations", files), tmp_path / "out"
    path = folder / "dogs_2019.json"
    path.write_bytes(damage(path.read_bytes()))
    assert said(redcaps(folder, out, "--skip-bad-rows")).startswith(f"{path} is cut off or holds no annotations: ")
    assert not list(out.iterdir())


def test_no_annotations(tmp_path):
    (tmp_path / "annotations").mkdir()
    assert "has no annotation file ({subreddit}_{year}.json)" in said(
        redcaps(tmp_path / "annotations", tmp_path / "out")
    )
    assert "none is missing or not a folder" in said(redcaps(tmp_path / "none", tmp_path / "out"))
    assert "s3://bucket/t.csv is not local; copy it here first" in said(yfcc("s3://bucket/t.csv", tmp_path / "out"))
    assert "is not local; copy it here first" in said(redcaps("gs://bucket/annotations", tmp_path / "out"))
    assert "none.csv is missing" in said(yfcc(tmp_path / "none.csv", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something_else(table, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/x.csv").touch()
    expected = f"{tmp_path}/more holds something else (x.csv); give another output folder"
    assert expected in said(yfcc(table, tmp_path / "more", "--overwrite"))
    assert "is a file, not a folder" in said(yfcc(table, table))
    assert "is not local" in said(yfcc(table, "s3://bucket/out"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"benchmark": "mine"}')
    assert "manifest.json is of something else" in said(yfcc(table, out, "--overwrite"))
    assert set(tree(out)) == {"manifest.json"}


def test_a_table_in_the_output_folder_is_not_replaced(table, tmp_path):
    """Whatever it is called: the lists are, too."""
    source = (tmp_path / "out/train_batch_2009-2010.csv").resolve()
    source.parent.mkdir()
    before = table.rename(source).read_bytes()
    for _ in range(2):
        message = f"{source} lies in {tmp_path}/out; give another output folder"
        assert message in said(yfcc(source, tmp_path / "out", "--overwrite"))
        assert tree(tmp_path / "out") == {source.name: before}


def test_two_at_once(table, tmp_path):
    out = tmp_path / "out"
    assert yfcc(table, out).returncode == 0
    with lock_folder(out):
        assert "already there" in yfcc(table, out).stdout
        message = f"another process is writing {out}; wait for it or end it"
        assert said(yfcc(table, out, "--seed", 1, "--overwrite")) == message
    assert manifest(out)["seed"] == 0


def test_lists_that_another_process_finishes_meanwhile_are_not_made_again(table, tmp_path, monkeypatch):
    settings, out = Settings(benchmark="yfcc15m", dataset="yfcc15m"), tmp_path / "out"

    @contextmanager
    def late(folder):
        assert yfcc(table, folder).returncode == 0
        yield

    monkeypatch.setattr("tic_clip.data.pairs.alone", late)
    inputs = find_yfcc15m(str(table))
    assert create_splits(read_yfcc15m(inputs), inputs, str(out), settings, yfcc_caption).reused


def test_flags_that_are_wrong(table, tmp_path):
    assert "from 0 to below 1, not 1.5" in said(yfcc(table, tmp_path / "out", "--test-share", 1.5))
    assert "at least 1" in said(yfcc(table, tmp_path / "out", "-j", 0))
    assert "invalid choice: 'redcaps'" in said(yfcc(table, tmp_path / "out", "--benchmark", "redcaps"))


def test_counts_that_do_not_add_up(tmp_path, monkeypatch):
    """A loss of rows is never silent."""
    monkeypatch.setattr("tic_clip.data.pairs.make_lines", lambda caption, samples: ({}, 0))
    settings = Settings(benchmark="redcaps", dataset="redcaps")
    rows = [Row("a", "a.jpg", ("a",), 1_546_300_800, "here"), BadRow("unusable key", "there")]
    with pytest.raises(TicError, match="2 rows read, but 0 kept and 1 dropped"):
        create_splits(rows, Inputs("x", []), str(tmp_path / "out"), settings, plain_caption, skip_bad_rows=True)


def test_decoding_undoes_what_yfcc_has():
    assert decode("Canon+PowerShot+ELPH+310+HS") == "Canon PowerShot ELPH 310 HS"
    assert decode(" a+b c ") == "a+b c"
