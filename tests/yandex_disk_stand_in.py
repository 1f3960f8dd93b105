"""Stand-in for Yandex.Disk: a local HTTP server that answers as its API and its storage do, and fails on request.

    python -m tests.yandex_disk_stand_in FOLDER [PORT]      serve the files of FOLDER until stopped

Sources: the pages "public" and "response-objects" of yandex.ru/dev/disk-api, and users' reports of busy public files.
These were never seen live and are assumed here:
- the answer to a busy file (429 DiskResourceDownloadLimitExceededError without "href") and whether it has Retry-After;
- the answer to an expired address (here 410; tests also try 403 and 404), and that an address redirects exactly once;
- whether the storage host sends ETag and Last-Modified, honours If-Range, and is the same host at the next try;
- whether files of many GB have "md5" and "sha256";
- the page that a captcha sends in place of JSON or of the file.
"""

import hashlib
import json
import os
import ssl
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

LINK = "https://disk.yandex.ru/d/nq0x0-Ivx93VJw"
PREFIX = "/v1/disk/public/resources"
BLOCK = 1 << 18


@dataclass
class Fault:
    """A fault of one answer; counts of bytes refer to its body."""

    status: int = 0  # answer with this status and `body`
    body: bytes | Mapping[str, Any] = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after this many bytes
    stall: int | None = None  # after this many bytes send nothing until `released` is set
    short: int | None = None  # send only this many bytes, as if these were all
    length: bool = True  # announce Content-Length
    ranges: bool = True  # honour Range
    lie: bytes | None = None  # send other content under the same ETag
    then: Callable[[], None] = lambda: None  # call this after the answer


@dataclass
class Request:
    """The kind of a request ("about", "address" or "content"), and the bytes of content that were sent."""

    kind: str
    headers: Mapping[str, str]
    sent: int = 0


class YandexDisk:
    """The server; it runs during its `with` block. `files`: path -> its bytes, or a file that holds them."""

    def __init__(self, files: Mapping[str, bytes | Path], port: int = 0, certificate: Path | None = None) -> None:
        self.files = dict(files)
        self.about: dict[str, dict[str, Any]] = {}  # path -> values that replace the API's; None removes one
        self.modified = "2024-05-14T10:12:13+00:00"
        self.tags = True  # the storage host sends ETag and Last-Modified
        self.faults: dict[str, list[Fault | None]] = {"about": [], "address": [], "content": []}
        self.always: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.released = threading.Event()
        self.fresh: set[str] = set()  # addresses that nobody has used yet
        self.digests: dict[str, tuple[object, dict[str, Any]]] = {}
        self.guard = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.disk = self  # type: ignore[attr-defined]
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # in these tests clients often hang up
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)

    def __enter__(self) -> "YandexDisk":
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Return this process's environment, changed: downloads come from this server, without proxy or pauses."""
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        inherited.pop("CI", None)
        return inherited | {"YANDEX_DISK_API": self.url + PREFIX, "YANDEX_DISK_LINK": LINK, "FETCH_BACKOFF": "0.01"}

    def kinds(self) -> list[str]:
        """Return the kinds of all requests so far."""
        return [request.kind for request in self.requests]

    def sent(self) -> int:
        """Return the bytes of content that were sent."""
        return sum(request.sent for request in self.requests)

    def describe(self, path: str) -> dict[str, Any]:
        """Return the API's description of a file."""
        content = self.files[path]
        if self.digests.get(path, (None,))[0] is not content:
            md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
            for block in pieces(content, 0):
                md5.update(block)
                sha256.update(block)
                size += len(block)
            self.digests[path] = content, {"size": size, "md5": md5.hexdigest(), "sha256": sha256.hexdigest()}
        said = {"name": Path(path).name, "type": "file", "modified": self.modified, **self.digests[path][1]}
        said |= self.about.get(path, {})
        return {key: value for key, value in said.items() if value is not None}


def pieces(content: bytes | Path, start: int) -> Iterator[bytes]:
    """Yield the content from byte `start` on."""
    if isinstance(content, bytes):
        for at in range(start, len(content), BLOCK):
            yield content[at : at + BLOCK]
        return
    with content.open("rb") as file:
        file.seek(start)
        while block := file.read(BLOCK):
            yield block


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after another."""

    protocol_version = "HTTP/1.1"

    @property
    def disk(self) -> YandexDisk:
        return self.server.disk  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)  # a proxy gets a whole URL
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path in (PREFIX, f"{PREFIX}/download"):
            self.api("address" if url.path.endswith("/download") else "about", query)
        elif url.path.startswith("/redirect/"):
            self.answer(302, b"", {"Location": f"{self.disk.url}/storage/{url.path.rpartition('/')[2]}?{url.query}"})
        elif url.path.startswith("/storage/"):
            self.storage(url.path.rpartition("/")[2], query["path"])
        else:
            self.answer(404, {"error": "NotFoundError", "message": "no such page", "description": url.path})

    def asked(self, kind: str) -> tuple[Request, Fault]:
        """Note the request and return the fault that is planned for it."""
        with self.disk.guard:
            request = Request(kind, dict(self.headers.items()))
            self.disk.requests.append(request)
            planned = self.disk.faults[kind]
            return request, (planned.pop(0) if planned else None) or self.disk.always.get(kind) or Fault()

    def api(self, kind: str, query: Mapping[str, str]) -> None:
        """Answer as cloud-api.yandex.net does."""
        _, fault = self.asked(kind)
        path = query.get("path", "")
        if fault.stall is not None:
            self.disk.released.wait()
        if fault.status:
            self.answer(fault.status, fault.body, fault.headers)
        elif query.get("public_key") != LINK or path not in self.disk.files:
            missing = {
                "error": "DiskNotFoundError",
                "message": "Resource not found.",
                "description": "Resource not found.",
            }
            self.answer(404, missing)
        elif kind == "about":
            said, wanted = self.disk.describe(path), query.get("fields", "").split(",")
            self.answer(200, {key: value for key, value in said.items() if key in wanted or not query.get("fields")})
        else:
            with self.disk.guard:
                token = str(len(self.disk.requests))
                self.disk.fresh.add(token)
            href = f"{self.disk.url}/redirect/{token}?path={quote(path)}"
            self.answer(200, {"href": href, "method": "GET", "templated": False})
        fault.then()

    def storage(self, token: str, path: str) -> None:
        """Answer as the storage host does."""
        request, fault = self.asked("content")
        with self.disk.guard:
            known = token in self.disk.fresh
            self.disk.fresh.discard(token)
        if fault.status or not known:
            self.answer(fault.status or 410, fault.body, fault.headers)
            fault.then()
            return
        said = self.disk.describe(path)
        content = self.disk.files[path] if fault.lie is None else fault.lie
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        headers = {"Content-Type": "application/zip", **fault.headers}
        guards = [f'"{said.get("md5")}"', formatdate(said["size"], usegmt=True)]
        if self.disk.tags:
            headers |= {"ETag": guards[0], "Last-Modified": guards[1]}
        start, status, wanted = 0, 200, self.headers.get("Range", "")
        if wanted and fault.ranges and self.headers.get("If-Range", guards[0]) in guards:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if start >= size:
                self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        end = size if fault.short is None else min(size, start + fault.short)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if fault.length:
            self.send_header("Content-Length", str(end - start))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        self.send(request, fault, content, start, end)
        fault.then()

    def send(self, request: Request, fault: Fault, content: bytes | Path, start: int, end: int) -> None:
        """Send the body, until the fault stops it."""
        left = end - start
        for block in pieces(content, start):
            for limit in (fault.stall, fault.cut):
                if limit is not None and request.sent + len(block) > limit:
                    head = block[: max(0, limit - request.sent)]
                    self.wfile.write(head)
                    request.sent += len(head)
                    left -= len(head)
                    block = block[len(head) :]
                    if limit == fault.cut:
                        self.close_connection = True
                        return
                    self.disk.released.wait()
            block = block[:left]
            self.wfile.write(block)
            request.sent += len(block)
            left -= len(block)
            if left <= 0:
                return

    def answer(self, status: int, body: bytes | Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Send a small answer; a mapping as JSON."""
        kind = "text/html; charset=utf-8" if isinstance(body, bytes) else "application/json; charset=utf-8"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with YandexDisk({f"/{path.name}": path for path in folder.iterdir() if path.is_file()}, port) as disk:
        for path in disk.files:
            disk.describe(path)  # computes the digests before the first request
        print(f"YANDEX_DISK_API={disk.url}{PREFIX} YANDEX_DISK_LINK={LINK}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
