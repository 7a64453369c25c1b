"""Reads GGUF headers (v2, v3), also from strangers.

Every count, length and product is bounded before anything is allocated for it; a violation is one ModelError that names
the field and its offset.  Tensor data is never touched, and the cost grows with the header, not with the file: reading
takes the header's size and at most 64 MiB of memory, whatever a file claims.  The format: docs/gguf.md of ggml; the
bounds are those of gguf_init_from_reader in ggml/src/gguf.cpp, or tighter.
"""

from __future__ import annotations

import io
import math
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.types import FILE_TYPES, TENSOR_TYPES, TensorType
from pyllamarun.output import printable

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
MAX_HEADER_BYTES = 64 << 20  # a vocabulary of 200,000 tokens with its merges takes 13 MiB
MAX_TEXT_BYTES = 8 << 20  # of keys, names and string values together: as Python's strings they may take four times that
MAX_ALIGNMENT = 1 << 20
MAX_SHOWN = 100  # characters of a name, where a person reads it
CHUNK_BYTES = 1 << 20


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

_unpack_length = struct.Struct("<Q").unpack_from


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
        if self.element_type != STRING:
            return list(struct.unpack(f"<{self.count}{SCALARS[self.element_type]}", self.raw))
        texts, position = [], 0
        for _ in range(self.count):
            (length,) = _unpack_length(self.raw, position)
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
    """What a GGUF file says of itself.  For a split model, `parts` are all its files and `tensors` those of all."""

    parts: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]

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
        return _shown(name.data if name and name.data else self.path.stem)

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
    first = _read_part(path)
    count = first.metadata["split.count"].data if "split.count" in first.metadata else 0
    if count > 1 and first.get("split.no", 0) != 0:
        raise ModelError(
            f"{path} is not the first part of its split model.",
            why=f"It says that it is part {first.get('split.no')} of {count}, counted from 0.",
            remedy="Name the first part; the others are found beside it.",
        )
    if not first.architecture:
        _fail(path, "It does not say of which architecture it is.")
    if count <= 1:
        return first
    parts = [first] + [_read_part(p) for p in _split_paths(path, count)[1:]]
    for number, part in enumerate(parts):
        if part.get("split.no") != number or part.get("split.count") != count:
            raise ModelError(
                f"{part.path} is not part {number + 1} of {count} of {path}.",
                why=f"It says that it is part {part.get('split.no')} of {part.get('split.count')}, counted from 0.",
                remedy="Download the parts again, all from one source, without renaming them.",
            )
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    _check_names(path, tensors)
    announced = first.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise ModelError(f"{path}: the parts hold {len(tensors)} tensors, and the first announces {announced}.")
    return Header(tuple(part.path for part in parts), first.metadata, tensors)


def _split_paths(first: Path, count: int) -> list[Path]:
    """The names that llama_split_path gives: NAME-00001-of-00003.gguf."""
    suffix = f"-00001-of-{count:05d}.gguf"
    if not first.name.endswith(suffix):
        raise ModelError(
            f"{first} is the first of {count} parts, but its name does not end in {suffix}.",
            remedy="Give the parts the names that they were published under.",
        )
    stem = first.name[: -len(suffix)]
    return [first.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]


def _read_part(path: Path) -> Header:
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


def parse_header(file: BinaryIO, path: Path, file_bytes: int) -> Header:
    """Parses one file's header from a stream at its start; `file_bytes` is the size of the whole file."""
    cursor = _Cursor(file, path, min(file_bytes, MAX_HEADER_BYTES))
    magic = cursor.take(min(file_bytes, len(MAGIC)), "magic")
    if magic != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file.",
            why=f"It begins with {magic!r} and not with {MAGIC!r}." if magic else "It is empty.",
            remedy="Name a model in GGUF format; models in other formats must be converted first.",
        )
    version = cursor.scalar("I", "version")
    if version not in VERSIONS:
        big_endian = int.from_bytes(struct.pack("<I", version), "big") in VERSIONS
        cursor.fail("version", "it is big-endian" if big_endian else f"{version} is none of {VERSIONS}")
    tensor_count = cursor.count("number of tensors", MAX_TENSORS)
    key_count = cursor.count("number of metadata keys", MAX_METADATA_KEYS)
    metadata = _read_metadata(cursor, key_count)
    _check_metadata(path, metadata)
    alignment = metadata["general.alignment"].data if "general.alignment" in metadata else DEFAULT_ALIGNMENT
    tensors = _read_tensors(cursor, tensor_count, alignment)
    _check_names(path, tensors)
    _check_data(path, tensors, file_bytes - _padded(cursor.position, alignment))
    return Header((path,), metadata, tensors)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = cursor.name("metadata key", MAX_KEY_BYTES)
        shown = _shown(key)
        if key in metadata:
            cursor.fail("metadata key", f'"{shown}" stands twice')
        value_type = cursor.scalar("I", f"type of {shown}")
        metadata[key] = Value(value_type, _read_value(cursor, value_type, shown))
    return metadata


def _read_value(cursor: _Cursor, value_type: int, key: str) -> Any:
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


def _check_metadata(path: Path, metadata: Mapping[str, Value]) -> None:
    """That the keys which are read here are what llama.cpp takes; it would refuse them, or abort."""
    architecture = metadata.get("general.architecture")
    prefix = f"{architecture.data}." if architecture else ""
    for short_key, expected in KEY_TYPES.items():
        key = short_key if "." in short_key else prefix + short_key
        if key in metadata and metadata[key].type != expected:
            _fail(path, f"{_shown(key)} is of type {TYPE_NAMES[metadata[key].type]} and not {TYPE_NAMES[expected]}.")
    alignment = metadata.get("general.alignment")
    if alignment and (alignment.data.bit_count() != 1 or alignment.data > MAX_ALIGNMENT):
        _fail(path, f"general.alignment is {alignment.data}, which is no power of two of at most {MAX_ALIGNMENT}.")
    layers = metadata.get(f"{prefix}block_count")
    if layers and not 0 < layers.data <= MAX_LAYERS:
        _fail(path, f"{_shown(prefix)}block_count is {layers.data}, which is not between 1 and {MAX_LAYERS}.")


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[Tensor, ...]:
    """The tensor table, in which the data of each tensor must begin where that of the one before ends, aligned."""
    tensors = []
    offset = 0
    for _ in range(count):
        tensor = _read_tensor(cursor)
        if tensor.offset != offset:
            cursor.fail(f"offset of {_shown(tensor.name)}", f"it is {tensor.offset} and should be {offset}")
        tensors.append(tensor)
        offset = _padded(offset + tensor.size_bytes, alignment)
    return tuple(tensors)


def _read_tensor(cursor: _Cursor) -> Tensor:
    name = cursor.name("tensor name", MAX_NAME_BYTES)
    shown = _shown(name)
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


def _read_dimension(cursor: _Cursor, tensor: str) -> int:
    dimension: int = cursor.scalar("q", f"shape of {tensor}")
    if dimension <= 0:
        cursor.fail(f"shape of {tensor}", f"{dimension} is not positive")
    return dimension


def _check_names(path: Path, tensors: tuple[Tensor, ...]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            _fail(path, f'The tensor "{_shown(tensor.name)}" stands twice.')
        seen.add(tensor.name)


def _check_data(path: Path, tensors: tuple[Tensor, ...], data_bytes: int) -> None:
    needed = tensors[-1].offset + tensors[-1].size_bytes if tensors else 0
    if needed > max(data_bytes, 0):
        raise ModelError(
            f"{path} is incomplete.",
            why=f"Its tensors need {needed:,} bytes of data, and {max(data_bytes, 0):,} are there.",
            remedy="Download it again.",
        )


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment


def _shown(name: str) -> str:
    """A name from a file, as it may stand in a message."""
    return printable(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…")


def _fail(path: Path, why: str) -> NoReturn:
    raise ModelError(
        f"{path} is not a sound GGUF file.",
        why=why,
        remedy="Download it again, from the model's own publisher.",
    )


class _Cursor:
    """Reads forward through a stream, keeping a chunk of it, never past `limit` bytes."""

    def __init__(self, file: BinaryIO, path: Path, limit: int) -> None:
        self._file = file
        self._path = path
        self._limit = limit
        self._text_bytes = 0
        self._chunk = b""
        self._chunk_start = 0  # in the file
        self._next = 0  # in the chunk
        self._field_start = 0  # of the field that was read last

    @property
    def position(self) -> int:
        return self._chunk_start + self._next

    def fail(self, field: str, why: str) -> NoReturn:
        _fail(self._path, f"{field} at byte {self._field_start}: {why}.")

    def _check_room(self, count: int, field: str) -> None:
        self._field_start = self.position
        if count > self._limit - self.position:
            too_large = f"the header is larger than {MAX_HEADER_BYTES} bytes"
            self.fail(field, too_large if self._limit == MAX_HEADER_BYTES else "the file ends within it")

    def _fill(self, count: int, field: str) -> None:
        """Brings the next `count` bytes into the chunk."""
        self._check_room(count, field)
        while len(self._chunk) - self._next < count:
            missing = count - (len(self._chunk) - self._next)
            more = self._file.read(max(CHUNK_BYTES, missing))
            if not more:
                self.fail(field, "the file ends within it")
            self._chunk_start = self.position
            self._chunk, self._next = self._chunk[self._next :] + more, 0

    def take(self, count: int, field: str) -> bytes:
        self._fill(count, field)
        self._next += count
        return self._chunk[self._next - count : self._next]

    def scalar(self, code: str, field: str) -> Any:
        size = struct.calcsize(code)
        self._fill(size, field)
        self._next += size
        return struct.unpack_from("<" + code, self._chunk, self._next - size)[0]

    def count(self, field: str, limit: int) -> int:
        value: int = self.scalar("Q", field)
        if value > limit:
            self.fail(field, f"{value} is more than {limit}")
        return value

    def text(self, field: str, limit: int) -> bytes:
        length = self.count(f"length of {field}", limit)
        self._text_bytes += length
        if self._text_bytes > MAX_TEXT_BYTES:
            self.fail(f"length of {field}", f"there are more than {MAX_TEXT_BYTES} bytes of text up to here")
        return self.take(length, field)

    def name(self, field: str, limit: int) -> str:
        data = self.text(field, limit)
        if not data:
            self.fail(field, "it is empty")
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(field, f'"{_shown(data.decode("utf-8", "replace"))}" is not UTF-8')

    def block(self, count: int, field: str) -> bytes:
        """`count` bytes, which may be many."""
        kept = io.BytesIO()
        self._copy(count, kept, field)
        return kept.getvalue()

    def strings(self, count: int, field: str) -> bytes:
        """`count` strings with their lengths, as they stand in the file."""
        self._check_room(8 * count, field)
        kept = io.BytesIO()
        while count:
            self._fill(8, field)
            number, end = _walk(self._chunk, self._next, count)
            self._copy(end - self._next, kept, field)
            count -= number
        return kept.getvalue()

    def _copy(self, count: int, target: io.BytesIO, field: str) -> None:
        self._check_room(count, field)
        while count:
            self._fill(1, field)
            count -= target.write(self.take(min(count, len(self._chunk) - self._next), field))


def _walk(chunk: bytes, position: int, count: int) -> tuple[int, int]:
    """Steps over at most `count` strings whose lengths are in the chunk: how many they are, and where the last ends."""
    last = len(chunk) - 8
    for number in range(count):
        if position > last:
            return number, position
        (length,) = _unpack_length(chunk, position)
        position += 8 + length
    return count, position
