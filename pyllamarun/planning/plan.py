"""A plan: which command runs the model, and what it takes.  What `plan --json` prints is what `serve` executes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyllamarun.errors import DoesNotFit
from pyllamarun.machine.host import Memory
from pyllamarun.models.gguf import Header
from pyllamarun.output import printable
from pyllamarun.planning import neighbours, residency
from pyllamarun.planning.choose import choose
from pyllamarun.planning.hardware import UNKNOWN, Hardware
from pyllamarun.planning.limits import Limit, resolve_limits
from pyllamarun.planning.place import Ask
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import DEFAULT_UBATCH_TOKENS, Request, fixed_value
from pyllamarun.planning.residency import Residency
from pyllamarun.planning.speed import Range, Speed, predict
from pyllamarun.planning.token_cost import use_of

UBATCH = ("-ub", "--ubatch-size")


@dataclass(frozen=True)
class DevicePlan:
    """One GPU, in bytes; all zero where it takes no part.

    total = weights + context + compute + projector + overhead, and total <= budget.

    Of `memory_bytes`, all that the GPU has, `free_bytes` can be had now; what that is more than the budget is headroom.

    The overhead is the CUDA context, "assumed" or "given", and of it `scratch_bytes` are ggml-cuda's scratch pool and
    cuBLAS's workspace: "computed" by rules, "rehearsed", "assumed" where there are none, or "given" with the overhead.
    """

    name: str
    description: str
    layers: int
    memory_bytes: int
    free_bytes: int
    budget_bytes: int
    weights_bytes: int
    context_bytes: int
    compute_bytes: int
    projector_bytes: int
    overhead_bytes: int
    overhead_source: str
    scratch_bytes: int
    scratch_source: str
    total_bytes: int


@dataclass(frozen=True)
class HostPlan:
    """Host memory, in bytes, by kind of buffer.

    mapped: weights in the page cache of the file, which must stay resident; pinned: page-locked for the GPU; repacked:
    weights in the CPU backend's own layout; context and compute: plain memory.
    """

    mapped_bytes: int
    pinned_bytes: int
    repacked_bytes: int
    weights_bytes: int
    context_bytes: int
    compute_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Advice:
    """A change that would help, and what the plan with it gives, made in the same call.

    `kind` is quant, context, kv_cache, vram, ram or card.  To type for it: `source` for the model, `words` in place of
    the options that were given, where "" takes one away, `arguments` after `--`, and `command` before all that, if any.
    """

    kind: str
    change: str
    source: str
    words: tuple[str, ...]
    arguments: tuple[str, ...]
    command: str
    gpu_layers: int
    layers: int
    vram_bytes: int
    ram_bytes: int
    stays_in_memory: bool
    generation: Range | None


@dataclass(frozen=True)
class Requantization:
    """What a plan's model is made of, where `--allow quant` had another type of it planned, and what that gains.

    `source` is what to type for the model as it is, of type `source_type`; `command` makes the file of `file_bytes`, if
    not `is_made`.  The plan without it has `gpu_layers_before`, None where it does not fit, and `generation_before`.
    """

    source: str
    source_type: str
    type: str
    file_bytes: int
    command: str
    is_made: bool
    gpu_layers_before: int | None
    generation_before: Range | None


@dataclass(frozen=True)
class Plan:
    """`division` is how the model is divided (planning/spill.py); `left_on_cpu`, what of offloaded layers stays behind;
    `moved`, what is on another GPU than its layer, by that GPU; `changes`, what was changed of the request, as allowed.
    """

    model: str
    model_name: str
    architecture: str
    weights_bytes: int
    argv: tuple[str, ...]
    gpu_layers: int
    layers: int
    division: str
    left_on_cpu: tuple[str, ...]
    moved: dict[str, tuple[str, ...]]
    context_tokens: int
    slot_context_tokens: int
    trained_context_tokens: int
    slots: int
    worst_prompt_tokens: int
    devices: tuple[DevicePlan, ...]
    host: HostPlan
    residency: Residency
    speed: Speed
    changes: tuple[str, ...]
    warnings: tuple[str, ...]
    advice: tuple[Advice, ...] = ()
    requantization: Requantization | None = None

    def of_model_at(self, path: Path) -> Plan:
        """The same plan of the same model in another place."""
        program, option, _, *others = self.argv
        return replace(self, model=str(path), argv=(program, option, str(path), *others))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    header: Header,
    request: Request,
    devices: Sequence[Device],
    memory: Memory,
    ask: Ask,
    hardware: Hardware = UNKNOWN,
    survey: neighbours.Survey = neighbours.nobody,
) -> Plan:
    """Places the model and describes the result.  `ask` answers for arguments that name the model by its path.

    `survey` is asked who holds memory of a GPU, only where there is too little.

    Raises DoesNotFit where a GPU or the host has not enough memory, unless the request says force.
    """
    limits, ram = resolve_limits(request, devices), residency.ram_limit(request.ram, memory)
    try:
        choice = choose(header, request, limits, ask, hardware)
    except DoesNotFit as error:
        raise neighbours.naming_neighbours(error, limits, survey) from None
    request, placement = choice.request, choice.placement
    answer = placement.answer
    needs, more = residency.host_needs(placement, header, request, memory, ram)
    verdict = residency.judge(needs, ram)
    if not request.force:
        residency.check(verdict, needs, ram)
    # Where nothing is known of the memory of a machine that is not here, it is taken to suffice.
    from_disk = verdict.verdict != residency.RESIDENT and not ram.assumed
    return Plan(
        model=str(header.path),
        model_name=header.name,
        architecture=printable(header.architecture),
        weights_bytes=header.weights_bytes,
        argv=(request.program, *placement.arguments, *more),
        gpu_layers=placement.gpu_layers,
        layers=answer.offloadable_layers,
        division=placement.division.name,
        left_on_cpu=_left_on_cpu(placement, header),
        moved={name: tuple(piece.name for piece, to in placement.moved if to == name) for _, name in placement.moved},
        context_tokens=answer.context_tokens,
        slot_context_tokens=answer.slot_context_tokens,
        trained_context_tokens=answer.trained_context_tokens,
        slots=answer.slots,
        worst_prompt_tokens=answer.worst_prompt_tokens,
        devices=tuple(_device_plan(placement, limit) for limit in limits),
        host=_host_plan(placement),
        residency=verdict,
        speed=_speed(placement, header, request, hardware, from_disk),
        changes=choice.notes,
        warnings=(
            *neighbours.shortages(limits, survey),
            *_warnings(placement),
            *residency.warnings(verdict, ram, header.path.name),
        ),
    )


def _speed(placement: Placement, header: Header, request: Request, hardware: Hardware, from_disk: bool) -> Speed:
    ubatch = fixed_value(request.arguments, *UBATCH) or ""
    return predict(
        header,
        placement.answer,
        placement.device_of,
        hardware,
        use_of(request),
        ubatch_tokens=int(ubatch) if ubatch.isdigit() and int(ubatch) > 0 else DEFAULT_UBATCH_TOKENS,
        from_disk=from_disk,
    )


def _left_on_cpu(placement: Placement, header: Header) -> tuple[str, ...]:
    """Tensors of offloaded layers that stay on the CPU."""
    first = placement.layers_on_cpu
    return tuple(
        tensor.name
        for tensor in header.tensors
        if (block := re.match(r"blk\.(\d+)\.", tensor.name))
        and int(block[1]) >= first
        and not placement.holds(tensor.name)
    )


def _device_plan(placement: Placement, limit: Limit) -> DevicePlan:
    answer, name = placement.answer, limit.device.name
    return DevicePlan(
        name=name,
        description=limit.device.description,
        layers=placement.layers_of(name),
        memory_bytes=limit.device.total_bytes,
        free_bytes=limit.free_bytes,
        budget_bytes=limit.budget_bytes,
        weights_bytes=answer.bytes(device=name, use="weights"),
        context_bytes=answer.bytes(device=name, use="context"),
        compute_bytes=answer.bytes(device=name, use="compute"),
        projector_bytes=answer.bytes(device=name, use="total"),
        overhead_bytes=placement.overhead_bytes(limit),
        overhead_source=limit.overhead_source,
        scratch_bytes=placement.scratch_bytes(limit),
        scratch_source=placement.scratch_source(limit),
        total_bytes=placement.used_bytes(limit),
    )


def _host_plan(placement: Placement) -> HostPlan:
    answer = placement.answer
    return HostPlan(
        mapped_bytes=answer.bytes(device="CPU", kind="mapped"),
        pinned_bytes=answer.bytes(device="CPU", kind="pinned"),
        repacked_bytes=answer.bytes(device="CPU", kind="repacked"),
        weights_bytes=answer.bytes(device="CPU", use="weights", kind="host"),
        context_bytes=answer.bytes(device="CPU", use="context", kind="host"),
        compute_bytes=answer.bytes(device="CPU", use="compute", kind="host"),
        total_bytes=answer.bytes(device="CPU"),
    )


def _warnings(placement: Placement) -> list[str]:
    answer = placement.answer
    warnings = []
    for limit in placement.limits:
        if placement.used_bytes(limit) > limit.limit_bytes:
            warnings.append(f"{limit.device.name}: this does not fit, and was forced.")
    if answer.trained_context_tokens and answer.slot_context_tokens > answer.trained_context_tokens:
        warnings.append(
            f"A slot's context of {answer.slot_context_tokens:,} tokens is longer than the "
            f"{answer.trained_context_tokens:,} that the model was trained with."
        )
    return warnings
