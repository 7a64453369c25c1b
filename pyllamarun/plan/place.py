"""Finds what goes to the GPU: as much as its memory, as llama.cpp itself counts it, holds within the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.models.gguf import Header
from pyllamarun.plan.probe import Answer, Device
from pyllamarun.plan.request import (
    ASSUMED_CONTEXT_BYTES,
    ASSUMED_POOL_BYTES,
    Request,
    context_bytes,
    fixed_value,
    has_option,
)
from pyllamarun.plan.spill import OVERRIDES, Division, Piece, covers, divisions, stays_on_cpu
from pyllamarun.plan.token_cost import TokenCost, token_cost
from pyllamarun.units import format_size

GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
TENSOR_SPLIT = ("-ts", "--tensor-split")
DEVICES = ("-dev", "--device")
MAX_SPLIT_ATTEMPTS = 4
MAX_FILL_ATTEMPTS = 6
AS_ASKED = Division("layers", 0, 0)
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
    """One way to place the model, and what it takes; `left_behind` are tensors that would not fit with the others."""

    division: Division
    on_gpu: int
    left_behind: tuple[Piece, ...]
    split: tuple[int, ...]
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

    def cost(self, header: Header) -> TokenCost:
        return token_cost(header, self.answer, self.device_of)

    def device_of(self, name: str) -> str | None:
        """The GPU that a tensor is on; of several the first."""
        return self.limits[0].device.name if self.limits and self.holds(name) else None

    def holds(self, name: str) -> bool:
        """Whether a tensor is on a GPU."""
        return self.division.holds(name, self.on_gpu) and all(piece.name != name for piece in self.left_behind)

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


def place(header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask) -> Placement:
    """The placement that costs least a token, of those within the limits.

    Raises DoesNotFit when not even -ngl 0 does, unless the request says force.
    """
    search = _Search(header, request, limits, ask)
    fixed = fixed_value(request.passthrough, *GPU_LAYERS)
    if fixed is not None or not limits:
        placement = search.as_asked()
        if not placement.fits and not request.force:
            raise _does_not_fit(placement, f"With -ngl {fixed} as you asked, the model")
        return placement
    nothing = search.nothing()
    if not nothing.fits:
        if request.force:
            return nothing
        raise _does_not_fit(nothing, "Even with every layer on the CPU, the model")
    everything = search.everything(nothing)
    if everything.fits:
        return everything
    chosen: Placement | None = None
    for division in divisions(request.passthrough, nothing.answer, len(limits)):
        if chosen and not (division.name == "feed_forward" and chosen.cost(header).has_much_attention_on_cpu):
            break  # experts' divisions come in the order of their merit
        found = search.best(division, nothing, everything)
        if found and (chosen is None or found.cost(header).is_clearly_below(chosen.cost(header))):
            chosen = found
    return chosen or nothing


def _largest_that_fits(
    fits: Placement, too_large: Placement, at: Callable[[int], Placement]
) -> tuple[Placement, Placement]:
    """Narrows down between one that fits and one that does not, by interpolation: memory is nearly linear in steps.

    Returns the last that fits and the first that does not.
    """
    while too_large.on_gpu - fits.on_gpu > 1:
        span = too_large.on_gpu - fits.on_gpu
        share = (1.0 - fits.load) / (too_large.load - fits.load)
        middle = at(fits.on_gpu + min(max(int(share * span), 1), span - 1))
        if middle.fits:
            fits = middle
        else:
            too_large = middle
    return fits, too_large


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
    """Asks for placements of one model, each once."""

    def __init__(self, header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask) -> None:
        self._header = header
        self._request = request
        self._limits = limits
        self._ask = ask
        self._splits = len(limits) > 1 and not has_option(request.passthrough, *TENSOR_SPLIT)
        self._known: dict[tuple[str, ...], Placement] = {}

    def as_asked(self) -> Placement:
        """With the user's own -ngl, or without any GPU."""
        value = fixed_value(self._request.passthrough, *GPU_LAYERS)
        if value is None:
            return self.nothing()
        placement = self._placement(AS_ASKED, 0, (), [])
        layers = placement.answer.offloadable_layers
        on_gpu = min(int(value), layers) if value.isdigit() else layers
        return replace(placement, division=Division("layers", layers, layers), on_gpu=on_gpu)

    def nothing(self) -> Placement:
        """With every layer on the CPU."""
        return self._placement(AS_ASKED, 0, (), ["-ngl", "0"])

    def everything(self, nothing: Placement) -> Placement:
        layers = nothing.answer.offloadable_layers
        return self._at(Division("layers", layers, layers), layers)

    def best(self, division: Division, nothing: Placement, everything: Placement) -> Placement | None:
        """The fullest placement of a division that fits, down to single tensors; None if none does."""
        least = nothing if division.name == "layers" else self._at(division, 0)
        if not least.fits:
            return None
        least = replace(least, division=division, on_gpu=0)
        most = replace(everything, division=division, on_gpu=division.steps)
        if division.name == "attention":
            most = self._at(division, division.steps)
            if most.fits:
                return most
        fits, too_large = _largest_that_fits(least, most, lambda on_gpu: self._at(division, on_gpu))
        return self._filled(fits, too_large) if len(self._limits) == 1 else fits

    def _filled(self, fits: Placement, too_large: Placement) -> Placement:
        """With as much of the next layer as there is room for: what has to stay on the CPU, and no more."""
        if has_option(self._request.passthrough, *OVERRIDES):
            return fits
        (limit,) = self._limits
        division, step = too_large.division, too_large.on_gpu
        excess = too_large.used_bytes(limit) - limit.limit_bytes
        # Some choices split the graph so that it needs more room to compute, which only llama.cpp can say.
        for left in covers(division.pieces(step, self._header.tensors), excess)[:MAX_FILL_ATTEMPTS]:
            candidate = self._at(division, step, left)
            if candidate.fits:
                return candidate
        return fits

    def _at(self, division: Division, on_gpu: int, left_behind: tuple[Piece, ...] = ()) -> Placement:
        if self._splits and on_gpu > 0:
            return self._best_split(division, on_gpu)
        where = [*division.arguments(on_gpu), *stays_on_cpu(left_behind)]
        return self._placement(division, on_gpu, (), where, left_behind)

    def _placement(
        self,
        division: Division,
        on_gpu: int,
        split: tuple[int, ...],
        where: Sequence[str],
        left_behind: tuple[Piece, ...] = (),
    ) -> Placement:
        request = self._request
        arguments = ["-m", str(self._header.path), "-c", str(request.context_tokens), "-np", str(request.slots), *where]
        if split:
            arguments += ["-ts", ",".join(map(str, split))]
        arguments += ["-fit", "off", *request.passthrough]
        key = tuple(arguments)
        if key not in self._known:
            answer = self._ask(arguments)
            self._known[key] = Placement(division, on_gpu, left_behind, split, key, answer, self._limits)
        return self._known[key]

    def _best_split(self, division: Division, layers: int) -> Placement:
        """Layers a GPU, first by budget, then by what llama.cpp says that each GPU's layers take."""
        rooms = [float(limit.buffer_bytes) for limit in self._limits]
        best = None
        tried = set()
        for _ in range(MAX_SPLIT_ATTEMPTS):
            split = apportion(layers, rooms)
            if split in tried:
                break
            tried.add(split)
            placement = self._placement(division, layers, split, division.arguments(layers))
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
