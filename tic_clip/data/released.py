"""The released lists of TiC-DataComp: their names, and reading the tables (year -> [uid], year -> synset -> [uid])."""

import pickle
import re
from collections import OrderedDict, defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tic_clip import TicError
from tic_clip.benchmarks import MONTHS
from tic_clip.storage import is_remote, read_json

YEARLY, MONTHLY = "tic-datacomp_training_yearly_noeval", "tic-datacomp_training_monthly"
TABLES = {"retrieval": "tic-datacomp_retrieval_evals_year2uids", "datacompnet": "tic-datacompnet_year2uids"}
FETCH = "python dataset_creation/tic-datacomp/download_uids.py --output-path"
YEARS = tuple(dict.fromkeys(month[:4] for month in MONTHS))


def local_folder(path: str) -> Path:
    """A folder of lists.

    Raises:
        TicError: it is in a cloud.
    """
    if is_remote(path):
        raise TicError(f"{path} is not local; UID files are memory-mapped, so they need a local disk")
    return Path(path)


class _Array(list):
    """What a pickled NumPy array of strings becomes: a list of them."""

    def __setstate__(self, state: tuple) -> None:
        _, _, dtype, _, data = state
        if isinstance(data, bytes):
            if not re.fullmatch(r"[<>|=][US][0-9]+", dtype.code):
                raise pickle.UnpicklingError(f"an array of {dtype.code}, not of strings")
            data = np.frombuffer(data, dtype.code).astype(str).tolist()
        self.extend(data)


class _Dtype:
    """What a pickled NumPy dtype becomes: its code, such as ``<U32``."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = f"|{code}"

    def __setstate__(self, state: tuple) -> None:
        self.code = f"{state[1]}{self.code[1:]}"


def _new_array(*_: object) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """How protocols before 3 write bytes."""
    return text.encode({"latin1": "latin1"}[encoding])


def _no_bytes() -> bytes:
    """How protocols before 3 write no bytes at all."""
    return b""


PLAIN = {
    **{("builtins", kind.__name__): kind for kind in (dict, frozenset, int, list, set, str, tuple)},
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "bytes"): _no_bytes,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
}
"""All that a pickle may name: containers, strings and numbers, and stand-ins for NumPy's arrays of strings."""


class PlainUnpickler(pickle.Unpickler):
    """Reads pickles of plain data; whatever else a pickle asks for is refused, so none of it is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        """The plain thing of that name.

        Raises:
            pickle.UnpicklingError: it is none.
        """
        module = {"__builtin__": "builtins"}.get(module, module)
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain data")
        return PLAIN[module, name]


def read_pickle(path: Path) -> Any:
    """The plain data in a pickle.

    Raises:
        TicError: it is damaged or holds more than plain data.
    """
    damage = (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError)
    try:
        with open(path, "rb") as file:
            return PlainUnpickler(file).load()
    except (*damage, OverflowError, MemoryError) as error:  # the last two: a length that can't be
        raise TicError(f"{path} is refused: {error or type(error).__name__}") from None


def table_path(lists: Path, task: str) -> Path:
    """The file of a task's table: JSON, or a pickle where there is no JSON.

    Raises:
        TicError: neither is there; the message has the command that fetches them.
    """
    for suffix in (".json", ".pkl"):
        if (path := lists / f"{TABLES[task]}{suffix}").exists():
            return path
    raise TicError(f"{lists} has no {TABLES[task]}.json; to fetch it: {FETCH} {lists} --lists eval")


def read_table(lists: Path, task: str) -> dict[str, Any]:
    """A released table: year -> [uid] for ``retrieval``, year -> synset -> [uid] for ``datacompnet``.

    Raises:
        TicError: it is missing or no such table.
    """
    path = table_path(lists, task)
    table = read_json(path) if path.suffix == ".json" else read_pickle(path)
    years = table if isinstance(table, dict) else {}
    uids = chain.from_iterable(year.values() if isinstance(year, dict) else [year] for year in years.values())
    kinds = {isinstance(year, dict) for year in years.values()}
    if kinds != {task == "datacompnet"} or not all(isinstance(some, list | tuple | set) for some in uids):
        raise TicError(f"{path} is no table of {'year -> synset' if task == 'datacompnet' else 'year'} -> UIDs")
    return {str(year): uids for year, uids in years.items()}
