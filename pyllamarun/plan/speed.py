"""How much one token costs, for choosing between placements that all fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pyllamarun.models.gguf import Header
from pyllamarun.plan.probe import Answer
from pyllamarun.plan.spill import EXPERTS

# As long as nothing is measured: a consumer card reads 300 to 1,000 GB/s, two channels of DDR4 or DDR5 35 to 70.
GPU_TO_RAM = 8.0
# Attention on the CPU takes longer than reading keys and values would: with 8 query heads to one of keys, 134 million
# operations a layer at 4,096 tokens, for 16 MiB.
ATTENTION_ON_CPU = 2.5
# Until something is measured: reading RAM; and from so many sequences at once, computing takes longer than reading.
RAM_BYTES_PER_SECOND = 40e9
GPU_SEQUENCES, CPU_SEQUENCES = 64, 8
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
    slots: int = 1

    @property
    def seconds(self) -> float:
        """Rough, for comparisons."""
        return self.as_ram_bytes / RAM_BYTES_PER_SECOND

    @property
    def as_ram_bytes(self) -> float:
        """All of it, as bytes that RAM would deliver in the same time."""
        gpu_reads, cpu_reads = max(1.0, self.slots / GPU_SEQUENCES), max(1.0, self.slots / CPU_SEQUENCES)
        gpu = (self.gpu_weights_bytes * gpu_reads + FILLED * self.gpu_context_bytes) / GPU_TO_RAM
        cpu = self.cpu_weights_bytes * cpu_reads + FILLED * ATTENTION_ON_CPU * self.cpu_context_bytes
        return gpu + cpu + self.crossings * CROSSING_BYTES

    def is_clearly_below(self, other: TokenCost) -> bool:
        return self.as_ram_bytes < CLEARLY * other.as_ram_bytes

    @property
    def has_much_attention_on_cpu(self) -> bool:
        """Whether a placement without it, all that dividing by feed-forward matrices saves, could be clearly below."""
        attention = FILLED * ATTENTION_ON_CPU * self.cpu_context_bytes
        return self.as_ram_bytes - attention < CLEARLY * self.as_ram_bytes


def token_cost(header: Header, answer: Answer, on_gpu: Callable[[str], bool], slots: int = 1) -> TokenCost:
    """Of a token in so many slots at once: weights by the tensor table, of experts only the share that is used; the KV
    cache as the probe says.

    A layer that is on both sides costs two crossings.
    """
    used = header.get("expert_used_count", 0)
    share = used / answer.experts if answer.experts and isinstance(used, int) else 1.0
    share = 1.0 - (1.0 - share) ** slots
    read = {True: 0.0, False: 0.0}
    sides: dict[str, set[bool]] = {}
    for tensor in header.tensors:
        if tensor.name.startswith("token_embd"):
            continue  # one row of it
        side = on_gpu(tensor.name)
        read[side] += tensor.size_bytes * (share if re.search(EXPERTS, tensor.name) else 1.0)
        sides.setdefault(".".join(tensor.name.split(".")[:2]), set()).add(side)
    on_device = answer.bytes(use="context", kind="device")
    return TokenCost(
        gpu_weights_bytes=round(read[True]),
        cpu_weights_bytes=round(read[False]),
        gpu_context_bytes=on_device,
        cpu_context_bytes=answer.bytes(use="context") - on_device,
        crossings=2 * sum(len(both) > 1 for both in sides.values()),
        slots=slots,
    )
