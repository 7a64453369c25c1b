"""Runs llama-perplexity over one part of a text, and reads its numbers as they come.

It exits with 0 also where it could not do what it was asked, and it may exit before its last lines are written
(common_log_main() in common/log.cpp says so).  So what the reference predicts is read from its file, and another model
reads again where its last lines are missing.  Options and lines: tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pyllamarun.errors import ModelError, ServerError, UsageError
from pyllamarun.models.divergence import Mean, OtherPart, ReferencePart
from pyllamarun.run.logits import Layout, is_begun_only, read_layout, read_reference_part
from pyllamarun.run.server import LAST_LINES, failure
from pyllamarun.units import format_size

Start = Callable[[Sequence[str]], AbstractContextManager["subprocess.Popen[str]"]]
Progress = Callable[[int, int], None]  # chunks done, of how many

ATTEMPTS = 3
VALUES_IN_A_LINE = 10  # five, each with its error

_NUMBER = r"-?(?:\d+\.\d+|nan|inf)"
_CHUNKS = re.compile(r"(?:computing|calculating perplexity) over (\d+) chunks")
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


def read_reference(
    start: Start, argv: Sequence[str], text: Path, logits: Path, most_chunks: int | None, check: Progress
) -> ReferencePart:
    """The reference's perplexity of a text, its predictions going to `logits`.

    `argv` says the program, the model and what goes where; `check` is called as soon as it is known how many chunks
    there are, and after each.  Raises UsageError, ModelError, DoesNotFit or ServerError.
    """
    words = [*argv, "-f", str(text), "--kl-divergence-base", str(logits), "--ppl-output-type", "1", "--no-warmup"]
    words += ["--chunks", str(most_chunks)] if most_chunks is not None else []
    logits.unlink(missing_ok=True)
    lines = _run(start, words, lambda line: bool(_REFERENCE_CHUNK.fullmatch(line)), check)
    if is_begun_only(logits):
        raise _too_short(lines)
    layout = read_layout(logits)
    if layout is None:
        raise _unfinished(lines)
    missing = layout.size_bytes - logits.stat().st_size
    if missing > shutil.disk_usage(logits.parent).free:
        raise UsageError(
            f"{logits.parent} is full: of {format_size(layout.size_bytes)}, {format_size(missing)} are missing.",
            why="The reference's predictions of a part of the text are kept there for a moment.",
            remedy="Make room there, or set PYLLAMARUN_HOME to a folder on another disk.",
        )
    if missing:
        raise _unfinished(lines)
    measured = read_reference_part(logits, layout)
    _check_finite(argv, [measured.surprise.value])
    return measured


def read_other(start: Start, argv: Sequence[str], logits: Path, check: Progress) -> OtherPart:
    """What another model predicts where the reference predicted `logits`.  Raises as `read_reference` does."""
    words = [*argv, "--kl-divergence-base", str(logits), "--kl-divergence", "--no-warmup"]
    layout = read_layout(logits)
    assert layout
    most = 0

    def check_once(done: int, chunks: int) -> None:
        nonlocal most
        if done > most:  # not again, where it is read again
            most = done
            check(done, chunks)

    for _ in range(ATTEMPTS):
        rows: list[list[float]] = []

        def take(line: str, rows: list[list[float]] = rows) -> bool:
            numbers = re.findall(_NUMBER, line) if _OTHER_CHUNK.match(line) else []
            if len(numbers) == VALUES_IN_A_LINE:
                rows.append([float(number) for number in numbers])
            return len(numbers) == VALUES_IN_A_LINE

        lines = _run(start, words, take, check_once)
        _check_finite(argv, [number for row in rows for number in (row[0], row[4])])
        found = _statistics(lines)
        if len(rows) == layout.chunks and len(found) == len(_STATISTICS):
            _check_finite(argv, [mean.value for mean in found.values()])
            return _other_part(layout, rows, found)
        if "failed to" in "\n".join(lines):
            break
    raise _unfinished(lines)


def _other_part(layout: Layout, rows: Sequence[Sequence[float]], found: Mapping[str, Mean]) -> OtherPart:
    perplexity, rms = found["perplexity"], found["shift_rms"]
    return OtherPart(
        chunks=layout.chunks,
        tokens=layout.chunks * layout.predicted_tokens,
        surprise=Mean(math.log(perplexity.value), perplexity.error / perplexity.value),
        rise=found["rise"],
        divergence=found["divergence"],
        most_divergence=found["most"].value,
        shift=Mean(found["shift"].value / 100, found["shift"].error / 100),
        squared_shift=Mean((rms.value / 100) ** 2, 2 * rms.value * rms.error / 1e4),
        same_top=found["same_top"].value / 100,
        running=tuple(math.log(row[0]) for row in rows),
        running_divergence=tuple(row[4] for row in rows),
    )


def _run(start: Start, argv: Sequence[str], take: Callable[[str], bool], check: Progress) -> deque[str]:
    """Its last lines but those of chunks, which `take` takes; raises why it failed, where it says so by its status."""
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
                chunks = int(found[1])
                check(0, chunks)
        status = process.wait()
    if status != 0:
        raise failure(status, lines)
    return lines


def _too_short(lines: Sequence[str]) -> UsageError:
    said = _ONLY.search("\n".join(lines))
    return UsageError(
        "The text is too short.",
        why=f"Two chunks are needed{f', and it is {said[1]} tokens' if said else ''}.",
        remedy="Give a longer --text, or a smaller -c.",
    )


def _unfinished(lines: Sequence[str]) -> ServerError:
    return ServerError(
        "llama-perplexity ended before it was done.",
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


def _check_finite(argv: Sequence[str], values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ModelError(
            f"{argv[list(argv).index('-m') + 1]} predicts no numbers (NaN).",
            why="Its weights are damaged, or overflow in the way that they are computed here.",
            remedy="Check the file, or try with every layer on the CPU: -- -ngl 0",
        )
