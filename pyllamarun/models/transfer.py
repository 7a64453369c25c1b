"""Brings the bytes of one file from a server into a Partial, by several connections, and hashes them as they come."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from pyllamarun.errors import DownloadError
from pyllamarun.models.answers import Answer, fault, read_answer
from pyllamarun.models.disk import check_room
from pyllamarun.models.http import Interrupted, Web
from pyllamarun.models.names import is_gguf
from pyllamarun.models.partial import CHUNK_BYTES, HASHED_AT_ONCE_BYTES, Partial
from pyllamarun.models.refusals import AGAIN, Place

if TYPE_CHECKING:
    import requests

CONNECTIONS = 4
PIECE_BYTES = 1 << 20
# A connection that breaks after less has brought nothing.
PROGRESS_BYTES = 1 << 20
PROGRESS_SECONDS = 0.1
FLUSH_SECONDS = 0.5
LEAVE_SECONDS = 2.0


class Worthless(DownloadError):
    """What the server sends is no model at all."""


class Transfer:
    """One file on its way.  Chunks are taken in order by a thread a connection, so that another can hash closely.

    A connection that the server refuses gives its chunk back while others go on: a server may allow fewer.
    """

    def __init__(self, web: Web, place: Place, partial: Partial, say: Callable[[str], None]) -> None:
        self._web, self._place, self._partial, self._say = web, place, partial, say
        self._direct = ""  # where the redirects led
        self._plain = False  # whether the server heeds no ranges: one connection, from the start on
        self._chunks: deque[int] = deque()
        self._working = 0
        self._bodies: set[requests.Response] = set()
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._digest = hashlib.sha256()
        self.transferred_bytes = self.resumed_bytes = 0

    def run(self, size_bytes: int | None, sha256: str, progress: Callable[[int, int], None]) -> str:
        """Fetches what is missing of the file, and returns its sha256.

        `size_bytes` and `sha256` are what is known of it: a partial file of another size is not gone on with, nor one
        of which the server names no version, unless its checksum will tell.  Raises DownloadError, and OSError where
        the disk does not do.
        """
        first = self._open(size_bytes, bool(sha256))
        partial = self._partial
        self.resumed_bytes = partial.done_bytes
        self._chunks.extend([0] if self._plain else partial.missing())
        self._working = min(CONNECTIONS, len(self._chunks)) if first else 0
        threads = [threading.Thread(target=self._work, args=(None,), daemon=True) for _ in range(1, self._working)]
        if first:
            threads.insert(0, threading.Thread(target=self._work, args=(first,), daemon=True))
        hasher = threading.Thread(target=self._guard, args=(self._hash,), daemon=True)
        threads += [hasher, threading.Thread(target=self._guard, args=(self._flush,), daemon=True)]
        try:
            for thread in threads:
                thread.start()
            while hasher.is_alive():
                hasher.join(PROGRESS_SECONDS)
                progress(partial.done_bytes, partial.size_bytes)
        finally:
            self._end(None)
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join(LEAVE_SECONDS)
        if self._error:
            raise self._error
        return self._digest.hexdigest()

    def _open(self, size_bytes: int | None, is_checked: bool) -> tuple[requests.Response, Answer] | None:
        """The first answer, which settles the version of the file; None when nothing is missing."""
        partial = self._partial
        begun = not partial.is_empty and self._goes_on(size_bytes, is_checked)
        if begun and not partial.missing():
            return None
        response, answer = self._ask(partial.missing()[0] if begun else 0, begun)
        if begun and (answer.version, answer.total_bytes) != (partial.version, partial.size_bytes):
            response.close()
            self._say(f"{self._place.shown} is fetched anew: it has changed on its server.")
            begun = False
            response, answer = self._ask(0, begun)
        try:
            self._check_size(response, answer, size_bytes)
            if not begun and not partial.is_empty:  # it is given up for a model, and for no login page
                self._check_beginning(self._first_piece(response))
                response, answer = self._ask(0, begun)
            check_room(partial.path.parent, answer.total_bytes - partial.disk_bytes)
            if not begun:
                partial.start(answer.version, answer.total_bytes)
        except BaseException:
            response.close()
            raise
        self._plain = not answer.is_range
        return response, answer

    def _goes_on(self, size_bytes: int | None, is_checked: bool) -> bool:
        """Whether what is there may be part of the file; says so where it may not."""
        if not self._partial.done:
            why = "what is there of it has no sound journal"
        elif size_bytes not in (None, self._partial.size_bytes):
            why = "its source announces another size now"
        elif not self._partial.version and not is_checked:
            why = "its server does not say which version it sends"
        else:
            return True
        self._say(f"{self._place.shown} is fetched anew: {why}.")
        return False

    def _check_size(self, response: requests.Response, answer: Answer, size_bytes: int | None) -> None:
        if not answer.length_bytes:
            raise Worthless(f"{self._place.shown} is empty.", remedy="Check the address.")
        if size_bytes in (None, answer.total_bytes):
            return
        if answer.start == 0:
            self._check_beginning(self._first_piece(response))
        raise DownloadError(
            f"{self._place.shown} is not the file that was announced.",
            why=f"Its server has {answer.total_bytes:,} bytes of it, and its source said {size_bytes:,}.",
            remedy="Try again: it may just have been replaced.",
        )

    def _first_piece(self, response: requests.Response) -> bytes:
        try:
            with closing(response):
                return next(self._web.body(response), b"")
        except Interrupted as error:
            raise self._failed(f"{error}.") from None

    def _failed(self, why: str) -> DownloadError:
        return DownloadError(f"{self._place.shown} cannot be fetched.", why=why, remedy=AGAIN)

    def _check_beginning(self, piece: bytes | memoryview) -> None:
        """Of a model, the first bytes say whether it is one."""
        start = bytes(piece[:64])
        if not is_gguf(self._partial.target.name) or start[:4] == b"GGUF"[: len(start)]:
            return
        why, remedy = "It does not begin as a GGUF file does.", "Check the address."
        if start.lstrip()[:1] == b"<":
            why, remedy = "It is a web page.", "Take the address of the file itself; there may be a login before it."
        elif start.startswith(b"version https://git-lfs"):
            why, remedy = "It is a Git-LFS pointer.", "Take the address that the file's page gives for downloading it."
        raise Worthless(f"{self._place.shown} is no model.", why=why, remedy=remedy)

    def _ask(self, chunk: int, begun: bool) -> tuple[requests.Response, Answer]:
        """Asks for what is missing of a chunk; or, of a server that heeds no ranges, for all of it."""
        headers, version = {}, self._partial.version
        if not self._plain:
            start, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
            if begun:
                start, end = start + self._partial.done[chunk], start + self._partial.length(chunk)
            headers["Range"] = f"bytes={start}-{end - 1}"
            if begun and version and not version.startswith("W/"):
                headers["If-Range"] = version
        response = self._get(headers)
        self._direct = response.url if response.url != self._place.url else ""
        try:
            return response, read_answer(self._place, response)
        except DownloadError:
            response.close()
            raise

    def _get(self, headers: dict[str, str]) -> requests.Response:
        if self._direct:
            with suppress(DownloadError):  # such addresses are good for a while only
                return self._web.get(self._place, headers, self._direct)
        return self._web.get(self._place, headers)

    def _work(self, first: tuple[requests.Response, Answer] | None) -> None:
        """One connection: chunk after chunk."""
        while (chunk := self._take()) is not None:
            try:
                self._complete(chunk, first)
                first = None
            except BaseException as error:
                self._give_back(chunk, error)
                return

    def _take(self) -> int | None:
        with self._news:
            if self._chunks and not self._stop.is_set():
                return self._chunks.popleft()
            self._working -= 1
            return None

    def _give_back(self, chunk: int, error: BaseException) -> None:
        with self._news:
            self._chunks.appendleft(chunk)
            self._working -= 1
            alone = not self._working
        if isinstance(error, Worthless):
            self._partial.discard()
        if alone or isinstance(error, Worthless) or not isinstance(error, DownloadError):
            self._end(error)

    def _complete(self, chunk: int, first: tuple[requests.Response, Answer] | None) -> None:
        """Brings what is missing of a chunk; of a server that heeds no ranges, of the file."""
        failures, partial = 0, self._partial
        while not self._stop.is_set() and (partial.missing() if self._plain else partial.left(chunk)):
            before = partial.done_bytes
            try:
                response, answer = first or self._ask(chunk, begun=True)
                self._receive(chunk, response, answer)
            except Interrupted as error:
                failures = 1 if partial.done_bytes - before >= PROGRESS_BYTES else failures + 1
                if failures >= self._web.patience.attempts:
                    raise self._failed(f"{error}; so it went {failures} times.") from None
                self._web.patience.sleep(2**failures / 4)
            first = None

    def _receive(self, chunk: int, response: requests.Response, answer: Answer) -> None:
        partial = self._partial
        position, left = (0, partial.size_bytes) if self._plain else (partial.next(chunk), partial.left(chunk))
        self._bodies.add(response)
        try:
            self._check_answer(answer, position, left)
            left = answer.length_bytes
            for piece in self._web.body(response, PIECE_BYTES):
                if self._stop.is_set():
                    return
                data = memoryview(piece)[:left]
                if position == 0:
                    self._check_beginning(data)
                partial.write(position, data)
                position, left = position + len(data), left - len(data)
                with self._news:
                    self.transferred_bytes += len(piece)
                    self._news.notify_all()
                if not left:
                    return
            raise Interrupted(f"An answer ended {left:,} bytes early")
        finally:
            self._bodies.discard(response)
            response.close()

    def _check_answer(self, answer: Answer, position: int, left: int) -> None:
        partial = self._partial
        if (answer.version, answer.total_bytes) != (partial.version, partial.size_bytes):
            raise DownloadError(
                f"{self._place.shown} changed while it was fetched.",
                why=f"It had {partial.size_bytes:,} bytes and the ETag {partial.version or '(none)'}, and has "
                f"{answer.total_bytes:,} and {answer.version or '(none)'} now.",
                remedy="Try again: it is fetched anew then.",
            )
        if answer.is_range == self._plain:
            raise Interrupted(
                "The server sent the whole file where a part was asked for, or a part of it for the whole"
            )
        if answer.start != position or not 0 < answer.length_bytes <= left:
            last = answer.start + answer.length_bytes - 1
            why = f"Asked for {left:,} bytes from {position:,} on, it sends {answer.start:,} to {last:,}."
            raise fault(self._place, why)

    def _hash(self) -> None:
        """Hashes the file from its start on, as far as it is there without a gap."""
        partial, position, buffer = self._partial, 0, memoryview(bytearray(HASHED_AT_ONCE_BYTES))
        while position < partial.size_bytes:
            piece = buffer[: partial.size_bytes - position]
            if not self._wait_for(position, len(piece)):
                return
            count = partial.read(piece, position)
            self._digest.update(piece[:count])
            position += count

    def _wait_for(self, position: int, count: int) -> bool:
        """Waits until so many bytes from `position` on are there; False where nobody will bring them."""
        with self._news:
            self._news.wait_for(lambda: self._stop.is_set() or self._partial.ready_bytes(position) >= count)
        return not self._stop.is_set()

    def _flush(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self._partial.flush()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        """Stops all threads; the first error is the one that counts."""
        with self._news:
            if not self._stop.is_set():
                self._error = error
            self._stop.set()
            self._news.notify_all()
        for response in tuple(self._bodies):
            with suppress(ValueError, RuntimeError, OSError):
                response.raw.shutdown()
