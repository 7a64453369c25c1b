"""Reads the file in which llama-perplexity leaves what a model predicts: `--kl-divergence-base`.

It holds, for each predicted token, the logarithm of the probability of each token of the vocabulary, in 16 bits; before
that, the text's tokens.  The format: perplexity() and log_softmax() in tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyllamarun.models.divergence import Mean, ReferencePart

_HEADER = struct.Struct("<8siii")  # a magic word, tokens of a chunk, tokens of the vocabulary, chunks
_BEGINNING = struct.Struct("<8si")  # what is written before the text is found long enough
MAGIC = b"_logits_"


@dataclass(frozen=True)
class Layout:
    """Where things are in such a file."""

    chunk_tokens: int
    vocabulary_size: int
    chunks: int

    @property
    def predicted_tokens(self) -> int:
        """Of a chunk: what follows its first half."""
        return self.chunk_tokens - 1 - self.chunk_tokens // 2

    @property
    def row_bytes(self) -> int:
        """For a predicted token: a scale and a smallest value, and 16 bits for each token of the vocabulary."""
        return 2 * (2 * ((self.vocabulary_size + 1) // 2) + 4)

    @property
    def tokens_bytes(self) -> int:
        return 4 * self.chunk_tokens * self.chunks

    @property
    def size_bytes(self) -> int:
        return _HEADER.size + self.tokens_bytes + self.chunks * self.predicted_tokens * self.row_bytes


def is_begun_only(path: Path) -> bool:
    """Whether nothing followed the beginning, which is so where the text is too short."""
    return path.exists() and path.stat().st_size == _BEGINNING.size


def read_layout(path: Path) -> Layout | None:
    """None where not even the header is there."""
    try:
        with path.open("rb") as file:
            magic, *numbers = _HEADER.unpack(file.read(_HEADER.size))
    except (OSError, struct.error):
        return None
    return Layout(*numbers) if magic == MAGIC and min(numbers) > 0 else None


def read_reference_part(path: Path, layout: Layout) -> ReferencePart:
    """How surprised the model was by the text, from a whole file; not finite where it predicted no numbers."""
    surprises = []
    running = []
    with path.open("rb") as file:
        tokens = struct.unpack(f"<{layout.chunk_tokens * layout.chunks}i", _at(file, _HEADER.size, layout.tokens_bytes))
        for chunk in range(layout.chunks):
            first = chunk * layout.chunk_tokens + layout.chunk_tokens // 2 + 1
            for number, token in enumerate(tokens[first : first + layout.predicted_tokens]):
                row = chunk * layout.predicted_tokens + number
                surprises.append(_surprise(file, _HEADER.size + layout.tokens_bytes + row * layout.row_bytes, token))
            running.append(math.fsum(surprises) / len(surprises))
    count = len(surprises)
    mean = running[-1]
    variance = math.fsum((surprise - mean) ** 2 for surprise in surprises) / count
    return ReferencePart(layout.chunks, count, Mean(mean, math.sqrt(variance / (count - 1))), tuple(running))


def _surprise(file: BinaryIO, position: int, token: int) -> float:
    scale, smallest = struct.unpack("<ff", _at(file, position, 8))
    (step,) = struct.unpack("<H", _at(file, position + 8 + 2 * token, 2))
    return -float(scale * step + smallest)


def _at(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    return file.read(count)
