"""TiC-YFCC15M's and TiC-RedCaps' lists by step: captions, dates, who is held out, bad input; both scripts."""

import csv
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ftfy
import pytest
from conftest import ROOT, run_script, times, tree
from miniature import held_out, write_redcaps, write_yfcc

from tic_clip import TicError
from tic_clip.data import pairs, sources
from tic_clip.data.lists import Options
from tic_clip.data.pairs import create_splits
from tic_clip.data.uids import make_uid
from tic_clip.storage import lock_folder

YFCC15M = ROOT / "dataset_creation/tic-yfcc15m/create_splits.py"
HEADER = "key,title,description,usertags,dateuploaded"
TIMES = {"2004-2008": 1_200_000_000, "2009-2010": 1_262_304_000, "2011-2012": 1_325_376_000, "2013-2014": 1_393_675_200}
KEYS = [hashlib.md5(str(i).encode()).hexdigest() for i in range(400)]


def make(source, out, dataset="yfcc15m", benchmark=None, **settings):
    return create_splits(dataset, str(source), Options(output_path=str(out), **settings), benchmark)


def read_list(path):
    """The rows of a list, as Python's own csv reads them."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def manifest(folder):
    return json.loads(Path(folder, "manifest.json").read_text())


def write_table(path, rows):
    """Write a yfcc15m.csv of (key, title, description, usertags, dateuploaded)."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    path.write_text(f"{HEADER}\n{text.getvalue()}", encoding="utf-8", newline="")
    return path


@pytest.fixture
def table(tmp_path):
    """Rows in all steps, and in two more years that are in none."""
    times = [*TIMES.values(), 1_000_000_000, 1_500_000_000]
    rows = [(key, f"title+{i}", "", "a,b+c", times[i % 6] + i) for i, key in enumerate(KEYS)]
    return write_table(tmp_path / "yfcc15m.csv", rows)


def write_annotations(folder, files):
    """Write {file name: [annotation]} as RedCaps has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        (folder / name).write_text(json.dumps({"info": {"version": "1.0"}, "annotations": found}))
    return folder


def annotation(image_id, created_utc=1_546_300_800, subreddit="cats", caption="a cat"):
    return {"image_id": image_id, "subreddit": subreddit, "caption": caption, "created_utc": created_utc, "author": "x"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("canon,canon+powershot+hs+310", "canon,canon powershot hs 310"),
        ("caf%C3%A9+%F0%9F%98%80", "café 😀"),
        ("caf%C3%83%C2%A9", "café"),  # mojibake: UTF-8 read as Latin-1, and written as UTF-8 again
        ("&lt;b&gt;bold&lt;/b&gt; &copy;&nbsp;me", "bold © me"),
        ('see <a href="http://x.org/?a=b&amp;c=d" rel="nofollow">my site</a>.', "see my site."),
        ("<a title='a > b' href=x>link</a>", "link"),
        ("one<br>two<br/>three<p>four</p>five", "one two three four five"),
        ("a <!-- a <b>hidden</b>\nnote --> b", "a b"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<me@home.org> <http://x.org/>", "<me@home.org> <http://x.org/>"),
        ("it's <b class=it's>so</b>", "it's so"),
        ("two\n\nlines\tand\r\nmore\u2028here", "two lines and more here"),
    ],
)
def test_a_field(text, expected):
    assert sources.clean_field(text) == expected


def test_captions():
    """YFCC's have the fields that are not empty, and 500 characters at most; RedCaps' are as they are given."""
    assert sources.yfcc_caption(("a+title", "some text", "x,y+z")) == "a title. some text. x,y z"
    assert sources.yfcc_caption(("a", "<img src=x>", "b")) == "a. b"
    assert sources.yfcc_caption(("", "%20", "<b> </b>")) == ""
    assert sources.yfcc_caption(("%C3%A9" * 498, "abc", "")) == "é" * 498 + ". "
    assert sources.redcaps_caption((" <b>1&amp;2</b>+\n%20  caf\u00c3\u00a9 ",)) == "<b>1&amp;2</b>+ %20 cafÃ©"
    assert sources.redcaps_caption(("x" * 600,)) == "x" * 600


def test_what_is_not_given_to_ftfy_would_not_change():
    """Each of these characters, after each other."""
    plain = [chr(i) for i in range(256) if sources._PLAIN.fullmatch(chr(i))]
    text = "".join(map("".join, itertools.product(plain, repeat=2)))
    assert ftfy.fix_text(text, unescape_html=True) == text


@pytest.mark.parametrize("piece", ["<a '", '<a "', "<!--", "<br '\""])
def test_tags_that_never_end(piece):
    """A pattern that goes back and forth would not come to an end either."""
    assert sources.clean_field(piece * 20_000) == piece * 20_000


def read(reader, path):
    """The rows of a file, and (reason, message) of those that can't be used."""
    bad = []
    return list(reader(str(path), lambda *fault: bad.append(fault))), bad


def test_seconds():
    for timestamp, seconds in ((0, 0), (" 1393675200 ", 1393675200), ("1393675200.5", 1393675200)):
        (row,) = sources.make_row("", ("key",), "key.jpg", (), timestamp, None)
        assert row.seconds == seconds
    bad, wrong = [], (253402300800, 1393675200000, "-0.5", None, "2014-03-01", "nan", 10**400)
    for timestamp in wrong:
        assert not list(sources.make_row("here", ("key",), "key.jpg", (), timestamp, lambda *fault: bad.append(fault)))
    message = "here: the date of key is not a time in seconds since 1970: "
    assert bad == [("impossible date", f"{message}{timestamp!r}") for timestamp in wrong]


def test_a_table_in_all_its_forms(tmp_path):
    """A byte order mark, both ends of lines, quotes, line breaks and NUL in fields, an empty line, none at the end."""
    text = (
        "\ufeffdateuploaded,userid,usertags, key ,title,description\r\n"
        '1,7,"a,b",k1,"say ""hi"" é","two\r\nlines"\r\n'
        "\r\n"
        '2,7,c,k2,a\rb,x"y\n'
        f"3,7,\x00,k3,{'x' * 200_000},"
    )
    (tmp_path / "t.csv").write_bytes(text.encode() + b"\xff")
    rows = [
        sources.Row("k1", "k1//k1.jpg", ('say "hi" é', "two\nlines", "a,b"), 1),
        sources.Row("k2", "k2//k2.jpg", ("a b", 'x"y', "c"), 2),
        sources.Row("k3", "k3//k3.jpg", ("x" * 200_000, "\ufffd", "\x00"), 3),
    ]
    assert read(sources.read_yfcc15m, tmp_path / "t.csv") == (rows, [])


def test_wrong_quotes_cost_one_row(tmp_path):
    path = tmp_path / "t.csv"
    bad = [r'b,"say \"hi\"",,,1', r'b,"5\"",d,t,1', 'b,"never closed,,,1']  # the second is open until the next quote
    path.write_text(f'{HEADER}\n{bad[0]}\na,"two\nlines",,,1\n{bad[1]}\nc,t,,,1\n{bad[2]}\nd,t,,,1\n')
    good, wrong = read(sources.read_yfcc15m, path)
    assert [row.key for row in good] == ["a", "c", "d"]
    assert [(reason, message.partition(" can't be read: ")[0]) for reason, message in wrong] == [
        ("malformed row", f"{path}, row {number} (line {line})") for number, line in ((1, 2), (3, 5), (5, 7))
    ]


def test_annotations_in_all_their_types(tmp_path):
    files = {
        "dog_and_cat_2018.json": [
            annotation("a1", "1546300800", subreddit=17),
            annotation(" a2 ", 1546300800.5, subreddit="Cats"),
            annotation("b", subreddit=None, caption=None),
            {"image_id": "c", "created_utc": 1},
            annotation("f", caption="half \ud83d, whole \ud83d\ude00"),
        ],
        "birds_2020-01.json": [annotation("d", subreddit=0)],
    }
    folder = write_annotations(tmp_path / "annotations", files)
    found = [read(sources.read_redcaps, path) for path in sorted(folder.iterdir())]
    assert [bad for _, bad in found] == [[], []]
    assert [(row.key, row.image, row.texts, row.seconds) for rows, _ in found for row in rows] == [
        ("d", "birds/d.jpg", ("a cat",), 1546300800),
        ("a1", "dog_and_cat/a1.jpg", ("a cat",), 1546300800),
        ("a2", "Cats/a2.jpg", ("a cat",), 1546300800),
        ("b", "dog_and_cat/b.jpg", ("",), 1546300800),
        ("c", "dog_and_cat/c.jpg", ("",), 1),
        ("f", "cats/f.jpg", ("half \ufffd, whole \U0001f600",), 1546300800),
    ]


def test_the_lists_of_yfcc15m(tmp_path):
    keys = [f"{i}bcdef{i}" for i in range(6)]
    times = [1230767999, 1230768000, 1420070399, 1420070400, 1072915199, 1072915200]
    path = write_table(tmp_path / "t.csv", [(key, "a,b", "", "", t) for key, t in zip(keys, times, strict=True)])
    out = tmp_path / "out"
    zone = {**os.environ, "TZ": "Pacific/Kiritimati"}  # 14 hours ahead of UTC
    printed = run_script(YFCC15M, "--csv-path", path, "--output-path", out, env=zone).stdout
    names = {f"{split}_batch_{step}.csv" for split in ("train", "test") for step in TIMES}
    assert set(tree(out)) == names | {"manifest.json"}
    assert (out / "train_batch_2004-2008.csv").read_bytes() == (
        b"key,image,caption,date\n"  # by `printf yfcc15m/0bcdef0 | sha256sum` and the other one
        b'0bcdef0,0bc/def/0bcdef0.jpg,"a,b",2008-12-31T23:59:59Z\n'
        b'5bcdef5,5bc/def/5bcdef5.jpg,"a,b",2004-01-01T00:00:00Z\n'
    )
    assert [row["date"] for row in read_list(out / "train_batch_2013-2014.csv")] == ["2014-12-31T23:59:59Z"]
    assert (out / "test_batch_2011-2012.csv").read_bytes() == b"key,image,caption,date\n"
    train = {"2004-2008": 2, "2009-2010": 1, "2011-2012": 0, "2013-2014": 1}
    assert manifest(out) == {
        **{"benchmark": "yfcc15m", "dataset": "yfcc15m", "seed": 0, "test_share": 0.01, "order": "uid"},
        "input": {"t.csv": hashlib.sha256(path.read_bytes()).hexdigest()},
        "counts": {step: {"train": count, "test": 0} for step, count in train.items()},
        **{"read": 6, "dropped": {"outside the steps": 2}},
        "files": {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sorted(names)},
    }
    lines = [line.split() for line in printed.splitlines()]
    assert (lines[2], lines[3], lines[-3]) == (["step", "train", "test"], ["2004-2008", "2", "0"], ["all", "4", "0"])
    assert printed.endswith("6 rows read; dropped: 2 outside the steps\n")


def test_the_lists_are_sorted_and_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    """Who is held out depends on nothing but the key, the seed and the share."""
    monkeypatch.setattr(pairs, "CHUNK", 100)
    rows = [(f"{key}{i}", "caf%C3%A9 <b>x</b>", "", "", TIMES["2009-2010"]) for i in range(2) for key in KEYS]
    path = write_table(tmp_path / "t.csv", rows)
    for workers in 1, 2:
        make(path, tmp_path / f"out{workers}", benchmark="yfcc15m_2011", seed=1, test_share=0.2, num_workers=workers)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")
    expected = {False: [], True: []}  # held out? -> lines, by a slow obvious way
    for key in sorted((row[0] for row in rows), key=lambda key: make_uid(f"yfcc15m/{key}")):
        made = {"key": key, "image": f"{key[:3]}/{key[3:6]}/{key}.jpg", "caption": "café x"}
        expected[held_out("yfcc15m", key, 0.2, 1)].append({**made, "date": "2010-01-01T00:00:00Z"})
    assert read_list(tmp_path / "out1/train_batch_2008-2011.csv") == expected[False]
    assert read_list(tmp_path / "out1/test_batch_2008-2011.csv") == expected[True] != []


def test_again_and_otherwise(table, tmp_path):
    out = tmp_path / "out"
    first, _ = make(table, out)
    before, stamps = tree(out), times(out)
    with lock_folder(out / ".building"):
        assert make(table, out, num_workers=2) == (first, True)
        with pytest.raises(TicError, match=r"another process is writing .*out/\.building"):
            make(table, out, seed=1, overwrite=True)
    (out / ".building").rmdir()
    with pytest.raises(NotADirectoryError):  # a file is not replaced
        make(table, table)
    assert times(out) == stamps
    with pytest.raises(TicError, match="has another benchmark and another test_share; give --overwrite to replace it"):
        make(table, out, test_share=0.5, benchmark="yfcc15m_2011")
    with open(table, "a") as file:
        file.write("key,title,,,never\n")
    with pytest.raises(TicError, match="has another input; give --overwrite"):
        make(table, out)
    with pytest.raises(TicError, match="the date of key"):
        make(table, out, overwrite=True)
    assert tree(out) == before
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["order"]  # as lists of earlier versions lack it; they are replaced, too
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / ".gitignore").write_text("*")
    made, _ = make(table, out, overwrite=True, skip_bad_rows=True, benchmark="yfcc15m_2011")
    assert (out / ".gitignore").read_text() == "*"  # hidden files stay
    assert (
        {*made["files"], "manifest.json", ".gitignore"}
        == set(tree(out))
        > {"train_batch_2008-2011.csv", "test_batch_2014.csv"}
    )


def test_the_lists_are_those_that_they_were_before_there_were_tables_of_others(tmp_path):
    """The digests are of the code that had YFCC15M and RedCaps only."""
    write_yfcc(tmp_path / "yfcc")
    write_redcaps(tmp_path / "redcaps")
    make(tmp_path / "yfcc/yfcc15m.csv", tmp_path / "yfcc15m", test_share=0.1)
    make(tmp_path / "redcaps/annotations", tmp_path / "lists", "redcaps", num_workers=2)
    for folder, digest in (
        ("yfcc15m", "2fe8a92a7b1ec61abf500fcbf474ef4e109858d0943c684c10e86314f494c462"),
        ("lists", "cfbd564b3fbbabd36ef881ee9fe6b80e36c2ebb1984ccf8ec5efe752e91658c9"),
    ):
        content = (path.name.encode() + b"\0" + path.read_bytes() for path in sorted((tmp_path / folder).iterdir()))
        assert hashlib.sha256(b"".join(content)).hexdigest() == digest


def test_killed_at_any_moment(tmp_path):
    """Nothing is under its name, and what is left is removed by the next run."""
    rows = [(f"{i}", "title+%C3%A9" * 5, "", "", TIMES["2009-2010"]) for i in range(20_000)]
    table, out = write_table(tmp_path / "t.csv", rows), tmp_path / "out"
    command = [sys.executable, YFCC15M, "--csv-path", table, "--output-path", out, "-j", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / ".building/work/ff").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert [path.name for path in out.iterdir()] == [".building"]
    write_table(tmp_path / "t.csv", rows[:10])
    make(table, out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "t.csv"}
    make(table, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


GOOD = f"good,title,,,{TIMES['2009-2010']}"


@pytest.mark.parametrize(
    ("line", "reason", "expected"),
    [
        ("k1,t,,,yesterday", "impossible date", "row 2 (line 3): the date of k1 is not a"),
        ("k1,t,,", "wrong number of fields", "row 2 (line 3) has 4 fields, not 5"),
        (" ,t,,,1", "unusable key", "row 2 (line 3): '' is not a name"),
        ('"a\nb",t,,,1', "unusable key", r"'a\nb' is not a name"),
        ("good,t,,,1", "duplicate key", "the key good is in more than one row"),
        (r'k1,"say \"hi\"",,,1', "malformed row", "row 2 (line 3) can't be read"),
    ],
)
def test_a_bad_row(tmp_path, line, reason, expected):
    path, out = tmp_path / "t.csv", tmp_path / "out"
    path.write_text(f"{HEADER}\n{GOOD}\n{line}\nlast,title,,,{TIMES['2009-2010']}\n")
    with pytest.raises(TicError) as error:
        make(path, out)
    assert expected in str(error.value)
    assert str(error.value).endswith("(--skip-bad-rows leaves such rows out)")
    assert not out.exists()
    make(path, out, skip_bad_rows=True)
    assert (manifest(out)["dropped"], manifest(out)["read"]) == ({reason: 1}, 3)
    kept = read_list(out / "train_batch_2009-2010.csv")
    assert {(row["key"], row["caption"]) for row in kept} == {("good", "title"), ("last", "title")}


def test_of_a_key_the_first_good_row_is_kept(tmp_path, monkeypatch):
    """Also when the rows are far apart; a bad row does not take its key."""
    monkeypatch.setattr(pairs, "CHUNK", 10)
    between = [(f"{i}", "t", "", "", TIMES["2009-2010"]) for i in range(20)]
    rows = [("k", "bad", "", "", "never"), ("k", "1st", "", "", TIMES["2009-2010"]), *between]
    table = write_table(tmp_path / "t.csv", [*rows, ("k", "2nd", "", "", 1), ("3", "again", "", "", 1)])
    make(table, tmp_path / "out", skip_bad_rows=True, test_share=0)
    assert manifest(tmp_path / "out")["dropped"] == {"duplicate key": 2, "impossible date": 1}
    captions = {row["key"]: row["caption"] for row in read_list(tmp_path / "out/train_batch_2009-2010.csv")}
    assert captions == {"k": "1st", **{key: "t" for key, *_ in between}}


def test_a_bad_annotation(tmp_path):
    bad, out = annotation("a", subreddit="../.."), tmp_path / "out"
    folder = write_annotations(tmp_path / "in", {"cats_2019.json": [annotation("x"), bad]})
    with pytest.raises(TicError, match=f"^{folder}/cats_2019.json, annotation 2: '../..' is not a name"):
        make(folder, out, "redcaps")
    make(folder, out, "redcaps", skip_bad_rows=True)
    assert manifest(out)["dropped"] == {"unusable key": 1}
    assert [row["key"] for row in read_list(out / "train_batch_2019.csv")] == ["x"]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"}", b""), (b"annotations", b"metadata"), (b"a cat", b"a \xff"), (b'{"image_id"', b'17, {"image_id"')],
)
def test_a_damaged_annotation_file(tmp_path, old, new):
    folder = write_annotations(tmp_path / "annotations", {"cats_2019.json": [annotation("a")]})
    path = folder / "cats_2019.json"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(TicError, match=f"^{path} is cut off or holds no annotations: "):
        make(folder, tmp_path / "out", "redcaps", skip_bad_rows=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no row that can be used; dropped: {'no caption': 1}"),
        ({"out": "gs://bucket/out"}, "is not local"),
        ({"benchmark": "laion"}, "unknown benchmark 'laion'"),
    ],
)
def test_bad_input(tmp_path, change, message):
    source = write_table(tmp_path / "t.csv", [("k", "", "", "", TIMES["2009-2010"])])
    with pytest.raises(TicError, match=message):
        make(**{"source": source, "out": tmp_path / "out", **change})
    assert not (tmp_path / "out").exists()
