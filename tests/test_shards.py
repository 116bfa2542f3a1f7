import json

import pytest

from tic_clip import TicError
from tic_clip.shards import dataset_size, list_tars, read_sizes, split_folders, split_sizes
from tic_clip.storage import write_json, write_text


def make_sizes(folder, sizes):
    write_json(f"{folder}/sizes.json", sizes)
    return str(folder)


def test_tars_of_a_folder(tmp_path):
    for name in ("b.tar", "a.tar", ".c.tar.1.tmp", "sizes.json"):
        (tmp_path / name).touch()
    assert list_tars(tmp_path) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_no_folder_and_no_tars(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(TicError, match=f"{name} is missing or no folder"):
            list_tars(tmp_path / name)
    with pytest.raises(TicError, match=r"holds no \.tar file"):
        list_tars(tmp_path)


def test_flat_split(tmp_path):
    make_sizes(tmp_path, {"00000001.tar": 2, "00000000.tar": 3, "00000002.tar": 0})
    make_sizes(tmp_path / "part", {"00000000.tar": 9})  # no part: the split has a table of its own
    assert split_folders(tmp_path) == [str(tmp_path)]
    assert list(split_sizes(tmp_path).items()) == [(f"{tmp_path}/00000000.tar", 3), (f"{tmp_path}/00000001.tar", 2)]


def test_split_in_parts(tmp_path):
    for part, count in (("01", 5), ("00", 4), ("02", 0)):
        make_sizes(tmp_path / part, {"00000000.tar": count, "00000001.tar": 1})
    (tmp_path / "logs").mkdir()
    assert split_folders(tmp_path) == [str(tmp_path / part) for part in ("00", "01", "02")]
    assert [(path.removeprefix(str(tmp_path)), count) for path, count in split_sizes(tmp_path).items()] == [
        ("/00/00000000.tar", 4),
        ("/00/00000001.tar", 1),
        ("/01/00000000.tar", 5),
        ("/01/00000001.tar", 1),
        ("/02/00000001.tar", 1),
    ]


def test_split_without_a_table(tmp_path):
    for read in (split_folders, split_sizes):
        with pytest.raises(TicError, match=r"has no sizes.json") as error:
            read(tmp_path)
        assert str(tmp_path) in str(error.value)
        with pytest.raises(TicError, match="nothing is missing: make this split first"):
            read(tmp_path / "nothing")
    with pytest.raises(TicError, match=f"{tmp_path} has no sizes.json"):
        read_sizes(str(tmp_path))


@pytest.mark.parametrize("table", [[], "text", 3, {"0.tar": None}, {"0.tar": -1}, {"0.tar": 1.5}, {"0.tar": True}])
def test_table_that_is_none(tmp_path, table):
    make_sizes(tmp_path, table)
    with pytest.raises(TicError, match=f"{tmp_path}/sizes.json is no table of shard name -> number of samples"):
        split_sizes(tmp_path)


@pytest.mark.parametrize("table", [b"", b"{", b"\xff\x00"])
def test_table_that_is_no_json(tmp_path, table):
    (tmp_path / "sizes.json").write_bytes(table)
    with pytest.raises(TicError, match=f"{tmp_path}/sizes.json is not valid JSON"):
        split_sizes(tmp_path)


@pytest.mark.parametrize("table", [{}, {"0.tar": 0, "1.tar": 0}])
def test_split_without_a_sample(tmp_path, table):
    make_sizes(tmp_path, table)
    with pytest.raises(TicError, match=f"{tmp_path} holds no sample"):
        split_sizes(tmp_path)


def test_each_shard_is_looked_up_in_its_own_folder(tmp_path):
    a = make_sizes(tmp_path / "a", {"0.tar": 10, "1.tar": 20})
    b = make_sizes(tmp_path / "b", {"0.tar": 300, "1.tar": 400, "2.tar": 500})
    assert dataset_size([f"{a}/0.tar"]) == (10, 1)
    assert dataset_size([f"{a}/0.tar", f"{b}/1.tar", f"{a}/1.tar"]) == (430, 3)
    assert dataset_size([f"{b}/0.tar", f"{a}/0.tar", f"{b}/0.tar"]) == (610, 3)  # a shard given twice is read twice
    assert dataset_size(iter([])) == (0, 0)


def test_shards_beside_the_program(tmp_path, monkeypatch):
    make_sizes(tmp_path, {"0.tar": 4})
    monkeypatch.chdir(tmp_path)
    assert dataset_size(["0.tar"]) == (4, 1)


def test_len_file_counts_where_there_is_no_table(tmp_path):
    a = make_sizes(tmp_path / "a", {"0.tar": 10})
    (tmp_path / "b").mkdir()
    (tmp_path / "b/__len__").write_text("70\n")
    assert dataset_size([f"{tmp_path}/b/0.tar", f"{a}/0.tar", f"{tmp_path}/b/1.tar"]) == (80, 3)
    (tmp_path / "a/__len__").write_text("1")
    assert dataset_size([f"{a}/0.tar"]) == (10, 1)
    (tmp_path / "b/__len__").write_text("many")
    with pytest.raises(TicError, match=f"{tmp_path}/b/__len__ holds no number"):
        dataset_size([f"{tmp_path}/b/0.tar"])


def test_shard_that_is_in_no_table(tmp_path):
    a = make_sizes(tmp_path / "a", {"0.tar": 10})
    b = make_sizes(tmp_path / "b", {"1.tar": 10})
    with pytest.raises(TicError, match=f"{b}/sizes.json has no entry for 0.tar"):
        dataset_size([f"{a}/0.tar", f"{b}/0.tar"])
    with pytest.raises(TicError, match=f"{tmp_path} has no sizes.json"):
        dataset_size([f"{a}/0.tar", f"{tmp_path}/0.tar"])


def test_in_the_cloud(s3):
    make_sizes(f"{s3}/a/00", {"0.tar": 10, "1.tar": 20})
    make_sizes(f"{s3}/a/01", {"0.tar": 300})
    write_text(f"{s3}/b/__len__", "7")
    write_text(f"{s3}/b/0.tar", "")
    assert split_sizes(f"{s3}/a") == {f"{s3}/a/00/0.tar": 10, f"{s3}/a/00/1.tar": 20, f"{s3}/a/01/0.tar": 300}
    assert dataset_size([f"{s3}/a/00/1.tar", f"{s3}/a/01/0.tar", f"{s3}/b/0.tar"]) == (327, 3)
    assert list_tars(f"{s3}/b") == [f"{s3}/b/0.tar"]
    with pytest.raises(TicError, match=r"s3://tic-test/a has no sizes.json"):
        dataset_size([f"{s3}/a/0.tar"])
    with pytest.raises(TicError, match=r"s3://tic-test/a/00/sizes.json has no entry for 9.tar"):
        dataset_size([f"{s3}/a/00/9.tar"])
    for call in (list_tars, split_sizes):
        with pytest.raises(TicError, match="s3://tic-test/nothing is missing"):
            call(f"{s3}/nothing")


def test_table_is_datacomps(tmp_path):
    """``sizes.json`` is what DataComp's own scripts read: a plain table of names and counts."""
    make_sizes(tmp_path, {"00000000.tar": 3})
    assert json.loads((tmp_path / "sizes.json").read_text()) == read_sizes(str(tmp_path)) == {"00000000.tar": 3}
