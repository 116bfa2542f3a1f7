"""UID and class files of tables and lists with a few UIDs, compared with answers worked out by hand."""

import json
import os
import re
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import call_script, times, tree

from tic_clip import TicError
from tic_clip.data.clip_benchmark import imagenet_texts
from tic_clip.data.eval_uids import filter_lists, imagenet_synsets, write_classes, write_eval_uids
from tic_clip.data.released import MONTHLY, TABLES, YEARLY
from tic_clip.data.uids import CLASS_ROW, UID, open_uids, save_uids

SCRIPTS = "dataset_creation/tic-datacomp"
TENCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"  # classes 0, 1, 2
RETRIEVAL = {"2014": [3, 1, 1, 2], "2015": [11, 10]}
DATACOMPNET = {"2014": {GOLDFISH: [4, 5, 1], TENCH: [5, 6, 6]}, "2015": {SHARK: [12, 3]}}
MONTH = [0, 1, 1, 2, 4, 5, 5, 5, 7, 8, 12]  # 201403, with repeats and an evaluation UID of another year


def uid(number):
    return f"{number // 2:016x}{number % 2:016x}"


def array(numbers):
    return np.array([(number // 2, number % 2) for number in numbers], UID)


def load(path):
    return [2 * high + low for high, low in open_uids(path).tolist()]


def classes_of(path):
    return [(2 * high + low, class_id) for high, low, class_id in open_uids(path, CLASS_ROW).tolist()]


def write_table(folder, task, table, uid=uid):
    """Write a table of evaluation UIDs, given by their numbers."""
    text = re.sub(r"(?<=[\[ ])\d+(?=[,\]])", lambda number: f'"{uid(int(number[0]))}"', json.dumps(table))
    (folder / f"{TABLES[task]}.json").write_text(text)


@pytest.fixture
def lists(tmp_path):
    """As on the hub, and one month in a folder of its year, as the authors' tars unpack."""
    folder = tmp_path / "lists/released"
    months = {f"{MONTHLY}/2014/201403": MONTH, f"{MONTHLY}/201404": [20, 20, 21]}
    for name, numbers in {f"{YEARLY}/2014": [0, 7, 7, 8], **months}.items():
        save_uids(folder / f"{name}.npy", array(numbers))
    write_table(folder, "retrieval", RETRIEVAL)
    write_table(folder, "datacompnet", DATACOMPNET)
    return folder


def write(function, lists):
    """{file: what is said of it}."""
    return said(function(str(lists), str(lists.parent)))


def said(lines):
    return {name: text for name, text in (line.split(": ", 1) for line in lines) if not name.startswith("missing")}


def test_a_year_without_yearly_evaluation(lists):
    write_table(lists, "retrieval", {"2014": [1], "2023": [30]})
    write_table(lists, "datacompnet", {"2023": {TENCH: [29]}})
    np.save(lists / MONTHLY / "202306.npy", array([29, 30, 31]))
    lines = write(write_eval_uids, lists)
    assert "uids/yearly/eval/retrieval/2023" not in lines
    assert lines["uids/monthly/eval/retrieval/202306"] == "1 UIDs"
    assert load(lists.parent / "uids/monthly/train/202306.npy") == [31]
    assert write(write_classes, lists) == {"classes/monthly/eval/datacompnet/202306": "1 UIDs"}


def test_years_and_months(lists):
    lines = write(write_eval_uids, lists)
    folder = lists.parent / "uids"
    written = {
        "yearly/eval/retrieval/2014": ([1, 2, 3], "3 UIDs"),
        "yearly/eval/datacompnet/2014": ([1, 4, 5, 6], "4 UIDs"),
        "monthly/train/201403": ([0, 7, 8], "3 UIDs, 8 evaluation UIDs removed"),  # without 12 too, which is of 2015
        "monthly/eval/retrieval/201403": ([1, 2], "2 UIDs"),
        "monthly/eval/datacompnet/201403": ([1, 4, 5], "3 UIDs"),
        "monthly/train/201404": ([20, 20, 21], "3 UIDs, 0 evaluation UIDs removed"),  # repeats to train on stay
    }
    for name, (numbers, line) in written.items():
        assert (load(folder / f"{name}.npy"), lines[f"uids/{name}"]) == (numbers, line)
    assert lines["uids/monthly/eval/retrieval/201404"] == "0 UIDs, so no file"
    assert sorted(path.name for path in (folder / "monthly/eval").rglob("*.npy")) == ["201403.npy"] * 2


@pytest.mark.parametrize("links", [True, False])
def test_yearly_lists_are_links_or_copies(lists, monkeypatch, links):
    source, target = lists / YEARLY / "2014.npy", lists.parent / "uids/yearly/train/2014.npy"
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError(18, "Invalid cross-device link")))
    for line in ("4 UIDs", "4 UIDs, already there"):
        assert write(write_eval_uids, lists)["uids/yearly/train/2014"] == line
        assert (target.samefile(source), load(target)) == (links, [0, 7, 7, 8])
    save_uids(source, array([9]))
    os.utime(source, (1, 1))
    write(write_eval_uids, lists)
    assert load(target) == [9]


def test_lists_that_are_symbolic_links(lists):
    """As in the cache of huggingface_hub; a link of an older version, which leads nowhere, is replaced."""
    write(write_eval_uids, lists)
    expected = tree(lists.parent / "uids")
    (lists.parent / "blobs").mkdir()
    for path in [path for path in lists.rglob("*") if path.is_file()]:
        path.symlink_to(os.path.relpath(path.rename(lists.parent / f"blobs/{path.name}"), path.parent))
    target = lists.parent / "uids/yearly/train/2014.npy"
    target.unlink()
    target.symlink_to("../../../nowhere")
    write(write_eval_uids, lists)
    assert tree(lists.parent / "uids") == expected  # a link would not be equal to a file


def test_a_new_table_or_list_with_an_old_time_does_months_again(lists):
    """``rsync -t`` and ``cp -p`` keep times; contents count. Without such a change nothing is written again."""
    folder = lists.parent / "uids/monthly"
    write(write_eval_uids, lists)
    written = times(folder / "train")
    os.utime(lists / MONTHLY / "2014/201403.npy")
    assert (
        write(write_eval_uids, lists)["uids/monthly/train/201403"] == "3 UIDs, 8 evaluation UIDs removed, already there"
    )
    assert times(folder / "train") == written
    write_table(lists, "retrieval", {"2014": [11, 10, 7], "2015": [3, 1]})  # of other years, one more and one less
    os.utime(lists / f"{TABLES['retrieval']}.json", (1, 1))
    source = lists / MONTHLY / "201404.npy"
    before = source.stat()
    np.save(source, array([20, 21, 22]))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    write(write_eval_uids, lists)
    assert load(folder / "train/201403.npy") == [0, 2, 8]
    assert load(folder / "train/201404.npy") == [20, 21, 22]
    assert load(folder / "eval/retrieval/201403.npy") == [7]


def test_what_cannot_be_read_is_named(lists):
    np.save(lists / MONTHLY / "201404.npy", array([21, 20]))
    with pytest.raises(TicError, match=r"201404.npy is not sorted"):
        write(write_eval_uids, lists)
    assert not (lists.parent / "uids/monthly/train/201404.npy").exists()
    write_table(lists, "datacompnet", {"2014": {"n99999999": [1]}})
    with pytest.raises(TicError, match="n99999999 is not one of ImageNet's 1000 synsets"):
        write(write_classes, lists)
    (lists / f"{TABLES['retrieval']}.json").write_text('{"2014": ["x"]}')
    with pytest.raises(TicError, match="'x' is not a UID"):
        write(write_eval_uids, lists)


def test_lists_through_a_filter(lists, tmp_path):
    """Those of training lose what the filter lacks; a list is filtered once."""
    write(write_eval_uids, lists)
    save_uids(tmp_path / "filter.npy", array([1, 7, 20, 20, 30]))
    arguments = (str(tmp_path / "lists/uids"), str(tmp_path / "filter.npy"), str(tmp_path / "lists/bestpool"))
    for again in ("", ", already there"):
        assert said(filter_lists(*arguments, "bestpool")) == {
            "yearly/train_bestpool/2014.npy": f"2 of 4 UIDs{again}",
            "monthly/train_bestpool/201403.npy": f"1 of 3 UIDs{again}",
            "monthly/train_bestpool/201404.npy": f"2 of 3 UIDs{again}",
        }
    assert set(tree(tmp_path / "lists/bestpool/yearly/eval")) == set(tree(tmp_path / "lists/uids/yearly/eval"))
    assert load(tmp_path / "lists/bestpool/yearly/train_bestpool/2014.npy") == [7, 7]
    assert load(tmp_path / "lists/bestpool/yearly/eval/retrieval/2014.npy") == [1, 2, 3]
    with pytest.raises(ValueError, match="unknown filter 'worst'"):
        list(filter_lists(*arguments, "worst"))


def test_classes(lists):
    write(write_eval_uids, lists)
    assert write(write_classes, lists) == {
        "classes/yearly/eval/datacompnet/2014": "4 UIDs",
        "classes/monthly/eval/datacompnet/201403": "3 UIDs",
        "classes/yearly/eval/datacompnet/2015": "2 UIDs",
    }
    folder = lists.parent / "classes"
    assert classes_of(folder / "yearly/eval/datacompnet/2014.npy") == [(1, 1), (4, 1), (5, 0), (6, 0)]
    assert classes_of(folder / "monthly/eval/datacompnet/201403.npy") == [(1, 1), (4, 1), (5, 0)]


def test_imagenet():
    synsets, texts = imagenet_synsets(), imagenet_texts()
    assert synsets == sorted(set(synsets))
    assert (len(synsets), *synsets[:3], synsets[999]) == (1000, TENCH, GOLDFISH, SHARK, "n15075141")
    assert (len(texts["classnames.txt"]), *texts["classnames.txt"][:2]) == (1000, "tench", "goldfish")
    assert len(texts["zeroshot_classification_templates.txt"]) == 80
    assert texts["zeroshot_classification_templates.txt"][0] == "a bad photo of a {c}."


def test_the_scripts_of_uids_and_classes(lists):
    """With the lists where they are by default, then elsewhere."""
    output = lists.parent
    classes, uids = (f"{SCRIPTS}/generate_{name}.py" for name in ("datacompnet_uid2classid", "eval_uids"))
    done = [call_script(script, "--output-path", output) for script in (classes, uids)]
    assert "no classes by month" in done[0].stdout
    missing = done[1].stdout.splitlines()[-1]
    assert missing.startswith("missing training lists: 109 of 112; to download them: python")
    assert missing.endswith(f"download_uids.py --output-path {lists} --lists yearly monthly")
    moved = lists.rename(output.parent / "elsewhere")
    done = call_script(classes, "--output-path", output, "--lists", moved)
    assert "classes/monthly/eval/datacompnet/201403: 3 UIDs" in done.stdout
    done = call_script(uids, "--output-path", output)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.startswith(f"error: {output}/released has no {TABLES['retrieval']}.json; to download it: ")


def test_the_script_of_restricted_classes(tmp_path):
    """ImageNet's dogs are 151 to 268, its animals 0 to 397, cats 281 to 293."""
    done = call_script(f"{SCRIPTS}/imagenet_restricted_classes.py", "--output-path", tmp_path / "out")
    assert "dog: 118 classes" in done.stdout
    groups = json.loads((tmp_path / "out/imagenet_restricted_classes.json").read_text())
    names = json.loads((tmp_path / "out/imagenet_restricted_classnames.json").read_text())
    assert len(groups) == len(names) == 11
    ranges = [list(range(398)), list(range(151, 269)), list(range(281, 294))]
    assert [groups[name] for name in ("animal", "dog", "cat")] == ranges
    assert set(names["phone"]) == {"mobile phone", "rotary dial telephone", "payphone"}
