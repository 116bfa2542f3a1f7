"""Local paths and cloud URLs as one thing: ``to_path``, atomic writes, JSON.

Nothing is ever visible under its final name before it is whole: local files are written beside it and renamed, cloud
objects are written to a local file and uploaded when that is complete.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tic_clip import TicError


def is_remote(path: object) -> bool:
    """Whether ``path`` is a cloud URL such as ``s3://bucket/key``."""
    return "://" in str(path)


def to_path(path: object) -> Any:
    """``path`` as a ``pathlib.Path`` or a ``cloudpathlib.CloudPath``, which share their interface."""
    if not is_remote(path):
        return Path(str(path))
    from cloudpathlib import CloudPath  # boto3 costs half a second, so only where a URL is given
    from cloudpathlib.exceptions import InvalidPrefixError

    try:
        return CloudPath(str(path))
    except InvalidPrefixError as error:
        raise TicError(f"{path} is no local path and no s3://, gs:// or az:// URL") from error


@contextmanager
def atomic_open(path: object, mode: str = "wb") -> Iterator[IO]:
    """Open ``path`` for writing so that it changes only when the block ends without an error."""
    path = to_path(path)
    if is_remote(path):  # not path.open: it uploads what there is even if the block raises
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "object"
            with open(temporary, mode) as file:
                yield file
            path.upload_from(temporary, force_overwrite_to_cloud=True)
        path.clear_cache()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: object, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_open(path) as file:
        file.write(text.encode())


def write_json(path: object, value: object) -> None:
    """Write ``value`` to ``path`` atomically, as indented JSON with a newline at its end."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: object) -> Any:
    """The JSON value in ``path``.

    Raises:
        TicError: ``path`` is missing or holds no JSON.
    """
    file = to_path(path)
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise TicError(f"{path} is missing") from None
    except ValueError as error:
        raise TicError(f"{path} is not valid JSON: {error}") from None
