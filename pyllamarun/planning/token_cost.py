"""What one generated token costs, in seconds: each thing that is read or computed for it, on each device."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pyllamarun.machine.rates import PLAIN, REPACKED, HostRates
from pyllamarun.models.gguf import Array, Header, Tensor
from pyllamarun.planning.hardware import UNKNOWN, GpuRates, Hardware
from pyllamarun.planning.probe import Answer, Steps
from pyllamarun.planning.request import Request, fixed_value
from pyllamarun.planning.spill import EXPERTS

CPU = "CPU"
# A conversation has, on the average, filled half of its context.
FILLED = 0.5
# A less plain division of a model has to be better by so much.
CLEARLY = 0.95
ABOUT = 1.005  # not worth another question

# What kernels get of a card's bandwidth, and what each of them costs besides, with CUDA graphs.  Not fitted to the
# tables of partial offload that the tests hold the model against, but to models wholly on a card; see docs/speed.md.
GPU_EFFICIENCY = 0.85
OLD_GPU_EFFICIENCY = 0.65  # before compute capability 7.5
EXPERTS_EFFICIENCY = 0.45  # of the few rows of each expert that a token uses
STEP_SECONDS = 1.3e-6
# To hand an activation from one device to another and wait for it.
CROSSING_SECONDS = 25e-6
# Operations per second of a multiprocessor in products with many columns, by compute capability; see docs/speed.md.
MULTIPROCESSOR_OPERATIONS = {
    6.0: 0.15e12, 6.1: 0.40e12, 7.0: 0.45e12, 7.5: 0.55e12, 8.0: 0.60e12, 8.6: 0.85e12, 8.9: 1.30e12, 9.0: 1.00e12,
    10.0: 1.10e12,
}  # fmt: skip

THREADS = ("-t", "--threads")
CACHE_TYPE = ("-ctk", "--cache-type-k")

DeviceOf = Callable[[str], "str | None"]


@dataclass(frozen=True)
class Term:
    """One summand.  `bytes_per_second` and `bytes` are 0 for what is not a matter of reading.

    `source` says where the rate comes from: measured, NVML, specification, nominal or assumed.
    """

    what: str
    device: str
    bytes: int
    bytes_per_second: float
    source: str
    seconds: float

    @property
    def is_of_weights(self) -> bool:
        return self.what.startswith(("weights", "experts"))


@dataclass(frozen=True)
class TokenCost:
    """What a token costs in each slot that generates one at the same time."""

    terms: tuple[Term, ...]

    @functools.cached_property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    def weights_read_bytes(self, device: str) -> int:
        """Bytes of weights that a token reads on a device."""
        return sum(term.bytes for term in self.terms if term.device == device and term.is_of_weights)

    def is_clearly_below(self, other: TokenCost) -> bool:
        return self.seconds < CLEARLY * other.seconds

    def is_about(self, other: TokenCost) -> bool:
        return self.seconds <= ABOUT * other.seconds

    @property
    def has_much_attention_on_cpu(self) -> bool:
        """Whether a placement without it, all that dividing by feed-forward matrices saves, could be clearly below."""
        attention = sum(term.seconds for term in self.terms if term.device == CPU and term.what == "attention")
        return self.seconds - attention < CLEARLY * self.seconds


@dataclass(frozen=True)
class Use:
    """How a token uses a model: how full the context is, how many slots generate at once, with how many threads.

    `cache_type` is the KV cache's; `threads` None: as many as llama.cpp uses by default.
    """

    filled: float = FILLED
    slots: int = 1
    threads: int | None = None
    cache_type: str = "F16"


USUAL = Use()


def use_of(request: Request, slots: int = 1) -> Use:
    """As a request has it, with so many slots generating at once."""
    threads = fixed_value(request.arguments, *THREADS) or ""
    return Use(
        slots=slots,
        threads=int(threads) if threads.isdigit() and int(threads) > 0 else None,
        cache_type=(fixed_value(request.arguments, *CACHE_TYPE) or "f16").upper(),
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that a token is multiplied with, on a device; `layout` is how it lies in RAM."""

    tensor: Tensor
    device: str
    is_expert: bool
    layout: str


def token_cost(
    header: Header, answer: Answer, device_of: DeviceOf, hardware: Hardware = UNKNOWN, use: Use = USUAL
) -> TokenCost:
    """`device_of` names the GPU that a tensor is on, or None for the CPU."""
    terms = [
        *_weights(header, answer, device_of, hardware, use),
        *cache_terms(header, answer, hardware, use),
        *_steps(answer, hardware),
    ]
    return TokenCost(tuple(term for term in terms if term.seconds > 0))


def matrices(header: Header, answer: Answer, device_of: DeviceOf, host: HostRates) -> Iterator[Matrix]:
    """What a token is multiplied with; of embeddings it reads one row, and where no output matrix is, all."""
    repacks = answer.bytes(kind="repacked") > 0
    layers = header.layers - _number(header, "nextn_predict_layers")
    has_output = False
    for tensor in header.tensors:
        role, layer = _role(tensor.name)
        if role == "rows" or len(tensor.shape) < 2 or layer >= layers:
            continue
        has_output = has_output or role == "output"
        yield _matrix(tensor, device_of(tensor.name), role == "expert", repacks, host)
    if not has_output:
        for tensor in header.tensors:
            if tensor.name == "token_embd.weight":
                yield _matrix(tensor, device_of("output.weight"), False, repacks, host)


def _matrix(tensor: Tensor, device: str | None, is_expert: bool, repacks: bool, host: HostRates) -> Matrix:
    is_repacked = device is None and repacks and tensor.shape[1] % 8 == 0 and host.is_repacked(tensor.type.name)
    return Matrix(tensor, device or CPU, is_expert, REPACKED if is_repacked else PLAIN)


@functools.lru_cache(maxsize=1 << 16)
def _role(name: str) -> tuple[str, int]:
    """What a tensor is to a token, by its name, and its layer."""
    block = re.match(r"blk\.(\d+)\.", name)
    layer = int(block[1]) if block else -1
    if not block and re.match(r"(enc\.|token_embd|per_layer_token_embd|position_embd|token_types|rope_)", name):
        return "rows", layer
    if name.startswith("output.weight"):
        return "output", layer
    return ("expert" if re.search(EXPERTS, name) else "matrix"), layer


def used_share(header: Header, slots: int) -> float:
    """The share of experts that so many tokens use at once, each choosing for itself."""
    used, count = _number(header, "expert_used_count"), _number(header, "expert_count")
    return 1.0 - (1.0 - min(1.0, used / count)) ** slots if used and count else 1.0


@dataclass(slots=True)
class _Sum:
    """What matrices of one kind come to for one token, or, of operations, for all slots."""

    size_bytes: float = 0.0
    rows: float = 0.0
    matrices: int = 0
    operations: float = 0.0


def _weights(header: Header, answer: Answer, device_of: DeviceOf, hardware: Hardware, use: Use) -> Iterator[Term]:
    used, once = used_share(header, use.slots), used_share(header, 1)
    sums: dict[tuple[str, str, str, bool], _Sum] = {}
    for matrix in matrices(header, answer, device_of, hardware.host):
        tensor = matrix.tensor
        share, mine = (used, once) if matrix.is_expert else (1.0, 1.0)
        found = sums.setdefault((matrix.device, tensor.type.name, matrix.layout, matrix.is_expert), _Sum())
        rows = math.prod(tensor.shape[1:])
        found.size_bytes += share * tensor.size_bytes
        found.rows += share * rows
        found.matrices += 1
        found.operations += 2.0 * mine * rows * tensor.shape[0] * use.slots
    host = hardware.host
    for (device, kind, layout, is_expert), one in sums.items():
        if device == CPU:
            seconds = host.read_seconds(kind, layout, one.size_bytes, one.rows, one.matrices, use.threads)
            compute, source = host.product_rate(kind, layout, use.threads), host.source
        else:
            gpu = hardware.gpu(device)
            seconds = one.size_bytes / gpu_read_rate(gpu, is_expert)
            compute, source = gpu_product_rate(gpu), gpu.source
        if use.slots > 1:
            seconds = max(seconds, one.operations / compute)
        what = f"{'experts' if is_expert else 'weights'} {kind}{' repacked' if layout == REPACKED else ''}"
        yield Term(what, device, round(one.size_bytes), one.size_bytes / seconds, source, seconds)


def gpu_read_rate(gpu: GpuRates, is_expert: bool = False) -> float:
    if is_expert:
        return EXPERTS_EFFICIENCY * gpu.bandwidth_bytes_per_second
    return (GPU_EFFICIENCY if gpu.capability >= 7.5 else OLD_GPU_EFFICIENCY) * gpu.bandwidth_bytes_per_second


def gpu_product_rate(gpu: GpuRates) -> float:
    """Operations per second in products with many columns."""
    known = [capability for capability in MULTIPROCESSOR_OPERATIONS if capability <= gpu.capability]
    return MULTIPROCESSOR_OPERATIONS[max(known, default=6.0)] * gpu.multiprocessors


def cache_terms(header: Header, answer: Answer, hardware: Hardware, use: Use) -> Iterator[Term]:
    """Keys and values as far as they are filled; on the CPU, looking at them for each query head takes longer."""
    sizes: dict[str, int] = {}
    for buffer in answer.buffers:
        if buffer.use == "context" and buffer.part == "model":
            device = buffer.device if buffer.kind == "device" else CPU
            sizes[device] = sizes.get(device, 0) + buffer.bytes
    total = sum(sizes.values())
    slot_share = min(1.0, use.slots * answer.slot_context_tokens / max(1, answer.context_tokens))
    for device, size in sizes.items():
        read = size * use.filled * slot_share
        if device != CPU:
            rate = gpu_read_rate(hardware.gpu(device))
            yield Term("KV cache", device, round(read), rate, hardware.gpu(device).source, read / rate)
            continue
        host = hardware.host
        tokens = use.slots * use.filled * answer.slot_context_tokens
        elements = _attended_elements(header) * tokens * size / total
        seconds = max(
            read / host.bandwidth_bytes_per_second, elements / host.attention_rate(use.cache_type, use.threads)
        )
        yield Term("attention", CPU, round(read), read / seconds if seconds else 0.0, host.source, seconds)


@functools.lru_cache(maxsize=64)
def _attended(layers: int, heads: tuple[int, ...], length: int) -> int:
    return sum(heads[i] if i < len(heads) else heads[-1] for i in range(layers)) * length if heads else 0


def _attended_elements(header: Header) -> int:
    """Elements of keys and values that one token's query heads look at, for each token in the cache."""
    value = header.get("attention.head_count", 0)
    heads = tuple(value.first(header.layers)) if isinstance(value, Array) else (value,)
    heads = tuple(max(0, int(one)) for one in heads if isinstance(one, int))
    default = _number(header, "embedding_length") // max(1, max(heads, default=1))
    key = _number(header, "attention.key_length") or default
    return _attended(header.layers, heads, key + (_number(header, "attention.value_length") or default))


def _steps(answer: Answer, hardware: Hardware) -> Iterator[Term]:
    """What steps cost besides reading weights: kernels to be launched, threads to wait for one another."""
    for graph in answer.graphs:
        if graph.part != "model":
            continue
        for steps in graph.devices:
            yield _step_term(steps, hardware)
        crossings = graph.splits - 1
        yield Term(f"{crossings} crossings", CPU, 0, 0.0, "assumed", crossings * CROSSING_SECONDS)


def _step_term(steps: Steps, hardware: Hardware) -> Term:
    if steps.device != CPU:
        count = steps.products + steps.others
        return Term(f"{count} steps", steps.device, 0, 0.0, "assumed", count * STEP_SECONDS)
    together = hardware.host.all  # what products cost on the CPU is counted with their weights
    seconds = steps.others * together.node_seconds + together.graph_seconds
    return Term(f"{steps.others} steps", CPU, 0, 0.0, hardware.host.source, seconds)


def _number(header: Header, key: str) -> int:
    value = header.get(key, 0)
    if isinstance(value, Array):
        value = max((one for one in value.first(header.layers) if isinstance(one, int)), default=0)
    return value if isinstance(value, int) and value > 0 else 0
