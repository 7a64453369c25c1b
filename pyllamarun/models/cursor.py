"""Reads the elements of a GGUF header forward from a stream, bounded: whatever a length says, no more than there is."""

from __future__ import annotations

import io
import os
import struct
from typing import Any, BinaryIO, NoReturn

from pyllamarun.errors import ModelError

MAX_HEADER_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20  # what is asked of a stream at once, where it is not known that more is needed


class Cursor:
    """Reads forward through a stream, keeping what it has read, never past `limit` bytes."""

    def __init__(self, file: BinaryIO, shown: str, limit: int) -> None:
        self._file = file
        self._shown = shown
        self._limit = limit
        self._buffer = bytearray()
        self.position = 0

    @classmethod
    def over(cls, data: bytes) -> Cursor:
        return cls(io.BytesIO(data), os.devnull, len(data))

    def fail(self, field: str, why: str) -> NoReturn:
        raise ModelError(
            f"{self._shown} is not a sound GGUF file.",
            why=f"{field} at byte {self.position}: {why}.",
            remedy="Download it again, from the model's own publisher.",
        )

    def _need(self, count: int, field: str) -> None:
        end = self.position + count
        if end > self._limit:
            self.fail(field, "the file ends within it")
        while len(self._buffer) < end:
            chunk = self._file.read(max(CHUNK_BYTES, end - len(self._buffer)))
            if not chunk:
                self.fail(field, "the file ends within it")
            self._buffer += chunk

    def skip(self, count: int, field: str) -> None:
        self._need(count, field)
        self.position += count

    def slice(self, start: int) -> bytes:
        return bytes(self._buffer[start : self.position])

    def beginning(self, count: int) -> bytes:
        """The first bytes of the stream, as far as they were read."""
        return bytes(self._buffer[:count])

    def take(self, count: int, field: str) -> bytes:
        start = self.position
        if start == 0 and self._limit < count:
            return self._file.read(self._limit)
        self.skip(count, field)
        return self.slice(start)

    def scalar(self, code: str, field: str) -> Any:
        size = struct.calcsize(code)
        self._need(size, field)
        value = struct.unpack_from("<" + code, self._buffer, self.position)[0]
        self.position += size
        return value

    def count(self, field: str, limit: int) -> int:
        value: int = self.scalar("Q", field)
        if value > limit:
            self.fail(field, f"{value} is more than {limit}")
        return value

    def string(self, field: str, limit: int = MAX_HEADER_BYTES) -> bytes:
        return self.take(self.count(f"length of {field}", limit), field)

    def skip_strings(self, count: int, field: str) -> None:
        """Steps over `count` strings; 8 bytes of length each bound the count before the walk begins."""
        if count * 8 > self._limit - self.position:
            self.fail(f"length of {field}", f"{count} strings are longer than the file")
        self._need(count * 8, field)
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._need(8, field)
            position, buffer = self.position, self._buffer
            last = len(buffer) - 8
            while count and position <= last:  # a vocabulary has hundreds of thousands
                position += 8 + unpack(buffer, position)[0]
                count -= 1
            self.skip(position - self.position, field)
