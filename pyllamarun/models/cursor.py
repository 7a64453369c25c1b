"""Reads the elements of a GGUF header forward from a stream, bounded: whatever a length says, no more than there is."""

from __future__ import annotations

import io
import re
import struct
from typing import Any, BinaryIO, NoReturn

from pyllamarun.errors import ModelError
from pyllamarun.output import printable

MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 200,000 tokens with its merges takes 13 MiB
MAX_TEXT_BYTES = 8 << 20  # of keys, names and string values together: as Python's strings they may take four times that
CHUNK_BYTES = 1 << 20  # what is asked of a stream at once, where it is not known that more is needed
MOST_AT_ONCE_BYTES = 4 << 20
MAX_SHOWN = 100  # characters of a name, where a person reads it

unpack_length = struct.Struct("<Q").unpack_from
# A vocabulary is hundreds of thousands of short strings, and a pattern steps over them faster than a loop: this many at
# once, each its length and as many bytes.
RUN_STRINGS = 128
_SHORT = (rb"\x%02x\0{7}.{%d}" % (length, length) for length in range(1, 33))
_RUN = re.compile(rb"(?:%s){%d}" % (b"|".join(_SHORT), RUN_STRINGS), re.DOTALL)


def legible(name: str) -> str:
    """A name from a file, as it may stand in a message."""
    return printable(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…")


def unsound(name: str, why: str) -> ModelError:
    """The error for a file that breaks the format's rules."""
    return ModelError(
        f"{name} is not a sound GGUF file.",
        why=why,
        remedy="Download it again, from the model's own publisher.",
    )


class Cursor:
    """Reads forward through a stream, keeping a chunk of it, never past `limit` bytes."""

    def __init__(self, file: BinaryIO, shown: str, limit: int) -> None:
        self._file = file
        self._shown = shown
        self._limit = limit
        self._text_bytes = 0
        self._chunk = b""
        self._chunk_start = 0  # in the file
        self._next = 0  # in the chunk
        self._field_start = 0  # of the field that was read last

    @property
    def position(self) -> int:
        return self._chunk_start + self._next

    def fail(self, field: str, why: str) -> NoReturn:
        raise unsound(self._shown, f"{field} at byte {self._field_start}: {why}.")

    def _check_room(self, count: int, field: str) -> None:
        self._field_start = self.position
        if count > self._limit - self.position:
            too_large = f"the header is larger than {MAX_HEADER_BYTES} bytes"
            self.fail(field, too_large if self._limit == MAX_HEADER_BYTES else "the file ends within it")

    def beginning(self) -> bytes:
        """What has been read of the stream, when next to nothing has been taken."""
        return self._chunk

    def _fill(self, count: int, field: str, known: int = 0) -> None:
        """Brings the next `count` bytes into the chunk; `known`, how many are known to be needed."""
        self._check_room(count, field)
        while len(self._chunk) - self._next < count:
            missing = count - (len(self._chunk) - self._next)
            more = self._file.read(max(CHUNK_BYTES, missing, min(known, MOST_AT_ONCE_BYTES)))
            if not more:
                self.fail(field, "the file ends within it")
            self._chunk_start = self.position
            self._chunk, self._next = self._chunk[self._next :] + more, 0

    def take(self, count: int, field: str) -> bytes:
        self._fill(count, field)
        self._next += count
        return self._chunk[self._next - count : self._next]

    def scalar(self, code: str, field: str) -> Any:
        size = struct.calcsize(code)
        self._fill(size, field)
        self._next += size
        return struct.unpack_from("<" + code, self._chunk, self._next - size)[0]

    def count(self, field: str, limit: int) -> int:
        value: int = self.scalar("Q", field)
        if value > limit:
            self.fail(field, f"{value} is more than {limit}")
        return value

    def text(self, field: str, limit: int) -> bytes:
        length = self.count(f"length of {field}", limit)
        self._text_bytes += length
        if self._text_bytes > MAX_TEXT_BYTES:
            self.fail(f"length of {field}", f"there are more than {MAX_TEXT_BYTES} bytes of text up to here")
        return self.take(length, field)

    def name(self, field: str, limit: int) -> str:
        data = self.text(field, limit)
        if not data:
            self.fail(field, "it is empty")
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(field, f'"{legible(data.decode("utf-8", "replace"))}" is not UTF-8')

    def block(self, count: int, field: str) -> bytes:
        """`count` bytes, which may be many."""
        kept = io.BytesIO()
        self._copy(count, kept, field)
        return kept.getvalue()

    def strings(self, count: int, field: str) -> bytes:
        """`count` strings with their lengths, as they stand in the file."""
        self._check_room(8 * count, field)
        kept = io.BytesIO()
        while count:
            self._fill(8, field, 8 * count)
            number, end = _walk(self._chunk, self._next, count)
            self._copy(end - self._next, kept, field)
            count -= number
        return kept.getvalue()

    def _copy(self, count: int, target: io.BytesIO, field: str) -> None:
        self._check_room(count, field)
        while count:
            self._fill(1, field, count)
            count -= target.write(self.take(min(count, len(self._chunk) - self._next), field))


def _walk(chunk: bytes, position: int, count: int) -> tuple[int, int]:
    """Steps over at most `count` strings whose lengths are in the chunk: how many they are, and where the last ends."""
    number = 0
    while number < count:
        run = _RUN.match(chunk, position) if count - number >= RUN_STRINGS else None
        if run:
            number, position = number + RUN_STRINGS, run.end()
            continue
        for _ in range(min(RUN_STRINGS, count - number)):
            if position > len(chunk) - 8:
                return number, position
            (length,) = unpack_length(chunk, position)
            number, position = number + 1, position + 8 + length
    return number, position
