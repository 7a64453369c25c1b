"""Tiny models of many architectures with real tensor names, which llama-server loads and runs.

Shapes are in GGUF's order (fastest dimension first), as the loaders under llama.cpp's src/models/ give them.  Weights
are small random numbers; a type that the gguf package cannot quantize is filled with zero bytes, which every type reads
as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_VOCAB = 512
N_CTX_TRAIN = 8192
MATRIX, EXPERTS, VECTOR = "Q4_0", "Q4_0", "F32"


@dataclass
class Spec:
    """What goes into one file: metadata under the architecture's prefix, and tensors by name."""

    arch: str
    n_layer: int = 4
    n_embd: int = 256
    n_ff: int = 512
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def add(self, name: str, *shape: int, type: str | None = None) -> None:
        default = VECTOR if len(shape) == 1 else EXPERTS if len(shape) == 3 else MATRIX
        self.tensors[name] = (shape, type or default)

    def block(self, layer: int, name: str, *shape: int, type: str | None = None) -> None:
        self.add(f"blk.{layer}.{name}", *shape, type=type)


def common(spec: Spec, *, tied: bool = False, n_vocab: int = N_VOCAB) -> None:
    spec.metadata |= {
        "context_length": N_CTX_TRAIN,
        "embedding_length": spec.n_embd,
        "block_count": spec.n_layer,
        "feed_forward_length": spec.n_ff,
        "attention.head_count": spec.n_head,
        "attention.head_count_kv": spec.n_head_kv,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": spec.head_dim,
        "vocab_size": n_vocab,
    }
    spec.add("token_embd.weight", spec.n_embd, n_vocab)
    spec.add("output_norm.weight", spec.n_embd)
    if not tied:
        spec.add("output.weight", spec.n_embd, n_vocab, type="Q8_0")


def attention(spec: Spec, layer: int, *, bias: bool = False, norms: bool = False, fused: bool = False) -> None:
    q, kv = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    spec.block(layer, "attn_norm.weight", spec.n_embd)
    if fused:
        spec.block(layer, "attn_qkv.weight", spec.n_embd, q + 2 * kv)
    else:
        for name, width in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            spec.block(layer, f"{name}.weight", spec.n_embd, width)
            if bias:
                spec.block(layer, f"{name}.bias", width)
    spec.block(layer, "attn_output.weight", q, spec.n_embd)
    if norms:
        spec.block(layer, "attn_q_norm.weight", spec.head_dim)
        spec.block(layer, "attn_k_norm.weight", spec.head_dim)


def feed_forward(spec: Spec, layer: int, *, norm: bool = True) -> None:
    if norm:
        spec.block(layer, "ffn_norm.weight", spec.n_embd)
    spec.block(layer, "ffn_gate.weight", spec.n_embd, spec.n_ff)
    spec.block(layer, "ffn_up.weight", spec.n_embd, spec.n_ff)
    spec.block(layer, "ffn_down.weight", spec.n_ff, spec.n_embd)


def experts(spec: Spec, layer: int, count: int, width: int, *, type: str | None = None) -> None:
    spec.block(layer, "ffn_gate_inp.weight", spec.n_embd, count, type="F32")
    spec.block(layer, "ffn_gate_exps.weight", spec.n_embd, width, count, type=type)
    spec.block(layer, "ffn_up_exps.weight", spec.n_embd, width, count, type=type)
    spec.block(layer, "ffn_down_exps.weight", width, spec.n_embd, count, type=type)


def llama() -> Spec:
    spec = Spec("llama")
    common(spec)
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i)
    return spec


def llama_k_quants() -> Spec:
    """K-quants in rows of 768, which CUDA pads to the next multiple of 512 elements."""
    spec = Spec("llama", n_embd=768, n_ff=1280, n_head=12, n_head_kv=4)
    common(spec)
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i)
    for name, (shape, kind) in spec.tensors.items():
        if kind == MATRIX:
            spec.tensors[name] = (shape, "Q6_K" if "ffn_down" in name else "Q4_K")
    return spec


def mixtral() -> Spec:
    spec = Spec("llama")
    common(spec)
    spec.metadata |= {"expert_count": 8, "expert_used_count": 2}
    for i in range(spec.n_layer):
        attention(spec, i)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        experts(spec, i, 8, spec.n_ff)
    return spec


def qwen2() -> Spec:
    spec = Spec("qwen2")
    common(spec, tied=True)
    for i in range(spec.n_layer):
        attention(spec, i, bias=True)
        feed_forward(spec, i)
    return spec


def qwen3() -> Spec:
    spec = Spec("qwen3", head_dim=128)
    common(spec)
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        feed_forward(spec, i)
    return spec


def qwen3moe() -> Spec:
    spec = Spec("qwen3moe")
    common(spec)
    spec.metadata |= {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 256}
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        experts(spec, i, 8, 256)
    return spec


def gemma2() -> Spec:
    spec = Spec("gemma2", n_layer=6)
    common(spec, tied=True)
    spec.metadata |= {
        "attention.sliding_window": 512,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i)
        spec.block(i, "post_attention_norm.weight", spec.n_embd)
        spec.block(i, "post_ffw_norm.weight", spec.n_embd)
    return spec


def gemma3() -> Spec:
    spec = Spec("gemma3", n_layer=8, head_dim=256, n_head_kv=1)
    common(spec, tied=True)
    spec.metadata |= {"attention.sliding_window": 512}
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        feed_forward(spec, i)
        spec.block(i, "post_attention_norm.weight", spec.n_embd)
        spec.block(i, "post_ffw_norm.weight", spec.n_embd)
    return spec


def phi3() -> Spec:
    spec = Spec("phi3")
    common(spec)
    spec.n_head_kv = spec.n_head
    spec.metadata["attention.head_count_kv"] = spec.n_head
    for i in range(spec.n_layer):
        attention(spec, i, fused=True)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        spec.block(i, "ffn_up.weight", spec.n_embd, 2 * spec.n_ff)
        spec.block(i, "ffn_down.weight", spec.n_ff, spec.n_embd)
    return spec


def command_r() -> Spec:
    spec = Spec("command-r")
    common(spec, tied=True)
    spec.metadata |= {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.0625}
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i, norm=False)
    return spec


def deepseek2() -> Spec:
    """Multi-head latent attention, one dense layer, shared and routed experts."""
    q_rank, kv_rank, nope, rope = 128, 512, 128, 64
    spec = Spec("deepseek2", n_head=16, head_dim=kv_rank + rope)
    common(spec)
    spec.metadata |= {
        "attention.head_count_kv": 1,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": nope,
        "attention.q_lora_rank": q_rank,
        "attention.kv_lora_rank": kv_rank,
        "rope.dimension_count": rope,
        "leading_dense_block_count": 1,
        "expert_count": 8,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 256,
        "expert_weights_scale": 1.0,
    }
    for i in range(spec.n_layer):
        spec.block(i, "attn_norm.weight", spec.n_embd)
        spec.block(i, "attn_q_a_norm.weight", q_rank)
        spec.block(i, "attn_kv_a_norm.weight", kv_rank)
        spec.block(i, "attn_q_a.weight", spec.n_embd, q_rank)
        spec.block(i, "attn_q_b.weight", q_rank, spec.n_head * (nope + rope))
        spec.block(i, "attn_kv_a_mqa.weight", spec.n_embd, kv_rank + rope)
        spec.block(i, "attn_k_b.weight", nope, kv_rank, spec.n_head)
        spec.block(i, "attn_v_b.weight", kv_rank, nope, spec.n_head)
        spec.block(i, "attn_output.weight", spec.n_head * nope, spec.n_embd)
        if i == 0:
            feed_forward(spec, i)
        else:
            spec.block(i, "ffn_norm.weight", spec.n_embd)
            experts(spec, i, 8, 256)
            spec.block(i, "ffn_gate_shexp.weight", spec.n_embd, 256)
            spec.block(i, "ffn_up_shexp.weight", spec.n_embd, 256)
            spec.block(i, "ffn_down_shexp.weight", 256, spec.n_embd)
    return spec


def gpt_oss() -> Spec:
    spec = Spec("gpt-oss", n_layer=6)
    common(spec)
    return with_oss_experts(spec, count=8, used=2, width=256)


def with_oss_experts(spec: Spec, *, count: int, used: int, width: int) -> Spec:
    """gpt-oss's layers: every second one attends to the last 128 tokens only; experts with biases."""
    spec.metadata |= {
        "attention.sliding_window": 128,
        "expert_count": count,
        "expert_used_count": used,
        "expert_feed_forward_length": width,
    }
    for i in range(spec.n_layer):
        attention(spec, i, bias=True)
        spec.block(i, "attn_output.bias", spec.n_embd)
        spec.block(i, "post_attention_norm.weight", spec.n_embd)
        spec.block(i, "attn_sinks.weight", spec.n_head)
        experts(spec, i, count, width, type="MXFP4")
        spec.block(i, "ffn_gate_inp.bias", count)
        spec.block(i, "ffn_gate_exps.bias", width, count, type="F32")
        spec.block(i, "ffn_up_exps.bias", width, count, type="F32")
        spec.block(i, "ffn_down_exps.bias", spec.n_embd, count, type="F32")
    return spec


def state_space(spec: Spec, layer: int, *, norms: bool = False) -> None:
    inner, state, conv, rank = 2 * spec.n_embd, 16, 4, 16
    spec.metadata |= {
        "ssm.conv_kernel": conv,
        "ssm.inner_size": inner,
        "ssm.state_size": state,
        "ssm.time_step_rank": rank,
    }
    spec.block(layer, "attn_norm.weight", spec.n_embd)
    spec.block(layer, "ssm_in.weight", spec.n_embd, 2 * inner)
    spec.block(layer, "ssm_conv1d.weight", conv, inner, type="F32")
    spec.block(layer, "ssm_conv1d.bias", inner)
    spec.block(layer, "ssm_x.weight", inner, rank + 2 * state)
    spec.block(layer, "ssm_dt.weight", rank, inner, type="F32")
    spec.block(layer, "ssm_dt.bias", inner)
    spec.block(layer, "ssm_a", state, inner, type="F32")
    spec.block(layer, "ssm_d", inner)
    spec.block(layer, "ssm_out.weight", inner, spec.n_embd)
    if norms:
        spec.block(layer, "ssm_dt_norm.weight", rank)
        spec.block(layer, "ssm_b_norm.weight", state)
        spec.block(layer, "ssm_c_norm.weight", state)


def mamba() -> Spec:
    spec = Spec("mamba", n_head=0, n_head_kv=0, n_ff=0)
    common(spec)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        del spec.metadata[key]
    for i in range(spec.n_layer):
        state_space(spec, i)
    return spec


def jamba() -> Spec:
    """A hybrid: attention in every fourth layer, a recurrent state in the others."""
    spec = Spec("jamba", n_layer=8)
    common(spec)
    kv_heads = [spec.n_head_kv if i % 4 == 2 else 0 for i in range(spec.n_layer)]
    spec.metadata["attention.head_count_kv"] = kv_heads
    for i in range(spec.n_layer):
        if kv_heads[i]:
            attention(spec, i)
        else:
            state_space(spec, i, norms=True)
        feed_forward(spec, i)
    return spec


def deepseek2_mtp() -> Spec:
    """With one more layer, which predicts a second token (multi-token prediction)."""
    spec = deepseek2()
    last, extra = f"blk.{spec.n_layer - 1}.", f"blk.{spec.n_layer}."
    for name, tensor in list(spec.tensors.items()):
        if name.startswith(last):
            spec.tensors[name.replace(last, extra)] = tensor
    spec.block(spec.n_layer, "nextn.eh_proj.weight", 2 * spec.n_embd, spec.n_embd)
    spec.block(spec.n_layer, "nextn.enorm.weight", spec.n_embd)
    spec.block(spec.n_layer, "nextn.hnorm.weight", spec.n_embd)
    spec.metadata |= {"block_count": spec.n_layer + 1, "nextn_predict_layers": 1}
    return spec


def projector() -> Spec:
    """A vision tower for gemma3: an mmproj file."""
    width, hidden, layers, image, patch = 256, 512, 3, 224, 14
    spec = Spec("clip")
    spec.metadata |= {
        "has_vision_encoder": True,
        "projector_type": "gemma3",
        "use_gelu": True,
        "vision.embedding_length": width,
        "vision.feed_forward_length": hidden,
        "vision.block_count": layers,
        "vision.projection_dim": 256,
        "vision.image_size": image,
        "vision.patch_size": patch,
        "vision.attention.head_count": 4,
        "vision.attention.layer_norm_epsilon": 1e-6,
        "vision.image_mean": [0.5, 0.5, 0.5],
        "vision.image_std": [0.5, 0.5, 0.5],
    }
    spec.add("v.patch_embd.weight", patch, patch, 3, width, type="F16")
    spec.add("v.patch_embd.bias", width)
    spec.add("v.position_embd.weight", width, (image // patch) ** 2, type="F32")
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            spec.add(f"v.blk.{layer}.{name}.weight", width, width, type="F16")
            spec.add(f"v.blk.{layer}.{name}.bias", width)
        for name in ("ln1", "ln2"):
            spec.add(f"v.blk.{layer}.{name}.weight", width)
            spec.add(f"v.blk.{layer}.{name}.bias", width)
        spec.add(f"v.blk.{layer}.ffn_up.weight", width, hidden, type="F16")
        spec.add(f"v.blk.{layer}.ffn_up.bias", hidden)
        spec.add(f"v.blk.{layer}.ffn_down.weight", hidden, width, type="F16")
        spec.add(f"v.blk.{layer}.ffn_down.bias", width)
    spec.add("v.post_ln.weight", width)
    spec.add("v.post_ln.bias", width)
    spec.add("mm.input_projection.weight", 256, width, type="F16")
    spec.add("mm.soft_emb_norm.weight", width)
    return spec


ARCHITECTURES: dict[str, Callable[[], Spec]] = {
    "llama": llama,
    "llama-k-quants": llama_k_quants,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3moe": qwen3moe,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "command-r": command_r,
    "deepseek2": deepseek2,
    "gpt-oss": gpt_oss,
    "mamba": mamba,
    "jamba": jamba,
}


OTHERS: dict[str, Callable[[], Spec]] = {"deepseek2-mtp": deepseek2_mtp, "projector": projector}


def write(spec: Spec, path: Path, *, seed: int = 0) -> Path:
    """Writes the model and returns its path."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, spec.arch)
    writer.add_name("synthetic")
    for key, value in spec.metadata.items():
        add_metadata(writer, f"{spec.arch}.{key}", value)
    if spec.arch != "clip":
        add_vocabulary(writer)
    for name, (shape, kind) in spec.tensors.items():
        _add_tensor(writer, name, shape, gguf.GGMLQuantizationType[kind], random)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, value)


def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int = N_VOCAB) -> None:
    """A SentencePiece vocabulary: control tokens, all bytes, then words, so that any text can be tokenized."""
    control = ["<unk>", "<s>", "</s>"]
    tokens = control + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [2, 3, 3] + [6] * 256
    words = n_vocab - len(tokens)
    tokens += [f"▁word{i}" for i in range(words)]
    types += [1] * words
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
    random: np.random.Generator,
) -> None:
    rows = tuple(reversed(shape))
    if kind == gguf.GGMLQuantizationType.F32:
        values = np.ones(rows) if name.endswith("norm.weight") else random.normal(0, 0.05, rows)
        writer.add_tensor(name, values.astype(np.float32))
        return
    try:
        data = gguf.quants.quantize(random.normal(0, 0.05, rows).astype(np.float32), kind)
    except NotImplementedError:
        data = np.zeros(gguf.quants.quant_shape_to_byte_shape(rows, kind), dtype=np.uint8)
    writer.add_tensor(name, data, raw_dtype=kind)
