"""A text to measure models with: read whole, and cut into parts that are measured one after the other.

The parts of a text are always the same, so that what was measured of one can be kept.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pyllamarun.errors import UsageError

SHIPPED = Path(__file__).with_name("persuasion.txt")
SHIPPED_NAME = "Persuasion, by Jane Austen (1817), the first chapters"
MOST_PARTS, LEAST_PART_BYTES = 16, 32 * 1024  # each is a load of the model, and what an interruption can cost
LEAST_BYTES_PER_CHUNK_TOKEN = 32  # llama-perplexity wants two chunks, and a token may be 8 bytes and more
MOST_TEXT_BYTES = 256 << 20


@dataclass(frozen=True)
class Text:
    """`name` is what a person calls it."""

    name: str
    data: bytes

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def is_shipped(self) -> bool:
        return self.name == SHIPPED_NAME

    def parts(self, chunk_tokens: int) -> tuple[bytes, ...]:
        """About equal, of some chunks each; all but the last end with a line, or where there is none, a character."""
        least_bytes = max(LEAST_PART_BYTES, LEAST_BYTES_PER_CHUNK_TOKEN * chunk_tokens)
        count = max(1, min(MOST_PARTS, len(self.data) // least_bytes))
        ends = [self._end_near(round(len(self.data) * number / count)) for number in range(1, count)]
        marks = [0, *ends, len(self.data)]
        return tuple(self.data[start:end] for start, end in itertools.pairwise(marks) if start < end)

    def _end_near(self, position: int) -> int:
        line = self.data.rfind(b"\n", max(0, position - LEAST_PART_BYTES // 4), position)
        if line >= 0:
            return line + 1
        while position < len(self.data) and self.data[position] & 0xC0 == 0x80:  # within a character of UTF-8
            position += 1
        return position


def read_text(path: Path | None) -> Text:
    """The text in a file, or the one that ships; UsageError where there is none, or it is not UTF-8."""
    if path is None:
        return Text(SHIPPED_NAME, SHIPPED.read_bytes())
    try:
        if not path.is_file():
            raise UsageError(f"There is no text file {path}.", remedy="Check the path, or leave --text out.")
        if path.stat().st_size > MOST_TEXT_BYTES:
            raise UsageError(f"{path} is larger than {MOST_TEXT_BYTES >> 20} MiB.", remedy="Take a part of it.")
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=error.strerror or str(error)) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8.",
            why=f"Byte {error.start} is 0x{error.object[error.start]:02x}.",
            remedy=f"Convert it: iconv -f LATIN1 -t UTF-8 {path} -o text.txt",
        ) from None
    if not data.strip():
        raise UsageError(f"{path} is empty.", remedy="Give a text of some thousand words, or leave --text out.")
    return Text(path.name, data)
