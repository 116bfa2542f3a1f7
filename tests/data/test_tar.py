"""``tic_clip.data.tar`` against Python's tarfile, GNU tar and webdataset."""

import io
import subprocess
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from tic_clip import TicError
from tic_clip.data.tar import BLOCK, END, MAX_PADDING, headers, open_shard, read_table, samples, write_shard

CONTENT = [
    ("0-0", {"png": b"p" * 700, "json": b'{"a": 1}', "txt": b""}),
    ("1-0", {"png": b"q" * 512, "json": b"{}", "txt": "größe".encode(), "cls": b"3"}),
]
LONG = "folder/" * 20 + "name.png"  # 148 bytes: ustar cuts it at a slash
LONGER = "n" * 180 + ".png"
USTAR, GNU, PAX = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT


def tar_of(entries, form=USTAR):
    """A tar that Python's tarfile made of (name or TarInfo, data) pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for info, data in entries:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def as_tarfile_reads(shard):
    """[(name, data)] of the files with a key and a suffix, up to what can't be read."""
    found = []
    with suppress(tarfile.TarError, ValueError, OverflowError), tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        for info in tar:
            name = info.name.partition("\0")[0]
            key, dot, suffix = name.rpartition("/")[2].partition(".")
            if info.isreg() and key and dot and suffix:
                found.append((name, tar.extractfile(info).read()))
    return found


def as_we_read(shard):
    """[(name, data)] of the members that belong to a sample."""
    table = read_table(shard)
    return [
        (f"{key}.{table.suffixes[table.suffix[i]]}", shard[table.offset[i] : table.offset[i] + table.size[i]])
        for key, start, stop in zip(table.keys, table.start, table.start[1:], strict=False)
        for i in range(start, stop)
    ]


def raw(name, data, kind=b"0", size_field=None):
    """One member with any type and size field, and a right checksum."""
    block = bytearray(headers([name.encode(errors="surrogateescape")], np.array([len(data)])).tobytes())
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


def info(name, **values):
    made = tarfile.TarInfo(name)
    for key, value in values.items():
        setattr(made, key, value)
    return made, b""


SIZES = [
    (f"{size}.png", bytes(range(256)) * (size // 256) + b"x" * (size % 256)) for size in (0, 1, 511, 512, 513, 5000)
]
KINDS = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)
NO_FILES = [info("link.png", type=kind, linkname="a.png", mtime=1.5) for kind in KINDS]


@pytest.mark.parametrize(
    ("form", "entries"),
    [
        (USTAR, [(LONG, b"1"), ("short.png", b"2"), ("n" * 96 + ".png", b"3")]),
        (GNU, [(LONG, b"1"), (LONGER, b"22"), ("short.png", b"3"), (LONGER * 9, b"4")]),
        (PAX, [(LONG, b"1"), (LONGER, b"22"), ("größe.png", b"3"), ("short.png", b"4"), (LONGER * 9, b"5")]),
        (PAX, [info("time.png", mtime=1.5), *SIZES, info(LONGER, mtime=1.5), *SIZES[3:5]]),  # as webdataset writes
        *((form, [SIZES[3], *NO_FILES, SIZES[4], *NO_FILES]) for form in (USTAR, GNU, PAX)),
        *((form, [info(LONGER, type=tarfile.SYMTYPE), ("short.png", b"1")]) for form in (GNU, PAX)),
        (GNU, [("gr\udcf6ße.png", b"not UTF-8"), ("./a/../b.png", b"")]),
    ],
)
def test_members_are_those_that_tarfile_finds(form, entries):
    shard = tar_of(entries, form)
    assert as_we_read(shard) == as_tarfile_reads(shard)
    assert len(as_we_read(shard)) == sum(isinstance(entry, str) or entry.isreg() for entry, _ in entries)


def test_samples_by_hand():
    names = ["0.png", "0.json", ".png", "1.JSON", "README", "2.txt", "2.png", "2.png", "c/.txt", "d.", "e/"]
    shard = tar_of([(name, b"d" * i) for i, name in enumerate(names)])
    read = [(one.key, {suffix: len(one.read(shard, suffix)) for suffix in one.members}) for one in samples(shard)]
    assert read == [("0", {"png": 0, "json": 1}), ("1", {"json": 3}), ("2", {"txt": 5, "png": 6}), ("2", {"png": 7})]


@pytest.mark.parametrize("version", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("holes", [4, 40])  # four are in a header of GNU's
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
        assert [one.issparse() for one in tar] == [True, False, False, True, False]
    with open_shard(tmp_path / "x.tar") as shard:
        ours, theirs = as_we_read(shard), as_tarfile_reads(shard[:])
        assert [one.flaw for one in samples(shard)] == ["sparse member", "sparse member", None]
    assert [name for name, _ in ours] == [name for name, _ in theirs] == names
    assert [ours[i] for i in (1, 2, 4)] == [theirs[i] for i in (1, 2, 4)]


@pytest.mark.parametrize("form", [GNU, PAX])
def test_members_of_8_gib(tmp_path, form):
    """They are flawed, and their data is not read: the file is a hole of 9 GiB."""
    with open(tmp_path / "x.tar", "wb") as file:
        for name, size in (("a.png", 1), ("b.png", 9 << 30), ("b.txt", 3), ("c.png", 8**11 - 1), ("d.png", 5)):
            made, _ = info(name, size=size)
            file.write(made.tobuf(form))
            file.seek(size + -size % 512, 1)
        file.write(END)
    with open_shard(tmp_path / "x.tar") as shard:
        table = read_table(shard)
    assert (table.keys, table.flawed) == (["a", "b", "c", "d"], {1: "member of 8 GiB or more"})
    with tarfile.open(tmp_path / "x.tar") as tar:
        theirs = [(one.offset_data, one.size) for one in tar]
    assert list(zip(table.offset.tolist(), table.size.tolist(), strict=True)) == theirs


PADDED = tar_of(SIZES)
WHOLE = PADDED[: len(PADDED.rstrip(b"\0")) // 512 * 512 + 512] + END
AFTER = "data after the end of the tar"


@pytest.mark.parametrize("padding", [0, 1, 511, 9000, MAX_PADDING - 2048])
def test_padding(padding):
    assert as_we_read(WHOLE + bytes(padding)) == SIZES
    assert read_table(bytes(10_240)).keys == []


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (WHOLE + WHOLE, f"{AFTER} at byte {len(WHOLE) - 1024}: two tars, or an overwritten header"),
        (PADDED + b"x", AFTER),
        (PADDED + bytes(MAX_PADDING), "are zeros: the file was not written to its end"),
        (bytes(10_241), "10241 bytes after byte 0 are zeros: the file was not written to its end"),
        *((PADDED[:at] + bytes(512) + PADDED[at + 512 :], AFTER) for at in (0, 512, 1536)),
        *((WHOLE[:cut], "truncated") for cut in (0, 1, 511, 512, 1000, 1024, len(WHOLE) - 1024)),
        (b"<html>404</html>" * 100, "damaged header at byte 0"),
        *(
            (raw("x", records, b"x") + raw("a.png", b"") + END, "damaged header at byte 0")
            for records in (b"0 path=a\n", b"9" * 5000 + b" path=a\n", pax(size="-1"))
        ),
    ],
)
def test_damage(shard, message):
    with pytest.raises(TicError, match=message):
        read_table(shard)


def test_many_entries():
    """More than are compared at a time, with a fault behind them, or within the last ones."""
    shard = b"".join(raw(f"{i}.png", b"") for i in range(5000)) + END
    assert read_table(shard).keys == [str(i) for i in range(5000)]
    for damaged in (4999, 4096, 4095, 0):
        with pytest.raises(TicError, match=f"wrong header checksum at byte {512 * damaged}"):
            read_table(shard[: 512 * damaged] + b"x" + shard[512 * damaged + 1 :])


def test_shard_is_read_by_tarfile_and_webdataset(tmp_path):
    path = tmp_path / "0.tar"
    assert write_shard(path, CONTENT) == 2
    expected = [(f"{key}.{suffix}", data) for key, content in CONTENT for suffix, data in content.items()]
    shard = path.read_bytes()
    assert as_tarfile_reads(shard) == as_we_read(shard) == expected
    assert shard == tar_of(expected)[: len(shard)]
    assert len(shard) == 512 * (7 + 2 + 1 + 0 + 1 + 1 + 1 + 1 + 2)  # headers, data, end
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read] == CONTENT
    with pytest.raises(TicError, match="longer than 100 bytes: kkk"):
        write_shard(path, [("k" * 100, {"png": b""})])
    assert path.read_bytes() == shard


# Damaged tars: what can't be read is a ``TicError`` and never another error; what is read is what tarfile reads.

set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # not into the working tree

TEXTS = ["0.png", "0.json", "0.txt", "a/b.c/1.json", "1.png", "README", "größe.png", "./x.JPG", ".", "/"]
NAMES = st.sampled_from(TEXTS)
DATA = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"x" * 511, b"x" * 512, b"x" * 513, END]))
SIZE_FIELDS = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.integers(0, 8**11 - 1).map(lambda size: b"%011o\0" % size),
    st.integers(0, 3 * BLOCK).map(lambda size: b"%11o " % size),
    st.integers(0, 3 * BLOCK).map(lambda size: b"%012o" % size),
    st.one_of(st.integers(0, 2**95 - 1), st.integers(0, 3 * BLOCK)).map(lambda n: (n | 1 << 95).to_bytes(12, "big")),
)
LONG_NAMES = st.one_of(st.binary(max_size=200), st.sampled_from([b"k" * 150 + b".png\0", b"a/" * 90 + b"b.txt"]))
RECORDS = st.one_of(
    st.binary(max_size=60),
    st.builds(pax, path=NAMES),
    st.builds(pax, size=st.integers(0, 3 * BLOCK)),
    st.builds(pax, path=st.text(max_size=20), size=st.integers(-5, 10**30)),
    st.builds(pax, comment=st.text(max_size=20), path=NAMES, mtime=st.floats()),
    st.builds(pax, mtime=st.floats(), uname=st.text(max_size=20)),
)


FILES = st.builds(raw, NAMES, DATA)
TYPES = st.sampled_from([b"\0", b"1", b"2", b"3", b"5", b"6", b"7", b"V", b"g", b"x"])


def overwrite(member, start, field):
    """A member with other bytes in its header, and a right checksum."""
    block = (member[:start] + field + member[start + len(field) :])[:BLOCK]
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:] + member[BLOCK:]


ENTRIES = st.one_of(
    FILES,
    FILES,
    st.builds(raw, NAMES, DATA, size_field=SIZE_FIELDS),
    st.builds(raw, NAMES, DATA, TYPES),
    st.builds(lambda records, file: raw("x", records, b"x") + file, RECORDS, FILES),
    st.builds(lambda name, file: raw("././@LongLink", name, b"L") + file, LONG_NAMES, FILES),
    st.builds(lambda name, file: raw("././@LongLink", name, b"K") + file, LONG_NAMES, FILES),
    st.builds(overwrite, FILES, st.integers(0, 500), st.binary(min_size=1, max_size=12)),
    st.builds(overwrite, FILES, st.just(0), st.binary(min_size=BLOCK, max_size=BLOCK)),
)


@st.composite
def tar(draw):
    """A tar of some entries, of which blocks may be removed, repeated or overwritten, or its end cut off."""
    shard = b"".join(draw(st.lists(ENTRIES, max_size=6))) + END
    for _ in range(draw(st.integers(0, 2))):
        blocks = [shard[i : i + BLOCK] for i in range(0, len(shard), BLOCK)]
        start, stop, at = (draw(st.integers(0, len(blocks) - 1)) for _ in range(3))
        changed = bytearray(blocks[at])
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
        shard = b"".join([*blocks[:start], bytes(changed), *blocks[stop:]])
    return shard[: draw(st.integers(0, len(shard)))] if draw(st.integers(0, 9)) == 0 else shard


@settings(max_examples=250, derandomize=True, database=None, deadline=None)
@given(tar())
def test_what_both_read_is_the_same(shard):
    try:
        table = read_table(shard)
    except TicError:
        return
    assert len(table.keys) == len(table.start) - 1
    assert ((table.offset >= BLOCK) & (table.size >= 0) & (table.offset + table.size <= len(shard))).all()
    if table.flawed:
        return
    theirs = [(name.lower(), data) for name, data in as_tarfile_reads(shard)]  # it takes some damage for the end
    assert [(name.lower(), data) for name, data in as_we_read(shard)][: len(theirs)] == theirs
