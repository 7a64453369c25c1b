#!/usr/bin/env python3
"""Writes a file with the header of Mistral Large 2 (123B, dense) in Q3_K_L, and a hole where its 64.5 GB would be.

The dimensions are those that Mistral AI published; the types those that llama-quantize chooses for Q3_K_L
(llama_tensor_get_type in llama.cpp's src/llama-quant.cpp).  It can be planned and rehearsed, but not run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from llama_70b_header import FLOAT32, STRING, TYPES, UINT32

from pyllamarun.models.gguf import Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TensorType

LAYERS, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 88, 12288, 28672, 96, 8, 128, 32768


def metadata() -> dict[str, Value]:
    integers = {
        "llama.block_count": LAYERS,
        "llama.context_length": 131072,
        "llama.embedding_length": EMBEDDING,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_SIZE,
        "llama.vocab_size": VOCABULARY,
        "general.file_type": 13,
        "general.quantization_version": 2,
    }
    return {
        "general.architecture": Value(STRING, "llama"),
        "general.name": Value(STRING, "Mistral Large 2 123B (header)"),
        **{key: Value(UINT32, number) for key, number in integers.items()},
        "llama.attention.layer_norm_rms_epsilon": Value(FLOAT32, 1e-5),
        "llama.rope.freq_base": Value(FLOAT32, 1000000.0),
        "tokenizer.ggml.model": Value(STRING, "none"),
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (EMBEDDING, VOCABULARY)
    yield "output_norm.weight", (EMBEDDING,)
    yield "output.weight", (EMBEDDING, VOCABULARY)
    of_a_layer = {
        "attn_norm": (EMBEDDING,),
        "ffn_norm": (EMBEDDING,),
        "attn_q": (EMBEDDING, HEADS * HEAD_SIZE),
        "attn_k": (EMBEDDING, KV_HEADS * HEAD_SIZE),
        "attn_v": (EMBEDDING, KV_HEADS * HEAD_SIZE),
        "attn_output": (HEADS * HEAD_SIZE, EMBEDDING),
        "ffn_gate": (EMBEDDING, FEED_FORWARD),
        "ffn_up": (EMBEDDING, FEED_FORWARD),
        "ffn_down": (FEED_FORWARD, EMBEDDING),
    }
    for layer in range(LAYERS):
        for name, shape in of_a_layer.items():
            yield f"blk.{layer}.{name}.weight", shape


def q3_k_l(name: str, shape: tuple[int, ...]) -> TensorType:
    if len(shape) == 1:
        return TYPES["F32"]
    if name == "output.weight":
        return TYPES["Q6_K"]
    more_bits = any(part in name for part in ("attn_v", "attn_output", "ffn_down"))
    return TYPES["Q5_K" if more_bits else "Q3_K"]


def write(path: Path) -> Path:
    return write_sparse(path, metadata(), ((name, q3_k_l(name, shape), shape) for name, shape in shapes()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE.gguf")
    print(write(Path(sys.argv[1])))
