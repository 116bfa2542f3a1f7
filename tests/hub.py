"""A server on this machine that answers what huggingface_hub asks the hub for: models and datasets."""

import hashlib
import json
import re
from contextlib import contextmanager

import pytest
from cloud import serving
from huggingface_hub import constants

FILE = re.compile(r"/api/models/([\w-]+/[\w-]+)(/tree/main)?|/(?:datasets/)?([\w-]+/[\w-]+)/resolve/(?:main|a+)/(.+)")
COMMIT = ("X-Repo-Commit", "a" * 40)


@contextmanager
def serving_hub(files):
    """Serve ``files``: repository -> name -> bytes; a server as ``cloud.serving`` has it."""

    def answer(environ, start_response):
        found = FILE.fullmatch(environ["PATH_INFO"])
        model, tree, repository, name = found.groups() if found else (None,) * 4
        own = store.files.get(model or repository, {})
        body = own.get(name)
        if model:
            sizes = [{"type": "file", "path": name, "size": len(data), "oid": "b"} for name, data in own.items()]
            body = json.dumps(sizes if tree else {"id": model, "tags": []}).encode()
        status, more = ("404 Not Found", ("X-Error-Code", "EntryNotFound")) if body is None else ("200 OK", COMMIT)
        body = body or b""
        tag = f'"{hashlib.sha256(body).hexdigest()}"'
        start_response(status, [("Content-Length", str(len(body))), ("ETag", tag), more])
        return [body if environ["REQUEST_METHOD"] == "GET" else b""]

    with serving(answer) as store:
        store.files = files
        yield store


@contextmanager
def using_hub(files, cache):
    """Serve ``files`` to this process, which has asked no hub yet; ``cache`` is its folder of what it was sent."""
    with serving_hub(files) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server
