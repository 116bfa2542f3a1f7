"""A server on this machine that stands before an S3 server and fails when told to.

``store.fail("GET", "x.json", 503, times=2)`` spoils the next two requests with that method and that text in their
path. A fault is an HTTP status, or ``CLOSE`` (no answer), ``TRUNCATE`` (the first half of the body), ``HANG`` (no
answer, but the connection stays) or ``LOST`` (the request is carried out, the answer does not come).
"""

import http.client
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CLOSE, TRUNCATE, HANG, LOST = "close", "truncate", "hang", "lost"
FOREVER = 1_000_000
CODES = {400: "InvalidToken", 403: "AccessDenied", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Fault:
    method: str
    text: str
    kind: int | str
    times: int


@dataclass
class Store:
    """Passes requests on to ``behind``; ``url`` is its own address, ``requests`` are (method, path)."""

    behind: str
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, method, text, kind, times=1):
        self.faults.append(Fault(method, text, kind, times))

    def spoil(self, method, path):
        """Note a request; returns the fault that it meets, or None."""
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and fault.text in path:
                    fault.times -= 1
                    return fault.kind
        return None

    def count(self, method, text=""):
        return sum(method == made and text in path for made, path in self.requests)

    def answer(self, method, path, headers, body):
        connection = http.client.HTTPConnection(urlsplit(self.behind).netloc)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data


def handler(store):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, headers, body, sent=None):
            self.send_response_only(status)
            length = len(body)
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            if self.close_connection:  # else a client may send its next request where nobody reads it
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:sent])

        def serve(self):
            fault = store.spoil(self.command, self.path)
            self.close_connection = self.close_connection or fault is not None
            if fault == HANG:
                time.sleep(3)
            if fault in (CLOSE, HANG):
                return
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if isinstance(fault, int):
                text = f"<Error><Code>{CODES[fault]}</Code><Message>planned</Message></Error>"
                self.reply(fault, [("Content-Type", "application/xml")], text.encode())
                return
            status, headers, body = store.answer(self.command, self.path, self.headers, data)
            if fault != LOST:
                self.reply(status, headers, body, len(body) // 2 if fault == TRUNCATE else None)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def serving(store):
    """Serve ``store`` at ``store.url``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(store))
    server.daemon_threads, server.block_on_close = True, False
    store.url = "http://{}:{}".format(*server.server_address)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield store
    server.shutdown()
    server.server_close()
