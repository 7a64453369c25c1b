"""Measures models against a reference over a text, part by part, and goes on where it was interrupted.

The reference reads a part first and leaves its predictions, which the others are then held against.  They are large, so
those of one part are there at a time: an interruption costs a part at most.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyllamarun.errors import UsageError
from pyllamarun.models.comparisons import Shelf
from pyllamarun.models.divergence import OtherPart, ReferencePart
from pyllamarun.models.gguf import Header
from pyllamarun.run.logits import Layout
from pyllamarun.run.perplexity import Start, read_other, read_reference
from pyllamarun.units import GIB, format_size

DISK_RESERVE_BYTES = GIB


@dataclass(frozen=True)
class Reader:
    """A model, and the command line of llama-perplexity that reads with it, without text and logits."""

    header: Header
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """The parts in their order, of the reference and of each other; `fresh_chunks` were measured now, not kept."""

    reference: tuple[ReferencePart, ...]
    others: tuple[tuple[OtherPart, ...], ...]
    fresh_chunks: int


class Measurement:
    """One reference and others over one text, `most_chunks` of it at most; the shelf is held meanwhile."""

    def __init__(
        self,
        start: Start,
        shelf: Shelf,
        parts: Sequence[bytes],
        chunk_tokens: int,
        most_chunks: int | None,
        progress: Callable[[int, int], None],
    ) -> None:
        self._start, self._shelf, self._parts = start, shelf, parts
        self._chunk_tokens, self._most_chunks, self._progress = chunk_tokens, most_chunks, progress
        self._chunks: dict[int, int] = {}  # of each part, as far as they are known
        self._done = self._fresh = 0

    def run(self, reference: Reader, others: Sequence[Reader]) -> Measured:
        """Raises UsageError, ModelError, DoesNotFit or ServerError; what was measured before that is kept."""
        self._readings = 1 + len(others)
        reference_parts: list[ReferencePart] = []
        other_parts: list[list[OtherPart]] = [[] for _ in others]
        for number in range(len(self._parts)):
            left = None if self._most_chunks is None else self._most_chunks - sum(self._chunks.values())
            if left is not None and left <= 0:
                break
            reference_parts.append(self._reference_part(number, reference, others, left))
            for other, found in zip(others, other_parts):
                found.append(self._other_part(number, other))
            self._shelf.remove_logits()
        return Measured(tuple(reference_parts), tuple(map(tuple, other_parts)), self._fresh)

    def _room(self) -> int:
        return max(0, shutil.disk_usage(self._shelf.folder).free - DISK_RESERVE_BYTES)

    def _reference_part(
        self, number: int, reference: Reader, others: Sequence[Reader], left: int | None
    ) -> ReferencePart:
        kept = self._shelf.reference_part(number)
        text, logits = self._shelf.text(number), self._shelf.logits(number)
        if kept and (all(self._shelf.other_part(other.header, number) for other in others) or logits.exists()):
            self._know(number, kept.chunks)
            self._advance(kept.chunks)
            return kept
        self._shelf.forget_reference_part(number)  # as long as its logits are not whole
        try:
            text.write_bytes(self._parts[number])
        except OSError as error:
            raise UsageError(f"{text} cannot be written.", why=error.strerror or "") from None
        check = self._checking(number, reference.header)
        measured = read_reference(self._start, reference.argv, text, logits, left, check)
        self._know(number, measured.chunks)
        self._shelf.keep_reference_part(number, measured)
        self._has_measured(measured.chunks)
        return measured

    def _other_part(self, number: int, other: Reader) -> OtherPart:
        kept = self._shelf.other_part(other.header, number)
        if kept:
            self._advance(kept.chunks)
            return kept
        measured = read_other(self._start, other.argv, self._shelf.logits(number), self._counting)
        self._shelf.keep_other_part(other.header, number, measured)
        self._has_measured(measured.chunks)
        return measured

    def _checking(self, number: int, header: Header) -> Callable[[int, int], None]:
        def check(done: int, chunks: int) -> None:
            if done == 0:
                self._know(number, chunks)
                self._check_disk(Layout(self._chunk_tokens, header.vocabulary_size, chunks).size_bytes)
            self._counting(done, chunks)

        return check

    def _check_disk(self, needed_bytes: int) -> None:
        if needed_bytes > self._room():
            raise UsageError(
                f"{self._shelf.folder.parent} has {format_size(self._room())} free, {format_size(DISK_RESERVE_BYTES)} "
                f"apart, and {format_size(needed_bytes)} are needed.",
                why="For a moment, the reference's predictions of a part of the text are kept there.",
                remedy="Make room, or set PYLLAMARUN_HOME to a folder on another disk.",
            )

    def _counting(self, done: int, _chunks: int) -> None:
        self._progress(self._done + done, self._total())

    def _has_measured(self, chunks: int) -> None:
        """As the result says it: of the lines that were counted meanwhile, the last may be missing."""
        self._fresh += chunks
        self._advance(chunks)

    def _advance(self, chunks: int) -> None:
        self._done += chunks
        self._progress(self._done, self._total())

    def _know(self, number: int, chunks: int) -> None:
        self._chunks[number] = chunks

    def _total(self) -> int:
        """Chunks to be read by all models: of parts that are not known yet, as many as their size lets expect."""
        known_bytes = sum(len(self._parts[number]) for number in self._chunks)
        each = sum(self._chunks.values()) / known_bytes if known_bytes else 0.0
        chunks = round(each * sum(map(len, self._parts)))
        return self._readings * (chunks if self._most_chunks is None else min(chunks, self._most_chunks))
