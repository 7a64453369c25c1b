"""What headers of Llama-like models have in common, for scripts that write one of published dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyllamarun.models.gguf import Value
from pyllamarun.models.types import TENSOR_TYPES

TYPES = {tensor_type.name: tensor_type for tensor_type in TENSOR_TYPES.values()}
UINT32, FLOAT32, STRING = 4, 6, 8


@dataclass(frozen=True)
class Llama:
    """`context`: tokens that it was trained with."""

    name: str
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    rope_base: float

    def metadata(self, file_type: int) -> dict[str, Value]:
        """Without a vocabulary."""
        integers = {
            "llama.block_count": self.layers,
            "llama.context_length": self.context,
            "llama.embedding_length": self.embedding,
            "llama.feed_forward_length": self.feed_forward,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.rope.dimension_count": self.head_size,
            "llama.vocab_size": self.vocabulary,
            "general.file_type": file_type,
            "general.quantization_version": 2,
        }
        return {
            "general.architecture": Value(STRING, "llama"),
            "general.name": Value(STRING, f"{self.name} (header)"),
            **{key: Value(UINT32, number) for key, number in integers.items()},
            "llama.attention.layer_norm_rms_epsilon": Value(FLOAT32, 1e-5),
            "llama.rope.freq_base": Value(FLOAT32, self.rope_base),
            "tokenizer.ggml.model": Value(STRING, "none"),
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tensors by their names, in the order of a file."""
        of_a_layer = {
            "attn_norm": (self.embedding,),
            "ffn_norm": (self.embedding,),
            "attn_q": (self.embedding, self.heads * self.head_size),
            "attn_k": (self.embedding, self.kv_heads * self.head_size),
            "attn_v": (self.embedding, self.kv_heads * self.head_size),
            "attn_output": (self.heads * self.head_size, self.embedding),
            "ffn_gate": (self.embedding, self.feed_forward),
            "ffn_up": (self.embedding, self.feed_forward),
            "ffn_down": (self.feed_forward, self.embedding),
        }
        yield "token_embd.weight", (self.embedding, self.vocabulary)
        yield "output_norm.weight", (self.embedding,)
        yield "output.weight", (self.embedding, self.vocabulary)
        for layer in range(self.layers):
            for name, shape in of_a_layer.items():
                yield f"blk.{layer}.{name}.weight", shape
