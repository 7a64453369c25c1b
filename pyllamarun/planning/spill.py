"""Where to draw the line between GPU and CPU: ways to divide a model, and what of the layer at the line stays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyllamarun.models.gguf import Tensor
from pyllamarun.planning.probe import Answer
from pyllamarun.planning.request import has_option

ROW_PADDING = 512  # MATRIX_ROW_PADDING in ggml-cuda's common.cuh: the last row of a quantized tensor is padded to it

EXPERTS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"  # LLM_FFN_EXPS_REGEX in llama.cpp's common.h
FEED_FORWARD = r"ffn_(up|down|gate)"  # LLM_FFN_DENSE_REGEX
# Matrices whose products are whole steps between two activations, so that each may be computed elsewhere.
MATRICES = rf"({EXPERTS}|{FEED_FORWARD}|ffn_(up|down|gate)_shexp|attn_(q|k|v|qkv|output))"

# What a user may have said about tensors after `--`: then nothing is said about them besides.
OVERRIDES = ("-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe", "-cmoe", "--cpu-moe", "-ncffn", "--n-cpu-ffn")


@dataclass(frozen=True)
class Piece:
    """A tensor that can stay on the CPU, and what it takes on the GPU."""

    name: str
    size_bytes: int

    @property
    def layer(self) -> str:
        return self.name.rpartition(".weight")[0].rpartition(".")[0]


@dataclass(frozen=True)
class Division:
    """One way to divide a model, by how many of its `steps` are on the GPU.

    layers: whole layers, the last ones first, then the output before them all.  feed_forward and experts: everything
    but the feed-forward matrices, or experts, of the first layers.  attention: whole layers less all experts.
    """

    name: str
    layers: int  # that can be offloaded, with the output
    steps: int

    def arguments(self, on_gpu: int) -> list[str]:
        if self.name == "layers":
            return ["-ngl", str(on_gpu)]
        if self.name == "attention":
            return ["-ngl", str(on_gpu), "-cmoe"]
        option = "-ncmoe" if self.name == "experts" else "-ncffn"
        return ["-ngl", str(self.layers), option, str(self.steps - on_gpu)]

    def gpu_layers(self, on_gpu: int) -> int:
        return on_gpu if self.name in ("layers", "attention") else self.layers

    def holds(self, name: str, on_gpu: int) -> bool:
        """Whether a tensor is on the GPU; the token embeddings never are."""
        block = re.match(r"blk\.(\d+)\.", name)
        if not block:
            return not name.startswith("token_embd") and self.gpu_layers(on_gpu) > 0
        layer = int(block[1])
        if self.name in ("layers", "attention"):
            is_expert = self.name == "attention" and re.search(EXPERTS, name)
            return layer >= self.layers - on_gpu and not is_expert
        kinds = EXPERTS if self.name == "experts" else FEED_FORWARD
        return layer >= self.steps - on_gpu or not re.search(rf"\.{kinds}\.", name)

    def layer_of_step(self, step: int) -> int:
        """The layer that is on the GPU with `step` steps and not with one less; the output is none of them."""
        return self.layers - step if self.name in ("layers", "attention") else self.steps - step


def size_on_gpu(tensor: Tensor) -> int:
    """Bytes on a CUDA device: ggml_backend_cuda_buffer_type_get_alloc_size."""
    remainder = tensor.shape[0] % ROW_PADDING
    padding = tensor.type.size_bytes(ROW_PADDING - remainder) if tensor.type.block_size > 1 and remainder else 0
    return tensor.size_bytes + padding


def divisions(passthrough: Sequence[str], answer: Answer) -> list[Division]:
    """The ways worth trying, the plainest first; `answer` is about the model with all layers on the CPU."""
    everything = answer.offloadable_layers
    plain = Division("layers", everything, everything)
    if has_option(passthrough, *OVERRIDES):
        return [plain]
    if answer.experts:
        experts = Division("experts", everything, answer.layers)
        return [experts, Division("attention", everything, everything), plain]
    return [plain, Division("feed_forward", everything, answer.layers)]


def cover(pieces: Sequence[Piece], needed_bytes: float) -> tuple[Piece, ...] | None:
    """The choice of fewest bytes that comes to `needed_bytes`, of these the one of fewest layers and pieces."""
    choices: list[tuple[int, tuple[Piece, ...]]] = [(0, ())]
    for piece in pieces:
        choices += [(size + piece.size_bytes, (*others, piece)) for size, others in choices]
    least = min((size for size, _ in choices if size >= needed_bytes), default=None)
    same = [choice for size, choice in choices if size == least]
    return min(same, key=lambda one: (len({piece.layer for piece in one}), len(one)), default=None)


def overridden(passthrough: Sequence[str]) -> Callable[[str], bool]:
    """Whether what the user wrote after `--` says of a tensor where it goes."""
    patterns = []
    for option, value in zip(passthrough, [*passthrough[1:], ""]):
        name, equals, attached = option.partition("=")
        value = attached if equals else value
        if name in ("-cmoe", "--cpu-moe"):
            patterns.append(rf"\.{EXPERTS}")
        elif name in ("-ncmoe", "--n-cpu-moe", "-ncffn", "--n-cpu-ffn") and value.isdecimal():
            kinds = EXPERTS if "moe" in name else rf"{FEED_FORWARD}\."
            patterns += [rf"blk\.{layer}\.{kinds}" for layer in range(int(value))]
        elif name in ("-ot", "--override-tensor"):
            patterns += [part.partition("=")[0] for part in value.split(",")]
    return lambda name: any(_finds(pattern, name) for pattern in patterns)


def _finds(pattern: str, name: str) -> bool:
    try:
        return bool(re.search(pattern, name))
    except re.error:  # llama.cpp's are ECMAScript's
        return False
