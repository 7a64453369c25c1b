"""Which GPUs take part in a placement, and in which order llama.cpp gives them layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pyllamarun.planning.hardware import ASSUMED, Hardware
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.placement import Placement


@dataclass(frozen=True)
class Gpus:
    """GPUs that take part, in the order in which they take layers; `named` is whether that must be said."""

    limits: tuple[Limit, ...]
    named: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(limit.device.name for limit in self.limits)

    def only(self, limits: Iterable[Limit]) -> Gpus:
        return Gpus(tuple(limits), True)

    def with_room(self, placement: Placement) -> Gpus:
        """Those on which a placement fits."""
        return self.only(limit for limit in self.limits if placement.used_bytes(limit) <= limit.limit_bytes)


def in_order(limits: tuple[Limit, ...], hardware: Hardware) -> Gpus:
    """The fastest first, where all speeds are known, then the one that may hold most.  The first computes what the CPU
    hands over of prompts, and is filled first.

    Only those of other machines go before it, which compute nothing for the CPU (ggml-rpc has no offload_op): so that
    activations cross the network, and not the output, which is many times larger.
    """
    speeds = [hardware.gpu(limit.device.name) for limit in limits]
    known = all(gpu.source != ASSUMED for limit, gpu in zip(limits, speeds) if not limit.is_remote)

    def rank(limit: Limit) -> tuple[bool, float, int, int, str]:
        speed = hardware.gpu(limit.device.name).bandwidth_bytes_per_second if known and not limit.is_remote else 0.0
        return not limit.is_remote, -speed, -limit.limit_bytes, -limit.device.total_bytes, limit.device.description

    ordered = tuple(sorted(limits, key=rank))
    return Gpus(ordered, ordered != limits)
