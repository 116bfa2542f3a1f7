"""A server on this machine that answers what huggingface_hub asks the hub for: models and datasets."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILE = re.compile(r"/(?:datasets/)?([\w-]+/[\w-]+)/resolve/(\w+)/(.+)")
API = re.compile(r"/api/(?:models|datasets)/([\w-]+/[\w-]+)/(revision|tree)/(\w+)(\?.*)?")


class Handler(BaseHTTPRequestHandler):
    """Serves ``server.files``: repository -> name -> bytes, all at ``server.commit``.

    ``server.faults`` maps (command, last part of the path) to a status, or to a function of the handler.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        server = self.server
        server.requests.append((self.command, self.path, self.headers.get("Range")))
        server.tokens.add(self.headers.get("Authorization"))
        name = self.path.partition("?")[0].rpartition("/")[2]
        fault = server.faults.get((self.command, name))
        if callable(fault):
            return fault(self)
        if fault:
            return self.answer(fault, b"")
        if found := API.fullmatch(self.path):
            return self.answer(200, self.describe(*found.groups()[:2]))
        found = FILE.fullmatch(self.path)
        body = server.files.get(found[1], {}).get(found[3]) if found and found[2] in (server.commit, "main") else None
        if body is None:
            return self.answer(404, b"")
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")
        self.answer(200, body, int(start[1]))

    do_GET = do_HEAD

    def describe(self, repository, what):
        """The repository and the names of its files, or (tree) their sizes."""
        files = self.server.files.get(repository, {})
        if what == "tree":
            sizes = {name: len(body) for name, body in files.items()}
            return json.dumps([{"type": "file", "path": n, "size": s, "oid": "b"} for n, s in sizes.items()]).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "sha": self.server.commit, "siblings": siblings}).encode()

    def answer(self, status, body, start=0, sent=None):
        """``sent``: cut the connection after so many bytes."""
        self.send_response(206 if start else status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:][:sent])
        self.close_connection = self.close_connection or sent is not None

    def log_message(self, *_):
        pass


@contextmanager
def serving_hub(files):
    """Serve ``files``: repository -> name -> bytes; ``url`` is where."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.tokens, server.faults, server.commit, server.files = [], set(), {}, "a" * 40, files
    server.url = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
