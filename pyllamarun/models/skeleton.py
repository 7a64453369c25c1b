"""Writes skeletons: sparse GGUF files with a model's metadata and tensor table, but without its vocabulary and data.

llama.cpp's memory and `llama-quantize --dry-run` come out the same on a skeleton as on the model, and a skeleton of
any model takes some tens of KiB on disk and milliseconds to load.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyllamarun.errors import ModelError
from pyllamarun.models.gguf import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    MAGIC,
    SCALARS,
    STRING,
    UINT32,
    Array,
    Header,
    Tensor,
    Value,
)
from pyllamarun.models.types import TENSOR_TYPES, TensorType

MAX_VOCABULARY = 1 << 22
_TYPE_NUMBERS = {tensor_type.name: number for number, tensor_type in TENSOR_TYPES.items()}


def write_skeleton(header: Header, path: Path, *, servable: bool = False) -> Path:
    """Writes the skeleton of a model, split models as one file, and returns its path.

    A servable one has a made-up vocabulary of the same size, so that llama-server can serve it; every weight is zero.
    """
    metadata = {key: value for key, value in header.metadata.items() if not _is_left_out(key, value, servable)}
    size = _vocabulary_size(header)
    if servable:
        metadata |= _made_up_vocabulary(size)
    else:
        # With this tokenizer llama.cpp makes up as many tokens as vocab_size says: llama_vocab::impl::load.
        metadata["tokenizer.ggml.model"] = Value(STRING, "none")
        metadata[f"{header.architecture}.vocab_size"] = Value(UINT32, size)
    metadata["general.alignment"] = Value(UINT32, DEFAULT_ALIGNMENT)
    return write_sparse(path, metadata, ((tensor.name, tensor.type, tensor.shape) for tensor in header.tensors))


def _is_left_out(key: str, value: Value, servable: bool) -> bool:
    if not key.startswith("tokenizer."):
        return key.startswith("split.")
    # What else the tokenizer's keys say, such as how many token types there are, belongs to the model's shape.
    names_tokens = key.endswith(("_token_id", ".pre"))
    return isinstance(value.data, Array) or "chat_template" in key or (servable and names_tokens)


def _made_up_vocabulary(size: int) -> dict[str, Value]:
    """Of the plainest kind, SentencePiece's: three special tokens, the bytes, and as many words as it takes."""
    unknown, normal, control, byte = 2, 1, 3, 6  # llama_token_type
    tokens = [("<unk>", unknown), ("<s>", control), ("</s>", control)]
    tokens += [(f"<0x{value:02X}>", byte) for value in range(256)]
    tokens += [(f"t{number}", normal) for number in range(len(tokens), size)]
    names, kinds = zip(*tokens[: max(size, 3)])
    count = len(names)
    return {
        "tokenizer.ggml.model": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(ARRAY, Array(STRING, count, b"".join(map(_string, names)))),
        "tokenizer.ggml.scores": Value(ARRAY, Array(FLOAT32, count, bytes(4 * count))),
        "tokenizer.ggml.token_type": Value(ARRAY, Array(INT32, count, struct.pack(f"<{count}i", *kinds))),
        "tokenizer.ggml.bos_token_id": Value(UINT32, 1),
        "tokenizer.ggml.eos_token_id": Value(UINT32, 2),
    }


def fingerprint(header: Header) -> str:
    """Tells models apart as far as memory depends on them: a digest of what a skeleton holds."""
    import hashlib

    metadata = [
        (key, value.type, value.data)
        for key, value in sorted(header.metadata.items())
        if not isinstance(value.data, Array) or key.startswith(f"{header.architecture}.")
    ]
    tensors = [(tensor.name, tensor.type.name, tensor.shape) for tensor in header.tensors]
    facts = [_vocabulary_size(header), metadata, tensors]
    return hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()


def _vocabulary_size(header: Header) -> int:
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    size = header.vocabulary_size or (embedding.shape[-1] if embedding else 0)
    if size > MAX_VOCABULARY:  # llama.cpp would allocate it, token by token
        raise ModelError(f"{header.path} claims a vocabulary of {size:,} tokens, more than {MAX_VOCABULARY:,}.")
    return size


def write_sparse(
    path: Path, metadata: Mapping[str, Value], tensors: Iterable[tuple[str, TensorType, tuple[int, ...]]]
) -> Path:
    """Writes a GGUF v3 file whose tensor data is a hole of the right size."""
    table = bytearray()
    offset = count = 0
    for name, tensor_type, shape in tensors:
        table += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        table += struct.pack("<IQ", _TYPE_NUMBERS[tensor_type.name], offset)
        offset += padded(tensor_type.size_bytes(math.prod(shape)))
        count += 1
    head = bytearray(MAGIC + struct.pack("<IQQ", 3, count, len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + struct.pack("<I", value.type) + _encoded(value)
    head += table
    data_start = padded(len(head))
    with path.open("wb") as file:
        file.write(head)
        file.truncate(data_start + offset)
    return path


def file_bytes(metadata: Mapping[str, Value], tensors: Iterable[Tensor]) -> int:
    """What `write_sparse` would write, and llama.cpp: the size of a GGUF v3 file, with its data."""
    head = len(MAGIC) + struct.calcsize("<IQQ")
    head += sum(_string_bytes(key) + 4 + _value_bytes(value) for key, value in metadata.items())
    data = 0
    for tensor in tensors:
        head += _string_bytes(tensor.name) + struct.calcsize(f"<I{len(tensor.shape)}QIQ")
        data += padded(tensor.size_bytes)
    return padded(head) + data


def padded(size_bytes: int) -> int:
    """Up to the next place where a tensor may begin."""
    return -(-size_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _encoded(value: Value) -> bytes:
    data: Any = value.data
    if value.type == STRING:
        return _string(data)
    if value.type == ARRAY:
        return struct.pack("<IQ", data.element_type, data.count) + bytes(data.raw)
    return struct.pack("<" + SCALARS[value.type], data)


def _string_bytes(text: str) -> int:
    return 8 + len(text.encode("utf-8", "replace"))


def _value_bytes(value: Value) -> int:
    if value.type == STRING:
        return _string_bytes(value.data)
    if value.type == ARRAY:
        return 4 + 8 + len(value.data.raw)
    return struct.calcsize("<" + SCALARS[value.type])
