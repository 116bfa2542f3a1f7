"""The clouds: objects, their six requests as each cloud's package makes them, and trying these again.

``locate`` gives the object that a URL names; ``tic_clip.storage`` is what callers use.
"""

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tic_clip import TicError

ATTEMPTS = 6
"""How often a request is made before the store counts as out of reach."""

BACKOFF = 0.5
"""Seconds before the second attempt; doubled before each further one, at most ``LONGEST_PAUSE``."""

LONGEST_PAUSE = 20.0

TIMEOUT = 60.0
"""Seconds that a connection, or the next bytes on it, may take."""

PART = 1 << 25
"""Bytes of one request of a large download or upload, so that an error costs one part only."""

BLOCK = 1 << 18
"""Bytes of a first ranged read; doubled up to ``PART`` / 4 while the reads follow each other closely."""

PAGE = 1000
"""Objects that one request lists."""

Listing = list[tuple[str, int]]
"""(key, size in bytes) of objects; a folder's key ends in "/"."""


class StorageError(OSError):
    """A store that could not be reached although it was tried several times; later it may be."""


class NotFoundError(FileNotFoundError, TicError):
    """A file or object that is not there."""


class Object:
    """An object, or a folder, of a cloud. The requests raise what the cloud's package raises; ``retry`` calls them.

    ``errors`` are the package's exceptions, ``transient`` those that may pass though they carry no HTTP status.
    """

    errors: tuple[type[Exception], ...] = ()
    transient: tuple[type[Exception], ...] = ()

    def __init__(self, url: str, bucket: str, key: str) -> None:
        self.url, self.bucket, self.key = url, bucket, key

    @property
    def prefix(self) -> str:
        """How the keys of what lies in this folder begin."""
        return f"{self.key}/" if self.key else ""

    def page(self, deep: bool, token: object, limit: int) -> tuple[Listing, object]:
        """One page of the objects in this folder (and, if not ``deep``, of the folders), and the next one's token."""
        raise NotImplementedError

    def stat(self) -> tuple[int, object]:
        """(size in bytes, a tag of this version)."""
        raise NotImplementedError

    def read(self, start: int, stop: int | None, tag: object) -> bytes:
        """The bytes from ``start`` to ``stop``, of the version ``tag`` if one is given."""
        raise NotImplementedError

    def put(self, local: Path) -> None:
        """Make a local file this object."""
        raise NotImplementedError

    def delete(self) -> None:
        """Remove the object."""
        raise NotImplementedError

    def retry(self, call: Callable, *args: object) -> Any:
        """``call(*args)``, tried again with growing pauses while its errors are such as may pass.

        Raises:
            TicError: an error that lasts.
            Unreachable: the last attempt failed, too.
        """
        from urllib3.exceptions import HTTPError  # below every cloud's package, and now and then not wrapped by it

        passing = (*self.transient, HTTPError, StorageError, ConnectionError, TimeoutError)
        for attempt in range(ATTEMPTS):
            if attempt:
                pause = min(BACKOFF * 2 ** (attempt - 1), LONGEST_PAUSE)
                time.sleep(pause * random.uniform(0.5, 1))  # not all workers at the same moment
            try:
                return call(*args)
            except (*self.errors, *passing) as error:
                lasting = self._lasting(error, isinstance(error, passing))
                if lasting:
                    raise lasting from error
                last = error
        raise StorageError(f"{self.url} could not be reached, tried {ATTEMPTS} times: {_one_line(last)}") from last

    def _lasting(self, error: Exception, passing: bool) -> TicError | None:
        """What to tell the user of an error that trying again can't mend, or None."""
        status, text = _status(error), _one_line(error)
        if status is None:
            return None if passing else TicError(f"{self.url}: {text}")
        if status in (408, 409, 429) or status >= 500 or "RequestTimeout" in text:
            return None
        if status == 404 and not re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", text):
            return NotFoundError(f"{self.url} is missing")
        what = {401: "no access", 403: "no access", 404: "no such bucket", 412: "changed while it was read"}
        return TicError(f"{self.url}: {what.get(status, 'failed')} ({text})")

    def whole(self, start: int, stop: int, tag: object) -> bytes:
        """``read``, but too few bytes are an error that may pass."""
        data = self.read(start, stop, tag)
        if len(data) != stop - start:
            raise StorageError(f"{len(data)} of {stop - start} bytes came")
        return data

    def entries(self, deep: bool) -> Iterator[tuple[str, int]]:
        """(name below this folder, size in bytes) of the objects in it, and of its folders if not ``deep``."""
        token, empty = None, True
        while empty or token:
            entries, token = self.retry(self.page, deep, token, PAGE)
            if empty and not entries and not token and self.key:
                raise NotFoundError(f"{self.url} is missing or no folder")
            yield from ((key[len(self.prefix) :], size) for key, size in entries)
            empty = False

    def download(self, file: IO) -> None:
        """Write the object to an open file: in parts, each tried again on its own, all of the same version."""
        total, tag = self.retry(self.stat)
        for start in range(0, total, PART):
            file.write(self.retry(self.whole, start, min(start + PART, total), tag))

    def upload(self, local: Path) -> None:
        """``put`` with retries."""
        self.retry(self.put, local)


class _S3(Object):
    def __init__(self, url: str, bucket: str, key: str) -> None:
        super().__init__(url, bucket, key)
        from botocore import exceptions, parsers

        passing = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
        damaged = (exceptions.FlexibleChecksumError, parsers.ResponseParserError)
        self.transient = (*passing, *damaged)
        self.errors = (exceptions.BotoCoreError, exceptions.ClientError)
        try:
            self.client = _client("S3Client", self._options).client
        except exceptions.BotoCoreError as error:
            raise TicError(f"{url}: {_one_line(error)}") from error
        self.object = {"Bucket": bucket, "Key": key}

    @staticmethod
    def _options() -> dict[str, Any]:
        import botocore.session
        from botocore.config import Config

        session, once = botocore.session.get_session(), {"total_max_attempts": 1}  # the other attempts are ours
        waits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
        session.set_default_client_config(Config(**waits, retries=once, max_pool_connections=64))
        return {"botocore_session": session}

    def page(self, deep: bool, token: object, limit: int) -> tuple[Listing, object]:
        options = {"ContinuationToken": token} if token else {}
        options |= {} if deep else {"Delimiter": "/"}
        page = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=limit, **options)
        found = [(entry["Key"], entry["Size"]) for entry in page.get("Contents", [])]
        found += [(entry["Prefix"], 0) for entry in page.get("CommonPrefixes", [])]
        return found, page.get("NextContinuationToken")

    def stat(self) -> tuple[int, object]:
        head = self.client.head_object(**self.object)
        return head["ContentLength"], head["ETag"]

    def read(self, start: int, stop: int | None, tag: object) -> bytes:
        options = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        options |= {"IfMatch": tag} if tag else {}
        return self.client.get_object(**self.object, **options)["Body"].read()

    def put(self, local: Path) -> None:
        with open(local, "rb") as file:
            self.client.put_object(**self.object, Body=file)

    def delete(self) -> None:
        self.client.delete_object(**self.object)

    def upload(self, local: Path) -> None:
        """``put`` with retries; a large file goes in parts, each tried on its own, and appears when all are there."""
        if local.stat().st_size <= PART:
            return super().upload(local)
        begun = self.retry(lambda: self.client.create_multipart_upload(**self.object))
        target = {**self.object, "UploadId": begun["UploadId"]}
        try:
            with open(local, "rb") as file:
                parts = enumerate(iter(lambda: file.read(PART), b""), 1)
                sent = {"Parts": [self._upload_part(target, number, data) for number, data in parts]}
            self.retry(lambda: self.client.complete_multipart_upload(**target, MultipartUpload=sent))
        except BaseException:
            with suppress(*self.errors, *self.transient):
                self.client.abort_multipart_upload(**target)
            raise

    def _upload_part(self, target: dict[str, Any], number: int, data: bytes) -> dict[str, Any]:
        answer = self.retry(lambda: self.client.upload_part(**target, PartNumber=number, Body=data))
        return {"ETag": answer["ETag"], "PartNumber": number}


class _GS(Object):
    def __init__(self, url: str, bucket: str, key: str) -> None:
        super().__init__(url, bucket, key)
        self.client = _client("GSClient").client
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        from requests import RequestException

        self.transient = (TransportError, DataCorruption, RequestException)
        self.errors = (GoogleAPIError, GoogleAuthError, InvalidResponse)
        self.blob = self.client.bucket(bucket).blob(key)
        self.once = {"retry": None, "timeout": TIMEOUT}

    def page(self, deep: bool, token: object, limit: int) -> tuple[Listing, object]:
        options = {"page_token": token, "page_size": limit, "delimiter": None if deep else "/"}
        pages = self.client.list_blobs(self.bucket, prefix=self.prefix, **options, **self.once)
        found = [(blob.name, blob.size) for blob in next(pages.pages, ())]
        return found + [(name, 0) for name in pages.prefixes], pages.next_page_token

    def stat(self) -> tuple[int, object]:
        self.blob.reload(**self.once)
        return self.blob.size, self.blob.generation

    def read(self, start: int, stop: int | None, tag: object) -> bytes:
        end = None if stop is None else stop - 1
        options = {"if_generation_match": tag, "raw_download": True}  # raw: as stored, in the size that stat gave
        return self.blob.download_as_bytes(start=start or None, end=end, **options, **self.once)

    def put(self, local: Path) -> None:
        self.blob.upload_from_filename(str(local), **self.once)

    def delete(self) -> None:
        self.blob.delete(**self.once)


class _Azure(Object):
    def __init__(self, url: str, bucket: str, key: str) -> None:
        super().__init__(url, bucket, key)
        service = _client("AzureBlobClient").service_client
        from azure.core import exceptions

        self.transient = (exceptions.ServiceRequestError, exceptions.ServiceResponseError, exceptions.HttpResponseError)
        self.errors = (exceptions.AzureError,)
        self.container = service.get_container_client(bucket)
        self.once = {"retry_total": 0, "connection_timeout": TIMEOUT, "read_timeout": TIMEOUT}

    @property
    def blob(self) -> Any:
        return self.container.get_blob_client(self.key)

    def page(self, deep: bool, token: object, limit: int) -> tuple[Listing, object]:
        call = self.container.list_blobs if deep else self.container.walk_blobs
        pages = call(name_starts_with=self.prefix, results_per_page=limit, **self.once).by_page(token)
        found = [(blob.name, getattr(blob, "size", 0)) for blob in next(pages, ())]
        return found, pages.continuation_token

    def stat(self) -> tuple[int, object]:
        properties = self.blob.get_blob_properties(**self.once)
        return properties.size, properties.etag

    def read(self, start: int, stop: int | None, tag: object) -> bytes:
        from azure.core import MatchConditions

        options = {} if stop is None else {"offset": start, "length": stop - start}
        options |= {"etag": tag, "match_condition": MatchConditions.IfNotModified} if tag else {}
        return self.blob.download_blob(**options, **self.once).readall()

    def put(self, local: Path) -> None:
        with open(local, "rb") as file:
            self.blob.upload_blob(file, overwrite=True, **self.once)

    def delete(self) -> None:
        self.blob.delete_blob(**self.once)


CLOUDS: dict[str, type[Object]] = {"s3": _S3, "gs": _GS, "az": _Azure}

_lock = threading.Lock()
_of_the_parent: list[object] = []


def _client(name: str, options: Callable[[], dict[str, Any]] = dict) -> Any:
    """cloudpathlib's default client of a cloud, made with ``options()`` where there is none yet."""
    import cloudpathlib

    kind = getattr(cloudpathlib, name)
    kind._cloud_meta.validate_completeness()  # its package is there
    with _lock:
        if kind._default_client is None:
            kind(**options()).set_as_default_client()
        return kind._default_client


def _after_fork() -> None:
    """Leave the clients to the parent (they share its connections, and would remove its cache folder if they went)."""
    global _lock
    _lock = threading.Lock()
    package = sys.modules.get("cloudpathlib")
    for name in ("S3Client", "GSClient", "AzureBlobClient") if package else ():
        kind = getattr(package, name)
        _of_the_parent.append(kind._default_client)
        kind._default_client = None


os.register_at_fork(after_in_child=_after_fork)


def locate(path: object) -> Object:
    """The cloud object that a URL names; slashes too many are left out.

    Raises:
        TicError: a URL of no known cloud, without a bucket, or whose package or credentials are missing.
    """
    scheme, _, rest = str(path).partition("://")
    cloud, names = CLOUDS.get(scheme.lower()), [name for name in rest.split("/") if name]
    if cloud is None:
        raise TicError(f"{path} is no local path and no s3://, gs:// or az:// URL")
    if not names:
        raise TicError(f"{path} names no bucket")
    from cloudpathlib.exceptions import CloudPathException, MissingDependenciesError

    try:
        return cloud(f"{scheme.lower()}://{'/'.join(names)}", names[0], "/".join(names[1:]))
    except (MissingDependenciesError, ModuleNotFoundError) as error:
        raise TicError(f"{path} needs a package that is not there: pip install 'tic-clip[{scheme.lower()}]'") from error
    except (CloudPathException, ValueError) as error:
        raise TicError(f"{path}: {_one_line(error)}") from error


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of any of the clouds' packages carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    codes = (getattr(error, "status_code", None), getattr(error, "code", None), getattr(response, "status_code", None))
    return next((int(code) for code in codes if isinstance(code, int)), None)


def _one_line(error: Exception) -> str:
    """An error's text, cut to what fits into one line."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and isinstance(response.get("Error"), dict):
        return f"{response['Error'].get('Code', '')} {response['Error'].get('Message', '')}".strip()
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


class Window:
    """Ranged reads of a cloud object; what was read last is kept, and grows while the reads are close together."""

    def __init__(self, found: Object) -> None:
        self.found = found
        self.size, self.tag = found.retry(found.stat)
        self.start, self.data, self.step = 0, b"", BLOCK // 2

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``."""
        stop = min(offset + size, self.size)
        if offset >= stop:
            return b""
        end = self.start + len(self.data)
        if offset < self.start or stop > end:
            near = 0 <= offset - self.start <= len(self.data) + self.step
            self.step = min(2 * self.step, max(PART // 4, BLOCK)) if near else BLOCK
            last = min(max(offset + self.step, stop), self.size)
            self.data, self.start = self.found.retry(self.found.whole, offset, last, self.tag), offset
        return self.data[offset - self.start : stop - self.start]
