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
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyllamarun.models.gguf import ARRAY, INT32, Array, Value
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TENSOR_TYPES, TensorType

LAYERS, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 80, 8192, 28672, 64, 8, 128, 128256
MERGES = 280147
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


def vocabulary() -> dict[str, Value]:
    """Byte-pair tokens and merges, of about the lengths that Llama 3's have."""
    seeded = random.Random(0)
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    tokens = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]  # GPT-2's bytes
    known = set(tokens)
    words = ("".join(seeded.choices("abcdefghijklmnopqrstuvwxyzĠ", k=seeded.randint(4, 11))) for _ in itertools.count())
    while len(tokens) < VOCABULARY:
        word = next(words)
        if word not in known:
            known.add(word)
            tokens.append(word)
    merges = [f"{word[:2]} {word[2:]}" for word in itertools.islice(words, MERGES)]
    return {
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": Value(ARRAY, Array(INT32, VOCABULARY, struct.pack("<i", 1) * VOCABULARY)),
        "tokenizer.ggml.merges": strings(merges),
        "tokenizer.ggml.bos_token_id": Value(UINT32, 128000),
        "tokenizer.ggml.eos_token_id": Value(UINT32, 128001),
    }


def strings(texts: Sequence[str]) -> Value:
    encoded = [text.encode() for text in texts]
    raw = b"".join(struct.pack("<Q", len(text)) + text for text in encoded)
    return Value(ARRAY, Array(STRING, len(texts), raw))


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
