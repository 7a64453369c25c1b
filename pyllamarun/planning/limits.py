"""What a process may hold on each GPU: budgets as they were asked for, against what the GPUs have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import ASSUMED_CONTEXT_BYTES, Request, context_bytes, fixed_value
from pyllamarun.units import format_size

DEVICES = ("-dev", "--device")
GIVEN, ASSUMED = "given", "assumed"


@dataclass(frozen=True)
class Limit:
    """What the process may hold on one GPU.

    `limit_bytes` is the budget, or less where less is free now.  `overhead_bytes` is held besides llama.cpp's buffers
    and counts against it: the CUDA context, to which a placement adds its scratch pool; or, when it was given, both.
    """

    device: Device
    budget_bytes: int
    limit_bytes: int
    overhead_bytes: int
    overhead_source: str

    @property
    def free_bytes(self) -> int:
        """What the process can have now.  "free" was read by one that holds a context of its own, as it will."""
        return min(self.device.total_bytes, self.device.free_bytes + min(ASSUMED_CONTEXT_BYTES, self.overhead_bytes))

    @property
    def is_remote(self) -> bool:
        """Whether the GPU is another machine's, reached by RPC."""
        return self.device.backend == "RPC"


def resolve_limits(request: Request, devices: Sequence[Device]) -> tuple[Limit, ...]:
    """One limit a GPU.

    Raises UsageError when the budgets do not match the GPUs, DoesNotFit when one is larger than its GPU.
    """
    used = _chosen_devices(request, devices)
    budgets = request.budgets
    if budgets and not used:
        raise UsageError(
            "A VRAM budget was given, and there is no GPU.",
            remedy="Plan for a card that is not here with --virtual-gpu 12GiB, or leave --vram out to use the CPU; "
            "`pyllamarun doctor` says whether CUDA_VISIBLE_DEVICES hides one.",
        )
    if len(budgets) not in (0, 1, len(used)):
        raise UsageError(
            f"--vram has {len(budgets)} values, and there are {len(used)} GPUs.",
            remedy="Give one value for all of them, or one each, separated by commas.",
        )
    for device in used:
        if not device.total_bytes:
            raise DoesNotFit(
                f"{device.name} tells nothing of its memory.",
                why="The driver does not answer for it, as for a card that was lost.",
                remedy="See `pyllamarun doctor`; leave it out with CUDA_VISIBLE_DEVICES, or `-- --device` and others.",
            )
    limits = []
    for position, device in enumerate(used):
        # "free" was read by a process that holds a context of its own, as the server will.
        free_bytes = min(device.total_bytes, device.free_bytes + context_bytes(request.overhead_bytes))
        budget_bytes = free_bytes
        if budgets:
            budget = budgets[position] if len(budgets) > 1 else budgets[0]
            budget_bytes = budget.resolve(device.total_bytes, free_bytes)
        if budget_bytes > device.total_bytes:
            raise DoesNotFit(
                f"The budget for {device.name} is {format_size(budget_bytes)}, and the card has "
                f"{format_size(device.total_bytes)}.",
                remedy="Give a smaller --vram, or `max` for all that is free.",
            )
        overhead, source = request.overhead_bytes, GIVEN
        if overhead is None:
            overhead, source = ASSUMED_CONTEXT_BYTES, ASSUMED
        limits.append(Limit(device, budget_bytes, min(budget_bytes, free_bytes), overhead, source))
    return tuple(limits)


def _chosen_devices(request: Request, devices: Sequence[Device]) -> list[Device]:
    chosen = fixed_value(request.passthrough, *DEVICES)
    if chosen is None:
        return list(devices)
    names = [] if chosen == "none" else chosen.split(",")
    by_name = {device.name: device for device in devices}
    for name in names:
        if name not in by_name:
            raise UsageError(
                f"There is no device {name}.",
                why="Devices: " + (", ".join(by_name) or "none"),
                remedy="Name one of these after --device.",
            )
    return [by_name[name] for name in names]
