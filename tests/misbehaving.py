"""A web server on this machine that misbehaves on purpose, and counts what it sends."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BLOCK_BYTES = 16 << 10
SEND_BUFFER_BYTES = 4 << 10  # what is in it counts as sent, and may never arrive


@dataclass(frozen=True)
class RemoteContent:
    """A file as a server has it: its beginning, and then zeros, made up as they are asked for."""

    head: bytes
    size: int = 0
    etag: str = '"one"'

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", max(self.size, len(self.head)))

    def read(self, start: int, end: int) -> bytes:
        data = self.head[start:end]
        return data + bytes(end - start - len(data))


PATTERN = random.Random(6).randbytes(1 << 20)


class MadeUpContent(RemoteContent):
    """A file without end to its bytes: a pattern of 1 MiB, each time with another number before it."""

    def read(self, start: int, end: int) -> bytes:
        pieces = [self.head[start:end]]
        start += len(pieces[0])
        while start < end:
            number, offset = divmod(start, len(PATTERN))
            piece = (number.to_bytes(8, "little")[offset:] + PATTERN[max(8, offset) :])[: end - start]
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for start in range(0, self.size, len(PATTERN)):
            digest.update(self.read(start, min(start + len(PATTERN), self.size)))
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    path: str
    headers: Mapping[str, str]


class Handler(BaseHTTPRequestHandler):
    """One connection; behaviours answer through it."""

    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        super().setup()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self._answered = False
        number = self.server.record(Request(self.path, dict(self.headers.items())))
        behaviours = self.server.routes.get(self.path.partition("?")[0], (refuse(404),))
        with contextlib.suppress(ConnectionError):
            behaviours[min(number, len(behaviours) - 1)](self)

    def answer(self, status: int, body: bytes = b"", **headers: str | int | None) -> None:
        """Status, headers (`None` leaves one out) and body, whatever they say of each other."""
        sent: dict[str, str | int | None] = {"Content-Length": len(body)}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"HTTP/1.1 {status} Status"] + [
            f"{name}: {value}" for name, value in sent.items() if value is not None
        ]
        self.write("\r\n".join([*lines, "", ""]).encode())
        self._answered = True
        self.write(body)

    def write(self, data: bytes) -> None:
        if self.command == "HEAD" and self._answered:
            return
        view = memoryview(data)
        for start in range(0, len(data), BLOCK_BYTES):
            self.wfile.write(view[start : start + BLOCK_BYTES])
            self.server.count(len(view[start : start + BLOCK_BYTES]))

    def reset(self) -> None:
        """Ends the connection as a crash would."""
        self.close_connection = True
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()

    def wanted(self, content: RemoteContent) -> tuple[int, int]:
        """The range that was asked for, as start and end; the whole file without one."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match or self.headers.get("If-Range", content.etag) != content.etag:
            return 0, 0
        return int(match[1]), min(int(match[2]) + 1, content.size)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Behaviour = Callable[[Handler], None]


def serve(content: RemoteContent, **more: str | int | None) -> Behaviour:
    """As it should be; `more` headers on top."""

    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(content)
        if start >= content.size and handler.headers.get("Range"):
            handler.answer(416, Content_Range=f"bytes */{content.size}", ETag=content.etag)
        elif end:
            bounds = f"bytes {start}-{end - 1}/{content.size}"
            handler.answer(206, content.read(start, end), **{"Content_Range": bounds, "ETag": content.etag, **more})
        else:
            without_ranges(content, **more)(handler)

    return behaviour


def without_ranges(content: RemoteContent, **more: str | int | None) -> Behaviour:
    """The whole file, whatever was asked for, until it is enough for the client."""

    def behaviour(handler: Handler) -> None:
        handler.answer(200, **{"Content_Length": content.size, "ETag": content.etag, **more})
        for start in range(0, content.size, BLOCK_BYTES):
            handler.write(content.read(start, min(start + BLOCK_BYTES, content.size)))

    return behaviour


def refuse(status: int, **headers: str | int | None) -> Behaviour:
    return lambda handler: handler.answer(status, b"a secret in the body", **headers)


def redirect(target: str, status: int = 302) -> Behaviour:
    return lambda handler: handler.answer(status, Location=target)


def break_off(content: RemoteContent, after: int) -> Behaviour:
    """The right answer, but the connection is reset after so many bytes of the body."""

    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(content)
        headers = {"Content_Range": f"bytes {start}-{end - 1}/{content.size}", "ETag": content.etag}
        handler.answer(206, content.read(start, start + after), Content_Length=end - start, **headers)
        handler.wfile.flush()
        handler.request.shutdown(socket.SHUT_WR)
        handler.close_connection = True

    return behaviour


def stall(content: RemoteContent, after: int) -> Behaviour:
    """So many bytes, and then nothing, for as long as the client waits."""

    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(content)
        headers = {"Content_Range": f"bytes {start}-{end - 1}/{content.size}", "ETag": content.etag}
        handler.answer(206, content.read(start, start + after), Content_Length=end - start, **headers)
        handler.request.settimeout(30)
        handler.rfile.read(1)
        handler.close_connection = True

    return behaviour


def trickle(content: RemoteContent, pause_seconds: float) -> Behaviour:
    """A byte at a time, each well before a time-out."""

    def behaviour(handler: Handler) -> None:
        start, end = handler.wanted(content)
        handler.answer(
            206, Content_Length=end - start, ETag=content.etag, Content_Range=f"bytes {start}-{end - 1}/{content.size}"
        )
        for position in range(start, end):
            handler.write(content.read(position, position + 1))
            threading.Event().wait(pause_seconds)

    return behaviour


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.routes: dict[str, tuple[Behaviour, ...]] = {}
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self._lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients leave when they have enough

    def record(self, request: Request) -> int:
        """How many requests for this path came before."""
        with self._lock:
            count = sum(one.path.partition("?")[0] == request.path.partition("?")[0] for one in self.requests)
            self.requests.append(request)
            return count

    def count(self, sent_bytes: int) -> None:
        with self._lock:
            self.sent_bytes += sent_bytes

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def at(self, path: str, *behaviours: Behaviour) -> str:
        """Answers requests for a path by these, one after the other; the last one goes on.  Returns the address."""
        self.routes[path] = behaviours
        return self.url + path


@contextlib.contextmanager
def misbehaving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
