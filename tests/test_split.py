import io
import json
import tarfile

import pytest
from conftest import write_tar

from tic_clip import TicError
from tic_clip.data.split import (
    EmptySplitError,
    count_samples,
    dataset_size,
    list_shards,
    list_tars,
    read_sizes,
    sizes_if_known,
    split_folders,
    split_sizes,
    write_sizes,
)
from tic_clip.data.tar import open_shard, samples
from tic_clip.storage import upload, write_json, write_text


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
        with pytest.raises(TicError, match=f"{name} is missing or not a folder"):
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
        with pytest.raises(TicError, match=r"nothing is missing: .*reshard.py makes splits"):
            read(tmp_path / "nothing")
    with pytest.raises(TicError, match=f"{tmp_path} has no sizes.json"):
        read_sizes(str(tmp_path))


@pytest.mark.parametrize("table", [[], "text", 3, {"0.tar": None}, {"0.tar": -1}, {"0.tar": 1.5}, {"0.tar": True}])
def test_table_that_is_none(tmp_path, table):
    make_sizes(tmp_path, table)
    with pytest.raises(
        TicError, match=f"{tmp_path}/sizes.json is not a JSON object of shard name -> number of samples"
    ):
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


@pytest.fixture(params=["local", "cloud"])
def folder(request, tmp_path):
    """A folder without anything in it, on the disk or in a cloud, where it has the name of an earlier test's."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3") + "/f"


def test_both_layouts(folder):
    for name in ("1/00000001.tar", "1/00000000.tar", "0/00000000.tar", "1-b/00000000.tar", ".old/0.tar", "2/x.json"):
        write_text(f"{folder}/{name}", name)
    expected = [
        (f"{folder}/0/00000000.tar", 14),
        (f"{folder}/1/00000000.tar", 14),
        (f"{folder}/1/00000001.tar", 14),
        (f"{folder}/1-b/00000000.tar", 16),
    ]
    assert list_shards(folder) == list_shards(f"{folder}/") == expected
    assert list_tars(folder) == [path for path, _ in expected]
    write_text(f"{folder}/00000000.tar", "flat")  # then the folders are something else
    assert list_shards(folder) == [(f"{folder}/00000000.tar", 4)]


def test_clip_benchmarks_links_are_no_part(folder):
    """``test/`` holds them on a disk, and copies of the shards once they were brought to a cloud."""
    for part in range(2):
        write_text(make_part(folder, part, 2) + "/00000000.tar", "")
        write_text(f"{folder}/test/{part}.tar", "")
    expected = [f"{folder}/{part:05d}/00000000.tar" for part in range(2)]
    assert list_tars(folder) == list(split_sizes(folder)) == expected
    assert sizes_if_known(folder) == dict(zip(expected, (1, 2), strict=True))
    assert split_folders(folder) == [f"{folder}/{part:05d}" for part in range(2)]
    assert list_tars(f"{folder}/test") == [f"{folder}/test/{part}.tar" for part in range(2)]


def test_shards_without_a_table(folder):
    write_text(f"{folder}/0.tar", "")
    make_sizes(f"{folder}/old", {"0.tar": 1})
    assert sizes_if_known(folder) == {f"{folder}/0.tar": None}
    make_sizes(folder, {"0.tar": 2})
    assert sizes_if_known(folder) == {f"{folder}/0.tar": 2}
    write_sizes(folder, {})
    with pytest.raises(EmptySplitError, match=f"^{folder} holds no sample$"):
        sizes_if_known(folder)


def make_part(folder, part, parts, sizes=None):
    folder = f"{folder}/{part:05d}"
    make_sizes(folder, {"00000000.tar": part + 1} if sizes is None else sizes)
    write_json(f"{folder}/meta.json", {"arguments": {"part": part, "parts": parts}})
    return folder


def test_all_parts_must_be_there(folder):
    for part in (0, 1, 3):
        make_part(folder, part, 4)
    for call in (split_folders, split_sizes):
        with pytest.raises(TicError, match=f"^{folder} has 3 of 4 parts: finish reshard first$"):
            call(folder)
    make_sizes(f"{folder}/00002", {"00000000.tar": 3})
    with pytest.raises(TicError, match=f"^{folder} has 3 of 4 parts"):  # its meta.json is written last
        split_folders(folder)
    write_json(f"{folder}/00002/meta.json", {"arguments": {"part": 2, "parts": 4}})
    assert split_folders(folder) == [f"{folder}/{part:05d}" for part in range(4)]
    assert list(split_sizes(f"{folder}/").values()) == [1, 2, 3, 4]
    assert split_sizes(f"{folder}/00002") == {f"{folder}/00002/00000000.tar": 3}  # a part is a split of its own
    write_json(f"{folder}/00003/meta.json", {"arguments": {"part": 3, "parts": 5}})
    with pytest.raises(TicError, match=f"^{folder} has parts of a split in 4 and of one in 5: make it again$"):
        split_folders(folder)


@pytest.mark.parametrize("meta", [{}, {"arguments": None}, {"arguments": {"part": "1", "parts": 4}}])
def test_parts_from_elsewhere(folder, meta):
    for part in ("a", "b"):
        make_sizes(f"{folder}/{part}", {"0.tar": 1})
        write_json(f"{folder}/{part}/meta.json", meta)
    assert split_folders(folder) == [f"{folder}/a", f"{folder}/b"]
    write_text(f"{folder}/c/0.tar", "")
    with pytest.raises(TicError, match=f"^{folder}/c has shards but no sizes.json: finish reshard first, or run add_"):
        split_folders(folder)


def test_a_damaged_meta(folder):
    make_sizes(f"{folder}/a", {"0.tar": 1})
    write_json(f"{folder}/a/meta.json", [])
    with pytest.raises(TicError, match=f"^{folder}/a/meta.json is not a JSON object$"):
        split_folders(folder)


def test_a_table_is_read_again_when_it_was_written(folder):
    make_sizes(folder, {"0.tar": 1})
    assert split_sizes(folder) == {f"{folder}/0.tar": 1}
    write_sizes(folder, {"1.tar": 3, "0.tar": 2})
    assert split_sizes(folder) == {f"{folder}/0.tar": 2, f"{folder}/1.tar": 3}


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


ODD = [
    [],
    [("a.jpg", b"1"), ("a.json", b"2" * 600), ("b.jpg", b"3"), ("b.jpg", b"4")],
    [(f"{'x' * 150}-{i}.jpg", b"1" * 5000) for i in range(3)],
    [("dir/a.jpg", b""), ("dir/b.jpg", b""), ("no-suffix", b"")],
]


def write_odd(path, members, form, mtime=0.0):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("members", ODD)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_counting_is_reading(tmp_path, folder, members, form, mtime):
    write_odd(tmp_path / "x.tar", members, form, mtime)
    with open_shard(tmp_path / "x.tar") as shard:
        expected = len(list(samples(shard)))
    write(tmp_path / "x.tar", folder)
    assert count_samples(f"{folder}/x.tar") == expected


def write(local, folder):
    """Bring a local file to a folder."""
    if "://" in folder:
        upload(local, f"{folder}/{local.name}")


def test_a_size_in_a_pax_header(tmp_path, folder):
    """Of a file of 8 GiB or more; the usual place for it holds nothing, and what lies there may look like the end."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 1000, {"size": "1000"}
            tar.addfile(info, io.BytesIO(bytes(1000)))
    data = (tmp_path / "x.tar").read_bytes()
    for name in (b"a.jpg", b"b.jpg"):
        start = data.index(name)
        head = data[start : start + 512].replace(b"00000001750", b"00000000000")
        total = sum(head[:148]) + sum(head[156:]) + 8 * 32
        data = data[:start] + head[:148] + b"%06o\0 " % total + head[156:] + data[start + 512 :]
    (tmp_path / "x.tar").write_bytes(data)
    write(tmp_path / "x.tar", folder)
    assert count_samples(f"{folder}/x.tar") == 2


def test_directories_and_links_are_no_samples(tmp_path, folder):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.REGTYPE):
            info = tarfile.TarInfo("a.jpg")
            info.type, info.size = kind, 1000 if kind == tarfile.SYMTYPE else 0  # a link's size is that of no data
            tar.addfile(info)
    write(tmp_path / "x.tar", folder)
    assert count_samples(f"{folder}/x.tar") == 1


def test_counting_names_a_damaged_shard(tmp_path, folder):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 5000), ("b.jpg", b"2" * 5000)])
    data = (tmp_path / "x.tar").read_bytes()
    header = data[:600] + b"x" + data[601:]
    for bad in (
        b"",
        data[:3000],
        data[:5632],
        data[:7000],
        b"x" * 2000,
        b"x" + data[1:],
        data[:148] + b"x" + data[149:],
    ):
        (tmp_path / "x.tar").write_bytes(bad)
        write(tmp_path / "x.tar", folder)
        with pytest.raises(TicError, match=f"^{folder}/x.tar: (empty|truncated|damaged|wrong)") as error:
            count_samples(f"{folder}/x.tar")
        assert "\n" not in str(error.value)
    (tmp_path / "x.tar").write_bytes(header)  # data, which nobody looks at
    write(tmp_path / "x.tar", folder)
    assert count_samples(f"{folder}/x.tar") == 2
    with pytest.raises(TicError, match=f"^{folder}/y.tar is missing$"):
        count_samples(f"{folder}/y.tar")
