"""The samples of an evaluation set: location of each image, class or captions, and the class names.

Three layouts are read: our splits, clip_benchmark's webdatasets (``test/{0,1,...}.tar``), and ImageNet's, a folder of
images for each class. A webdataset's captions are the lines of a sample's text.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from mimetypes import guess_type
from typing import NamedTuple

from tic_clip import TicError
from tic_clip.data.clip_benchmark import CLASSNAMES, TEMPLATES, imagenet_texts
from tic_clip.data.split import CLIP_BENCHMARK_DIR, SIZES, SUBSET, list_shards, sizes_if_known
from tic_clip.data.tar import IMAGES, Buffer, Sample, open_shard, samples
from tic_clip.data.uids import UID
from tic_clip.storage import exists, list_files, list_folders, open_file, read_bytes

LABEL = {"retrieval": "txt", "classification": "cls"}
"""The member of a sample that a kind of task needs beside the image."""


class Classes(NamedTuple):
    """The class names and prompt templates of a classification task; ``{c}`` stands for the name."""

    names: tuple[str, ...]
    templates: tuple[str, ...]


class EvalSample(NamedTuple):
    """An image, ``size`` bytes at ``offset`` of the file ``path``, with its class id and captions if needed."""

    path: str
    name: str  # in messages
    offset: int
    size: int
    label: int = -1
    captions: Sequence[str] = ()


@dataclass(kw_only=True)
class EvalSet:
    """The samples of a folder."""

    samples: list[EvalSample]
    classes: Classes | None = None
    coverage: float | None = None  # the share of the split's UID list that is in its shards, if it has a list
    dropped: Counter[str] = field(default_factory=Counter)  # samples left out, by reason

    def texts(self, part: slice = slice(None)) -> list[str]:
        """Return the distinct captions of ``part`` of the samples that no earlier sample has."""
        before = {caption for sample in self.samples[: part.start or 0] for caption in sample.captions}
        captions = dict.fromkeys(caption for sample in self.samples[part] for caption in sample.captions)
        return [caption for caption in captions if caption not in before]


def read_images(samples: Sequence[EvalSample]) -> Iterator[bytes]:
    """Yield the image of each sample; read neighbours in a cloud's shard with one request."""
    for path, group in groupby(samples, key=lambda sample: sample.path):
        run = list(group)
        with open_file(path, block_size=max(run[-1].offset + run[-1].size - run[0].offset, 1)) as file:
            for sample in run:
                file.seek(sample.offset)
                yield file.read(sample.size)


class UnusableSample(TicError):
    """A sample that a task can't use; ``args``: the reason to count it under, and details."""


def read_set(folder: str, kinds: Collection[str], *, skip_bad: bool = False, first_only: bool = False) -> EvalSet:
    """Return the samples of a folder with what tasks of ``kinds`` need; raise a TicError if there are none.

    An unusable sample is a TicError, or counted with ``skip_bad``. ``first_only``: read only the first shard with any.
    """
    found = EvalSet(samples=[], classes=read_classes(folder) if "classification" in kinds else None)
    images = image_folders(folder)
    if images and "retrieval" in kinds:
        raise TicError(f"{folder} has a folder of images for each class, and no captions")
    for label, files in enumerate(images.values()):
        for path, size in files:
            if (suffix := _suffix(path)) in IMAGES:
                found.samples.append(EvalSample(path, path, 0, size, label))
            else:
                found.dropped[f"{suffix} images are not read"] += 1
    for path, count in () if images else shard_sizes(folder).items():
        if not (first_only and found.samples):
            _read_shard(path, count, kinds, found, skip_bad)
    if not found.samples:
        raise TicError(f"{folder} holds no sample" + (" that can be used" if found.dropped else ""))
    for _, size in [*list_files(folder, SUBSET), *list_files(folder, f"*/{SUBSET}")][:1]:  # the list of all its parts
        num_listed = size // UID.itemsize - 8  # behind NumPy's header of 128 bytes
        found.coverage = (len(found.samples) + found.dropped.total()) / num_listed
    return found


def _read_shard(path: str, count: int | None, kinds: Collection[str], found: EvalSet, skip_bad: bool) -> None:
    """Add the samples of a tar, which must be ``count`` if that is known."""
    with open_shard(path) as shard:
        members = list(samples(shard))
        if count is not None and len(members) != count:
            raise TicError(f"{path} holds {len(members)} samples, its {SIZES} says {count}")
        for sample in members:
            name = f"{path}: sample {sample.key}"
            try:
                image, *labels = _parse(sample, shard, kinds, found.classes)
                found.samples.append(EvalSample(path, name, *sample.members[image], *labels))
            except UnusableSample as error:
                if not skip_bad:
                    raise TicError(f"{name}: {': '.join(error.args)} (--skip_bad leaves it out)") from None
                found.dropped[error.args[0]] += 1


def _parse(
    sample: Sample, shard: Buffer, kinds: Collection[str], classes: Classes | None
) -> tuple[str, int, list[str]]:
    """Return the suffix of a sample's image, its class id and its captions; raise an ``UnusableSample``."""
    image = next((suffix for suffix in IMAGES if suffix in sample.members), "image")
    label, captions = -1, []
    for suffix in (image, *(LABEL[kind] for kind in kinds)):
        if suffix not in sample.members:
            raise UnusableSample(f"no {suffix}")
        try:
            if suffix == "cls":
                label = int(sample.read(shard, suffix))
            elif suffix == "txt":
                captions = list(filter(str.strip, sample.read(shard, suffix).decode().splitlines()))
        except ValueError as error:
            raise UnusableSample(f"bad {suffix}", str(error)) from None
    if "retrieval" in kinds and not captions:
        raise UnusableSample("empty caption")
    if classes and not 0 <= label < len(classes.names):
        raise UnusableSample("unknown class id", f"{label}, there are {len(classes.names)} class names")
    return image, label, captions


def image_folders(folder: str) -> dict[str, list[tuple[str, int]]]:
    """Return folder of images -> (path, bytes) of each image, of any format; {} for a webdataset."""
    if list_files(folder, "*.tar") or exists(f"{folder}/{SIZES}"):
        return {}
    images = [
        (path, size)
        for path, size in list_files(folder, "*/*")
        if _suffix(path) in IMAGES or (guess_type(path)[0] or "").startswith("image/")
    ]
    folders = {path: [] for path in list_folders(folder)} if images else {}
    for path, size in images:
        folders[path.rpartition("/")[0]].append((path, size))
    return folders


def count_images(folder: str) -> int:
    """Return how many images a folder has, from its table of sizes or its files; 0 if unknown."""
    images = image_folders(folder)
    return sum(map(len, images.values())) if images else sum(count or 0 for count in shard_sizes(folder).values())


def _suffix(path: str) -> str:
    return path.rpartition(".")[2].lower()


def shard_sizes(folder: str) -> dict[str, int] | dict[str, None]:
    """Return shard -> number of samples (None if unknown) of a split or of clip_benchmark's ``test/`` in it."""
    is_split = any(list_files(folder, pattern) for pattern in ("*.tar", "[0-9]*/*.tar"))
    if list_files(folder, f"{CLIP_BENCHMARK_DIR}/*.tar") and not is_split:
        folder = f"{folder}/{CLIP_BENCHMARK_DIR}"
        count, table = len(list_shards(folder)), f"{folder}/nshards.txt"
        expected = read_bytes(table).decode().strip() if exists(table) else str(count)
        if str(count) != expected:
            raise TicError(f"{folder} has {count} shards, its nshards.txt says {expected}")
    return sizes_if_known(folder)


def read_classes(folder: str) -> Classes:
    """Return the class names and templates of a task: its own, those of the folder above, or ImageNet's for images.

    Folders of images named by ImageNet's synsets have its class names; other folders' names are the class names.
    """
    folders = [path.rpartition("/")[2] for path in image_folders(folder)]
    names, templates = _read_lines(folder, CLASSNAMES), _read_lines(folder, TEMPLATES)
    if folders:
        from tic_clip.data.eval_uids import imagenet_synsets

        known = dict(zip(imagenet_synsets(), imagenet_classes().names, strict=True))
        names = names or [known.get(name, name.replace("_", " ")) for name in folders]
        templates = templates or imagenet_classes().templates
        if len(names) != len(folders):
            raise TicError(f"{folder} has {len(folders)} folders of images and {len(names)} class names")
    for name, lines in ((CLASSNAMES, names), (TEMPLATES, templates)):
        if not lines:
            raise TicError(f"{folder} has no {name}, and neither has the folder above it")
    for template in templates:
        if "{c}" not in template:
            raise TicError(f"{folder}: the template {template!r} has no {{c}}, which stands for the class name")
    return Classes(tuple(names), tuple(templates))


def imagenet_classes() -> Classes:
    """Return OpenCLIP's class names and prompt templates of ImageNet."""
    return Classes(*map(tuple, imagenet_texts().values()))


def _read_lines(folder: str, name: str) -> list[str]:
    """Return the lines of a task's text file, in its folder or in the one above, shared by all periods."""
    for parent in (folder, folder.rstrip("/").rpartition("/")[0]):
        if exists(f"{parent}/{name}"):
            return [line.strip() for line in read_bytes(f"{parent}/{name}").decode().strip().splitlines()]
    return []


def fingerprint(folder: str, kind: str) -> str:
    """Return the SHA-256 of a task's content: UIDs, sizes of shards, class names and templates.

    Without tables of sizes and UIDs, the names and sizes of its files are used.
    """
    digest = hashlib.sha256()
    tables = [path for name in (SIZES, SUBSET) if exists(path := f"{folder}/{name}")]
    for path in tables:
        digest.update(read_bytes(path))
    images = [image for files in image_folders(folder).values() for image in files]
    shards = {} if tables or images else shard_sizes(folder)
    for path, size in images or [file for file in list_files(folder, "**/*.tar") if file[0] in shards]:
        digest.update(f"{path.rpartition('/')[2]} {size}\n".encode())
    for texts in read_classes(folder) if kind == "classification" else ():
        digest.update("\n".join(texts).encode())
    return digest.hexdigest()
