"""Models that a server pretends to have: real headers, and data that is made up as it is asked for."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

from misbehaving import BLOCK_BYTES, RemoteContent, Server, serve

from pyllamarun.models.gguf import ARRAY, DEFAULT_ALIGNMENT, STRING, UINT32, Array, Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TENSOR_TYPES, TensorType

TYPES = {tensor_type.name: tensor_type for tensor_type in TENSOR_TYPES.values()}
COMMIT = "c" * 40
MOST_HASHED_BYTES = 256 << 20
REPOSITORY = "someone/Model-GGUF"
Tensors = list[tuple[str, TensorType, tuple[int, ...]]]


def vocabulary(size: int) -> Value:
    """As many tokens, of some ten bytes each."""
    words = (f"token {number}".encode() for number in range(size))
    return Value(ARRAY, Array(STRING, size, b"".join(struct.pack("<Q", len(word)) + word for word in words)))


def content(path: Path, metadata: Mapping[str, Value], tensors: Tensors) -> RemoteContent:
    """What a server has of a model; `path` is a file to make it with."""
    write_sparse(path, metadata, tensors)
    size = path.stat().st_size
    sizes = (kind.size_bytes(math.prod(shape)) for _, kind, shape in tensors)
    data = sum(-(-size_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT for size_bytes in sizes)
    with path.open("rb") as file:
        return RemoteContent(file.read(size - data), size)


def small(path: Path, *, tokens: int = 0) -> RemoteContent:
    """A model of one gibibyte of weights; its vocabulary makes the header large."""
    metadata = {"general.architecture": Value(STRING, "llama"), "llama.block_count": Value(UINT32, 1)}
    if tokens:
        metadata["tokenizer.ggml.tokens"] = vocabulary(tokens)
    return content(path, metadata, [("blk.0.ffn_up.weight", TYPES["Q8_0"], (32768, 32768))])


def split(path: Path, metadata: Mapping[str, Value], tensors: Tensors, count: int) -> list[RemoteContent]:
    """A model in parts: the metadata in the first, and each with its share of the tensors."""
    uint16 = 2
    share = -(-len(tensors) // count)
    parts = []
    for number in range(count):
        own = {"split.no": Value(uint16, number), "split.count": Value(uint16, count)}
        own["split.tensors.count"] = Value(5, len(tensors))
        first = dict(metadata) if number == 0 else {}
        parts.append(content(path, first | own, tensors[number * share : (number + 1) * share]))
    return parts


@functools.cache
def sha256(one: RemoteContent) -> str:
    """What a repository says of a file: the truth, but for large ones, which tests read the beginnings of only."""
    if one.size > MOST_HASHED_BYTES:
        return "0" * 64
    hasher = hashlib.sha256(one.head)
    for start in range(len(one.head), one.size, BLOCK_BYTES):
        hasher.update(bytes(min(BLOCK_BYTES, one.size - start)))
    return hasher.hexdigest()


def publish(server: Server, files: dict[str, RemoteContent], *, revision: str = "main", commit: str = COMMIT) -> None:
    """A repository on Hugging Face, with the list of its files."""
    siblings = [{"rfilename": name, "size": one.size, "lfs": {"sha256": sha256(one)}} for name, one in files.items()]
    siblings.append({"rfilename": "README.md", "size": 10})
    listing = RemoteContent(json.dumps({"sha": commit, "siblings": siblings}).encode())
    server.at(f"/api/models/{REPOSITORY}/revision/{revision}", serve(listing))
    for name, one in files.items():
        facts = {"X_Repo_Commit": commit, "X_Linked_Etag": f'"{sha256(one)}"', "X_Linked_Size": one.size}
        for at in (commit, revision):
            server.at(f"/{REPOSITORY}/resolve/{at}/{name}", serve(one, **facts))
