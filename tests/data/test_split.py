import pytest

from tic_clip import TicError
from tic_clip.data.split import dataset_size, list_shards, sizes_if_known, split_folders, split_sizes
from tic_clip.storage import write_json, write_text


def make_sizes(folder, sizes):
    write_json(f"{folder}/sizes.json", sizes)
    return str(folder)


def make_part(folder, part, parts):
    make_sizes(f"{folder}/{part:05d}", {"00000000.tar": part + 1})
    write_json(f"{folder}/{part:05d}/meta.json", {"arguments": {"part": part, "parts": parts}})
    return f"{folder}/{part:05d}"


@pytest.fixture(params=["local", "cloud"])
def folder(request, tmp_path):
    """A folder without anything in it, on the disk or in a cloud, where it has the name of an earlier test's."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3") + "/f"


def test_both_layouts(folder):
    for name in ("1/1.tar", "1/0.tar", "0/0.tar", "1-b/0.tar", "test/00.tar", ".old/0.tar", "2/x.json"):
        write_text(f"{folder}/{name}", name)
    names = ["0/0.tar", "1/0.tar", "1/1.tar", "1-b/0.tar", "test/00.tar"]
    assert list_shards(folder) == list_shards(f"{folder}/") == {f"{folder}/{name}": len(name) for name in names}
    assert list(list_shards(f"{folder}/1")) == [f"{folder}/1/0.tar", f"{folder}/1/1.tar"]


def test_tars_that_would_not_be_read(tmp_path):
    for folder, name in ((tmp_path / "a", "0.tar"), (tmp_path / "b", "1/b/0.tar"), (tmp_path / "c", "1/1.TAR")):
        write_text(folder / "1/0.tar", "")
        write_text(folder / name, "")
        message = "/1/1.TAR would not be read: rename" if "TAR" in name else "0.tar do not lie equally deep below"
        with pytest.raises(TicError, match=f"^{folder}.*{message}"):
            list_shards(folder)


def test_clip_benchmarks_links_are_not_a_part(tmp_path, folder):
    """``test/`` holds them on a disk, and copies of the shards once they were brought to a cloud."""
    for part in range(2):
        write_text(make_part(folder, part, 2) + "/00000000.tar", "")
        if folder == str(tmp_path):
            (tmp_path / "test").mkdir(exist_ok=True)
            (tmp_path / f"test/{part}.tar").symlink_to(f"../{part:05d}/00000000.tar")
        else:
            write_text(f"{folder}/test/{part}.tar", "")
            write_text(f"{folder}/test/nshards.txt", "2\n")
    parts = [f"{folder}/{part:05d}" for part in range(2)]
    assert split_folders(folder) == parts
    assert (
        sizes_if_known(folder) == split_sizes(folder) == {f"{part}/00000000.tar": i + 1 for i, part in enumerate(parts)}
    )
    assert list(list_shards(folder)) == list(split_sizes(folder))
    assert list(list_shards(f"{folder}/test")) == [f"{folder}/test/{part}.tar" for part in range(2)]


def test_flat_split(tmp_path):
    make_sizes(tmp_path, {"00000001.tar": 2, "00000000.tar": 3, "00000002.tar": 0})
    make_sizes(tmp_path / "part", {"00000000.tar": 9})  # no part: the split has a table of its own
    assert split_folders(tmp_path) == [str(tmp_path)]
    assert list(split_sizes(tmp_path).items()) == [(f"{tmp_path}/00000000.tar", 3), (f"{tmp_path}/00000001.tar", 2)]


def test_parts_from_elsewhere(folder):
    for part, count in (("01", 5), ("00", 4), ("02", 0)):
        make_sizes(f"{folder}/{part}", {"1.tar": count, "0.tar": 1})
    write_json(f"{folder}/00/meta.json", {"arguments": None})
    write_text(f"{folder}/logs/log", "")
    assert split_folders(folder) == [f"{folder}/{part}" for part in ("00", "01", "02")]
    names = [("00/0", 1), ("00/1", 4), ("01/0", 1), ("01/1", 5), ("02/0", 1)]
    assert list(split_sizes(folder).items()) == [(f"{folder}/{name}.tar", count) for name, count in names]
    write_text(f"{folder}/c/0.tar", "")
    with pytest.raises(TicError, match=f"^{folder}/c has shards but no sizes.json: finish reshard first, or run add_"):
        split_folders(folder)


def test_all_parts_must_be_there(folder):
    for part in (0, 1, 3):
        make_part(folder, part, 4)
    make_sizes(f"{folder}/00002", {"00000000.tar": 3})
    with pytest.raises(TicError, match=f"^{folder} has 3 of 4 parts: finish reshard first$"):  # meta.json comes last
        split_folders(folder)
    make_part(folder, 2, 4)
    assert list(split_sizes(f"{folder}/").values()) == [1, 2, 3, 4]
    assert split_sizes(f"{folder}/00002") == {f"{folder}/00002/00000000.tar": 3}  # a part is a split of its own
    make_part(folder, 4, 5)
    with pytest.raises(TicError, match=f"^{folder} has 5 of 4 or 5 parts: finish reshard first$"):
        split_folders(folder)
    write_json(f"{folder}/00002/meta.json", [])
    with pytest.raises(TicError, match=f"^{folder}/00002/meta.json is not a JSON object$"):
        split_folders(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        *((table, "sizes.json is not a JSON object of") for table in (b"[]", b"{", b"\xff", b'{"a": -1}')),
        *((table, "holds no sample") for table in (b"{}", b'{"0.tar": 0, "1.tar": 0}')),
        (None, "has no sizes.json: finish reshard.py, or count shards"),
    ],
)
def test_tables_without_samples(tmp_path, table, message):
    if table is not None:
        (tmp_path / "sizes.json").write_bytes(table)
    with pytest.raises(TicError, match=f"{tmp_path}.{message}"):
        split_sizes(tmp_path)


def test_shards_without_a_table(folder):
    for call in (list_shards, split_sizes):
        with pytest.raises(TicError, match=f"{folder}/nothing is missing"):
            call(f"{folder}/nothing")
    write_text(f"{folder}/0.tar", "")
    make_sizes(f"{folder}/old", {"0.tar": 1})
    assert sizes_if_known(folder) == {f"{folder}/0.tar": None}
    make_sizes(folder, {})
    assert sizes_if_known(folder) == {}


def test_each_shard_is_looked_up_in_its_own_folder(folder, monkeypatch, tmp_path):
    a = make_sizes(f"{folder}/a", {"0.tar": 10, "1.tar": 20})
    b = make_sizes(f"{folder}/b", {"0.tar": 300, "1.tar": 400})
    assert dataset_size([f"{a}/0.tar", f"{b}/1.tar", f"{a}/1.tar"]) == (430, 3)
    assert dataset_size([f"{b}/0.tar", f"{a}/0.tar", f"{b}/0.tar"]) == (610, 3)  # a shard given twice is read twice
    assert dataset_size(iter([])) == (0, 0)
    with pytest.raises(TicError, match=f"{b}/sizes.json has no entry for 2.tar"):
        dataset_size([f"{a}/0.tar", f"{b}/2.tar"])
    with pytest.raises(TicError, match=f"{folder} has no sizes.json"):
        dataset_size([f"{a}/0.tar", f"{folder}/0.tar"])
    make_sizes(tmp_path, {"0.tar": 4})
    monkeypatch.chdir(tmp_path)
    assert dataset_size(["0.tar"]) == (4, 1)


def test_few_requests(s3_faulty, s3):
    for part in range(4):
        make_part(f"{s3}/parts", part, 4)
    make_sizes(f"{s3}/flat", {f"{i}.tar": 1 for i in range(9)})
    s3_faulty.requests.clear()
    flat = split_sizes(f"{s3}/flat")
    assert [method for method, _ in s3_faulty.requests] == ["GET"]
    split_sizes(f"{s3}/parts")
    assert len(s3_faulty.requests) == 1 + 2 + 4 * 2  # no table in the split, its folders, two tables a part
    assert dataset_size(flat) == (9, 9)
    assert len(s3_faulty.requests) == 11
    assert s3_faulty.count("HEAD") == 0
