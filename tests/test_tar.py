import errno
import io
import tarfile
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import webdataset

from tic_clip import TicError
from tic_clip.data import tar
from tic_clip.data.tar import (
    END,
    HEADER,
    Sample,
    header,
    headers,
    members,
    octal,
    open_shard,
    read_table,
    samples,
    split_name,
    write_shard,
)
from tic_clip.storage import to_path

CONTENT = [
    ("0-0", {"png": b"p" * 700, "json": b'{"a": 1}', "txt": b""}),
    ("1-0", {"png": b"q" * 512, "json": b"{}", "txt": "größe".encode(), "cls": b"3"}),
]
LONG = "folder/" * 20 + "name.png"  # 148 bytes: ustar cuts it at a slash
LONGER = "n" * 180 + ".png"


def tar_of(entries, **options):
    """A tar that Python's tarfile made of (name or TarInfo, data) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for info, data in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def as_tarfile_reads(shard):
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]


def as_we_read(shard):
    return [(name, shard[start : start + size]) for name, start, size in members(shard)]


def raw(name, data, kind=b"0", size_field=None, signed=False):
    """One member with any type and size field, and a right checksum."""
    block = bytearray(header(name, len(data)))
    block[156:157] = kind
    if size_field:
        block[124:136] = size_field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(byte - 256 * (signed and byte > 127) for byte in block)
    return bytes(block) + data + bytes(-len(data) % 512)


def pax(**values):
    """PAX records; each begins with its own length."""
    records = b""
    for key, value in values.items():
        rest = f" {key}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 20) if len(str(n)) + len(rest) == n)
        records += str(length).encode() + rest
    return records


def link(kind, name="link.png"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "a.png"
    return info, b""


SIZES = [
    (f"{size}.png", bytes(range(256)) * (size // 256) + b"x" * (size % 256)) for size in (0, 1, 511, 512, 513, 5000)
]
SKIPPED = [link(kind) for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)]
USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT


@pytest.mark.parametrize(
    ("form", "entries"),
    [
        (USTAR, []),
        (USTAR, SIZES),
        (USTAR, [(LONG, b"1"), ("short.png", b"2"), ("n" * 100, b"3")]),
        (GNU, [(LONG, b"1"), (LONGER, b"22"), ("short.png", b"3"), (LONGER * 9, b"4")]),
        (PAX, [(LONG, b"1"), (LONGER, b"22"), ("größe.png", b"3"), ("short.png", b"4"), (LONGER * 9, b"5")]),
        *((form, [SIZES[3], *SKIPPED, SIZES[4], *SKIPPED]) for form in (USTAR, GNU, PAX)),
        *((form, [link(tarfile.SYMTYPE, LONGER), ("short.png", b"1")]) for form in (GNU, PAX)),
        (GNU, [("gr\udcf6ße.png", b"no UTF-8"), ("./a/../b.png", b"")]),
    ],
)
def test_members_are_those_that_tarfile_finds(form, entries):
    shard = tar_of(entries, format=form)
    assert as_we_read(shard) == as_tarfile_reads(shard)
    assert len(as_we_read(shard)) == sum(isinstance(info, str) for info, _ in entries)


def test_global_pax_header():
    shard = tar_of([("a.png", b"1"), (LONGER, b"2")], format=PAX, pax_headers={"comment": "of git archive"})
    assert shard[156:157] == b"g"
    assert as_we_read(shard) == as_tarfile_reads(shard) == [("a.png", b"1"), (LONGER, b"2")]


def test_old_types_and_sizes():
    size = b"\x80" + (600).to_bytes(11, "big")  # base 256
    shard = raw("a.png", b"a", b"\0") + raw("b.png", b"b" * 600, size_field=size) + raw("c.png", b"c") + END
    assert as_we_read(shard) == as_tarfile_reads(shard) == [("a.png", b"a"), ("b.png", b"b" * 600), ("c.png", b"c")]


def test_checksum_of_signed_bytes():
    shard = raw("gr\udcf6\udcff.png", b"a", signed=True) + raw("gr\udcf6\udcff.png", b"b") + END
    assert as_we_read(shard) == as_tarfile_reads(shard) == [("gr\udcf6\udcff.png", b"a"), ("gr\udcf6\udcff.png", b"b")]


def test_size_in_a_pax_record():
    """It counts for the next file, and for no other."""
    size = b"00000000003\0"
    entries = raw("x", pax(size=700, path="a/b.png"), b"x"), raw("cut", b"a" * 700, size_field=size), raw("c.png", b"c")
    shard = b"".join(entries) + END
    assert as_we_read(shard) == as_tarfile_reads(shard) == [("a/b.png", b"a" * 700), ("c.png", b"c")]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_size_of_an_entry_without_data(kind):
    """Some tars give a link the size of what it leads to."""
    shard = raw("a.png", b"", kind, size_field=b"00000001000\0") + raw("b.png", b"b") + END
    assert as_we_read(shard) == as_tarfile_reads(shard) == [("b.png", b"b")]


def test_kinds_of_entries_are_counted():
    ignored = Counter()
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"V", b"S")
    shard = b"".join(raw("a.png", b"", kind) for kind in kinds) + raw("L", LONGER.encode(), b"L") + raw("b", b"b") + END
    assert [name for name, _, _ in members(shard, ignored)] == [LONGER]
    assert ignored == {"directory": 1, "link": 2, "device": 2, "other entry": 2}


def test_what_follows_the_end_is_not_read():
    shard = tar_of(SIZES)
    assert as_we_read(shard + b"rubbish") == as_we_read(shard + shard) == SIZES


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("0.png", "0", "png"),
        ("a/b.c/0.JSON", "a/b.c/0", "json"),
        ("./0.seg.png", "./0", "seg.png"),
        ("a/0", "a/0", ""),
    ],
)
def test_names(name, key, suffix):
    assert split_name(name) == (key, suffix)


def test_samples():
    names = ["0.png", "0.json", "1.png", "1.png", "1.txt", "a/1.txt", "1.json"]
    shard = tar_of([(name, str(i).encode()) for i, name in enumerate(names)])
    found = [
        (sample.key, {suffix: sample.read(shard, suffix) for suffix in sample.members}) for sample in samples(shard)
    ]
    assert found == [
        ("0", {"png": b"0", "json": b"1"}),
        ("1", {"png": b"2"}),
        ("1", {"png": b"3", "txt": b"4"}),
        ("a/1", {"txt": b"5"}),
        ("1", {"json": b"6"}),
    ]


def test_no_samples():
    assert list(samples(END)) == []
    table = read_table(END)
    assert (table.keys, table.start.tolist(), table.find("png").tolist()) == ([], [0], [])


def test_table_by_hand():
    names = ["0.png", "0.json", ".png", "1.JSON", "README", "2.txt", "2.png", "2.png", "c/.txt"]
    ignored = Counter()
    shard = tar_of([(name, b"d" * i) for i, name in enumerate(names)], format=USTAR)
    table = read_table(shard, ignored)
    assert table.keys == ["0", "1", "2", "2"]
    assert table.start.tolist() == [0, 2, 3, 5, 6]
    assert table.suffixes == ["png", "json", "txt"]
    assert table.suffix.tolist() == [0, 1, 1, 2, 0, 0]
    assert table.size.tolist() == [0, 1, 3, 5, 6, 7]
    assert [shard[start : start + 1] for start in table.offset.tolist()[1:]] == [b"d"] * 5
    assert ignored == {"file without a key or a suffix": 3}
    assert table.find("png").tolist() == [0, -1, 4, 5]
    assert table.find("json").tolist() == [1, 2, -1, -1]
    assert table.find("cls").tolist() == [-1] * 4
    position, member = table.members_of(np.array([2, 0, 2, 1]))
    assert position.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert member.tolist() == [3, 4, 0, 1, 3, 4, 2]
    part = table.take(np.array([3, 1]))
    assert (part.keys, part.start.tolist(), part.size.tolist()) == (["2", "1"], [0, 1, 2], [7, 3])
    assert part.find("json").tolist() == [-1, 1]


def test_a_suffix_of_its_own_for_each_member():
    """Names with dots in them: memory stays in proportion to the shard."""
    shard = b"".join(header(f"{i}.{i}.jpg", 0) for i in range(4000)) + END
    tracemalloc.start()
    table = read_table(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table.keys) == len(table.suffixes) == 4000
    assert peak < 10 * len(shard)


def test_many_entries():
    """More than are looked at at a time, with a fault behind them, or within the last ones."""
    entries = [header(f"{i}.png", 0) for i in range(10_000)]
    shard = b"".join(entries) + END
    assert [name for name, _, _ in members(shard)] == [f"{i}.png" for i in range(10_000)]
    for damaged in (9_999, 4096, 4095, 0):
        found = []
        with pytest.raises(TicError, match=f"wrong header checksum at byte {512 * damaged}"):
            found.extend(members(shard[: 512 * damaged] + b"x" + shard[512 * damaged + 1 :]))
        assert len(found) == damaged


def test_shard_is_read_by_tarfile_and_webdataset(tmp_path):
    path = tmp_path / "0.tar"
    assert write_shard(path, CONTENT) == 2
    expected = [(f"{key}.{suffix}", data) for key, content in CONTENT for suffix, data in content.items()]
    assert as_tarfile_reads(path.read_bytes()) == as_we_read(path.read_bytes()) == expected
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read] == CONTENT


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1])
def test_header_is_tarfiles(size):
    info = tarfile.TarInfo("größe.png")
    info.size = size
    assert header("größe.png", size) == info.tobuf(tarfile.USTAR_FORMAT, "utf-8")


def test_headers_of_many_members():
    names, sizes = ["a.png", "größe.json", "n" * 100, "b"], [0, 1, 8**11 - 1, 512]
    table = headers([name.encode() for name in names], np.array(sizes))
    assert table.shape == (4, 512)
    assert table.tobytes() == b"".join(map(header, names, sizes))
    assert table.view(HEADER)["size"].ravel().tolist() == [b"%011o" % size for size in sizes]
    assert headers([], np.array([])).shape == (0, 512)


def test_octal():
    assert octal(np.array([0, 7, 8, 511]), 3).tolist() == [b"000", b"007", b"010", b"777"]


def test_too_large_a_member():
    with pytest.raises(TicError, match="member of 8589934592 bytes: a tar's limit is 8 GiB"):
        header("a", 8**11)


def test_too_long_a_name():
    assert len(header("n" * 100, 0)) == 512
    with pytest.raises(TicError, match="longer than 100 bytes: nnn"):
        header("n" * 101, 0)


def test_equal_data_give_equal_tars(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / name, iter(CONTENT))
    shard = (tmp_path / "a").read_bytes()
    assert shard == (tmp_path / "b").read_bytes()
    assert shard == tar_of(as_tarfile_reads(shard), format=USTAR)[: len(shard)]
    assert len(shard) == 512 * (7 + 2 + 1 + 0 + 1 + 1 + 1 + 1 + 2)  # headers, data, end


def test_cut_off_anywhere_is_seen(tmp_path):
    write_shard(tmp_path / "0.tar", CONTENT)
    shard = (tmp_path / "0.tar").read_bytes()
    whole, read = list(members(shard)), []
    for cut in range(len(shard) - 512):
        read.clear()
        with pytest.raises(TicError, match="truncated"):
            read.extend(members(shard[:cut]))
        assert read == [(name, start, size) for name, start, size in whole if start + size <= cut]
    assert len(list(members(shard[:-512]))) == 7


def test_every_byte_of_a_header_counts():
    shard = bytearray(tar_of([("a.png", b"1")], format=USTAR))
    for i in range(512):
        shard[i] ^= 0xFF
        with pytest.raises(TicError, match="at byte 0"):
            list(members(shard))
        shard[i] ^= 0xFF
    assert as_we_read(bytes(shard)) == [("a.png", b"1")]


@pytest.mark.parametrize(
    "records",
    [
        *(b"rubbish", b"0 path=a\n", b"2 path=a\n", b"-5 path=a\n", b" path=a\n", b"99 path=a\n"),
        *(b"9" * 5000 + b" path=a\n", pax(size="x"), pax(size=""), pax(size="-1"), pax(size="9" * 5000)),
    ],
)
def test_damaged_pax_header(records):
    with pytest.raises(TicError, match="damaged PAX header at byte 512"):
        list(members(raw("x", records, b"x") + raw("a.png", b"") + END))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shard: b"", "empty file"),
        (lambda shard: shard[:1000], "truncated"),
        (lambda shard: shard[:-1024], "truncated"),
        (lambda shard: b"<html>404</html>" * 100, "damaged header at byte 0"),
        (lambda shard: shard.replace(b"0-0.json", b"0-0.jsom"), "wrong header checksum at byte 1536"),
    ],
)
def test_error_names_the_shard(tmp_path, damage, message):
    path = tmp_path / "00000007.tar"
    write_shard(path, CONTENT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TicError) as error, open_shard(path) as shard:
        list(samples(shard))
    assert str(error.value).startswith(f"{path}: {message}")


def test_missing_shard(tmp_path):
    with pytest.raises(TicError, match=f"{tmp_path}/0.tar is missing"), open_shard(tmp_path / "0.tar"):
        pass


def test_failed_write_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "0.tar"
    write_shard(path, CONTENT[:1])
    before = path.read_bytes()

    def content():
        yield CONTENT[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_shard(path, content())
    with pytest.raises(TicError, match="longer than 100 bytes"):
        write_shard(path, [("k" * 100, {"png": b""})])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_read_is_a_byte_range():
    assert Sample("0", {"png": (2, 3)}).read(b"0123456789", "png") == b"234"
    assert [tar.padded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_shard_in_the_cloud(tmp_path, s3):
    for path in (f"{s3}/0.tar", tmp_path / "0.tar"):
        write_shard(path, CONTENT)
    with open_shard(f"{s3}/0.tar") as shard:
        assert shard[:] == (tmp_path / "0.tar").read_bytes()
    to_path(f"{s3}/1.tar").write_bytes(b"")
    for name, message in (("1.tar", ": empty file"), ("2.tar", " is missing")):
        with pytest.raises(TicError, match=f"{s3}/{name}{message}"), open_shard(f"{s3}/{name}"):
            pass
