"""Servers on this machine that fail when told to: an S3 here, huggingface.co in ``hub.py``.

``store.fail("GET", "x.json", 503, times=2)`` spoils the next two requests with that method and that text in their
URL. A fault is an HTTP status, or ``CLOSE`` (no answer), ``TRUNCATE`` (the first half of the body), ``HANG`` (no
answer, but the connection stays) or ``LOST`` (the request is carried out, the answer does not come).
"""

import socket
import threading
import time
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CLOSE, TRUNCATE, HANG, LOST = "close", "truncate", "hang", "lost"
FOREVER = 1_000_000
CODES = {400: "InvalidToken", 403: "AccessDenied", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}


class Store:
    """A WSGI application before another; ``requests`` are (method, URL), ``faults`` [method, text, kind, times]."""

    def __init__(self, app):
        self.app = app
        self.requests, self.faults, self.lock = [], [], threading.Lock()

    def fail(self, method, text, kind, times=1):
        self.faults.append([method, text, kind, times])

    def count(self, method, text=""):
        return sum(method == made and text in url for made, url in self.requests)

    def next_fault(self, method, url):
        with self.lock:
            self.requests.append((method, url))
            for fault in self.faults:
                if fault[0] == method and fault[1] in url and fault[3]:
                    fault[3] -= 1
                    return fault[2]
        return None

    def __call__(self, environ, start_response):
        fault = self.next_fault(environ["REQUEST_METHOD"], environ["REQUEST_URI"])
        if fault == HANG:
            time.sleep(3)
        if isinstance(fault, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{fault} planned", [("Content-Type", "application/xml")])
            error = f"<Error><Code>{CODES.get(fault)}</Code><Message>planned</Message></Error>"
            return [error.encode() if environ["REQUEST_METHOD"] != "HEAD" else b""]
        body = b"" if fault in (CLOSE, HANG) else b"".join(self.app(environ, start_response))
        if fault in (CLOSE, HANG, LOST):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionError
        return [body[: len(body) // 2] if fault == TRUNCATE else body]


@contextmanager
def serving(app=None):
    """Serve a ``Store`` at ``store.url``: of moto's S3, or of another application."""
    store = Store(app or DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True)
    store.url = "http://{}:{}".format(*server.server_address)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield store
    server.shutdown()
    server.server_close()
