"""Pictures in the folders that people have: nested or flat files of any suffix, or zip archives; found, read, judged.

A picture is known by the path that a list gives it, ``a/b/key.jpg``, or by its key. Nothing is unpacked or written.
"""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from itertools import chain, islice

import numpy as np

from tic_clip import TicError
from tic_clip.data.uids import make_uid, parse_uids

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".WEBP")

PLACE = np.dtype([("how", "u1"), ("zip", "<u4"), ("start", "<u8"), ("size", "<u8"), ("crc", "<u4")])
"""Where a picture is. ``how``: 0, nowhere; n, the n-th of its ``candidates``; ``IN_ZIP``, in the zip with that number,
whose directory gives the first byte of its header, its size there in bytes, and its CRC."""

IN_ZIP = 255

KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "a GIF", b"BM": "a BMP", b"%PDF": "a PDF"}
"""What a file begins with, and what it is then."""

PLACEHOLDERS = {"d835884373f4d6c8f24742ceabe74946"}
"""MD5 of pictures that a host serves in place of a removed one: imgur's (it is the ETag of i.imgur.com/removed.png)."""

_SMALL = 4096  # bytes; all known placeholders are smaller

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_IS_ENCRYPTED = 1


class Unusable(Exception):
    """A file that no sample can be made of; the message is the reason."""


# --- Where they are ---


def candidates(image: str) -> Iterator[str]:
    """The paths, below the folder of pictures, at which ``image`` may lie: as it says, with other suffixes, flat."""
    yield image
    stem = os.path.splitext(image)[0]
    for place in (stem, stem.rpartition("/")[2]):
        yield from (place + suffix for suffix in SUFFIXES)


NESTED, FLAT = range(1, 2 + len(SUFFIXES)), range(2 + len(SUFFIXES), 2 + 2 * len(SUFFIXES))
"""The numbers of the candidates."""


def find_file(folder: str, image: str, first: int) -> int:
    """Which of its ``candidates``, counted from 1, an image is; 0 for none. ``first`` is the likeliest.

    Raises:
        TicError: it leads out of the folder.
    """
    if image.startswith("/") or ".." in image.split("/") or "\0" in image or not image:
        raise TicError(f"{image!r} is no path of a picture within a folder")
    if os.path.isfile(f"{folder}/{_candidate(image, first)}"):
        return first
    nested = NESTED if _is_folder(f"{folder}/{image.rpartition('/')[0]}") else ()
    paths, order = list(candidates(image)), chain(nested, FLAT if _is_flat(folder) else ())
    return next((number for number in order if os.path.isfile(f"{folder}/{paths[number - 1]}")), 0)


def _candidate(image: str, number: int) -> str:
    return next(islice(candidates(image), number - 1, None))


@lru_cache(maxsize=1 << 16)
def _is_folder(path: str) -> bool:
    return os.path.isdir(path)


@cache
def _is_flat(folder: str) -> bool:
    """Whether a folder has pictures in itself; the listing ends at the first."""
    with os.scandir(folder) as entries:
        return any(entry.name.endswith(SUFFIXES) for entry in entries)


def find_zips(folder: str) -> list[str]:
    """The zip archives anywhere in a folder, sorted; a folder that links lead to is looked into once."""
    found, linked = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.islink(path):
            if (real := os.path.realpath(path)) in linked:  # or round and round
                folders.clear()
                continue
            linked.add(real)
        found += (f"{path}/{name}" for name in names if name.lower().endswith(".zip"))
    return sorted(found)


def index_zip(dataset: str, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(UIDs (N,), places (N,), all of ``PLACE`` but the zip's number) of the pictures in a zip, called by their keys.

    Raises:
        TicError: it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = [entry for entry in archive.infolist() if os.path.splitext(entry.filename)[1] in SUFFIXES]
        places = [(IN_ZIP, 0, entry.header_offset, entry.compress_size, entry.CRC) for entry in found]
        table = np.array(places, dtype=PLACE)
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise TicError(f"{path} is no zip archive that can be read: {error}") from None
    except OverflowError:
        raise TicError(f"{path} is no zip archive that can be read: its beginning is missing") from None
    keys = (os.path.splitext(entry.filename.rpartition("/")[2])[0] for entry in found)
    return parse_uids(make_uid(f"{dataset}/{key}") for key in keys), table


# --- What they hold ---


def read_file(path: str) -> bytes:
    """The bytes of a file.

    Raises:
        Unusable: it may not be read.
        OSError: it can't be, which may be so for all: a disk that has gone away must not end as missing images.
    """
    try:
        file = os.open(path, os.O_RDONLY)  # half the system calls of open()
    except PermissionError:
        raise Unusable("file that may not be read") from None
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(file)
    if len(data) < size:
        raise TicError(f"{path} became shorter while it was read")
    return data


def read_zipped(path: str, place: np.void) -> bytes:
    """The bytes of the member of a zip that is at ``place``.

    Raises:
        Unusable: it is damaged, encrypted or compressed in a rare way.
        OSError: the zip can't be read.
    """
    with open(path, "rb") as file:
        file.seek(int(place["start"]))
        head = file.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size)
        magic, _, flags, method, _, _, _, _, _, name, extra = _LOCAL_HEADER.unpack(head)
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(int(place["size"]))
    usable = magic == b"PK\3\4" and not flags & _IS_ENCRYPTED and method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    try:
        data = zlib.decompress(data, -zlib.MAX_WBITS) if usable and method == zipfile.ZIP_DEFLATED else data
    except zlib.error:
        usable = False
    if not usable or zlib.crc32(data) != place["crc"]:
        raise Unusable("zip member that can't be read")
    return data


def suffix_of(data: bytes, placeholders: Iterable[tuple[int, str]] = ()) -> str:
    """What a picture's file is by its first bytes, jpg, png or webp; ``placeholders`` are (size, MD5) of unwanted ones.

    Raises:
        Unusable: it is none of them, or is a placeholder.
    """
    if not data:
        raise Unusable("empty file")
    if len(data) <= _SMALL or any(len(data) == size for size, _ in placeholders):
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest in PLACEHOLDERS or (len(data), digest) in placeholders:
            raise Unusable("placeholder of a removed image")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    kind = next((kind for magic, kind in KINDS.items() if data.startswith(magic)), None)
    if kind in ("jpg", "png"):
        return kind
    if data[:512].lstrip()[:1] in (b"<", b"{"):
        kind = "a web page"
    raise Unusable(f"not an image but {kind}" if kind else "not an image")


def read_picture(folder: str, image: str, place: np.void, zips: list[str]) -> bytes:
    """The bytes of the picture ``image``, which is at ``place``, one of ``PLACE``.

    Raises:
        Unusable: it can't be read.
    """
    if place["how"] == IN_ZIP:
        return read_zipped(zips[place["zip"]], place)
    return read_file(f"{folder}/{_candidate(image, place['how'])}")


def fingerprints(files: Iterable[str]) -> Iterator[tuple[int, str]]:
    """(size, MD5) of files.

    Raises:
        OSError: one can't be read.
    """
    for path in files:
        with open(path, "rb") as file:
            data = file.read()
        yield len(data), hashlib.md5(data, usedforsecurity=False).hexdigest()
