"""Finds the largest number of whole layers whose memory, as llama.cpp itself counts it, stays within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.plan.probe import Answer, Device
from pyllamarun.plan.request import (
    ASSUMED_CONTEXT_BYTES,
    ASSUMED_POOL_BYTES,
    Request,
    context_bytes,
    fixed_value,
)
from pyllamarun.units import format_size

GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
TENSOR_SPLIT = ("-ts", "--tensor-split")
DEVICES = ("-dev", "--device")
MAX_SPLIT_ATTEMPTS = 4
GIVEN, ASSUMED = "given", "assumed"

Ask = Callable[[Sequence[str]], Answer]


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
    def buffer_bytes(self) -> int:
        return max(0, self.limit_bytes - self.overhead_bytes)


@dataclass(frozen=True)
class Placement:
    """One way to place the layers, and what it takes."""

    gpu_layers: int
    split: tuple[int, ...]
    arguments: tuple[str, ...]
    answer: Answer
    limits: tuple[Limit, ...]

    def scratch_bytes(self, limit: Limit) -> int:
        """What is held besides buffers and context; assumed where the probe has no rules, as for Vulkan."""
        if limit.overhead_source == GIVEN:
            return 0
        computed = self.answer.scratch_bytes(limit.device.name)
        return ASSUMED_POOL_BYTES if computed is None else computed

    def scratch_source(self, limit: Limit) -> str:
        if limit.overhead_source == GIVEN:
            return GIVEN
        return ASSUMED if self.answer.scratch_bytes(limit.device.name) is None else self.answer.scratch_source

    def used_bytes(self, limit: Limit) -> int:
        return self.answer.bytes(device=limit.device.name) + limit.overhead_bytes + self.scratch_bytes(limit)

    @property
    def fits(self) -> bool:
        return all(self.used_bytes(limit) <= limit.limit_bytes for limit in self.limits)

    @property
    def load(self) -> float:
        """How full the fullest GPU is; above 1 it does not fit."""
        return max((self.used_bytes(limit) / max(limit.limit_bytes, 1) for limit in self.limits), default=0.0)


def resolve_limits(request: Request, devices: Sequence[Device]) -> tuple[Limit, ...]:
    """One limit a GPU.

    Raises UsageError when the budgets do not match the GPUs, DoesNotFit when one is larger than its GPU.
    """
    used = _chosen_devices(request, devices)
    budgets = request.budgets
    if budgets and not used:
        raise UsageError(
            "A VRAM budget was given, and there is no GPU.",
            remedy="Plan for a card that is not here with --virtual-gpu 12GiB, or leave --vram out to use the CPU.",
        )
    if len(budgets) not in (0, 1, len(used)):
        raise UsageError(
            f"--vram has {len(budgets)} values, and there are {len(used)} GPUs.",
            remedy="Give one value for all of them, or one each, separated by commas.",
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


def place(model: str, request: Request, limits: tuple[Limit, ...], ask: Ask) -> Placement:
    """The placement with the most layers on the GPUs; `model` is what stands after -m in the arguments.

    Raises DoesNotFit when not even -ngl 0 does, unless the request says force.
    """
    search = _Search(model, request, limits, ask)
    fixed = fixed_value(request.passthrough, *GPU_LAYERS)
    if fixed is not None or not limits:
        placement = search.with_layers(0, fixed=fixed is not None)
        if not placement.fits and not request.force:
            raise _does_not_fit(placement, f"With -ngl {fixed} as you asked, the model")
        return placement
    nothing = search.with_layers(0)
    if not nothing.fits:
        if request.force:
            return nothing
        raise _does_not_fit(nothing, "Even with every layer on the CPU, the model")
    everything = search.with_layers(nothing.answer.offloadable_layers)
    if everything.fits:
        return everything
    return _largest_that_fits(nothing, everything, search.with_layers)


def _largest_that_fits(fits: Placement, too_large: Placement, with_layers: Callable[[int], Placement]) -> Placement:
    """Narrows down between one that fits and one that does not, by interpolation: memory is nearly linear in layers."""
    while too_large.gpu_layers - fits.gpu_layers > 1:
        span = too_large.gpu_layers - fits.gpu_layers
        share = (1.0 - fits.load) / (too_large.load - fits.load)
        layers = fits.gpu_layers + min(max(int(share * span), 1), span - 1)
        middle = with_layers(layers)
        if middle.fits:
            fits = middle
        else:
            too_large = middle
    return fits


def _does_not_fit(placement: Placement, subject: str) -> DoesNotFit:
    limit = max(placement.limits, key=lambda one: placement.used_bytes(one) - one.limit_bytes)
    answer, name = placement.answer, limit.device.name
    parts = ", ".join(
        f"{use} {format_size(answer.bytes(device=name, use=use))}"
        for use in ("weights", "context", "compute", "total")
        if answer.bytes(device=name, use=use)
    )
    overhead = limit.overhead_bytes + placement.scratch_bytes(limit)
    limited = "" if limit.limit_bytes == limit.budget_bytes else f" (of a budget of {format_size(limit.budget_bytes)})"
    needed = placement.used_bytes(limit)
    return DoesNotFit(
        f"{subject} needs {format_size(needed)} on {name}, and may use {format_size(limit.limit_bytes)}{limited}.",
        why=f"{parts}, overhead {format_size(overhead)} ({limit.overhead_source}).",
        remedy=f"Allow --vram {-(-needed // 2**20)}MiB, or take less with a smaller -c, or a smaller -ub after `--`.",
    )


class _Search:
    """Asks for placements of one model, each number of layers once."""

    def __init__(self, model: str, request: Request, limits: tuple[Limit, ...], ask: Ask) -> None:
        self._model = model
        self._request = request
        self._limits = limits
        self._ask = ask
        self._splits = len(limits) > 1 and fixed_value(request.passthrough, *TENSOR_SPLIT) is None
        self._known: dict[int, Placement] = {}

    def with_layers(self, layers: int, *, fixed: bool = False) -> Placement:
        if layers not in self._known:
            if layers > 0 and self._splits:
                self._known[layers] = self._best_split(layers)
            else:
                self._known[layers] = self._placement(layers, (), fixed=fixed)
        return self._known[layers]

    def _placement(self, layers: int, split: tuple[int, ...], *, fixed: bool = False) -> Placement:
        arguments = ["-m", self._model, "-c", str(self._request.context_tokens), "-np", str(self._request.slots)]
        if not fixed:
            arguments += ["-ngl", str(layers)]
        if split:
            arguments += ["-ts", ",".join(map(str, split))]
        arguments += ["-fit", "off", *self._request.passthrough]
        answer = self._ask(arguments)
        if fixed:
            value = fixed_value(self._request.passthrough, *GPU_LAYERS) or "0"
            layers = int(value) if value.isdigit() else answer.offloadable_layers
        return Placement(min(layers, answer.offloadable_layers), split, tuple(arguments), answer, self._limits)

    def _best_split(self, layers: int) -> Placement:
        """Layers a GPU, first by budget, then by what llama.cpp says that each GPU's layers take."""
        rooms = [float(limit.buffer_bytes) for limit in self._limits]
        best = None
        tried = set()
        for _ in range(MAX_SPLIT_ATTEMPTS):
            split = apportion(layers, rooms)
            if split in tried:
                break
            tried.add(split)
            placement = self._placement(layers, split)
            if best is None or placement.load < best.load:
                best = placement
            if placement.fits:
                break
            rooms = [self._room_in_layers(placement, limit, count) for limit, count in zip(self._limits, split)]
        assert best is not None
        return best

    def _room_in_layers(self, placement: Placement, limit: Limit, count: int) -> float:
        """How many layers like its present ones would fill this GPU."""
        answer, name = placement.answer, limit.device.name
        compute = answer.bytes(device=name, use="compute")
        fixed = compute + placement.scratch_bytes(limit)
        layer_bytes = (answer.bytes(device=name) - compute) / count if count else 0.0
        if not layer_bytes:
            layer_bytes = sum(answer.bytes(device=one.device.name) for one in self._limits) / placement.gpu_layers
        return max(0.0, (limit.buffer_bytes - fixed) / layer_bytes)


def apportion(count: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to `shares` that add up to `count` (largest remainders first)."""
    total = sum(shares)
    if total <= 0:
        return (count, *[0] * (len(shares) - 1))
    exact = [count * share / total for share in shares]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return tuple(whole)
