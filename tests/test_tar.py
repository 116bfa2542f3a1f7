"""``tic_clip.data.tar`` against Python's tarfile, GNU tar and webdataset."""

import errno
import io
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset

from tic_clip import TicError
from tic_clip.data.tar import (
    END,
    MAX_PADDING,
    Sample,
    headers,
    open_shard,
    read_table,
    samples,
    write_shard,
)

CONTENT = [
    ("0-0", {"png": b"p" * 700, "json": b'{"a": 1}', "txt": b""}),
    ("1-0", {"png": b"q" * 512, "json": b"{}", "txt": "größe".encode(), "cls": b"3"}),
]
LONG = "folder/" * 20 + "name.png"  # 148 bytes: ustar cuts it at a slash
LONGER = "n" * 180 + ".png"
USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT


def tar_of(entries, **options):
    """A tar that Python's tarfile made of (name or TarInfo, data) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for info, data in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def is_named(name):
    """Whether a member has a key and a suffix."""
    key, dot, suffix = name.rpartition("/")[2].partition(".")
    return bool(key and dot and suffix)


def as_tarfile_reads(shard):
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg() and is_named(info.name)]


def as_we_read(shard):
    """[(name, data)] of the members that belong to a sample."""
    table = read_table(shard)
    return [
        (f"{key}.{table.suffixes[table.suffix[i]]}", shard[table.offset[i] : table.offset[i] + table.size[i]])
        for key, start, stop in zip(table.keys, table.start, table.start[1:], strict=False)
        for i in range(start, stop)
    ]


def header(name, size):
    return headers([name.encode(errors="surrogateescape")], np.array([size])).tobytes()


def raw(name, data, kind=b"0", size_field=None):
    """One member with any type and size field, and a right checksum."""
    block = bytearray(header(name, len(data)))
    block[156:157] = kind
    block[124:136] = size_field or block[124:136]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
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


@pytest.mark.parametrize(
    ("form", "entries"),
    [
        (USTAR, []),
        (USTAR, SIZES),
        (USTAR, [(LONG, b"1"), ("short.png", b"2"), ("n" * 96 + ".png", b"3")]),
        (GNU, [(LONG, b"1"), (LONGER, b"22"), ("short.png", b"3"), (LONGER * 9, b"4")]),
        (PAX, [(LONG, b"1"), (LONGER, b"22"), ("größe.png", b"3"), ("short.png", b"4"), (LONGER * 9, b"5")]),
        *((form, [SIZES[3], *SKIPPED, SIZES[4], *SKIPPED]) for form in (USTAR, GNU, PAX)),
        *((form, [link(tarfile.SYMTYPE, LONGER), ("short.png", b"1")]) for form in (GNU, PAX)),
        (GNU, [("gr\udcf6ße.png", b"not UTF-8"), ("./a/../b.png", b"")]),
    ],
)
def test_members_are_those_that_tarfile_finds(form, entries):
    shard = tar_of(entries, format=form)
    assert as_we_read(shard) == as_tarfile_reads(shard)
    assert len(as_we_read(shard)) == sum(isinstance(info, str) for info, _ in entries)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (raw("x", pax(comment="of git archive"), b"g"), []),
        (raw("a.png", b"a", b"\0"), [("a.png", b"a")]),
        (raw("a.png", b"a" * 600, size_field=b"\x80" + (600).to_bytes(11, "big")), [("a.png", b"a" * 600)]),
        (  # a PAX record's size counts for the next file, and for no other
            raw("x", pax(size=700, path="a/b.png"), b"x") + raw("cut", b"a" * 700, size_field=b"00000000003\0"),
            [("a/b.png", b"a" * 700)],
        ),
        # some tars give a link the size of its target
        *((raw("a.png", b"", kind, size_field=b"00000001000\0"), []) for kind in (b"1", b"2", b"3", b"4", b"5", b"6")),
    ],
)
def test_other_headers(entries, expected):
    shard = entries + raw("z.png", b"z") + END
    assert as_we_read(shard) == as_tarfile_reads(shard) == [*expected, ("z.png", b"z")]


# --- Samples ---


def test_names():
    names = ["0.png", "a/b.c/0.JSON", "./0.seg.png", "a/0", "a/.png", "b/c.", "d.png/"]
    table = read_table(b"".join(raw(name, b"") for name in names) + END)
    assert table.keys == ["0", "a/b.c/0", "./0"]
    assert table.suffixes == ["png", "json", "seg.png"]


def test_samples():
    names = ["0.png", "0.json", "1.png", "1.png", "1.txt", "a/1.txt", "1.json"]
    shard = tar_of([(name, str(i).encode()) for i, name in enumerate(names)])
    assert [(one.key, {suffix: one.read(shard, suffix) for suffix in one.members}) for one in samples(shard)] == [
        ("0", {"png": b"0", "json": b"1"}),
        ("1", {"png": b"2"}),
        ("1", {"png": b"3", "txt": b"4"}),
        ("a/1", {"txt": b"5"}),
        ("1", {"json": b"6"}),
    ]
    assert Sample("0", {"png": (2, 3)}).read(b"0123456789", "png") == b"234"


def test_table_by_hand():
    names = ["0.png", "0.json", ".png", "1.JSON", "README", "2.txt", "2.png", "2.png", "c/.txt"]
    shard = tar_of([(name, b"d" * i) for i, name in enumerate(names)], format=USTAR)
    table = read_table(shard)
    assert table.keys == ["0", "1", "2", "2"]
    assert table.start.tolist() == [0, 2, 3, 5, 6]
    assert table.suffixes == ["png", "json", "txt"]
    assert table.suffix.tolist() == [0, 1, 1, 2, 0, 0]
    assert table.size.tolist() == [0, 1, 3, 5, 6, 7]
    assert [shard[start : start + 1] for start in table.offset.tolist()[1:]] == [b"d"] * 5
    assert table.find("png").tolist() == [0, -1, 4, 5]
    assert table.find("json").tolist() == [1, 2, -1, -1]
    assert table.find("cls").tolist() == [-1] * 4
    position, member = table.members_of(np.array([2, 0, 2, 1]))
    assert position.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert member.tolist() == [3, 4, 0, 1, 3, 4, 2]
    part = table.take(np.array([3, 1]))
    assert (part.keys, part.start.tolist(), part.size.tolist()) == (["2", "1"], [0, 1, 2], [7, 3])
    assert part.find("json").tolist() == [-1, 1]


# --- Members that are not a range of bytes ---


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("holes", [1, 4, 5, 40])
def test_sparse_members(tmp_path, version, holes):
    """They are flawed, and what follows is read right, as Python's tarfile does."""
    for name in ("a.png", "b.png"):
        with open(tmp_path / name, "wb") as file:
            for i in range(holes if name == "a.png" else 1):
                file.seek((2 * i + 1) << 16)
                file.write(b"data" * 1500)
    for name in ("a.txt", "b.txt", "c.png"):
        (tmp_path / name).write_bytes(name.encode() * 200)
    names = ["a.png", "a.txt", "b.txt", "b.png", "c.png"]
    form = ["--format=gnu"] if version == "gnu" else ["--format=pax", f"--sparse-version={version}"]
    command = ["tar", "cf", "x.tar", "-C", tmp_path, "--sparse", *form, "--hole-detection=raw", *names]
    subprocess.run(command, cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert [info.issparse() for info in tar] == [True, False, False, True, False]
    with open_shard(tmp_path / "x.tar") as shard:
        table = read_table(shard)
        flawed = {0: "sparse member", 1: "sparse member"}
        assert (table.keys, table.start.tolist(), table.flawed) == (["a", "b", "c"], [0, 2, 4, 5], flawed)
        theirs = as_tarfile_reads(shard[:])
        ours = as_we_read(shard)
        assert [name for name, _ in ours] == [name for name, _ in theirs] == names
        assert [ours[i] for i in (1, 2, 4)] == [theirs[i] for i in (1, 2, 4)]
        assert [list(sample.members) for sample in samples(shard)] == [[], [], ["png"]]
        assert table.take(np.array([2, 1])).flawed == {1: "sparse member"}


@pytest.mark.parametrize("form", [GNU, PAX])
def test_members_of_8_gib(tmp_path, form):
    """They are flawed, and their data is not read: the file is a hole of 9 GiB."""
    with open(tmp_path / "x.tar", "wb") as file:
        for name, size in (("a.png", 1), ("b.png", 9 << 30), ("b.txt", 3), ("c.png", 8**11 - 1), ("d.png", 5)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf(form))
            file.seek(size + -size % 512, 1)
        file.write(END)
    with open_shard(tmp_path / "x.tar") as shard:
        table = read_table(shard)
    assert (table.keys, table.flawed) == (["a", "b", "c", "d"], {1: "member of 8 GiB or more"})
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert [(info.offset_data, info.size) for info in tar] == list(
            zip(table.offset.tolist(), table.size.tolist(), strict=True)
        )


# --- Damage ---

TWO = tar_of(SIZES)


@pytest.mark.parametrize("padding", [0, 1, 511, 9000, MAX_PADDING - 2048])
def test_padding(padding):
    shard = TWO.rstrip(b"\0")
    shard += bytes(-len(shard) % 512) + END + bytes(padding)
    assert as_we_read(shard) == SIZES
    assert read_table(bytes(10_240)).keys == []


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (TWO + TWO, "data after the end of the tar at byte 10240: two tars in one file, or an overwritten header"),
        (TWO + b"x", "data after the end of the tar"),
        (TWO + bytes(MAX_PADDING), "are zeros: the file was not written to its end"),
        (bytes(10_241), "10241 bytes after byte 0 are zeros: the file was not written to its end"),
        *((TWO[:at] + bytes(512) + TWO[at + 512 :], "data after the end of the tar") for at in (0, 512, 1536)),
    ],
)
def test_what_follows_the_end_must_be_padding(shard, message):
    message = message.replace("byte 10240", f"byte {len(TWO.rstrip(bytes(1))) // 512 * 512 + 512}")
    with pytest.raises(TicError, match=message):
        read_table(shard)


def test_many_entries():
    """More than are compared at a time, with a fault behind them, or within the last ones."""
    shard = b"".join(header(f"{i}.png", 0) for i in range(5000)) + END
    assert read_table(shard).keys == [str(i) for i in range(5000)]
    for damaged in (4999, 4096, 4095, 0):
        with pytest.raises(TicError, match=f"wrong header checksum at byte {512 * damaged}"):
            read_table(shard[: 512 * damaged] + b"x" + shard[512 * damaged + 1 :])


def test_cut_off_anywhere_is_seen():
    shard = TWO.rstrip(b"\0")
    shard += bytes(-len(shard) % 512 + 1024)
    for cut in range(0, len(shard) - 1024, 7):
        with pytest.raises(TicError, match="truncated"):
            read_table(shard[:cut])
    assert as_we_read(shard[:-512]) == SIZES


def test_every_byte_of_a_header_counts():
    shard = bytearray(tar_of([("a.png", b"1")], format=USTAR))
    for i in (*range(155), *range(156, 512)):  # what follows the checksum's NUL says nothing
        shard[i] ^= 0xFF
        with pytest.raises(TicError, match="at byte 0"):
            read_table(bytes(shard))
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
        read_table(raw("x", records, b"x") + raw("a.png", b"") + END)


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


def test_another_file_that_is_missing_is_not_taken_for_the_shard(tmp_path):
    write_shard(tmp_path / "0.tar", CONTENT)
    with pytest.raises(FileNotFoundError, match=r"/list.npy"), open_shard(tmp_path / "0.tar"):
        (tmp_path / "list.npy").read_bytes()


def test_shard_in_the_cloud(tmp_path, s3):
    for path in (f"{s3}/0.tar", tmp_path / "0.tar"):
        write_shard(path, CONTENT)
    with open_shard(f"{s3}/0.tar") as shard:
        assert shard[:] == (tmp_path / "0.tar").read_bytes()
    for path in (f"{s3}/2.tar", tmp_path / "2.tar"):
        with pytest.raises(TicError, match=f"{path} is missing"), open_shard(path):
            pass


# --- Writing ---


def test_shard_is_read_by_tarfile_and_webdataset(tmp_path):
    path = tmp_path / "0.tar"
    assert write_shard(path, CONTENT) == 2
    expected = [(f"{key}.{suffix}", data) for key, content in CONTENT for suffix, data in content.items()]
    shard = path.read_bytes()
    assert as_tarfile_reads(shard) == as_we_read(shard) == expected
    assert shard == tar_of(expected, format=USTAR)[: len(shard)]
    assert len(shard) == 512 * (7 + 2 + 1 + 0 + 1 + 1 + 1 + 1 + 2)  # headers, data, end
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read] == CONTENT


def test_headers_are_tarfiles():
    names, sizes = ["a.png", "größe.json", "n" * 100, "b"], [0, 1, 8**11 - 1, 512]
    expected = b""
    for name, size in zip(names, sizes, strict=True):
        info = tarfile.TarInfo(name)
        info.size = size
        expected += info.tobuf(USTAR, "utf-8")
    assert headers([name.encode() for name in names], np.array(sizes)).tobytes() == expected
    assert headers([], np.array([])).shape == (0, 512)
    with pytest.raises(TicError, match="member of 8589934592 bytes: a tar's limit is 8 GiB"):
        header("a", 8**11)
    with pytest.raises(TicError, match="longer than 100 bytes: nnn"):
        header("n" * 101, 0)


def test_failed_write_leaves_the_old_shard(tmp_path):
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
