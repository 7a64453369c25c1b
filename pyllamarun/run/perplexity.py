"""Runs llama-perplexity over one part of a text, and reads its numbers as they come.

It exits with 0 also where it could not do what it was asked; what it printed says so.  Options, lines and the file of
logits: tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pyllamarun.errors import ModelError, PyllamarunError, ServerError, UsageError
from pyllamarun.models.divergence import Mean, OtherPart, ReferencePart
from pyllamarun.run.server import LAST_LINES, failure
from pyllamarun.units import format_size

Start = Callable[[Sequence[str]], AbstractContextManager["subprocess.Popen[str]"]]
Progress = Callable[[int, int], None]  # chunks done, of how many

_NUMBER = r"-?(?:\d+\.\d+|nan|inf)"
_CHUNKS = re.compile(r"computing over (\d+) chunks|calculating perplexity over (\d+) chunks")
_TOO_SHORT = re.compile(r"you need at least (\d+) tokens")
_ONLY = re.compile(r"tokenizes to only (\d+) tokens")
_REFERENCE_CHUNK = re.compile(rf"\s*\d+\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*")
_OTHER_CHUNK = re.compile(r"\s*(\d+)\s")
# Its last lines.  What stands between a value and its error is "±", in whatever encoding.
_STATISTICS = {
    "perplexity": r"Mean PPL\(Q\)\s*:",
    "rise": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:",
    "divergence": r"Mean\s+KLD:",
    "most": r"Maximum KLD:",
    "shift": r"Mean\s+\S{1,4}p:",
    "shift_rms": r"RMS \S{1,4}p\s*:",
    "same_top": r"Same top p:",
}


def predicted_tokens(chunk_tokens: int) -> int:
    """Of a chunk: what follows its first half."""
    return chunk_tokens - 1 - chunk_tokens // 2


def logits_bytes(vocabulary_size: int, chunk_tokens: int, chunks: int) -> int:
    """The size of the file of logits: for each predicted token 16 bits a token of the vocabulary and a scale."""
    row_bytes = 2 * (2 * ((vocabulary_size + 1) // 2) + 4)
    return 20 + chunks * (4 * chunk_tokens + predicted_tokens(chunk_tokens) * row_bytes)


def read_reference(
    start: Start, argv: Sequence[str], text: Path, logits: Path, most_chunks: int | None, check: Progress
) -> ReferencePart:
    """The reference's perplexity of a text, its predictions going to `logits`.

    `argv` says the program, the model and what goes where; `check` is called as soon as it is known how many chunks
    there are, and after each.  Raises UsageError, ModelError, DoesNotFit or ServerError.
    """
    words = [*argv, "-f", str(text), "--kl-divergence-base", str(logits), "--ppl-output-type", "1", "--no-warmup"]
    words += ["--chunks", str(most_chunks)] if most_chunks is not None else []
    rows: list[tuple[float, float]] = []

    def take(line: str) -> bool:
        found = _REFERENCE_CHUNK.fullmatch(line)
        if found:
            rows.append((float(found[2]), float(found[3])))
        return bool(found)

    lines, chunks = _run(start, words, take, check)
    if not chunks or len(rows) != chunks:
        raise _unfinished(lines, len(rows), chunks)
    value, error = rows[-1]
    _check_finite(argv, [value])
    tokens = chunks * predicted_tokens(_chunk_tokens(argv))
    return ReferencePart(chunks, tokens, Mean(value, _error(error)), tuple(surprise for surprise, _ in rows))


def read_other(start: Start, argv: Sequence[str], logits: Path, check: Progress) -> OtherPart:
    """What another model predicts where the reference predicted `logits`.  Raises as `read_reference` does."""
    words = [*argv, "--kl-divergence-base", str(logits), "--kl-divergence", "--no-warmup"]
    rows: list[list[float]] = []

    def take(line: str) -> bool:
        numbers = re.findall(_NUMBER, line) if _OTHER_CHUNK.match(line) else []
        if len(numbers) == 10:  # five values, each with its error
            rows.append([float(number) for number in numbers])
        return len(numbers) == 10

    lines, chunks = _run(start, words, take, check)
    found = _statistics(lines)
    if rows and not all(math.isfinite(row[0]) and math.isfinite(row[4]) for row in rows):
        _check_finite(argv, [math.nan])
    if not chunks or len(rows) != chunks or len(found) != len(_STATISTICS):
        raise _unfinished(lines, len(rows), chunks)
    _check_finite(argv, [mean.value for mean in found.values()])
    perplexity, rms = found["perplexity"], found["shift_rms"]
    return OtherPart(
        chunks=chunks,
        tokens=chunks * predicted_tokens(_chunk_tokens(argv)),
        surprise=Mean(math.log(perplexity.value), perplexity.error / perplexity.value),
        rise=found["rise"],
        divergence=found["divergence"],
        most_divergence=found["most"].value,
        shift=_percent(found["shift"]),
        squared_shift=Mean((rms.value / 100) ** 2, 2 * rms.value * rms.error / 1e4),
        same_top=found["same_top"].value / 100,
        running=tuple(math.log(row[0]) for row in rows),
        running_divergence=tuple(row[4] for row in rows),
    )


def _run(start: Start, argv: Sequence[str], take: Callable[[str], bool], check: Progress) -> tuple[deque[str], int]:
    """Its last lines but those of chunks, and how many chunks it found; raises why it failed."""
    lines: deque[str] = deque(maxlen=200)
    chunks = done = 0
    with start(argv) as process:
        assert process.stdout
        for raw in process.stdout:
            line = raw.rstrip("\n")
            if chunks and take(line):
                done += 1
                check(done, chunks)
                continue
            lines.append(line)
            found = None if chunks else _CHUNKS.search(line)
            if found:
                chunks = int(found[1] or found[2])
                check(0, chunks)
        status = process.wait()
    if status != 0:
        error = failure(status, lines)
        error.what = f"llama-perplexity: {error.what}" if isinstance(error, ServerError) else error.what
        raise error
    _check_length(lines)
    return lines, chunks


def _check_length(lines: Sequence[str]) -> None:
    said = "\n".join(lines)
    needed, there = _TOO_SHORT.search(said), _ONLY.search(said)
    if needed:
        raise UsageError(
            "The text is too short.",
            why=f"It is {there[1] if there else 'a few'} tokens, and {needed[1]} are needed: two chunks.",
            remedy="Give a longer --text, or a smaller -c.",
        )


def _unfinished(lines: Sequence[str], done: int, chunks: int) -> PyllamarunError:
    return ServerError(
        f"llama-perplexity ended after {done} of {chunks} chunks.",
        why="\n".join(list(lines)[-LAST_LINES:]),
        remedy="Run the same again: what was measured before is kept.",
    )


def _statistics(lines: Sequence[str]) -> dict[str, Mean]:
    found = {}
    for line in lines:
        for name, label in _STATISTICS.items():
            match = re.match(rf"{label}\s*({_NUMBER})(?:\s+\S{{1,4}}\s+({_NUMBER}))?", line)
            if match:
                found[name] = Mean(float(match[1]), _error(float(match[2] or 0)))
    return found


def _error(error: float) -> float:
    """Of two models that predict the same, rounding can leave less than nothing under the root."""
    return error if math.isfinite(error) else 0.0


def _percent(mean: Mean) -> Mean:
    return Mean(mean.value / 100, mean.error / 100)


def _chunk_tokens(argv: Sequence[str]) -> int:
    return int(argv[list(argv).index("-c") + 1])


def _check_finite(argv: Sequence[str], values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ModelError(
            f"{argv[list(argv).index('-m') + 1]} predicts no numbers (NaN).",
            why="Its weights are damaged, or overflow in the way that they are computed here.",
            remedy="Check the file, or try with every layer on the CPU: -- -ngl 0",
        )


def check_logits(logits: Path, vocabulary_size: int, chunk_tokens: int, chunks: int) -> None:
    """Raises UsageError where not all of the logits could be written: llama-perplexity does not look."""
    needed = logits_bytes(vocabulary_size, chunk_tokens, chunks)
    there = logits.stat().st_size if logits.exists() else 0
    if there < needed:
        raise UsageError(
            f"{logits.parent} is full: of {format_size(needed)} of logits {format_size(there)} were written.",
            remedy="Make room there, or set PYLLAMARUN_HOME to a folder on another disk.",
        )
