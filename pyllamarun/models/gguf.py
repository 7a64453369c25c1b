"""Reads GGUF headers (v2, v3), also from strangers.

Every count, length and product is bounded before anything is allocated for it; a violation is one ModelError that names
the field and its offset.  Tensor data is never touched, and the cost grows with the header, not with the file: reading
takes the header's size and at most 64 MiB of memory, whatever a file claims.  The format: docs/gguf.md of ggml; the
bounds are those of gguf_init_from_reader in ggml/src/gguf.cpp, or tighter.
"""

from __future__ import annotations

import math
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.cursor import MAX_HEADER_BYTES, MAX_TEXT_BYTES, Cursor, legible, unpack_length, unsound
from pyllamarun.models.types import FILE_TYPES, TENSOR_TYPES, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_METADATA_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_KEY_BYTES = (1 << 16) - 1  # the format's own limit
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 1 << 62
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_ALIGNMENT = 1 << 20

# What stands in place of a model now and then, by how it begins.
IMPOSTORS = {
    b"version https://git-lfs": "It is a Git-LFS pointer: the line that stands for a file which was not fetched.",
    b"<!doctype": "It is a web page.",
    b"<html": "It is a web page.",
}

# enum gguf_type: number -> struct format, for the types of fixed size.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, UINT16, UINT32, INT32, FLOAT32 = 8, 9, 2, 4, 5, 6
TYPE_NAMES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")

# The types that llama.cpp insists on, for the keys that are read here; the last two follow the architecture's name.
KEY_TYPES = {
    "general.architecture": STRING, "general.name": STRING, "general.alignment": UINT32, "general.file_type": UINT32,
    "split.no": UINT16, "split.count": UINT16, "split.tensors.count": INT32, "tokenizer.ggml.tokens": ARRAY,
    "block_count": UINT32, "context_length": UINT32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One line of the tensor table; `shape` has the fastest dimension first, `offset` counts from the data section."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array, kept as it stands in the file: a vocabulary is large and rarely looked at."""

    element_type: int
    count: int
    raw: bytes

    def values(self) -> list[Any]:
        return self.first(self.count)

    def first(self, count: int) -> list[Any]:
        """The first elements, at most so many."""
        count = min(count, self.count)
        if self.element_type != STRING:
            return list(struct.unpack_from(f"<{count}{SCALARS[self.element_type]}", self.raw))
        texts, position = [], 0
        for _ in range(count):
            (length,) = unpack_length(self.raw, position)
            position += 8 + length
            texts.append(self.raw[position - length : position].decode("utf-8", "replace"))
        return texts


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value with its GGUF type; `data` is an int, float, bool, str or Array."""

    type: int
    data: Any


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    For a split model, `parts` are all its files, `tensors` and `file_bytes` those of all.
    """

    parts: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    file_bytes: int

    @property
    def split_count(self) -> int:
        """Of how many files it is one, by its own account; the key stands for itself, never after an architecture."""
        count = self.metadata["split.count"].data if "split.count" in self.metadata else 0
        return int(count)

    @property
    def path(self) -> Path:
        return self.parts[0]

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value by its key, or by its key without the architecture's prefix."""
        for full_key in (key, f"{self.architecture}.{key}"):
            if full_key in self.metadata:
                return self.metadata[full_key].data
        return default

    @property
    def architecture(self) -> str:
        value = self.metadata.get("general.architecture")
        return value.data if value and isinstance(value.data, str) else ""

    @property
    def name(self) -> str:
        name = self.metadata.get("general.name")
        return legible(name.data if name and name.data else self.path.stem)

    @property
    def layers(self) -> int:
        """Repeating layers (block_count)."""
        return self._integer("block_count")

    @property
    def trained_context_tokens(self) -> int:
        return self._integer("context_length")

    @property
    def vocabulary_size(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.data.count if tokens else self._integer("vocab_size")

    @property
    def file_type(self) -> str:
        """What the file calls its quantization, e.g. "Q4_K_M"; "" if it does not say."""
        number = self.metadata.get("general.file_type")
        return FILE_TYPES.get(number.data, "") if number else ""

    def _integer(self, key: str) -> int:
        """A number above 0 from the architecture's own keys; 0 if there is none."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        return value.data if value and isinstance(value.data, int) and value.data > 0 else 0

    @cached_property
    def weights_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors)

    @cached_property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def read_header(path: Path) -> Header:
    """Reads the header of a model file, and of all its parts when it is the first of a split.

    Raises UsageError when there is no such file, and ModelError when it is not a sound GGUF file.
    """
    return read_parts(path, _read_file)


def read_parts(first_path: Path, read_part: Callable[[Path], Header], shown: Callable[[Path], str] = str) -> Header:
    """The header of a model whose first part is named, from those of its parts, wherever `read_part` reads them.

    `shown` is what messages call a part.  Raises ModelError, and what `read_part` raises.
    """
    first = read_part(first_path)
    name = shown(first_path)
    count = first.split_count
    if count > 1 and first.get("split.no", 0) != 0:
        raise ModelError(
            f"{name} is not the first part of its split model.",
            why=f"It says that it is part {first.get('split.no')} of {count}, counted from 0.",
            remedy="Name the first part; the others are found beside it.",
        )
    if not first.architecture:
        raise unsound(name, "It does not say of which architecture it is.")
    if count <= 1:
        return first
    parts = [first] + [read_part(path) for path in split_paths(first_path, count, name)[1:]]
    for number, part in enumerate(parts):
        if part.get("split.no") != number or part.get("split.count") != count:
            raise ModelError(
                f"{shown(part.path)} is not part {number + 1} of {count} of {name}.",
                why=f"It says that it is part {part.get('split.no')} of {part.get('split.count')}, counted from 0.",
                remedy="Download the parts again, all from one source, without renaming them.",
            )
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    _check_names(name, tensors)
    announced = first.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise ModelError(f"{name}: the parts hold {len(tensors)} tensors, and the first announces {announced}.")
    return Header(tuple(part.path for part in parts), first.metadata, tensors, sum(part.file_bytes for part in parts))


def split_paths(first: Path, count: int, shown: str) -> list[Path]:
    """The names that llama_split_path gives: NAME-00001-of-00003.gguf."""
    suffix = f"-00001-of-{count:05d}.gguf"
    if not first.name.endswith(suffix):
        raise ModelError(
            f"{shown} is the first of {count} parts, but its name does not end in {suffix}.",
            remedy="Give the parts the names that they were published under.",
        )
    stem = first.name[: -len(suffix)]
    return [first.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]


def _read_file(path: Path) -> Header:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UsageError(f"There is no file {path}.", remedy="Check the path.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=error.strerror or str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} is not a regular file.", remedy="Name a GGUF file.")
    try:
        with path.open("rb") as file:
            return parse_header(file, path, status.st_size)
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=error.strerror or str(error)) from None


def parse_header(file: BinaryIO, path: Path, file_bytes: int, shown: str = "") -> Header:
    """Parses one file's header from a stream at its start; `file_bytes` is the size of the whole file.

    `path` is where it lies, and `shown` what messages call it instead.  It reads forward only, and asks for
    CHUNK_BYTES at once, or more where it knows that the header has as much; a stream may give less.
    """
    shown = shown or str(path)
    cursor = Cursor(file, shown, min(file_bytes, MAX_HEADER_BYTES))
    magic = cursor.take(min(file_bytes, len(MAGIC)), "magic")
    if magic != MAGIC:
        raise _no_gguf(shown, magic, cursor.beginning())
    version = cursor.scalar("I", "version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(struct.pack("<I", version), "big") in VERSIONS
        cursor.fail("version", "it is big-endian" if big_endian else f"{version} is none of {VERSIONS}")
    tensor_count = cursor.count("number of tensors", MAX_TENSORS)
    key_count = cursor.count("number of metadata keys", MAX_METADATA_KEYS)
    metadata = _read_metadata(cursor, key_count)
    _check_metadata(shown, metadata)
    alignment = metadata["general.alignment"].data if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    tensors = _read_tensors(cursor, tensor_count, alignment)
    _check_names(shown, tensors)
    _check_data(shown, tensors, file_bytes - _padded(cursor.position, alignment))
    return Header((path,), metadata, tensors, file_bytes)


def _no_gguf(shown: str, magic: bytes, beginning: bytes) -> ModelError:
    why = f"It begins with {magic!r} and not with {MAGIC!r}." if magic else "It is empty."
    remedy = "Name a model in GGUF format; models in other formats must be converted first."
    for start, what in IMPOSTORS.items():
        if beginning[:64].lstrip().lower().startswith(start):
            why, remedy = what, "Download the model itself, and check the address or path."
    return ModelError(f"{shown} is not a GGUF file.", why=why, remedy=remedy)


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.name("metadata key", MAX_KEY_BYTES)
        name = legible(key)
        if key in metadata:
            cursor.fail("metadata key", f'"{name}" stands twice')
        value_type = cursor.scalar("I", f"type of {name}")
        metadata[key] = Value(value_type, _read_value(cursor, value_type, name))
    return metadata


def _read_value(cursor: Cursor, value_type: int, key: str) -> Any:
    if value_type in SCALARS:
        return cursor.scalar(SCALARS[value_type], key)
    if value_type == STRING:
        return cursor.text(key, MAX_TEXT_BYTES).decode("utf-8", "replace")
    if value_type != ARRAY:
        cursor.fail(f"type of {key}", f"{value_type} is no value type")
    element_type = cursor.scalar("I", f"element type of {key}")
    if element_type not in SCALARS and element_type != STRING:
        cursor.fail(f"element type of {key}", f"{element_type} is no type for the elements of an array")
    count = cursor.scalar("Q", f"length of {key}")
    if element_type == STRING:
        return Array(STRING, count, cursor.strings(count, key))
    return Array(element_type, count, cursor.block(count * struct.calcsize(SCALARS[element_type]), key))


def _check_metadata(shown: str, metadata: Mapping[str, Value]) -> None:
    """That the keys which are read here are what llama.cpp takes; it would refuse them, or abort."""
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture.data}." if architecture else ""
    for short_key, expected in KEY_TYPES.items():
        key = short_key if "." in short_key else prefix + short_key
        if key in metadata and metadata[key].type != expected:
            raise unsound(
                shown, f"{legible(key)} is of type {TYPE_NAMES[metadata[key].type]} and not {TYPE_NAMES[expected]}."
            )
    alignment = metadata.get("general.alignment")
    if alignment and (alignment.data.bit_count() != 1 or alignment.data > MAX_ALIGNMENT):
        raise unsound(
            shown, f"general.alignment is {alignment.data}, which is no power of two of at most {MAX_ALIGNMENT}."
        )
    layers = metadata.get(f"{prefix}block_count")
    if layers and not 0 < layers.data <= MAX_LAYERS:
        raise unsound(shown, f"{legible(prefix)}block_count is {layers.data}, which is not between 1 and {MAX_LAYERS}.")


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    """The tensor table, in which the data of each tensor must begin where that of the one before ends, aligned."""
    tensors = []
    offset = 0
    for _ in range(count):
        tensor = _read_tensor(cursor)
        if tensor.offset != offset:
            cursor.fail(f"offset of {legible(tensor.name)}", f"it is {tensor.offset} and should be {offset}")
        tensors.append(tensor)
        offset = _padded(offset + tensor.size_bytes, alignment)
    return tuple(tensors)


def _read_tensor(cursor: Cursor) -> Tensor:
    name = cursor.name("tensor name", MAX_NAME_BYTES)
    shown = legible(name)
    dimensions = cursor.scalar("I", f"dimensions of {shown}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        cursor.fail(f"dimensions of {shown}", f"{dimensions} is not between 1 and {MAX_DIMENSIONS}")
    shape = tuple(_read_dimension(cursor, shown) for _ in range(dimensions))
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        cursor.fail(f"shape of {shown}", "it is larger than any memory")
    type_number = cursor.scalar("I", f"type of {shown}")
    tensor_type = TENSOR_TYPES.get(type_number)
    if tensor_type is None:
        cursor.fail(f"type of {shown}", f"{type_number} is no tensor type of this llama.cpp")
    if shape[0] % tensor_type.block_size:
        cursor.fail(f"type of {shown}", f"rows of {shape[0]} are no multiple of {tensor_type.name}'s blocks")
    offset = cursor.scalar("Q", f"offset of {shown}")
    return Tensor(name, tensor_type, shape, offset, tensor_type.size_bytes(elements))


def _read_dimension(cursor: Cursor, tensor: str) -> int:
    dimension: int = cursor.scalar("q", f"shape of {tensor}")
    if dimension <= 0:
        cursor.fail(f"shape of {tensor}", f"{dimension} is not positive")
    return dimension


def _check_names(shown: str, tensors: tuple[Tensor, ...]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise unsound(shown, f'The tensor "{legible(tensor.name)}" stands twice.')
        seen.add(tensor.name)


def _check_data(shown: str, tensors: tuple[Tensor, ...], data_bytes: int) -> None:
    needed = tensors[-1].offset + tensors[-1].size_bytes if tensors else 0
    if needed > max(data_bytes, 0):
        raise ModelError(
            f"{shown} is incomplete.",
            why=f"Its tensors need {needed:,} bytes of data, and {max(data_bytes, 0):,} are there.",
            remedy="Download it again.",
        )


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment
