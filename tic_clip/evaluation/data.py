"""The samples of an evaluation set: where each image lies, its class or captions, and the names of the classes.

Three layouts are read: splits of ours, clip_benchmark's webdatasets (``test/{0,1,...}.tar``), and pictures in folders,
a class each, as ImageNet has them. A webdataset's captions are the lines of a sample's text.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.data.clip_benchmark import CLASSNAMES, TEMPLATES, imagenet_texts
from tic_clip.data.split import CLIP_BENCHMARK_DIR, SIZES, SUBSET, EmptySplitError, list_shards, sizes_if_known
from tic_clip.data.tar import IMAGES, Sample, open_shard, samples
from tic_clip.data.uids import UID
from tic_clip.storage import NotFoundError, exists, is_dir, list_files, list_folders, open_file, read_bytes

BAD_IMAGE = "bad image"
LABEL = {"retrieval": "txt", "classification": "cls"}
"""The member of a sample that a kind of task needs beside the image."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The class names and prompt templates of a classification task; ``{c}`` stands for the name."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(kw_only=True)
class EvalSet:
    """N samples: sample i's image is ``size[i]`` bytes at ``offset[i]`` of ``files[file[i]]``.

    ``labels`` (N,) are class ids, ``captions`` the texts of each image; each is there if it was asked for. ``dropped``
    counts the samples that are left out, by reason; ``coverage`` is the share of the split's UID list that is there, or
    None where no list is.
    """

    files: list[str]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None = None
    captions: list[list[str]] | None = None
    classes: Classes | None = None
    coverage: float | None = None
    dropped: Counter = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.file)

    @cached_property
    def texts(self) -> list[str]:
        """The different captions, each once: equal captions have equal features then, to the last bit."""
        return list(dict.fromkeys(caption for some in self.captions or () for caption in some))

    @property
    def text_image(self) -> np.ndarray:
        """(M,) the image of each caption."""
        return np.repeat(np.arange(len(self)), [len(some) for some in self.captions])

    @property
    def text_of(self) -> np.ndarray:
        """(M,) where each caption stands in ``texts``."""
        place = {text: i for i, text in enumerate(self.texts)}
        return np.array([place[caption] for some in self.captions for caption in some], dtype=np.int64)

    def without(self, bad: list[int]) -> "EvalSet":
        """The set without some images, which are counted; ``texts`` stays as it is."""
        if not bad:
            return self
        keep = np.delete(np.arange(len(self)), bad)
        rest = replace(
            self,
            file=self.file[keep],
            offset=self.offset[keep],
            size=self.size[keep],
            labels=self.labels[keep] if self.labels is not None else None,
            captions=[self.captions[i] for i in keep] if self.captions is not None else None,
            dropped=self.dropped + Counter({BAD_IMAGE: len(bad)}),
        )
        rest.texts = self.texts
        return rest

    def images(self, start: int, stop: int) -> Iterator[bytes]:
        """The images of samples ``start`` to ``stop``, as they lie in their files; one read for those side by side."""
        for number, run in groupby(range(start, stop), key=self.file.__getitem__):
            which = list(run)
            first, last = self.offset[which].min(), (self.offset + self.size)[which[0] : which[-1] + 1].max()
            with open_file(self.files[number]) as file:
                file.seek(int(first))
                data = file.read(int(last - first))
            for i in which:
                begin = int(self.offset[i] - first)
                yield data[begin : begin + int(self.size[i])]

    def name(self, i: int) -> str:
        """What to call sample ``i`` in a message: its shard and key, or its file."""
        path = self.files[self.file[i]]
        if not path.endswith(".tar"):
            return path
        with open_shard(path) as shard:
            inside = (one.key for one in samples(shard) if (self.offset[i], self.size[i]) in one.members.values())
            return f"{path}: sample {next(inside)}"


def read_set(folder: str, kinds: Collection[str], *, skip_bad: bool = False) -> EvalSet:
    """The samples of a task's folder, with what tasks of ``kinds`` (of ``LABEL``) need.

    Raises:
        TicError: it has no sample, not as many as its table says, no class names, or a sample without what is needed;
            with ``skip_bad`` such a sample is counted in ``dropped`` instead.
    """
    classes = read_classes(folder) if "classification" in kinds else None
    reader = _Reader(kinds, classes, skip_bad)
    if not is_pictures(folder):
        sizes = shard_sizes(folder)
        for path, wanted in sizes.items():
            reader.add_shard(path, wanted)
    elif "retrieval" in kinds:
        raise TicError(f"{folder} has folders of pictures, which is a layout for classes: there are no captions")
    else:
        for label, path in enumerate(list_folders(folder)):
            reader.add_pictures(path, label)
    found = reader.result()
    if not len(found):
        raise TicError(f"{folder} holds no sample" + (" that can be used" if found.dropped else ""))
    listed = _listed_uids(folder)
    found.coverage = (len(found) + found.dropped.total()) / listed if listed else None
    return found


class _Reader:
    """Gathers the samples of an ``EvalSet``."""

    def __init__(self, kinds: Collection[str], classes: Classes | None, skip_bad: bool) -> None:
        self.kinds, self.classes, self.skip_bad = kinds, classes, skip_bad
        self.files: list[str] = []
        self.places: list[tuple[int, int, int]] = []
        self.labels: list[int] = []
        self.captions: list[list[str]] = []
        self.dropped: Counter = Counter()

    def add_shard(self, path: str, wanted: int | None) -> None:
        """Add the samples of a tar, which must be ``wanted`` in number if that is known."""
        self.files.append(path)
        with open_shard(path) as shard:
            found = list(samples(shard))
            if wanted is not None and len(found) != wanted:
                raise TicError(f"{path} holds {len(found)} samples, its {SIZES} says {wanted}")
            for sample in found:
                reason = self._add(sample, shard)
                if reason:
                    self.drop(f"{path}: sample {sample.key}", *reason)

    def _add(self, sample: Sample, shard: Any) -> tuple[str, str] | None:
        """Add a sample of a shard, or say (reason to count it under, what is wrong)."""
        image = next((suffix for suffix in IMAGES if suffix in sample.members), "image")
        for suffix in (image, *(LABEL[kind] for kind in self.kinds)):
            if suffix not in sample.members:
                return f"no {suffix}", f"has no {suffix}"
        label, captions = -1, []
        try:
            if "classification" in self.kinds:
                label = int(sample.read(shard, "cls"))
            if "retrieval" in self.kinds:
                captions = [line for line in sample.read(shard, "txt").decode().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            return "bad txt", f"has a bad txt: {error}"
        except ValueError as error:
            return "bad cls", f"has a bad cls: {error}"
        if "retrieval" in self.kinds and not captions:
            return "empty caption", "has an empty caption"
        if self.classes and not 0 <= label < len(self.classes.names):
            return "unknown class id", f"has class id {label}, there are {len(self.classes.names)} class names"
        self.places.append((len(self.files) - 1, *sample.members[image]))
        self.labels.append(label)
        self.captions.append(captions)
        return None

    def add_pictures(self, folder: str, label: int) -> None:
        """Add the pictures of a class."""
        for path, size in _pictures(folder):
            self.files.append(path)
            self.places.append((len(self.files) - 1, 0, size))
            self.labels.append(label)

    def drop(self, name: str, reason: str, message: str) -> None:
        """Count a sample that can't be used, or refuse it."""
        if not self.skip_bad:
            raise TicError(f"{name} {message} (--skip_bad leaves such samples out)")
        self.dropped[reason] += 1

    def result(self) -> EvalSet:
        """All that was added."""
        places = np.array(self.places, dtype=np.int64).reshape(-1, 3)
        return EvalSet(
            files=self.files,
            file=places[:, 0],
            offset=places[:, 1],
            size=places[:, 2],
            labels=np.array(self.labels, dtype=np.int64) if "classification" in self.kinds else None,
            captions=self.captions if "retrieval" in self.kinds else None,
            classes=self.classes,
            dropped=self.dropped,
        )


# Where the samples are.


def is_pictures(folder: str) -> bool:
    """Whether a folder has no shards, but folders of pictures."""
    if list_files(folder, "*.tar") or exists(f"{folder}/{SIZES}"):
        return False
    return any(_pictures(path) for path in list_folders(folder)[:3])


def _pictures(folder: str) -> list[tuple[str, int]]:
    return [(path, size) for path, size in list_files(folder) if path.rpartition(".")[2].lower() in IMAGES]


def shard_sizes(folder: str) -> dict[str, int] | dict[str, None]:
    """The shards of a split, or of clip_benchmark's ``test/`` in it, with their samples where a table counts them.

    Raises:
        TicError: there are none, or not as many as ``nshards.txt`` says.
    """
    own = any(list_files(folder, f"{at}*.tar") for at in ("", "[0-9]*/"))
    if list_files(folder, f"{CLIP_BENCHMARK_DIR}/*.tar") and not own:
        folder = f"{folder}/{CLIP_BENCHMARK_DIR}"
        found, there = len(list_shards(folder)), exists(f"{folder}/nshards.txt")
        wanted = read_bytes(f"{folder}/nshards.txt").decode().strip() if there else str(found)
        if str(found) != wanted:
            raise TicError(f"{folder} has {found} shards, its nshards.txt says {wanted}")
    try:
        return sizes_if_known(folder)
    except EmptySplitError:
        return {}


def _listed_uids(folder: str) -> int | None:
    """How many UIDs the list of a split has; each part of a split has the whole list."""
    for path, size in [entry for at in ("", "*/") for entry in list_files(folder, f"{at}{SUBSET}")][:1]:
        with open_file(path) as file:
            header = file.read(10)
            return (size - 10 - int.from_bytes(header[8:10], "little")) // UID.itemsize
    return None


def read_classes(folder: str) -> Classes:
    """The class names and templates of a task: its own, those of the folder above, or for pictures ImageNet's.

    Folders of pictures that have ImageNet's synsets for names have its class names, others are called as their folder.

    Raises:
        TicError: there are none, or not a name for each folder of pictures.
    """
    pictures = [path.rpartition("/")[2] for path in list_folders(folder)] if is_pictures(folder) else []
    names = _lines(folder, CLASSNAMES)
    templates = _lines(folder, TEMPLATES)
    if pictures:
        names, templates = names or _names_of(pictures), templates or imagenet_classes().templates
        if len(names) != len(pictures):
            raise TicError(f"{folder} has {len(pictures)} folders of pictures and {len(names)} class names")
    for name, found in ((CLASSNAMES, names), (TEMPLATES, templates)):
        if not found:
            raise TicError(f"{folder} has no {name}, and neither has the folder above it")
    return Classes(names=tuple(names), templates=tuple(templates))


def imagenet_classes() -> Classes:
    """ImageNet's class names and prompt templates, as OpenCLIP has them."""
    texts = imagenet_texts()
    return Classes(names=tuple(texts[CLASSNAMES]), templates=tuple(texts[TEMPLATES]))


def _names_of(folders: list[str]) -> list[str]:
    """The class names of folders of pictures."""
    from tic_clip.data.eval_uids import imagenet_synsets

    names = dict(zip(imagenet_synsets(), imagenet_classes().names, strict=True))
    return [names.get(folder, folder.replace("_", " ")) for folder in folders]


def _lines(folder: str, name: str) -> list[str]:
    """The lines of a task's text file, in its folder or (one for all periods) in the folder above it."""
    for place in (folder, folder.rstrip("/").rpartition("/")[0]):
        if exists(f"{place}/{name}"):
            return [line.strip() for line in read_bytes(f"{place}/{name}").decode().strip().splitlines()]
    return []


def fingerprint(folder: str, kind: str) -> str:
    """The SHA-256 of what a task is made of: its UIDs, its shards' sizes, its class names and templates.

    Where there is neither a table of sizes nor one of UIDs, each file's name and bytes in all stand for them.

    Raises:
        TicError: there are no data.
    """
    if not is_dir(folder):
        raise NotFoundError(f"{folder} is missing")
    digest = hashlib.sha256()
    tables = [path for name in (SIZES, SUBSET) if exists(path := f"{folder}/{name}")]
    for path in tables:
        digest.update(read_bytes(path))
    for path, size in [] if tables else _data_files(folder):
        digest.update(f"{path.rpartition('/')[2]} {size}\n".encode())
    classes = read_classes(folder) if kind == "classification" else None
    for texts in (classes.names, classes.templates) if classes else ():
        digest.update("\n".join(texts).encode())
    return digest.hexdigest()


def _data_files(folder: str) -> Iterator[tuple[str, int]]:
    """(path, bytes) of the files that hold a task's samples."""
    if is_pictures(folder):
        for path in list_folders(folder):
            yield from _pictures(path)
        return
    shards = shard_sizes(folder)
    yield from ((path, size) for path, size in list_files(folder, "**/*.tar") if path in shards)
