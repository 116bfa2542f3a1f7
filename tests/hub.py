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
        server.requests.append((self.command, self.path))
        fault = server.faults.get((self.command, self.path.partition("?")[0].rpartition("/")[2]))
        if callable(fault):
            return fault(self)
        if fault:
            return self.answer(fault)
        if found := API.fullmatch(self.path):
            return self.answer(200, self.describe(*found.groups()[:2]))
        found = FILE.fullmatch(self.path)
        body = server.files.get(found[1], {}).get(found[3]) if found and found[2] in (server.commit, "main") else None
        self.answer(404 if body is None else 200, body or b"")

    do_GET = do_HEAD

    def describe(self, repository, what):
        """The repository and the names of its files, or (tree) their sizes."""
        files = self.server.files.get(repository, {})
        if what == "tree":
            sizes = {name: len(body) for name, body in files.items()}
            return json.dumps([{"type": "file", "path": n, "size": s, "oid": "b"} for n, s in sizes.items()]).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "sha": self.server.commit, "siblings": siblings}).encode()

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.server.commit)
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
    server.requests, server.faults, server.commit, server.files = [], {}, "a" * 40, files
    server.url = "http://{}:{}".format(*server.server_address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
