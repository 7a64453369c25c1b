"""What a token costs at least, however a model is placed: whether a search can find what it is for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pyllamarun.models.gguf import Header
from pyllamarun.planning.hardware import Hardware
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.probe import Answer
from pyllamarun.planning.token_cost import CPU, Use, cache_terms, gpu_read_rate, matrices, used_share


def least_seconds(header: Header, answer: Answer, limits: Sequence[Limit], hardware: Hardware, use: Use) -> float:
    """Less than any placement within the limits costs a token; `answer` is to any one of them.

    What saves most per byte goes to the fastest GPU, the last of it in part, as if all GPUs were one and held nothing
    but weights and KV cache.  Steps and crossings cost nothing, and of several slots the weights are only read.
    """
    room = sum(max(0, limit.limit_bytes - limit.overhead_bytes) for limit in limits)
    names = [limit.device.name for limit in limits]
    seconds, savings = 0.0, []
    for size, on_cpu, on_gpu in _costs(header, answer, names, hardware, use):
        seconds += on_cpu
        if on_gpu < on_cpu:
            savings.append(((on_cpu - on_gpu) / size, size))
    for saving, size in sorted(savings, reverse=True):
        taken = min(size, room)
        seconds -= saving * taken
        room -= taken
    return seconds


def _costs(
    header: Header, answer: Answer, names: Sequence[str], hardware: Hardware, use: Use
) -> Iterator[tuple[int, float, float]]:
    """Of each matrix, and of the KV cache: its bytes, and the seconds that it takes on the CPU and on a GPU."""
    share = used_share(header, use.slots)
    rates = {
        is_expert: max((gpu_read_rate(hardware.gpu(name), is_expert) for name in names), default=0.0)
        for is_expert in (False, True)
    }
    for matrix in matrices(header, answer, lambda _: None, hardware.host):
        tensor, part = matrix.tensor, share if matrix.is_expert else 1.0
        rows, rate = math.prod(tensor.shape[1:]), rates[matrix.is_expert]
        on_cpu = hardware.host.read_seconds(
            tensor.type.name, matrix.layout, part * tensor.size_bytes, part * rows, 1, use.threads
        )
        yield tensor.size_bytes, on_cpu, part * tensor.size_bytes / rate if rate else math.inf
    context = [buffer for buffer in answer.buffers if buffer.use == "context" and buffer.part == "model"]
    size = sum(buffer.bytes for buffer in context)
    if size:
        gathered = replace(answer, buffers=(replace(context[0], device=CPU, kind="host", bytes=size),))
        (term,) = cache_terms(header, gathered, hardware, use)
        yield size, term.seconds, term.bytes / rates[False] if rates[False] else math.inf
