"""What holds of every plan: on random models of real architectures, asked of the real probe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
from harness import Machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import Spec, attention, common, experts, feed_forward

from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.plan.place import Placement, place, resolve_limits
from pyllamarun.plan.probe import Device
from pyllamarun.plan.request import Budget, Request
from pyllamarun.units import GIB, MIB

MOST = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
CARD_BYTES = 64 * GIB


@st.composite
def specs(draw: Callable[..., object]) -> Spec:
    """Dense models and models of experts, with and without sliding windows, from 0.1 to some 30 billion parameters."""

    def pick(*choices: int) -> int:
        return int(draw(st.sampled_from(choices)))  # type: ignore[call-overload]

    architecture = str(draw(st.sampled_from(["llama", "qwen3", "gemma3", "qwen3moe"])))
    head_dim, heads_kv = pick(64, 128), pick(1, 2, 8)
    heads = heads_kv * pick(1, 2, 4)
    width = 256 * pick(2, 4, 8, 16)
    spec = Spec(architecture, pick(3, 8, 24, 40), width, width * pick(2, 3, 4), heads, heads_kv, head_dim)
    common(spec, tied=architecture == "gemma3", n_vocab=shapes.N_VOCAB)
    if architecture == "gemma3":
        spec.metadata |= {"attention.sliding_window": 512}
    if architecture == "qwen3moe":
        spec.metadata |= {"expert_count": 16, "expert_used_count": 2, "expert_feed_forward_length": 512}
    for layer in range(spec.n_layer):
        attention(spec, layer, norms=architecture != "llama")
        if architecture == "qwen3moe":
            spec.block(layer, "ffn_norm.weight", width)
            experts(spec, layer, 16, 512)
        else:
            feed_forward(spec, layer)
        if architecture == "gemma3":
            spec.block(layer, "post_attention_norm.weight", width)
            spec.block(layer, "post_ffw_norm.weight", width)
    return shapes.quantized(spec)
