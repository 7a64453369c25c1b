"""What would help a plan that is slow, does not stay in memory, or does not fit: single changes, each planned.

Pure: which changes are worth a plan, and which of the plans are better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from pyllamarun.machine.cards import Card
from pyllamarun.models.gguf import Header
from pyllamarun.planning.compare import USABLE, Row
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.plan import Advice, Plan
from pyllamarun.planning.request import Request, has_option
from pyllamarun.planning.residency import RESIDENT
from pyllamarun.planning.variants import SHORTEST_CONTEXT_TOKENS, Variant
from pyllamarun.units import GIB, format_size

CACHE_TYPES = ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v")
SMALLER_CACHE = ("-ctk", "q8_0", "-ctv", "q8_0")
LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")  # that people requantize to, the largest first
CONSUMER = r"NVIDIA GeForce RTX \d+( Ti)?( SUPER)?"  # on sale everywhere, for desktops
RAM_SIZES_GIB = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WORTHWHILE = 1.05


def is_wanting(plan: Plan) -> bool:
    """Whether it is slower than usable, as far as that is predicted, or more than memory has."""
    return plan.residency.verdict != RESIDENT or pace(plan) < USABLE


def pace(plan: Plan) -> float:
    """Tokens a second, between low and high; 0 where nothing is predicted."""
    return plan.speed.generation.middle if plan.speed.generation else 0.0


def changes(
    header: Header, source: str, request: Request, asked: Sequence[Limit], most: Sequence[Limit]
) -> list[Variant]:
    """Those of the request alone: a shorter context, a smaller KV cache, all the VRAM that is free."""
    found = []
    shorter = max(SHORTEST_CONTEXT_TOKENS * request.slots, request.context_tokens // 4)
    if shorter < request.context_tokens:
        label = f"{shorter:,} tokens of context instead of {request.context_tokens:,}"
        less = replace(request, context_tokens=shorter)
        found.append(Variant(label, header, less, "context", source, words=("-c", str(shorter))))
    if not has_option(request.passthrough, *CACHE_TYPES):
        label = "a KV cache in q8_0 instead of f16"
        smaller = replace(request, passthrough=(*request.passthrough, *SMALLER_CACHE))
        found.append(Variant(label, header, smaller, "kv_cache", source))
    have, could = (sum(limit.budget_bytes for limit in limits) for limits in (asked, most))
    if have < could:
        label = f"all of the VRAM that is free, {format_size(could)}, instead of {format_size(have)}"
        all_of_it = replace(request, budgets=())
        found.append(Variant(label, header, all_of_it, "vram", source, words=("--vram", "")))
    return found


def larger_card(plan: Plan | None, header: Header, asked: Sequence[Limit], cards: Iterable[Card]) -> Card | None:
    """The smallest consumer card that would hold all of it, or else the largest; None where none is larger."""
    if len(asked) > 1:
        return None
    needed = (
        plan.host.total_bytes + sum(one.total_bytes for one in plan.devices) if plan else header.weights_bytes + GIB
    )
    wanted = [card for card in cards if re.fullmatch(CONSUMER, card.name)]
    wanted.sort(key=lambda card: (round(card.memory_bytes / GIB), card.bandwidth_bytes_per_second))
    present = max((limit.device.total_bytes for limit in asked), default=0)
    larger = [card for card in wanted if _usable_bytes(card) > present]
    return next((card for card in larger if _usable_bytes(card) >= needed), larger[-1] if larger else None)


def more_ram(plan: Plan) -> int | None:
    """A usual size of RAM that holds what the plan puts there, and a tenth more; None where what there is does."""
    if plan.residency.verdict == RESIDENT:
        return None
    return next((size * GIB for size in RAM_SIZES_GIB if size * GIB >= 1.1 * plan.host.total_bytes), None)


def _usable_bytes(card: Card) -> int:
    return card.memory_bytes - card.reserved_bytes


def down_to_usable(types: Sequence[str], planned: Callable[[str], Row]) -> list[Row]:
    """Of types, the largest first, the row of the first that is usable, or of the last, and those before it that were
    asked about on the way: few are, as smaller ones are faster."""
    rows: dict[int, Row] = {}
    first, last = 0, len(types) - 1
    while first <= last:
        middle = (first + last) // 2
        row = rows[middle] = planned(types[middle])
        if row.is_usable:
            last = middle - 1
        else:
            first = middle + 1
    return [rows[place] for place in sorted(rows) if place <= first]


def advice_from(rows: Iterable[Row], plan: Plan | None) -> tuple[Advice, ...]:
    """The rows that are better than the plan, the best first; the type of a row is the kind of its change."""
    better = [row for row in rows if row.fits and is_better(row, plan)]
    better.sort(key=lambda row: (row.stays_in_memory, row.pace, row.gpu_layers / max(row.layers, 1)), reverse=True)
    return tuple(_advice(row) for row in better)


def is_better(row: Row, plan: Plan | None) -> bool:
    """Clearly, than a plan; or where there is none, at all."""
    if plan is None:
        return True
    if row.stays_in_memory != (plan.residency.verdict == RESIDENT):
        return row.stays_in_memory
    return row.pace > 0 and row.pace >= WORTHWHILE * pace(plan)


def _advice(row: Row) -> Advice:
    return Advice(
        kind=row.type,
        change=row.label,
        source=row.source,
        words=row.words,
        arguments=SMALLER_CACHE if row.type == "kv_cache" else (),
        command=row.command,
        gpu_layers=row.gpu_layers,
        layers=row.layers,
        vram_bytes=row.vram_bytes,
        ram_bytes=row.ram_bytes,
        stays_in_memory=row.stays_in_memory,
        generation=row.generation,
    )
