"""What a model is made of: its tensors by type and by role, its metadata, and what its KV cache takes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pyllamarun.models.gguf import Array, Header, Tensor, Value

F16_BYTES = 2
SHOWN_ELEMENTS, SHOWN_CHARACTERS = 8, 200
ROLES = ("embeddings", "attention", "ffn", "experts", "output", "other")
TYPE_NAMES = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "string", 10: "u64", 11: "i64",
    12: "f64",
}  # fmt: skip

# Of these llama.cpp knows what their metadata do not say: src/models/.
LINEAR_ATTENTION_INTERVAL = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
LAYERS_WITH_KV = {"gemma3n": 20}


@dataclass(frozen=True)
class Group:
    """Tensors that have something in common."""

    name: str
    tensors: int
    parameters: int
    size_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Field:
    """A metadata value, shortened: of an array the first elements, of a text the beginning.

    `length` is the number of elements or characters that there are; None for a single value.
    """

    key: str
    type: str
    value: Any
    length: int | None


@dataclass(frozen=True)
class Summary:
    """What a header says, counted.  A number that it does not say is 0, a text "".

    `kv_bytes_per_token` is what one more token takes in the KV cache in f16, as long as every layer keeps it: layers
    with a sliding window keep `sliding_window_tokens` only.  `kv_layers` is how many layers have such a cache.
    """

    name: str
    architecture: str
    file_type: str
    parts: tuple[str, ...]
    file_bytes: int
    weights_bytes: int
    parameters: int
    bits_per_weight: float
    layers: int
    embedding_length: int
    vocabulary_size: int
    trained_context_tokens: int
    rope: dict[str, Any]
    sliding_window_tokens: int
    experts: int
    experts_used: int
    experts_shared: int
    kv_layers: int
    kv_bytes_per_token: int
    types: tuple[Group, ...]
    roles: tuple[Group, ...]
    metadata: tuple[Field, ...]


def summarize(header: Header) -> Summary:
    kv_bytes = kv_bytes_by_layer(header)
    whole = _group("", header.tensors)
    return Summary(
        name=header.name,
        architecture=escaped(header.architecture),
        file_type=header.file_type,
        parts=tuple(map(str, header.parts)),
        file_bytes=header.file_bytes,
        weights_bytes=whole.size_bytes,
        parameters=whole.parameters,
        bits_per_weight=whole.bits_per_weight,
        layers=header.layers,
        embedding_length=_count(header, "embedding_length"),
        vocabulary_size=header.vocabulary_size,
        trained_context_tokens=header.trained_context_tokens,
        rope=_rope(header),
        sliding_window_tokens=_count(header, "attention.sliding_window"),
        experts=_count(header, "expert_count"),
        experts_used=_count(header, "expert_used_count"),
        experts_shared=_count(header, "expert_shared_count"),
        kv_layers=sum(size > 0 for size in kv_bytes),
        kv_bytes_per_token=sum(kv_bytes),
        types=_groups(header.tensors, lambda tensor: tensor.type.name),
        roles=tuple(sorted(_groups(header.tensors, role), key=lambda group: ROLES.index(group.name))),
        metadata=tuple(_field(key, value) for key, value in header.metadata.items()),
    )


def role(tensor: Tensor) -> str:
    """Which part of the model a tensor belongs to: one of ROLES.  Names as in llama.cpp's src/llama-arch.cpp.

    Shared experts, which every token uses, and the routers belong to the feed-forward part.
    """
    name = re.sub(r"^((enc|dec)\.)?blk\.\d+\.", "", tensor.name)
    if name.startswith(("token_embd", "per_layer_token_embd", "position_embd", "token_types")):
        return "embeddings"
    if name == tensor.name:
        return "output" if name.startswith(("output", "dec.output", "cls")) else "other"
    if re.search(r"_exps\.|_chexps\.", name):
        return "experts"
    if name.startswith(("attn", "cross_attn", "post_attention")):
        return "attention"
    if name.startswith(("ffn", "post_ffw", "exp_probs")):
        return "ffn"
    return "other"


def _groups(tensors: Iterable[Tensor], name_of: Callable[[Tensor], str]) -> tuple[Group, ...]:
    """The largest first."""
    by_name: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_name.setdefault(name_of(tensor), []).append(tensor)
    groups = [_group(name, members) for name, members in by_name.items()]
    return tuple(sorted(groups, key=lambda group: -group.size_bytes))


def _group(name: str, tensors: Iterable[Tensor]) -> Group:
    count = parameters = size_bytes = 0
    for tensor in tensors:
        count += 1
        parameters += math.prod(tensor.shape)
        size_bytes += tensor.size_bytes
    return Group(name, count, parameters, size_bytes, round(8 * size_bytes / parameters, 3) if parameters else 0.0)


def kv_bytes_by_layer(header: Header) -> tuple[int, ...]:
    """Bytes that one token takes in each layer's KV cache, in f16; 0 in a layer without one.

    As llama_kv_cache and llama_hparams count: heads x (key length + value length), which may differ by layer.  With
    multi-head latent attention only keys are kept.  A recurrent layer's state, which does not grow, is not counted.
    """
    layers = max(0, header.layers - _count(header, "nextn_predict_layers"))
    heads = _by_layer(header, "attention.head_count", layers, 0)
    heads_kv = _by_layer(header, "attention.head_count_kv", layers, None)
    default = _count(header, "embedding_length") // heads[0] if heads and heads[0] else 0
    lengths = [_lengths(header, default, suffix) for suffix in ("", "_swa")]
    slides = _by_layer(header, "attention.sliding_window_pattern", layers, 0)
    return tuple(
        F16_BYTES * (heads[i] if heads_kv[i] is None else heads_kv[i]) * lengths[bool(slides[i])]
        if _has_kv(header, i)
        else 0
        for i in range(layers)
    )


def _lengths(header: Header, default: int, suffix: str) -> int:
    """Elements that a head keeps of a token."""
    key, value = (
        _count(header, f"attention.{part}_length{suffix}", _count(header, f"attention.{part}_length", default))
        for part in ("key", "value")
    )
    latent = _count(header, "attention.key_length_mla") and _count(header, "attention.value_length_mla")
    return key if latent else key + value


def _has_kv(header: Header, layer: int) -> bool:
    shared = _count(header, "attention.shared_kv_layers")
    if layer >= LAYERS_WITH_KV.get(header.architecture, header.layers - shared):
        return False
    interval = LINEAR_ATTENTION_INTERVAL.get(header.architecture, 1)
    interval = _count(header, "full_attention_interval", interval)
    return interval <= 1 or (layer + 1) % interval == 0


def _by_layer(header: Header, key: str, layers: int, default: Any) -> list[Any]:
    """A number that is the same for all layers, or an array with one for each."""
    value = header.get(key, default)
    values = value.first(layers) if isinstance(value, Array) else [value] * layers
    values = [_positive(one) if one is not None else None for one in values]
    return values + [0] * (layers - len(values))


def _count(header: Header, key: str, default: int = 0) -> int:
    value = header.get(key, default)
    if isinstance(value, Array):
        return max(map(_positive, value.first(1 << 16)), default=0)
    return _positive(value)


def _positive(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _rope(header: Header) -> dict[str, Any]:
    """What the metadata say of the rotary position embedding, by their own names."""
    prefix = f"{header.architecture}.rope."
    found = ((key.removeprefix(prefix), value) for key, value in header.metadata.items() if key.startswith(prefix))
    return {escaped(key): _field(key, value).value for key, value in found}


def _field(key: str, value: Value) -> Field:
    data = value.data
    if isinstance(data, Array):
        kind = TYPE_NAMES[data.element_type]
        return Field(escaped(key), f"{kind}[]", [_shown(one) for one in data.first(SHOWN_ELEMENTS)], data.count)
    return Field(escaped(key), TYPE_NAMES[value.type], _shown(data), len(data) if isinstance(data, str) else None)


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        text = escaped(value[:SHOWN_CHARACTERS])
        return text if len(value) <= SHOWN_CHARACTERS else text + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value


def escaped(text: str) -> str:
    r"""Text from a file, with control characters as \n, \x1b and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
