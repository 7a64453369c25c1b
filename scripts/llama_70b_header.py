#!/usr/bin/env python3
"""Writes a file with the header of a Llama-3-70B in Q4_K_M, and a hole where its 39.6 GiB of weights would be.

The dimensions are those that Meta published for Llama 3 70B; the types are those that llama-quantize chooses for
Q4_K_M (llama_tensor_get_type in llama.cpp's src/llama-quant.cpp).  It takes some tens of KiB on disk, and can be
planned, but not run.  With --vocabulary it has as many tokens and merges as Llama 3, made up, and takes 8 MB.
"""

from __future__ import annotations

import itertools
import random
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_header import STRING, TYPES, UINT32, Llama

from pyllamarun.models.gguf import ARRAY, INT32, Array, Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TensorType

MODEL = Llama(
    name="Llama 3 70B",
    layers=80,
    embedding=8192,
    feed_forward=28672,
    heads=64,
    kv_heads=8,
    head_size=128,
    vocabulary=128256,
    context=8192,
    rope_base=500000.0,
)
MERGES = 280147
metadata, shapes = MODEL.metadata, MODEL.shapes


def vocabulary() -> dict[str, Value]:
    """Byte-pair tokens and merges, of about the lengths that Llama 3's have."""
    seeded = random.Random(0)
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]  # GPT-2's bytes
    known = set(tokens)
    words = ("".join(seeded.choices("abcdefghijklmnopqrstuvwxyzĠ", k=seeded.randint(4, 11))) for _ in itertools.count())
    while len(tokens) < MODEL.vocabulary:
        word = next(words)
        if word not in known:
            known.add(word)
            tokens.append(word)
    merges = [f"{word[:2]} {word[2:]}" for word in itertools.islice(words, MERGES)]
    return {
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": Value(
            ARRAY, Array(INT32, MODEL.vocabulary, struct.pack("<i", 1) * MODEL.vocabulary)
        ),
        "tokenizer.ggml.merges": strings(merges),
        "tokenizer.ggml.bos_token_id": Value(UINT32, 128000),
        "tokenizer.ggml.eos_token_id": Value(UINT32, 128001),
    }


def strings(texts: Sequence[str]) -> Value:
    encoded = [text.encode() for text in texts]
    raw = b"".join(struct.pack("<Q", len(text)) + text for text in encoded)
    return Value(ARRAY, Array(STRING, len(texts), raw))


def uses_more_bits(layer: int) -> bool:
    return layer < MODEL.layers // 8 or layer >= 7 * MODEL.layers // 8 or (layer - MODEL.layers // 8) % 3 == 2


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


def write(path: Path, *, with_vocabulary: bool = False) -> Path:
    keys = metadata(file_type=15) | (vocabulary() if with_vocabulary else {})
    return write_sparse(path, keys, ((name, q4_k_m(name, shape), shape) for name, shape in shapes()))


def write_f16(path: Path) -> Path:
    """The same model before quantization."""
    tensors = ((name, TYPES["F32" if len(shape) == 1 else "F16"], shape) for name, shape in shapes())
    return write_sparse(path, metadata(file_type=1), tensors)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--vocabulary"]
    if len(arguments) != 1:
        sys.exit(f"usage: {sys.argv[0]} [--vocabulary] FILE.gguf")
    print(write(Path(arguments[0]), with_vocabulary="--vocabulary" in sys.argv))
