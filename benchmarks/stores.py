"""Stores on loopback to measure and test against: S3 as moto speaks it, a folder over HTTP, and what stands between."""

from __future__ import annotations

import http.client
import http.server
import logging
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

BLOCK = 1 << 16
AWS = {
    "AWS_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
}


@dataclass(frozen=True)
class Request:
    """A request that passed: its method, path and Range header, and the bytes of its body and of the answer's."""

    method: str
    path: str
    range: str
    sent: int
    received: int


@dataclass(eq=False)
class Between:
    """What stands between a job and a store: it counts, and answers as slowly and as badly as it is told to.

    delay: seconds before each answer; rate: bytes a second of all answers together, 0 = as fast as it goes; fault: is
    asked for each request's method and path, "" to answer well, or "503", "drop" (half of the body, then the line is
    cut), "stall" (no answer, ever) or "damage" (another byte in the middle). listening: a socket that clients reach it
    by, where they are on another machine (benchmarks.nodes); `url` is then the caller's to set.
    """

    upstream: str
    delay: float = 0.0
    rate: float = 0.0
    fault: Callable[[str, str], str] = lambda method, path: ""
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    listening: socket.socket | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def take(self) -> list[Request]:
        """The requests since the last call."""
        found, self.requests = self.requests, []
        return found

    def __enter__(self) -> Between:
        handler, own = partial(_Passing, self), self.listening is None
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=own)
        self._server.daemon_threads = True
        if self.listening is not None:
            self._server.socket.close()
            self._server.socket = self.listening
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()  # lets stalled answers go
        self._server.shutdown()
        self._server.server_close()


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class _Passing(_Quiet):
    def __init__(self, between: Between, *rest: Any) -> None:
        self.between = between
        super().__init__(*rest)

    def do_GET(self) -> None:
        between = self.between
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = between.fault(self.command, self.path)
        if fault == "stall":
            between._over.wait()
            self.close_connection = True
            return
        time.sleep(between.delay)
        if fault == "503":
            between.requests.append(Request(self.command, self.path, "", len(body), 0))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(between.upstream.removeprefix("http://"), timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        between.requests.append(Request(self.command, self.path, self.headers.get("Range", ""), len(body), len(data)))
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if fault == "damage" and data:
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        for start in range(0, len(data), BLOCK):
            part = data[start : start + BLOCK]
            if between.rate:
                with between._turn:  # one line for all
                    time.sleep(len(part) / between.rate)
            self.wfile.write(part)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815


class _Folder(_Quiet):
    """A folder, with ranges."""

    def __init__(self, root: Path, authorization: str, *rest: Any) -> None:
        self.root, self.authorization = root, authorization
        super().__init__(*rest)

    def do_GET(self) -> None:
        path = self.root / self.path.lstrip("/")
        allowed = not self.authorization or self.headers.get("Authorization") == self.authorization
        if not allowed or ".." in path.parts or not path.is_file():
            self.send_response(404 if allowed else 401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(size, int(asked[2] or size) + 1)) if asked else (0, size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            with open(path, "rb") as file:
                file.seek(begin)
                shutil.copyfileobj(_Part(file, end - begin), self.wfile)

    do_HEAD = do_GET  # noqa: N815


class _Part:
    """The next bytes of a file, and no more."""

    def __init__(self, file: Any, size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int) -> bytes:
        data: bytes = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


@contextmanager
def folder_server(root: Path, authorization: str = "") -> Iterator[str]:
    """The URL of a read-only HTTP server of a folder that knows ranges; authorization: the header that it wants."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Folder, root, authorization)) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an S3 server without buckets; AWS has the environment that its clients need, but AWS_ENDPOINT_URL."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
