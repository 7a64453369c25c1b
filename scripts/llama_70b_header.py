#!/usr/bin/env python3
"""Writes a file with the header of a Llama-3-70B in Q4_K_M, and a hole where its 39.6 GiB of weights would be.

The dimensions are those that Meta published for Llama 3 70B; the types are those that llama-quantize chooses for
Q4_K_M (llama_tensor_get_type in llama.cpp's src/llama-quant.cpp).  It takes some tens of KiB on disk, and can be
planned, but not run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pyllamarun.models.gguf import Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TENSOR_TYPES, TensorType

LAYERS, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 80, 8192, 28672, 64, 8, 128, 128256
TYPES = {tensor_type.name: tensor_type for tensor_type in TENSOR_TYPES.values()}
UINT32, FLOAT32, STRING = 4, 6, 8


def metadata(file_type: int) -> dict[str, Value]:
    integers = {
        "llama.block_count": LAYERS,
        "llama.context_length": 8192,
        "llama.embedding_length": EMBEDDING,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.vocab_size": VOCABULARY,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }
    return {
        "general.architecture": Value(STRING, "llama"),
        "general.name": Value(STRING, "Llama 3 70B (header)"),
        **{key: Value(UINT32, number) for key, number in integers.items()},
        "llama.attention.layer_norm_rms_epsilon": Value(FLOAT32, 1e-5),
        "llama.rope.freq_base": Value(FLOAT32, 500000.0),
        "tokenizer.ggml.model": Value(STRING, "none"),
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (EMBEDDING, VOCABULARY)
    yield "output_norm.weight", (EMBEDDING,)
    yield "output.weight", (EMBEDDING, VOCABULARY)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        yield f"{block}.attn_norm.weight", (EMBEDDING,)
        yield f"{block}.ffn_norm.weight", (EMBEDDING,)
        yield f"{block}.attn_q.weight", (EMBEDDING, HEADS * HEAD_SIZE)
        yield f"{block}.attn_k.weight", (EMBEDDING, KV_HEADS * HEAD_SIZE)
        yield f"{block}.attn_v.weight", (EMBEDDING, KV_HEADS * HEAD_SIZE)
        yield f"{block}.attn_output.weight", (HEADS * HEAD_SIZE, EMBEDDING)
        yield f"{block}.ffn_gate.weight", (EMBEDDING, FEED_FORWARD)
        yield f"{block}.ffn_up.weight", (EMBEDDING, FEED_FORWARD)
        yield f"{block}.ffn_down.weight", (FEED_FORWARD, EMBEDDING)


def uses_more_bits(layer: int) -> bool:
    return layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2


def q4_k_m(name: str, shape: tuple[int, ...]) -> TensorType:
    if len(shape) == 1:
        return TYPES["F32"]
    if name == "output.weight":
        return TYPES["Q6_K"]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else -1
    if "attn_v" in name:  # with eight query heads to one of keys and values, these bits are cheap
        return TYPES["Q6_K"] if uses_more_bits(layer) else TYPES["Q5_K"]
    if "ffn_down" in name and uses_more_bits(layer):
        return TYPES["Q6_K"]
    return TYPES["Q4_K"]


def write(path: Path) -> Path:
    return write_sparse(path, metadata(file_type=15), ((name, q4_k_m(name, shape), shape) for name, shape in shapes()))


def write_f16(path: Path) -> Path:
    """The same model before quantization."""
    tensors = ((name, TYPES["F32" if len(shape) == 1 else "F16"], shape) for name, shape in shapes())
    return write_sparse(path, metadata(file_type=1), tensors)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE.gguf")
    print(write(Path(sys.argv[1])))
