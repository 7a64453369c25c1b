#!/usr/bin/env python3
"""Writes a file with the header of Mistral Large 2 (123B, dense) in Q3_K_L, and a hole where its 64.5 GB would be.

The dimensions are those that Mistral AI published; the types those that llama-quantize chooses for Q3_K_L
(llama_tensor_get_type in llama.cpp's src/llama-quant.cpp).  It can be planned and rehearsed, but not run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llama_header import TYPES, Llama

from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TensorType

MODEL = Llama(
    name="Mistral Large 2 123B",
    layers=88,
    embedding=12288,
    feed_forward=28672,
    heads=96,
    kv_heads=8,
    head_size=128,
    vocabulary=32768,
    context=131072,
    rope_base=1000000.0,
)


def q3_k_l(name: str, shape: tuple[int, ...]) -> TensorType:
    if len(shape) == 1:
        return TYPES["F32"]
    if name == "output.weight":
        return TYPES["Q6_K"]
    more_bits = any(part in name for part in ("attn_v", "attn_output", "ffn_down"))
    return TYPES["Q5_K" if more_bits else "Q3_K"]


def write(path: Path) -> Path:
    return write_sparse(
        path, MODEL.metadata(file_type=13), ((n, q3_k_l(n, shape), shape) for n, shape in MODEL.shapes())
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FILE.gguf")
    print(write(Path(sys.argv[1])))
