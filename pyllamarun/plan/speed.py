"""How much one token costs, for choosing between placements that all fit."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from pyllamarun.models.gguf import Header
from pyllamarun.plan.probe import Answer
from pyllamarun.plan.spill import EXPERTS, Division

# As long as nothing is measured: a consumer card reads 300 to 1,000 GB/s, two channels of DDR4 or DDR5 35 to 70.
GPU_TO_RAM = 8.0
# Attention on the CPU takes longer than reading keys and values would: with 8 query heads to one of keys, 134 million
# operations a layer at 4,096 tokens, for 16 MiB.
ATTENTION_ON_CPU = 2.5
# A conversation has, on the average, filled half of its context.
FILLED = 0.5
# What handing an activation to the other side and back costs, as bytes that RAM would deliver meanwhile (20 us).
CROSSING_BYTES = 1_000_000
# These being rough, a less plain division has to be better by so much.
CLEARLY = 0.95


@dataclass(frozen=True)
class TokenCost:
    """What one token reads on each side, in bytes, and how often the computation crosses from one to the other."""

    gpu_weights_bytes: int
    cpu_weights_bytes: int
    gpu_context_bytes: int
    cpu_context_bytes: int
    crossings: int

    @property
    def as_ram_bytes(self) -> float:
        """All of it, as bytes that RAM would deliver in the same time."""
        gpu = (self.gpu_weights_bytes + FILLED * self.gpu_context_bytes) / GPU_TO_RAM
        cpu = self.cpu_weights_bytes + FILLED * ATTENTION_ON_CPU * self.cpu_context_bytes
        return gpu + cpu + self.crossings * CROSSING_BYTES

    def is_clearly_below(self, other: TokenCost) -> bool:
        return self.as_ram_bytes < CLEARLY * other.as_ram_bytes

    @property
    def has_much_attention_on_cpu(self) -> bool:
        """Whether a placement without it, all that dividing by feed-forward matrices saves, could be clearly below."""
        attention = FILLED * ATTENTION_ON_CPU * self.cpu_context_bytes
        return self.as_ram_bytes - attention < CLEARLY * self.as_ram_bytes


def token_cost(
    header: Header, answer: Answer, division: Division, on_gpu: int, left_behind: Collection[str]
) -> TokenCost:
    """Weights by the tensor table, of experts only the share that is used; the KV cache as the probe says."""
    used = header.get("expert_used_count", 0)
    share = used / answer.experts if answer.experts and isinstance(used, int) else 1.0
    gpu = cpu = 0.0
    crossing = set()
    for tensor in header.tensors:
        if tensor.name.startswith("token_embd"):
            continue  # one row of it
        read = tensor.size_bytes * (share if re.search(EXPERTS, tensor.name) else 1.0)
        if division.holds(tensor.name, on_gpu) and tensor.name not in left_behind:
            gpu += read
        else:
            cpu += read
            crossing.add(tensor.name.rpartition(".ffn")[0] or tensor.name)
    whole = division.layers - on_gpu if division.name in ("layers", "attention") else 0
    crossings = 1 + sum(not _is_in_first_layers(name, whole) for name in crossing)
    return TokenCost(
        gpu_weights_bytes=round(gpu),
        cpu_weights_bytes=round(cpu),
        gpu_context_bytes=answer.bytes(use="context", kind="device"),
        cpu_context_bytes=answer.bytes(use="context") - answer.bytes(use="context", kind="device"),
        crossings=crossings,
    )


def _is_in_first_layers(name: str, layers: int) -> bool:
    block = re.match(r"blk\.(\d+)", name)
    return block is not None and int(block[1]) < layers
