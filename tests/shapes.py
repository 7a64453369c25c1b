"""Models with the widths of real ones, without data, and of few layers where what a kernel needs is asked, since that
depends on widths alone.

The dimensions are those of the models' published configurations, the types those of llama-quantize's Q4_K_M.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from synthetic import Spec, add_metadata, add_vocabulary, attention, common, experts, feed_forward, with_oss_experts

from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import padded
from pyllamarun.models.types import TENSOR_TYPES

N_VOCAB = 32000
TYPES = {tensor_type.name: tensor_type for tensor_type in TENSOR_TYPES.values()}


def quantized(spec: Spec, *, more_bits: tuple[str, ...] = ("attn_v", "ffn_down", "output.weight")) -> Spec:
    """Q4_K_M: Q6_K where `more_bits` names it, in every second layer, and Q4_K elsewhere."""
    for name, (shape, kind) in spec.tensors.items():
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if kind in ("Q4_0", "Q8_0"):
            more = layer % 2 == 0 and any(part in name for part in more_bits)
            spec.tensors[name] = (shape, "Q6_K" if more else "Q4_K")
    return spec


def llama_8b(layers: int = 2) -> Spec:
    spec = Spec("llama", n_layer=layers, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, head_dim=128)
    common(spec, n_vocab=N_VOCAB)
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i)
    return quantized(spec)


def mixtral_8x7b(layers: int = 2) -> Spec:
    spec = Spec("llama", n_layer=layers, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, head_dim=128)
    common(spec, n_vocab=N_VOCAB)
    spec.metadata |= {"expert_count": 8, "expert_used_count": 2}
    for i in range(spec.n_layer):
        attention(spec, i)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        experts(spec, i, 8, spec.n_ff)
    return quantized(spec)


def qwen3_30b_a3b(layers: int = 2) -> Spec:
    spec = Spec("qwen3moe", n_layer=layers, n_embd=2048, n_ff=6144, n_head=32, n_head_kv=4, head_dim=128)
    common(spec, n_vocab=N_VOCAB)
    spec.metadata |= {"expert_count": 128, "expert_used_count": 8, "expert_feed_forward_length": 768}
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        experts(spec, i, 128, 768)
    return quantized(spec)


def gemma3_12b(layers: int = 6) -> Spec:
    """Every sixth layer attends to all tokens, the others to the last 1,024."""
    spec = Spec("gemma3", n_layer=layers, n_embd=3840, n_ff=15360, n_head=16, n_head_kv=8, head_dim=256)
    common(spec, tied=True, n_vocab=N_VOCAB)
    spec.metadata |= {"attention.sliding_window": 1024}
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        feed_forward(spec, i)
        spec.block(i, "post_attention_norm.weight", spec.n_embd)
        spec.block(i, "post_ffw_norm.weight", spec.n_embd)
    return quantized(spec)


def llama_8b_f16(layers: int = 2) -> Spec:
    spec = llama_8b(layers)
    for name, (shape, _) in spec.tensors.items():
        spec.tensors[name] = (shape, "F32" if len(shape) == 1 else "F16")
    return spec


def qwen3_32b(layers: int = 2) -> Spec:
    spec = Spec("qwen3", n_layer=layers, n_embd=5120, n_ff=25600, n_head=64, n_head_kv=8, head_dim=128)
    common(spec, n_vocab=N_VOCAB)
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        feed_forward(spec, i)
    return quantized(spec)


def gpt_oss_120b(layers: int = 2) -> Spec:
    spec = Spec("gpt-oss", n_layer=layers, n_embd=2880, n_ff=2880, n_head=64, n_head_kv=8, head_dim=64)
    common(spec, n_vocab=N_VOCAB)
    return with_oss_experts(spec, count=128, used=4, width=2880)


SHAPES: dict[str, Callable[..., Spec]] = {
    "llama-8b": llama_8b,
    "llama-8b-f16": llama_8b_f16,
    "mixtral-8x7b": mixtral_8x7b,
    "qwen3-30b-a3b": qwen3_30b_a3b,
    "gemma3-12b": gemma3_12b,
    "qwen3-32b": qwen3_32b,
    "gpt-oss-120b": gpt_oss_120b,
}


def write(spec: Spec, path: Path) -> Path:
    """Writes the model with a hole for its data, and returns its path."""
    writer = gguf.GGUFWriter(path, spec.arch)
    writer.add_name("shape")
    for key, value in spec.metadata.items():
        add_metadata(writer, f"{spec.arch}.{key}", value)
    add_vocabulary(writer, spec.metadata["vocab_size"])
    size = 0
    for name, (shape, kind) in spec.tensors.items():
        tensor_type = gguf.GGMLQuantizationType[kind]
        n_bytes = TYPES[kind].size_bytes(math.prod(shape))
        writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), n_bytes, raw_dtype=tensor_type)
        size += gguf.GGUFWriter.ggml_pad(n_bytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        end = file.seek(0, 2)
        file.truncate(gguf.GGUFWriter.ggml_pad(end, writer.data_alignment) + size)
    return path


# Where the scales of a block are, which must be numbers: block_q4_K and block_q6_K in ggml/src/ggml-common.h.
SCALE_BYTES = {"Q4_K": (0, 2), "Q6_K": (208,)}


def fill(path: Path, *, seed: int = 0) -> Path:
    """Gives a model of matrices in Q4_K and Q6_K random weights that are small, and norms of ones; returns its path."""
    random = np.random.default_rng(seed)
    header = read_header(path)
    start = header.file_bytes - sum(padded(tensor.size_bytes) for tensor in header.tensors)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            file.seek(start + tensor.offset)
            if tensor.type.name == "F32":
                file.write(np.ones(tensor.size_bytes // 4, np.float32).tobytes())
                continue
            blocks = (
                np.frombuffer(random.bytes(tensor.size_bytes), np.uint8).copy().reshape(-1, tensor.type.block_bytes)
            )
            for position in SCALE_BYTES[tensor.type.name]:
                scales = (random.random(len(blocks)) * 1e-4).astype(np.float16)
                blocks[:, position : position + 2] = scales.view(np.uint8).reshape(-1, 2)
            file.write(blocks.tobytes())
    return path
