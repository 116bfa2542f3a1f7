"""Damaged tars: what can't be read is a ``TicError`` and never another error; what is read is what tarfile reads."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from test_tar import as_tarfile_reads, as_we_read, pax, raw

from tic_clip import TicError
from tic_clip.data.tar import BLOCK, END, read_table

set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # not into the working tree

FUZZ = settings(max_examples=250, derandomize=True, database=None, deadline=None)

NAMES = st.sampled_from(
    ["0.png", "0.json", "0.txt", "a/b.c/1.json", "1.png", "README", "größe.png", "./x.JPG", ".", "/"]
)
DATA = st.one_of(st.binary(max_size=40), st.sampled_from([b"", b"x" * 511, b"x" * 512, b"x" * 513, END]))
SIZES = st.one_of(
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
    st.builds(raw, NAMES, DATA, size_field=SIZES),
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


@FUZZ
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
