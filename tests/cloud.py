"""Stores that fail when told to, on this machine: one before an S3 server, and one that speaks Google's and Azure's.

``store.fail("GET", "x.json", 503, times=2)`` spoils the next two requests with that method and that text in their
path. A fault is an HTTP status, or ``CLOSE`` (no answer), ``TRUNCATE`` (the first half of the body), ``HANG`` (no
answer, but the connection stays) or ``LOST`` (the request is carried out, the answer does not come).
"""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

CLOSE, TRUNCATE, HANG, LOST = "close", "truncate", "hang", "lost"
FOREVER = 1_000_000
CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Fault:
    method: str
    text: str
    kind: int | str
    times: int


@dataclass
class Store:
    """``url`` is the server's address; ``requests`` are the (method, path with its query) that came."""

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
        """(status, headers, body) of the answer to a request."""
        raise NotImplementedError


@dataclass
class Proxy(Store):
    """Passes requests on to the server at the address ``behind``."""

    behind: str = ""

    def answer(self, method, path, headers, body):
        connection = http.client.HTTPConnection(urlsplit(self.behind).netloc)
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.getheaders(), data


@dataclass
class Memory(Store):
    """What google-cloud-storage and azure-storage-blob ask for, from ``objects``: (bucket, key) -> (data, version)."""

    objects: dict[tuple[str, str], tuple[bytes, int]] = field(default_factory=dict)

    def answer(self, method, path, headers, body):
        url = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if "/storage/v1/b/" not in url.path:
            return self.azure(method, url.path.removeprefix("/account/"), query, headers, body)
        bucket, _, key = url.path.partition("/storage/v1/b/")[2].partition("/o")
        return self.google(method, bucket, unquote(key[1:]), query, headers, body)

    def put(self, bucket, key, data):
        version = self.objects.get((bucket, key), (b"", 0))[1] + 1
        self.objects[bucket, key] = (data, version)
        return version

    def page(self, bucket, prefix, delimiter, limit, after):
        """(keys, folders, the next page's token): a page of a listing."""
        names = set()
        for found, key in self.objects:
            if found == bucket and key.startswith(prefix):
                rest, mark, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
                names.add(prefix + rest + mark)
        names = sorted(name for name in names if name > after)
        page = names[:limit]
        folders = [name for name in page if delimiter and name.endswith(delimiter)]
        return [name for name in page if name not in folders], folders, page[-1] if len(names) > limit else ""

    def part(self, data, span):
        """(status, headers, body): all of the data, or the range that a header asks for."""
        if not span:
            return 200, [], data
        start, stop = span.removeprefix("bytes=").split("-")
        part = data[int(start) : int(stop) + 1 if stop else None]
        return 206, [("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")], part

    def google(self, method, bucket, key, query, headers, body):
        if method == "POST":
            message = message_from_bytes(b"Content-Type: " + headers["content-type"].encode() + b"\r\n\r\n" + body)
            meta, data = message.get_payload()
            key, data = json.loads(meta.get_payload())["name"], data.get_payload(decode=True)
            return 200, [], json.dumps({"name": key, "generation": str(self.put(bucket, key, data))}).encode()
        if method == "GET" and not key:
            limit, after = int(query.get("maxResults", 1000)), query.get("pageToken", "")
            keys, folders, token = self.page(bucket, query.get("prefix", ""), query.get("delimiter"), limit, after)
            items = [{"name": key, "size": str(len(self.objects[bucket, key][0]))} for key in keys]
            page = {"items": items, "prefixes": folders, "nextPageToken": token}
            return 200, [("Content-Type", "application/json")], json.dumps(page).encode()
        if (bucket, key) not in self.objects:
            return 404, [("Content-Type", "application/json")], b'{"error": {"message": "No such object"}}'
        data, version = self.objects[bucket, key]
        if method == "DELETE":
            del self.objects[bucket, key]
            return 204, [], b""
        if query.get("ifGenerationMatch", str(version)) != str(version):
            return 412, [], b'{"error": {"message": "conditionNotMet"}}'
        if query.get("alt") == "media":
            return self.part(data, headers["range"])
        meta = {"name": key, "size": str(len(data)), "generation": str(version)}
        return 200, [("Content-Type", "application/json")], json.dumps(meta).encode()

    def azure(self, method, path, query, headers, body):
        bucket, _, key = unquote(path).partition("/")
        if query.get("comp") == "list":
            limit, after = int(query.get("maxresults", 5000)), query.get("marker", "")
            keys, folders, token = self.page(bucket, query.get("prefix", ""), query.get("delimiter"), limit, after)
            lines = [
                f"<Blob><Name>{key}</Name><Properties><Content-Length>{len(self.objects[bucket, key][0])}"
                "</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
                for key in keys
            ] + [f"<BlobPrefix><Name>{folder}</Name></BlobPrefix>" for folder in folders]
            text = f"<Blobs>{''.join(lines)}</Blobs><NextMarker>{token}</NextMarker>"
            page = f'<?xml version="1.0"?><EnumerationResults ContainerName="{bucket}">{text}</EnumerationResults>'
            return 200, [("Content-Type", "application/xml")], page.encode()
        if method == "PUT":
            return 201, [("ETag", f'"{self.put(bucket, key, body)}"')], b""
        if (bucket, key) not in self.objects:
            return 404, [("x-ms-error-code", "BlobNotFound")], b""
        data, version = self.objects[bucket, key]
        if method == "DELETE":
            del self.objects[bucket, key]
            return 202, [], b""
        if headers["if-match"] not in (None, f'"{version}"'):
            return 412, [("x-ms-error-code", "ConditionNotMet")], b""
        status, more, part = self.part(data, headers["x-ms-range"])
        more += [("ETag", f'"{version}"'), ("x-ms-blob-type", "BlockBlob"), ("Content-Length", str(len(part)))]
        return status, more, b"" if method == "HEAD" else part


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
