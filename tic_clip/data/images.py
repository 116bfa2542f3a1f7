"""Find and read images in users' folders: nested or flat files with any suffix, zip archives, or tars.

An image is found by its path in a list, ``a/b/key.jpg``, or by its key. Nothing is unpacked.
"""

import errno
import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from tic_clip import TicError
from tic_clip.data.sources import Row
from tic_clip.data.tar import IMAGES, open_shard, samples
from tic_clip.data.uids import UID, make_uid, parse_uids

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")
_SPELLINGS = [spelling for suffix in SUFFIXES for spelling in (suffix, suffix.upper(), suffix.title())]

ZIP_MEMBER = np.dtype([*UID.descr, ("zip", "<u4"), ("start", "<u8"), ("size", "<u8"), ("crc", "<u4")])
"""An image in a zip: its UID, the zip's number, its header's first byte, its compressed bytes, and its CRC.

One in a tar: the first byte of its data, and their number.
"""
FORMATS = re.compile(rb"(?P<jpg>\xff\xd8\xff)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<webp>RIFF....WEBP)", re.DOTALL)
OTHERS = {"a GIF": rb"GIF8", "a BMP": rb"BM", "a PDF": rb"%PDF", "a web page": rb"\s*[<{]"}

STORED, ZIP_IMAGES = "images", 10_000  # the folder of the zips of a table's own images, and how many are in each
PLACEHOLDERS = {"d835884373f4d6c8f24742ceabe74946"}  # MD5 of imgur's removed.png, served in place of a removed image


def strip_suffix(path: str) -> str:
    """Return the path of an image without its suffix, if that is one of ``SUFFIXES``."""
    return os.path.splitext(path)[0] if path.lower().endswith(SUFFIXES) else path


class UnusableImage(Exception):
    """An image that can't become a sample; the message is the reason."""


def read_file(folder: str, image: str, *, is_exact: bool = False) -> bytes | None:
    """Return an image's bytes: at its path, with another suffix, or flat unless ``is_exact``; None if missing."""
    parent, name = os.path.split(strip_suffix(image))
    places = dict.fromkeys([os.path.join(folder, parent), *[os.path.join(folder, "")] * (not is_exact)])
    others = (os.path.join(place, name + suffix) for place in filter(_has_images, places) for suffix in _SPELLINGS)
    for path in chain([os.path.join(folder, image)], others):
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # so no file is called so
                return None
            raise OSError(error.errno, error.strerror, path) from None  # a failed read does not name the file
    return None


@lru_cache(maxsize=1 << 16)
def _has_images(folder: str) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(SUFFIXES) for entry in entries)
    return False


def find_archives(folder: str, skipped: str) -> list[str]:
    """Return all zips and tars below a folder, following links, except in ``skipped``, sorted."""
    found, seen = [], {os.path.realpath(skipped)}
    for path, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(path)) in seen:
            folders.clear()
        else:
            seen.add(place)
            names = (os.path.join(path, name) for name in files if name.lower().endswith((".zip", ".tar")))
            found += filter(os.path.isfile, names)
    return sorted(found)


def index_archive(dataset: str, paths: list[str], is_exact: bool, number: int) -> np.ndarray:
    """Return the images of archive ``number`` as ``ZIP_MEMBER`` (N,) with the UIDs of their names; TicError if damaged.

    A name is the file's key; if ``is_exact``, each end of its path has a row: c of a/b/c.jpg, b/c and a/b/c.
    """
    members = list((_list_tar if paths[number].lower().endswith(".tar") else _list_zip)(paths[number]))
    parts = [strip_suffix(name).split("/") for name, *_ in members]
    keys = [["/".join(part[i:]) for i in range(len(part))] if is_exact else part[-1:] for part in parts]
    table = np.array([(0, 0, number, *place) for _, *place in members], dtype=ZIP_MEMBER)
    table = table[np.repeat(np.arange(len(table)), list(map(len, keys)))]
    uids = parse_uids(make_uid(f"{dataset}/{key}") for key in chain.from_iterable(keys))
    table["f0"], table["f1"] = uids["f0"], uids["f1"]
    return table


def _list_zip(path: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, start, size, CRC) of the images in a zip, as ``ZIP_MEMBER`` has them."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.header_offset < 0:
                    raise zipfile.BadZipFile("its beginning is missing")
                if entry.filename.lower().endswith(SUFFIXES):
                    yield entry.filename, entry.header_offset, entry.compress_size, entry.CRC
    except Exception as error:  # a damaged directory fails in many ways
        raise TicError(f"{path} is not a zip archive that can be read: {error}") from error


def _list_tar(path: str) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, start, size, 0) of the images in a tar."""
    found = {}  # of two with the same name, the last counts, as for tar
    if os.path.getsize(path):
        with open_shard(path) as shard:
            for sample in samples(shard):
                for suffix, place in sample.members.items():  # of a.40.jpg webdataset's key is a
                    if suffix.rpartition(".")[2] in IMAGES:
                        found[f"{sample.key}.{suffix}"] = place
    yield from ((name, *place, 0) for name, place in found.items())


def read_member(path: str, member: np.void) -> bytes:
    """Return the bytes of a ``ZIP_MEMBER``; UnusableImage if it is damaged, encrypted or compressed in a rare way."""
    with open(path, "rb") as file:
        file.seek(int(member["start"]))
        if path.lower().endswith(".tar"):
            return file.read(int(member["size"]))
        method, name, extra = struct.unpack("<8xH16xHH", file.read(30).ljust(30))  # APPNOTE.TXT 4.3.7
        file.seek(name + extra, os.SEEK_CUR)
        data = file.read(int(member["size"]))
    with suppress(zlib.error):
        data = zlib.decompress(data, -zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else data
    if zlib.crc32(data) != member["crc"]:
        raise UnusableImage("zip member that can't be read")
    return data


def detect_format(data: bytes) -> str:
    """Return jpg, png or webp from an image's first bytes; raise an UnusableImage for others and placeholders."""
    if not data:
        raise UnusableImage("empty file")
    if len(data) <= 4096 and hashlib.md5(data, usedforsecurity=False).hexdigest() in PLACEHOLDERS:
        raise UnusableImage("placeholder of a removed image")
    if found := FORMATS.match(data):
        return found.lastgroup
    kind = next((f" but {kind}" for kind, start in OTHERS.items() if re.match(start, data)), "")
    raise UnusableImage(f"not an image{kind}")


def store_images(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """Yield rows, writing images inside them to numbered zips in ``folder``/images/."""
    count, archive = 0, None
    with ExitStack() as stack:
        for row in rows:
            if row.data is None:
                yield row
                continue
            if count % ZIP_IMAGES == 0:
                stack.close()
                (folder / STORED).mkdir(exist_ok=True)
                archive = stack.enter_context(zipfile.ZipFile(folder / STORED / f"{count // ZIP_IMAGES:05d}.zip", "w"))
            found = FORMATS.match(row.data)  # create_tars.py counts those that can't be used
            name = f"{count:09d}.{found.lastgroup if found else 'jpg'}"
            archive.writestr(zipfile.ZipInfo(name), row.data)
            count += 1
            yield row._replace(image=name, data=None)
