"""Requantizes a model with llama-quantize: the file, whole or not at all.  What it will be: requantize.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.errors import BinaryError, ModelError, UsageError
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.types import FILE_TYPES
from pyllamarun.units import MIB, format_size

Start = Callable[[Sequence[str]], AbstractContextManager[subprocess.Popen[str]]]
Progress = Callable[[int, int], None]

DISK_RESERVE_BYTES = 64 * MIB
MAX_NAME_BYTES = 255
LOW_QUALITY = ("Q2_K", "Q2_K_S", "IQ2", "IQ1", "TQ1", "TQ2", "Q1_0", "Q2_0")

# llama-quantize's own words: src/llama-quant.cpp and tools/quantize/quantize.cpp.
_TYPE_LINE = re.compile(r"^\s*\d*\s+(?:or\s+)?([A-Z0-9_]+)\s+:", re.MULTILINE)
_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")
FALLBACK = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")
_FAILURE = re.compile(
    r"failed to quantize: (.+)|(this quantization requires an importance matrix)|error: (.+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Quantized:
    """A finished requantization; sizes are of tensor data."""

    source: str
    target: str
    type: str
    before_bytes: int
    after_bytes: int
    tensors: int
    fallback_tensors: int
    file_bytes: int


def known_types(help_text: str) -> tuple[str, ...]:
    """The type names that `llama-quantize --help` lists, COPY excepted."""
    _, _, table = help_text.partition("allowed quantization types")
    return tuple(name for name in _TYPE_LINE.findall(table) if name != "COPY")


def check_type(name: str, types: Sequence[str]) -> str:
    """The type as llama-quantize spells it; UsageError if there is none of that name."""
    if name.upper() in types:
        return name.upper()
    raise UsageError(
        f'There is no quantization type "{name}".',
        why="Types: " + ", ".join(types),
        remedy="For a smaller Q4_K_M, take Q3_K_M, or Q2_K where it must be.",
    )


def default_target(source: Header, type_name: str) -> Path:
    """The source's name with its type replaced, or the type appended."""
    stem = re.sub(r"-00001-of-\d{5}$", "", source.path.stem)
    names = "|".join(re.escape(name) for name in sorted(set(FILE_TYPES.values()), key=len, reverse=True))
    renamed, count = re.subn(rf"(?i)(?<=[-._])(?:{names})$", type_name, stem)
    return source.path.with_name((renamed if count else f"{stem}-{type_name}") + ".gguf")


def check_target(source: Header, target: Path, type_name: str) -> None:
    """Raises UsageError where writing would lose or repeat something."""
    if source.file_type == type_name:
        raise UsageError(f"{source.path} is {type_name} already.", remedy="Take it as it is.")
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES:
        raise UsageError(f"The name of {target} is too long.", remedy="Name another file with -o.")
    if any(os.path.realpath(target) == os.path.realpath(part) for part in source.parts):
        raise UsageError("The target is the source.", remedy="Name another file with -o.")
    if os.path.lexists(target):
        raise UsageError(
            f"{target} exists already; nothing was changed.",
            remedy="Name another file with -o, or remove this one first.",
        )
    if not target.parent.is_dir():
        raise UsageError(f"There is no folder {target.parent}.", remedy=f"mkdir -p {target.parent}")


def loss_warning(type_name: str) -> str:
    """What a person should know of a type that loses much; "" of others."""
    if not type_name.startswith(LOW_QUALITY):
        return ""
    return f"{type_name} loses much: answers get visibly worse, above all with small models.  Take Q3_K_M if it fits."


def quality_warning(type_name: str, source: Header) -> str:
    """What a person should know before this conversion; "" if there is nothing to say."""
    sentences = [text for text in [loss_warning(type_name)] if text]
    if source.file_type and source.file_type not in ("F32", "F16", "BF16"):
        sentences.append(
            f"The source is {source.file_type} already: quantizing it again loses more than quantizing the original "
            "F16 model would."
        )
    return "\n".join(sentences)


def check_disk(target: Path, forecast_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < forecast_bytes + DISK_RESERVE_BYTES:
        raise UsageError(
            f"{target.parent} has {format_size(free)} free, and {format_size(forecast_bytes)} are needed.",
            remedy="Make room, or write to another disk with -o.",
        )


def quantize(
    start: Start, quantizer: Path, source: Header, target: Path, type_name: str, threads: int, progress: Progress
) -> Quantized:
    """Writes `target`, which appears under its name only when it is complete and has been read back."""
    partial = target.with_name(f".{os.getpid()}.partial")
    argv = [str(quantizer), "--allow-requantize", str(source.path), str(partial), type_name, str(threads)]
    try:
        lines, status = _run(start, argv, progress)
        if status != 0 or not partial.exists():
            raise failure(type_name, lines, status)
        written = read_header(partial)
        if {tensor.name for tensor in written.tensors} != {tensor.name for tensor in source.tensors}:
            raise ModelError(f"llama-quantize wrote {len(written.tensors)} of {len(source.tensors)} tensors.")
        _publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return Quantized(
        source=str(source.path),
        target=str(target),
        type=type_name,
        before_bytes=source.weights_bytes,
        after_bytes=written.weights_bytes,
        tensors=len(written.tensors),
        fallback_tensors=int(_first(FALLBACK, lines) or 0),
        file_bytes=target.stat().st_size,
    )


def _publish(partial: Path, target: Path) -> None:
    """Gives the file its name, unless somebody else took the name meanwhile."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(partial, target)
    except FileExistsError:
        raise UsageError(f"{target} appeared meanwhile; it was left as it is.") from None
    except OSError:  # a file system without hard links
        partial.rename(target)


def _run(start: Start, argv: Sequence[str], progress: Progress) -> tuple[list[str], int]:
    lines = []
    with start(argv) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            position = _TENSOR_LINE.match(line)
            if position:
                progress(int(position[1]), int(position[2]))
        status = process.wait()
    return lines, status


def _first(pattern: re.Pattern[str], lines: Sequence[str]) -> str | None:
    for line in lines:
        match = pattern.search(line)
        if match:
            return match[1]
    return None


def needs_imatrix(type_name: str) -> UsageError:
    return UsageError(
        f"{type_name} needs an importance matrix.",
        remedy="Take a type that does not: Q2_K is the smallest.",
    )


def failure(type_name: str, lines: Sequence[str], status: int) -> BinaryError | UsageError:
    """The error for a llama-quantize that ended so, after these lines."""
    text = "\n".join(lines)
    if "requires an importance matrix" in text or "requires an imatrix" in text:
        return needs_imatrix(type_name)
    reasons = [next(filter(None, match.groups())) for match in _FAILURE.finditer(text)]
    killed = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
    return BinaryError(
        f"llama-quantize failed: {killed}.",
        why=reasons[-1] if reasons else "\n".join(lines[-3:]),
        remedy="Nothing was left behind; the source is untouched.",
    )
