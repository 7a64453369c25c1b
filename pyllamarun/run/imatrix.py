"""Computes an importance matrix with llama-imatrix: once for a model and a text, and where it stopped it goes on."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import shutil
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyllamarun.errors import BinaryError, ModelError, UsageError
from pyllamarun.models.gguf import parse_header
from pyllamarun.run.process import running

CHUNK_TOKENS = 512  # llama-imatrix's own default
KEPT_EVERY_CHUNKS = 10
NEVER = 1_000_000_000
UBATCHES = (512, 128, 32)  # the largest with which it fits: logits of all its tokens are computed

# llama-imatrix's own words: tools/imatrix/imatrix.cpp.
_TOTAL = re.compile(r"computing over (\d+) chunks")
_CHUNK = re.compile(r"\[(\d+)\][-\d.naif]+,")
_NOTHING_LEFT = "not be enough tokens left"
_TOO_SHORT = "tokenizes to only"

Progress = Callable[[int, int], None]


def imatrix_arguments(planned: Sequence[str], text: Path, threads: int | None = None) -> list[str]:
    """llama-imatrix's arguments, from those that were planned.  It takes the physical cores where it is not told."""
    return [*planned, "-f", str(text), "--output-frequency", str(NEVER), *(["-t", str(threads)] if threads else [])]


def compute_imatrix(
    program: Path, environment: Mapping[str, str], arguments: Sequence[str], target: Path, progress: Progress
) -> Path:
    """Computes `target`, which appears when it is whole; every ten chunks are kept, in a hidden folder beside it.

    `progress` is told how many chunks of how many are done.  Raises UsageError or BinaryError.
    """
    if target.exists():
        return target
    with _own_folder(target.with_name(f".{target.name}.partial")) as folder:
        done, kept = _kept(folder)
        result = folder / "whole.gguf"
        argv = [str(program), *arguments, "-o", str(result), "--save-frequency", str(KEPT_EVERY_CHUNKS)]
        argv += ["--in-file", str(kept), "--chunk", str(done)] if kept else []
        text, status = _run(argv, environment, folder, done, progress)
        if status != 0 and kept and _NOTHING_LEFT in text:
            result = kept  # but for less than three chunks, which it does not take up again
        elif status != 0:
            raise _failure(text, status)
        _check(result)
        result.replace(target)
        shutil.rmtree(folder)
    return target


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """A folder that no other process works in; it stays where the block fails."""
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"Nothing can be written to {folder.parent}.", why=error.strerror or "") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "This importance matrix is being computed by another process.", remedy="Wait for it, and run it again."
            ) from None
        yield folder
    finally:
        os.close(descriptor)


def _kept(folder: Path) -> tuple[int, Path | None]:
    """The furthest that is sound, and how many chunks it is of."""
    for chunks, path in sorted(_saved(folder), reverse=True):
        try:
            _check(path)
        except BinaryError:
            continue
        return chunks, path
    return 0, None


def _saved(folder: Path) -> list[tuple[int, Path]]:
    found = ((re.search(r"\.at_(\d+)$", path.name), path) for path in folder.iterdir())
    return [(int(match[1]), path) for match, path in found if match]


def _check(path: Path) -> None:
    """Raises BinaryError where a file is torn."""
    try:
        with path.open("rb") as file:
            parse_header(file, path, path.stat().st_size)
    except (OSError, ModelError) as error:
        raise BinaryError("llama-imatrix wrote no sound importance matrix.", why=str(error)) from None


def _run(
    argv: Sequence[str], environment: Mapping[str, str], folder: Path, done: int, progress: Progress
) -> tuple[str, int]:
    """What it said last, and its exit status.  It ends no line while it computes."""
    said: deque[str] = deque(maxlen=256)
    decoder, line, total = codecs.getincrementaldecoder("utf-8")("replace"), "", 0
    with running(argv, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            line += decoder.decode(piece)
            *lines, line = line.split("\n")
            said.extend(lines)
            for text in (*lines, line):
                match = _TOTAL.search(text)
                total = int(match[1]) if match else total
            chunks = _CHUNK.findall(line)
            if chunks and total:
                progress(done + int(chunks[-1]), done + total)
                for _, path in sorted(_saved(folder))[:-2]:
                    path.unlink()
        status = process.wait()
    return "\n".join([*said, line]), status


def _failure(text: str, status: int) -> BinaryError | UsageError:
    if _TOO_SHORT in text:
        return UsageError(
            f"The text for the importance matrix is too short: it must have at least {2 * CHUNK_TOKENS:,} tokens.",
            remedy="Some 100,000 tokens of what the model is to be used for are usual.",
        )
    killed = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
    errors = [line for line in text.splitlines() if re.search(r" E |error|failed", line)]
    return BinaryError(
        f"llama-imatrix failed: {killed}.",
        why="\n".join((errors or text.splitlines())[-3:]),
        remedy="What it had computed is kept; run it again.",
    )
