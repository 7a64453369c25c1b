"""A way to place a model, what it takes by llama.cpp's own count, and what a token costs with it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from pyllamarun.models.gguf import Header
from pyllamarun.planning.hardware import UNKNOWN, Hardware
from pyllamarun.planning.limits import ASSUMED, GIVEN, Limit
from pyllamarun.planning.probe import Answer
from pyllamarun.planning.request import ASSUMED_POOL_BYTES
from pyllamarun.planning.spill import Division, Piece
from pyllamarun.planning.token_cost import USUAL, TokenCost, Use, token_cost


@dataclass(frozen=True)
class Placement:
    """One way to place the model, and what it takes.

    `devices` are the GPUs that take part, in llama.cpp's order, and `split` says how many layers each has; of these,
    `left_behind` are matrices that stay on the CPU, and `moved` those on another GPU than their layer.
    """

    division: Division
    on_gpu: int
    devices: tuple[str, ...]
    split: tuple[int, ...]
    left_behind: tuple[Piece, ...]
    moved: tuple[tuple[Piece, str], ...]
    arguments: tuple[str, ...]
    answer: Answer
    limits: tuple[Limit, ...]

    @property
    def gpu_layers(self) -> int:
        return self.division.gpu_layers(self.on_gpu)

    @property
    def layers_on_cpu(self) -> int:
        """How many of the first layers are on the CPU as a whole."""
        return max(0, self.answer.offloadable_layers - self.gpu_layers)

    def cost(self, header: Header, hardware: Hardware = UNKNOWN, use: Use = USUAL) -> TokenCost:
        return token_cost(header, self.answer, self.device_of, hardware, use)

    @property
    def is_complete(self) -> bool:
        """Whether all of the model is on GPUs."""
        return not self.layers_on_cpu and not self.left_behind and self.division.steps == self.on_gpu

    def holds(self, name: str) -> bool:
        """Whether a tensor is on a GPU."""
        return self.device_of(name) is not None

    def device_of(self, name: str) -> str | None:
        """The GPU that a tensor is on; None for the CPU."""
        if name not in self._devices_of:
            self._devices_of[name] = self._found_device(name)
        return self._devices_of[name]

    @functools.cached_property
    def _devices_of(self) -> dict[str, str | None]:
        """What was found before: what a token costs is asked several times, of all tensors."""
        return {}

    def _found_device(self, name: str) -> str | None:
        if not self.division.holds(name, self.on_gpu) or any(piece.name == name for piece in self.left_behind):
            return None
        for piece, device in self.moved:
            if piece.name == name:
                return device
        block = re.match(r"blk\.(\d+)\.", name)
        position = (int(block[1]) if block else self.answer.offloadable_layers - 1) - self.layers_on_cpu
        for device, count in zip(self.devices, self.split):
            if position < count:
                return device
            position -= count
        return self.devices[-1] if self.devices else None

    def layers_of(self, device: str) -> int:
        """How many layers a GPU has; the output is one of them."""
        if len(self.devices) == 1 or not self.split:
            return self.gpu_layers if self.devices == (device,) else 0
        return dict(zip(self.devices, self.split)).get(device, 0)

    def takes_part(self, limit: Limit) -> bool:
        """Whether the process holds anything on a GPU; one that takes no part has no context either."""
        return limit.device.name in self.devices or self.answer.bytes(device=limit.device.name) > 0

    def overhead_bytes(self, limit: Limit) -> int:
        """What is held besides buffers: context and scratch memory."""
        return limit.overhead_bytes + self.scratch_bytes(limit) if self.takes_part(limit) else 0

    def scratch_bytes(self, limit: Limit) -> int:
        """What is held besides buffers and context; assumed where the probe has no rules, as for Vulkan."""
        if limit.overhead_source == GIVEN or not self.takes_part(limit):
            return 0
        computed = self.answer.scratch_bytes(limit.device.name)
        return ASSUMED_POOL_BYTES if computed is None else computed

    def scratch_source(self, limit: Limit) -> str:
        if limit.overhead_source == GIVEN:
            return GIVEN
        if not self.takes_part(limit):
            return self.answer.scratch_source
        return ASSUMED if self.answer.scratch_bytes(limit.device.name) is None else self.answer.scratch_source

    def used_bytes(self, limit: Limit) -> int:
        return self.answer.bytes(device=limit.device.name) + self.overhead_bytes(limit)

    @property
    def fits(self) -> bool:
        return all(self.used_bytes(limit) <= limit.limit_bytes for limit in self.limits)
