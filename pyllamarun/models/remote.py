"""Reads headers over HTTP by ranges: a few requests that grow, so that no more is fetched than the header and little.

What is read is one version of one file: its ETag and its size are pinned by the first answer, and a later one that
differs is an error.  A server that heeds no ranges is read from its start and left where the header ends.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from pyllamarun.errors import DownloadError
from pyllamarun.models.answers import Answer, fault, read_answer
from pyllamarun.models.cursor import CHUNK_BYTES
from pyllamarun.models.gguf import Header, parse_header, read_parts
from pyllamarun.models.http import Interrupted, Web
from pyllamarun.models.refusals import AGAIN, Place

if TYPE_CHECKING:
    import requests

    from pyllamarun.models.hub_cache import Spot

FIRST_BYTES = 64 << 10
# Read beyond what is known to be needed: by the first part of a model, and by the others together.  With what else
# goes over the line (redirects, a list of the repository's files) it stays within 1 MiB.
AHEAD_BYTES = 384 << 10
LEAST_AHEAD_BYTES = 8 << 10


@dataclass(frozen=True)
class RemoteFile:
    """One file on a server; `size_bytes` where it is known beforehand, else None; `sha256` where it is published.

    `spot` is its place in Hugging Face's cache, where it is to be kept there.
    """

    place: Place
    size_bytes: int | None = None
    sha256: str = ""
    spot: Spot | None = None


def read_remote_header(web: Web, path: Path, find: Callable[[Path], RemoteFile]) -> Header:
    """The header of a model that is not here, and of all its parts when it is the first of a split.

    `path` is where it would be kept, and its parts beside it; `find` says where on the network each of them lies.
    Raises DownloadError, and ModelError when it is not a sound GGUF file.
    """
    ahead_bytes = AHEAD_BYTES

    def read_part(part: Path) -> Header:
        nonlocal ahead_bytes
        file = find(part)
        with RangeReader(web, file, ahead_bytes) as stream:
            size_bytes = stream.open()
            header = parse_header(cast(BinaryIO, stream), part, size_bytes, file.place.shown)
        if part == path and header.split_count > 1:
            ahead_bytes = max(LEAST_AHEAD_BYTES, AHEAD_BYTES // (header.split_count - 1))
        return header

    return read_parts(path, read_part, lambda part: find(part).place.shown)


class RangeReader(io.RawIOBase):
    """A file on a server, read forward from its start.

    `read(n)` fetches n bytes where that is more than CHUNK_BYTES, and else as many as were read so far, within limits:
    who asks for a chunk does not know how much of it is needed.
    """

    def __init__(self, web: Web, file: RemoteFile, ahead_bytes: int = AHEAD_BYTES) -> None:
        super().__init__()
        self._web, self._place, self._ahead_bytes = web, file.place, ahead_bytes
        self._size: int | None = file.size_bytes
        self._version: str | None = None
        self._direct = ""  # where the redirects led
        self._position = 0
        self._pending = b""
        self._breaks = 0
        self._response: requests.Response | None = None
        self._stream: Iterator[bytes] | None = None  # from a server that heeds no ranges

    def open(self) -> int:
        """Makes the first request, and returns the size of the whole file in bytes."""
        self._pending = self.read(FIRST_BYTES)
        assert self._size is not None
        return self._size

    def close(self) -> None:
        self._leave()
        super().close()

    def _leave(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = self._stream = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Some bytes, at most `size`; b"" at the end of the file.  Goes on where a connection breaks, a few times."""
        while not self._pending and self._position != self._size:
            try:
                self._read_on(size if size > CHUNK_BYTES else min(size, self._ahead_bytes))
            except Interrupted as error:
                self._leave()
                self._breaks += 1
                if self._breaks >= self._web.patience.attempts:
                    why = f"{error}; so it went {self._breaks} times."
                    raise DownloadError(f"{self._place.shown} cannot be read.", why=why, remedy=AGAIN) from None
                self._web.patience.sleep(2**self._breaks / 4)
        data, self._pending = self._pending[:size], self._pending[size:]
        return data

    def _read_on(self, wanted: int) -> None:
        """Adds to what is pending.  What came before a connection broke is kept, also when this raises Interrupted."""
        if self._stream is None:
            if wanted <= CHUNK_BYTES:
                wanted = min(wanted, max(FIRST_BYTES, self._position))
            self._ask(wanted if self._size is None else min(wanted, self._size - self._position))
        if self._stream is not None:
            self._take(next(self._stream, b""))

    def _take(self, piece: bytes) -> None:
        self._pending += piece
        self._position += len(piece)

    def _ask(self, wanted: int) -> None:
        """One request: reads the range that was asked for, or begins to read the whole file."""
        headers = {"Range": f"bytes={self._position}-{self._position + wanted - 1}"}
        if self._version and not self._version.startswith("W/"):
            headers["If-Range"] = self._version
        self._response = response = self._get(headers)
        self._direct = response.url if response.url != self._place.url else ""
        answer = read_answer(self._place, response)
        self._check_version(answer)
        if not answer.is_range:
            self._stream = _without(self._position, self._web.body(response))
            return
        if answer.length_bytes:
            self._read_range(response, answer, wanted)
        elif self._position != self._size:
            raise fault(self._place, f"It answers that byte {self._position:,} is past the end of {self._size:,}.")
        self._leave()

    def _get(self, headers: Mapping[str, str]) -> requests.Response:
        if self._direct:
            try:
                return self._web.get(self._place, headers, self._direct)
            except DownloadError:  # such addresses are good for a while only
                pass
        return self._web.get(self._place, headers)

    def _read_range(self, response: requests.Response, answer: Answer, wanted: int) -> None:
        left, last = answer.length_bytes, answer.start + answer.length_bytes - 1
        if answer.start != self._position or left > wanted:
            why = f"Asked for {wanted:,} bytes from {self._position:,} on, it sends {answer.start:,} to {last:,}."
            raise fault(self._place, why)
        for piece in self._web.body(response):
            self._take(piece[:left])
            left -= len(piece)
            if left <= 0:
                return
        raise Interrupted(f"An answer ended {left:,} bytes early")

    def _check_version(self, answer: Answer) -> None:
        size = answer.total_bytes if self._size is None else self._size
        changed = self._version is not None and answer.version != self._version
        if changed or answer.total_bytes != size:
            raise DownloadError(
                f"{self._place.shown} changed while it was read.",
                why="Its ETag is another now." if changed else f"It had {size:,} bytes and has {answer.total_bytes:,}.",
                remedy="Try again: it is read from its start then.",
            )
        self._version, self._size = answer.version, size


def _without(count: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces from byte `count` on."""
    for piece in pieces:
        if len(piece) > count:
            yield piece[count:]
        count = max(0, count - len(piece))
