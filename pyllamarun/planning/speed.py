"""How fast a placed model will be: tokens per second, from low to high, what that rests on, and what to call it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pyllamarun.machine.rates import MEASURED, NOMINAL
from pyllamarun.models.gguf import Header
from pyllamarun.planning.hardware import NVML, SPECIFICATION, UNKNOWN, GpuRates, Hardware
from pyllamarun.planning.probe import Answer
from pyllamarun.planning.token_cost import (
    CPU,
    USUAL,
    DeviceOf,
    Term,
    Use,
    gpu_product_rate,
    gpu_read_rate,
    matrices,
    token_cost,
    used_share,
)

# By how much a rate may be wrong either way, by where it comes from.
SPREAD = {MEASURED: 0.15, NVML: 0.20, SPECIFICATION: 0.20, NOMINAL: 0.20, "assumed": 0.50}
TELLING = 0.01  # a smaller share of the time is nothing that a prediction rests on
PROMPT_SPREAD = 0.15  # more, for a prompt

# ggml-cuda has weights copied from RAM for batches of at least so many tokens (GGML_OP_OFFLOAD_MIN_BATCH).
OFFLOADED_BATCH = 32
# What copies get of a PCI Express link: from pinned memory, and from pages of a file.
PINNED_EFFICIENCY, MAPPED_EFFICIENCY = 0.80, 0.40

UNUSABLE, SLOW, USABLE, INTERACTIVE = "unusable", "slow: batch work", "usable", "interactive"


@dataclass(frozen=True)
class Range:
    """Tokens per second."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high)


@dataclass(frozen=True)
class Speed:
    """Tokens per second in one slot: generated with the context filled as far as was asked, with it empty, and full;
    and of a prompt that is read.  `throughput` is what all slots generate together when all of them do.

    `from_disk`: the model is larger than the RAM that is available, so that a part of it is read from disk for every
    token, which takes minutes; then no figure is given.  `basis` is where rates come from, `terms` what a generated
    token is made of.
    """

    generation: Range | None
    generation_empty: Range | None
    generation_full: Range | None
    prompt: Range | None
    throughput: Range | None
    from_disk: bool
    basis: tuple[str, ...]
    terms: tuple[Term, ...]
    verdict: str


def predict(
    header: Header,
    answer: Answer,
    device_of: DeviceOf,
    hardware: Hardware = UNKNOWN,
    use: Use = USUAL,
    *,
    ubatch_tokens: int = 512,
    from_disk: bool = False,
) -> Speed:
    """`device_of` names the GPU that a tensor is on, or None for the CPU.

    `from_disk`: what is on the CPU does not stay in memory, and is read again for each token.
    """
    cost = token_cost(header, answer, device_of, hardware, use)
    telling = [term for term in cost.terms if term.seconds > TELLING * cost.seconds]
    basis = tuple(dict.fromkeys(term.source for term in sorted(telling, key=lambda term: -term.seconds)))
    if from_disk:
        return Speed(None, None, None, None, None, True, basis, cost.terms, UNUSABLE)

    def generated(use: Use) -> Range:
        return _range(token_cost(header, answer, device_of, hardware, use).terms, use.slots)

    generation = _range(cost.terms, 1)
    return Speed(
        generation=generation,
        generation_empty=generated(replace(use, filled=0.0)),
        generation_full=generated(replace(use, filled=1.0)),
        prompt=_prompt(header, answer, device_of, hardware, use, ubatch_tokens),
        throughput=generated(replace(use, slots=max(1, answer.slots))),
        from_disk=False,
        basis=basis,
        terms=cost.terms,
        verdict=verdict(generation.middle),
    )


def verdict(tokens_per_second: float) -> str:
    """What generation at this speed is good for."""
    if tokens_per_second < 0.5:
        return UNUSABLE
    if tokens_per_second < 2:
        return SLOW
    return USABLE if tokens_per_second <= 10 else INTERACTIVE


def _range(terms: Iterable[Term], tokens: int, more: float = 0.0) -> Range:
    """Each term as slow, and as fast, as its rate may be."""
    slow = fast = 0.0
    for term in terms:
        spread = min(0.9, SPREAD[term.source] + more)
        slow += term.seconds / (1.0 - spread)
        fast += term.seconds / (1.0 + spread)
    return Range(tokens / slow, tokens / fast) if fast else Range(0.0, 0.0)


def _prompt(
    header: Header, answer: Answer, device_of: DeviceOf, hardware: Hardware, use: Use, ubatch_tokens: int
) -> Range:
    """A prompt of one ubatch, at the beginning of a context."""
    main = next(iter(hardware.gpus), None)
    offloads = main is not None and ubatch_tokens >= OFFLOADED_BATCH
    efficiency = PINNED_EFFICIENCY if answer.bytes(kind="pinned") > answer.bytes(kind="mapped") else MAPPED_EFFICIENCY
    once, all_used = used_share(header, 1), used_share(header, ubatch_tokens)
    terms: dict[tuple[str, str, str], Term] = {}
    seconds: dict[tuple[str, str, str], float] = {}
    for matrix in matrices(header, answer, device_of, hardware.host):
        tensor = matrix.tensor
        if tensor.name in ("output.weight", "token_embd.weight"):
            continue  # for the last token only
        operations = 2.0 * math.prod(tensor.shape) * ubatch_tokens * (once if matrix.is_expert else 1.0)
        size = tensor.size_bytes * (all_used if matrix.is_expert else 1.0)
        if matrix.device != CPU:
            found = [_computed(matrix.device, hardware.gpu(matrix.device), operations, size)]
        elif offloads and main:
            link = efficiency * hardware.gpus[main].pcie_bytes_per_second
            found = [
                Term("copies", main, round(size), link, hardware.gpus[main].source, size / link),
                _computed(main, hardware.gpus[main], operations, size),
            ]
        else:
            rate = hardware.host.product_rate(tensor.type.name, matrix.layout, use.threads)
            found = [Term("products", CPU, 0, 0.0, hardware.host.source, operations / rate)]
        for term in found:
            key = (term.what, term.device, term.source)
            terms.setdefault(key, term)
            seconds[key] = seconds.get(key, 0.0) + term.seconds
    steps = [term for term in token_cost(header, answer, device_of, hardware, use).terms if term.what.endswith("steps")]
    summed = [replace(term, seconds=seconds[key]) for key, term in terms.items()]
    return _range([*summed, *steps], ubatch_tokens, PROMPT_SPREAD)


def _computed(device: str, gpu: GpuRates, operations: float, size_bytes: float) -> Term:
    seconds = max(operations / gpu_product_rate(gpu), size_bytes / gpu_read_rate(gpu))
    return Term("products", device, 0, 0.0, gpu.source, seconds)
