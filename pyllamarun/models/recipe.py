"""How a model is to be quantized besides its type: what llama-quantize is told, in a dry run as in a real one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pyllamarun.errors import UsageError
from pyllamarun.models.gguf import ARRAY, STRING, UINT32, Array, Header, Tensor, Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TENSOR_TYPES

# Types that ggml computes with, but that no file has.
NOT_STORED = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
KINDS = tuple(one.name for one in TENSOR_TYPES.values() if one.name not in NOT_STORED)


@dataclass(frozen=True)
class Recipe:
    """llama-quantize's options.  `imatrix` is a file; `tensor_types` are "PATTERN=TYPE"; "" and () leave it to choose.

    `keep_split` means as many files as the source has, and is nothing where that is one.
    """

    imatrix: Path | None = None
    tensor_types: tuple[str, ...] = ()
    output_type: str = ""
    embedding_type: str = ""
    pure: bool = False
    keep_split: bool = False

    @property
    def changes_types(self) -> bool:
        """Whether a file of the same type as its source would be another one."""
        return bool(self.tensor_types or self.output_type or self.embedding_type or self.pure)

    def arguments(self) -> list[str]:
        """For llama-quantize, before the name of the source."""
        words: list[str] = []
        if self.imatrix is not None:
            words += ["--imatrix", str(self.imatrix)]  # which llama-quantize writes into the file
        for tensor_type in self.tensor_types:
            words += ["--tensor-type", tensor_type]
        for option, value in (
            ("--output-tensor-type", self.output_type),
            ("--token-embedding-type", self.embedding_type),
        ):
            words += [option, value] if value else []
        return words + ["--pure"] * self.pure + ["--keep-split"] * self.keep_split

    def checked(self, source: Header) -> Recipe:
        """The same, if it can be carried out on this source; of one file, not split.  UsageError where it cannot."""
        for kind in filter(None, (self.output_type, self.embedding_type)):
            _check_kind(kind)
        for text in self.tensor_types:
            pattern, _, kind = text.partition("=")
            if not pattern or not kind:
                raise UsageError(f'"{text}" names no tensors and a type.', remedy="Write PATTERN=TYPE: attn_v=q6_K.")
            _check_kind(kind)
            _check_pattern(pattern, source)
        if self.imatrix is not None and not self.imatrix.is_file():
            raise UsageError(f"There is no file {self.imatrix}.", remedy="Check the path of the importance matrix.")
        return replace(self, keep_split=self.keep_split and len(source.parts) > 1)


PLAIN = Recipe()


def _check_kind(name: str) -> None:
    if name.upper() not in KINDS:
        raise UsageError(f'There is no tensor type "{name}".', why="Types of tensors: " + ", ".join(KINDS))


def _check_pattern(pattern: str, source: Header) -> None:
    """llama-quantize would pass over a pattern in silence that no tensor has; what Python cannot read is left to it."""
    try:
        matches = re.compile(pattern.lower())
    except (re.error, OverflowError, RecursionError):
        return
    if not any(matches.search(tensor.name) for tensor in source.tensors):
        raise UsageError(
            f'No tensor of {source.path} is called "{pattern}".',
            remedy="`pyllamarun inspect` and its --json show what a model is made of.",
        )


def write_placeholder(path: Path, tensors: Iterable[Tensor]) -> Path:
    """An importance matrix that says nothing, for a dry run: types depend on whether there is one, not on its figures.

    As IMatrixCollector::save_imatrix in tools/imatrix/imatrix.cpp writes it.
    """
    metadata = {
        "general.type": Value(STRING, "imatrix"),
        "imatrix.datasets": Value(ARRAY, Array(STRING, 0, b"")),
        "imatrix.chunk_count": Value(UINT32, 1),
        "imatrix.chunk_size": Value(UINT32, 512),
    }
    kind = TENSOR_TYPES[0]
    matrices = ((tensor.name, tensor.shape[0]) for tensor in tensors if len(tensor.shape) > 1)
    name, width = next(matrices, ("none", 1))
    return write_sparse(path, metadata, [(f"{name}.in_sum2", kind, (width, 1)), (f"{name}.counts", kind, (1, 1))])
