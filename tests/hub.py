"""A server on this machine that answers what huggingface_hub asks the hub for: models and datasets."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

FILE = re.compile(r"/api/models/([\w-]+/[\w-]+)(/tree/main)?|/(?:datasets/)?([\w-]+/[\w-]+)/resolve/(?:main|a+)/(.+)")


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``: repository -> name -> bytes.

    ``server.faults`` maps (command, last part of the path) to a status, or to a function of the handler.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        server, (path, _, _) = self.server, self.path.partition("?")
        server.requests.append((self.command, path))
        fault = server.faults.get((self.command, path.rpartition("/")[2]))
        if fault:
            return fault(self) if callable(fault) else self.answer(fault)
        found = FILE.fullmatch(path)
        if not found:
            return self.answer(404)
        model, tree, repository, name = found.groups()
        files = server.files.get(model or repository, {})
        if model:
            sizes = [{"type": "file", "path": name, "size": len(body), "oid": "b"} for name, body in files.items()]
            return self.answer(200, json.dumps(sizes if tree else {"id": model, "tags": []}).encode())
        self.answer(200 if name in files else 404, files.get(name, b""))

    do_GET = do_HEAD

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving_hub(files):
    """Serve ``files``: repository -> name -> bytes; ``url`` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.faults, server.files = [], {}, files
    server.url = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def using_hub(files, cache):
    """Serve ``files`` to this process, which has asked no hub yet; ``cache`` is its folder of what it was sent."""
    with serving_hub(files) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        yield server
