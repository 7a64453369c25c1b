"""What llama-quantize would make of a model: the header of the file that it would write, tensor by tensor.

llama-quantize itself is asked, with --dry-run and about the model's skeleton, so the forecast has its types, its
fallbacks and its order of tensors.  Nothing is written, and of the model no more than its header is needed.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.errors import BinaryError, UsageError
from pyllamarun.models.gguf import UINT32, Header, Tensor, Value
from pyllamarun.models.quantize import ALIASES, UNQUANTIZED, Start, default_target, failure
from pyllamarun.models.recipe import PLAIN, Recipe
from pyllamarun.models.skeleton import file_bytes, padded
from pyllamarun.models.types import FILE_TYPES, TENSOR_TYPES, TensorType

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml/include/ggml.h
# For models that were trained for them; another loses everything.
SPECIAL = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4_MOE")

AT_ONCE = 2  # dry runs; each is one thread

# What a dry run prints of a tensor: llama_model_quantize_impl in src/llama-quant.cpp.
_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (.+?) +- \[[ \d,]+\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?"
)
_FALLBACK = re.compile(
    r"warning: .* - ncols +\d+ not divisible by +\d+ \(required for type +(\w+)\) .*-> falling back to +(\w+)"
)
_NEEDS_IMATRIX = "will require an imatrix"
_TYPES_BY_NAME: Mapping[str, TensorType] = {one.name: one for one in TENSOR_TYPES.values()}
_FILE_TYPE_NUMBERS = {name: number for number, name in FILE_TYPES.items()}


@dataclass(frozen=True)
class Fallback:
    """Tensors whose rows are no multiple of the block of the type `wanted`, and which become `given` instead."""

    wanted: str
    given: str
    tensors: int


@dataclass(frozen=True)
class Requantized:
    """A model as llama-quantize would write it, as one file, under the name that `pyllamarun quantize` gives it."""

    type: str
    header: Header
    fallbacks: tuple[Fallback, ...]
    needs_imatrix: bool

    @property
    def fallback_tensors(self) -> int:
        return sum(one.tensors for one in self.fallbacks)


@dataclass(frozen=True)
class LeftOut:
    """A type that is not offered, and why."""

    type: str
    reason: str


@dataclass(frozen=True)
class Requantizations:
    """All that a model allows: those that make it smaller, the largest first, and what was left out."""

    offered: tuple[Requantized, ...]
    left_out: tuple[LeftOut, ...]


def requantized(
    start: Start, quantizer: Path, skeleton: Path, header: Header, type_name: str, recipe: Recipe = PLAIN
) -> Requantized:
    """The forecast for one type; `skeleton` is the model's.  Raises BinaryError where llama-quantize fails."""
    with _dry_run(start, quantizer, skeleton, type_name, recipe) as process:
        return _forecast(process, header, type_name)


def requantizations(
    start: Start, quantizer: Path, skeleton: Path, header: Header, types: Iterable[str], recipe: Recipe = PLAIN
) -> Requantizations:
    """The forecasts for all `types` that make the model smaller and need no more than the model.

    A type that llama-quantize fails with is left out with its reason.
    """
    offered, left_out = [], []
    asked = [name for name in types if name not in ALIASES]
    left_out += [LeftOut(name, "meant for models that were trained in it") for name in asked if name in SPECIAL]
    asked = [name for name in asked if name not in SPECIAL and name not in (*UNQUANTIZED, header.file_type)]
    for type_name, process in _dry_runs(start, quantizer, skeleton, asked, recipe):
        try:
            forecast = _forecast(process, header, type_name)
        except (BinaryError, UsageError) as error:
            left_out.append(LeftOut(type_name, error.why or error.what))
            continue
        if forecast.needs_imatrix:
            left_out.append(LeftOut(type_name, "made only with an importance matrix"))
        elif forecast.header.weights_bytes >= header.weights_bytes:
            left_out.append(LeftOut(type_name, "not smaller than the model"))
        else:
            offered.append(forecast)
    offered.sort(key=lambda one: -one.header.weights_bytes)
    return Requantizations(tuple(offered), tuple(left_out))


def _dry_run(
    start: Start, quantizer: Path, skeleton: Path, type_name: str, recipe: Recipe
) -> AbstractContextManager[subprocess.Popen[str]]:
    options = ["--dry-run", "--allow-requantize", *recipe.arguments()]
    return start([str(quantizer), *options, str(skeleton), os.devnull, type_name, "1"])


def _dry_runs(
    start: Start, quantizer: Path, skeleton: Path, types: Sequence[str], recipe: Recipe
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The dry runs in their order, AT_ONCE of them under way."""
    with ExitStack() as stack:
        under_way: list[tuple[str, subprocess.Popen[str]]] = []
        for type_name in types:
            under_way.append((type_name, stack.enter_context(_dry_run(start, quantizer, skeleton, type_name, recipe))))
            if len(under_way) == AT_ONCE:
                yield under_way.pop(0)
        yield from under_way


def _forecast(process: subprocess.Popen[str], header: Header, type_name: str) -> Requantized:
    """Reads what a dry run says of each tensor; its order is that of the file."""
    assert process.stdout
    text = process.stdout.read()
    status = process.wait()
    if status != 0:
        raise failure(type_name, text.splitlines(), status)
    chosen = {match[1]: match[3] or match[2] for match in map(_TENSOR.match, text.splitlines()) if match}
    source = {tensor.name: tensor for tensor in header.tensors}
    if chosen.keys() != source.keys() or not {one.upper() for one in chosen.values()} <= _TYPES_BY_NAME.keys():
        raise BinaryError(
            f"llama-quantize says what {len(chosen)} tensors would become, and {header.path} has {len(source)}.",
            remedy="Run `pyllamarun doctor`.",
        )
    tensors = tuple(_laid_out(source, ((name, _TYPES_BY_NAME[kind.upper()]) for name, kind in chosen.items())))
    return Requantized(
        type=type_name,
        header=_written(header, type_name, tensors),
        fallbacks=_fallbacks(text),
        needs_imatrix=_NEEDS_IMATRIX in text,
    )


def _fallbacks(text: str) -> tuple[Fallback, ...]:
    counted = Counter((wanted.upper(), given.upper()) for wanted, given in _FALLBACK.findall(text))
    return tuple(Fallback(wanted, given, count) for (wanted, given), count in counted.most_common())


def _written(header: Header, type_name: str, tensors: tuple[Tensor, ...]) -> Header:
    """One file with these tensors, and with the metadata that llama-quantize changes."""
    file_type = _FILE_TYPE_NUMBERS[ALIASES.get(type_name, type_name)]
    metadata = {key: value for key, value in header.metadata.items() if not key.startswith("split.")}
    metadata["general.file_type"] = Value(UINT32, file_type)
    metadata["general.quantization_version"] = Value(UINT32, QUANTIZATION_VERSION)
    return Header((default_target(header, type_name),), metadata, tensors, file_bytes(metadata, tensors))


def _laid_out(source: Mapping[str, Tensor], types: Iterable[tuple[str, TensorType]]) -> Iterator[Tensor]:
    """The tensors one after the other, each of its new type."""
    offset = 0
    for name, tensor_type in types:
        shape = source[name].shape
        size_bytes = tensor_type.size_bytes(math.prod(shape))
        yield Tensor(name, tensor_type, shape, offset, size_bytes)
        offset += padded(size_bytes)
