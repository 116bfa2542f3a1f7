"""Find and read images in the folders that people have: nested or flat files of any suffix, or zip archives.

An image is known by the path that a list gives it, ``a/b/key.jpg``, or by its key. Nothing is unpacked or written.
"""

import errno
import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.data.uids import UID, make_uid, parse_uids

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
_SPELLINGS = [spelling for suffix in SUFFIXES for spelling in (suffix, suffix.upper(), suffix.title())]

ZIP_MEMBER = np.dtype([*UID.descr, ("zip", "<u4"), ("start", "<u8"), ("size", "<u8"), ("crc", "<u4")])
"""An image in a zip: its UID, the zip's number, its header's first byte, its compressed bytes, and its CRC."""

MAGIC_BYTES = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "a GIF", b"BM": "a BMP", b"%PDF": "a PDF"}

PLACEHOLDERS = {"d835884373f4d6c8f24742ceabe74946"}
"""MD5 of images that a host serves in place of a removed one: imgur's (it is the ETag of i.imgur.com/removed.png)."""

_MAX_PLACEHOLDER = 4096  # bytes
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7


class UnusableImage(Exception):
    """A file that no sample can be made of; the message is the reason."""


def read_file(folder: str, image: str) -> bytes | None:
    """Return the bytes of an image: at its path, with another suffix, or flat in ``folder``; None if there is no file.

    Raises:
        UnusableImage: it may not be read.
        OSError: it can't be, which may be so for all: a disk that has gone away must not end as missing images.
    """
    for path in _candidates(folder, image):
        try:
            return Path(path).read_bytes()
        except PermissionError:
            raise UnusableImage("file that may not be read") from None
        except OSError as error:
            if error.errno not in _ABSENT:
                raise OSError(error.errno, error.strerror, path) from None  # a failed read does not name the file
    return None


def _candidates(folder: str, image: str) -> Iterator[str]:
    yield f"{folder}/{image}"
    parent, _, name = os.path.splitext(image)[0].rpartition("/")
    for place in dict.fromkeys((f"{folder}/{parent}" if parent else folder, folder)):
        if _has_images(place):
            yield from (f"{place}/{name}{suffix}" for suffix in _SPELLINGS)


@lru_cache(maxsize=1 << 16)
def _has_images(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(_is_image(entry.name) for entry in entries)
    except OSError:
        return False


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def find_zips(folder: str) -> list[str]:
    """Return the zip archives anywhere in a folder, sorted; a folder that links lead to is searched once."""
    found, linked = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.islink(path):
            if (real := os.path.realpath(path)) in linked:  # or round and round
                folders.clear()
                continue
            linked.add(real)
        found += (f"{path}/{name}" for name in names if name.lower().endswith(".zip"))
    return sorted(found)


def index_zip(dataset: str, zips: list[str], number: int) -> np.ndarray:
    """Return the images of zip ``number``, called by their keys, as ``ZIP_MEMBER`` (N,); TicError if it is damaged."""
    try:
        with zipfile.ZipFile(zips[number]) as archive:
            members = [entry for entry in archive.infolist() if _is_image(entry.filename)]
        rows = [(0, 0, number, entry.header_offset, entry.compress_size, entry.CRC) for entry in members]
        table = np.array(rows, dtype=ZIP_MEMBER)
        if (table["start"].astype(float) + table["size"]).max(initial=0) > os.path.getsize(zips[number]):
            raise ValueError("its directory points beyond its end")
    except (zipfile.BadZipFile, OSError, ValueError, OverflowError, NotImplementedError, struct.error) as error:
        raise TicError(f"{zips[number]} is not a zip archive that can be read: {error}") from None
    keys = (os.path.splitext(entry.filename.rpartition("/")[2])[0] for entry in members)
    uids = parse_uids(make_uid(f"{dataset}/{key}") for key in keys)
    table["f0"], table["f1"] = uids["f0"], uids["f1"]
    return table


def read_zipped(path: str, member: np.void) -> bytes:
    """Return the bytes of one ``ZIP_MEMBER``; UnusableImage if it is damaged, encrypted or compressed in a rare way."""
    with open(path, "rb") as file:
        file.seek(int(member["start"]))
        head = file.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size)
        _, _, _, method, *_, name, extra = _LOCAL_HEADER.unpack(head)
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(int(member["size"]))
    with suppress(zlib.error):
        data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
    if zlib.crc32(data) != member["crc"]:
        raise UnusableImage("zip member that can't be read")
    return data


def detect_format(data: bytes) -> str:
    """Return jpg, png or webp by an image's first bytes; UnusableImage if it is none of them or a placeholder."""
    if not data:
        raise UnusableImage("empty file")
    if len(data) <= _MAX_PLACEHOLDER and hashlib.md5(data, usedforsecurity=False).hexdigest() in PLACEHOLDERS:
        raise UnusableImage("placeholder of a removed image")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    kind = next((kind for magic, kind in MAGIC_BYTES.items() if data.startswith(magic)), None)
    if kind in ("jpg", "png"):
        return kind
    if data[:512].lstrip()[:1] in (b"<", b"{"):
        kind = "a web page"
    raise UnusableImage(f"not an image but {kind}" if kind else "not an image")
