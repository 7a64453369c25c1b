"""What-ifs: variants of a request, each with a plan of its own, in rows that can be compared.

Pure: whoever calls says how a variant is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pyllamarun.errors import DoesNotFit, PyllamarunError
from pyllamarun.models.quality import Quality, quality
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.probe import Refused
from pyllamarun.planning.residency import RESIDENT
from pyllamarun.planning.speed import Range
from pyllamarun.planning.variants import Variant

USABLE = 2.0  # tokens a second: verdict() in planning/speed.py
# Of two that are as good as equal, the cheaper.
AS_FAST = 0.95


@dataclass(frozen=True)
class Row:
    """A variant and its plan; of one that does not fit, `plan` is None, and `reason` says why.

    Sums are over all GPUs.  `generation` is tokens a second of one request that is alone, `throughput` those of all
    slots together when all of them generate; None where nothing is predicted, as where `from_disk` a part of the model
    is read from disk for every token.
    """

    label: str
    is_current: bool
    type: str
    file_bytes: int
    weights_bytes: int
    bits_per_weight: float
    quality: Quality | None
    context_tokens: int
    slots: int
    gpu_layers: int
    layers: int
    budget_bytes: int
    vram_bytes: int
    ram_bytes: int
    generation: Range | None
    throughput: Range | None
    from_disk: bool
    source: str
    words: tuple[str, ...]
    command: str
    reason: str
    plan: Plan | None

    @property
    def fits(self) -> bool:
        return self.plan is not None

    @property
    def stays_in_memory(self) -> bool:
        return self.plan is not None and self.plan.residency.verdict == RESIDENT

    @property
    def is_usable(self) -> bool:
        return self.stays_in_memory and self.pace >= USABLE

    @property
    def pace(self) -> float:
        """Tokens a second, between low and high; 0 where it does not fit or nothing is predicted."""
        return self.generation.middle if self.generation else 0.0

    @property
    def pace_in_company(self) -> float:
        """What a slot gets when all of them generate."""
        return self.throughput.middle / self.slots if self.throughput else 0.0


@dataclass(frozen=True)
class Comparison:
    """Rows along an axis; `recommended` is the label of one of them, "" if none is, and `reason` says why that one.

    `left_out` are the names of what was not planned, and why.
    """

    axis: str
    model: str
    model_name: str
    rows: tuple[Row, ...]
    recommended: str
    reason: str
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recommended_row(self) -> Row | None:
        return next((row for row in self.rows if self.recommended and row.label == self.recommended), None)

    def to_dict(self) -> dict[str, Any]:
        rows = [asdict(row) | {"fits": row.fits} for row in self.rows]
        left_out = [{"name": name, "reason": reason} for name, reason in self.left_out]
        return asdict(self) | {"rows": rows, "left_out": left_out}


def rows_of(variants: Iterable[Variant], plan: Callable[[Variant], Plan]) -> tuple[Row, ...]:
    """Plans one after the other.  What does not fit, or llama.cpp refuses, is a row that says so."""
    rows = []
    for variant in variants:
        try:
            rows.append(_row(variant, plan(variant)))
        except (DoesNotFit, Refused) as error:
            rows.append(unplanned(variant, error))
    return tuple(rows)


def _row(variant: Variant, plan: Plan) -> Row:
    return replace(
        _without_plan(variant),
        context_tokens=plan.context_tokens,
        slots=plan.slots,
        gpu_layers=plan.gpu_layers,
        layers=plan.layers,
        budget_bytes=sum(device.budget_bytes for device in plan.devices),
        vram_bytes=sum(device.total_bytes for device in plan.devices),
        ram_bytes=plan.host.total_bytes,
        generation=plan.speed.generation,
        throughput=plan.speed.throughput,
        from_disk=plan.speed.from_disk,
        plan=plan,
    )


def unplanned(variant: Variant, error: PyllamarunError) -> Row:
    return replace(_without_plan(variant), reason=error.what)


def _without_plan(variant: Variant) -> Row:
    header, request = variant.header, variant.request
    return Row(
        label=variant.label,
        is_current=variant.is_current,
        type=variant.type,
        file_bytes=header.file_bytes,
        weights_bytes=header.weights_bytes,
        bits_per_weight=round(8 * header.weights_bytes / header.parameters, 3) if header.parameters else 0.0,
        quality=quality(variant.type, header.parameters),
        context_tokens=request.context_tokens,
        slots=request.slots,
        gpu_layers=0,
        layers=0,
        budget_bytes=0,
        vram_bytes=0,
        ram_bytes=0,
        generation=None,
        throughput=None,
        from_disk=False,
        source=variant.source,
        words=variant.words,
        command=variant.command,
        reason="",
        plan=None,
    )


def recommend(axis: str, rows: Sequence[Row]) -> tuple[str, str]:
    """The label of the best row, and why it is that; ("", why) where there is none.

    Of quantizations that which keeps most and is usable, of contexts the longest that is usable; where none is usable,
    the same of those about as fast as the fastest.  Of budgets the smallest that is about as fast as any.  Of slots the
    most that are usable when all generate; where none is, those that generate most together.
    """
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return "", "None of these fits."
    if all(row.from_disk for row in fitting):
        return "", "Each reads a part of the model from disk for every token."
    if axis == "slots":
        return _best_slots(fitting)
    fastest = max(fitting, key=lambda row: row.pace)
    as_fast = [row for row in fitting if row.pace >= AS_FAST * fastest.pace]
    if axis == "vram":
        return min(as_fast, key=lambda row: row.budget_bytes).label, "the smallest budget within 5% of the fastest"
    usable = [row for row in fitting if row.pace >= USABLE]
    best = _longest(usable or as_fast) if axis == "ctx" else _best_quality(usable or as_fast)
    if not usable:
        return best.label, f"none reaches {USABLE:g} tok/s; it is within 5% of the fastest"
    return best.label, "the longest that is usable" if axis == "ctx" else "it keeps most of those that are usable"


def _best_slots(rows: Sequence[Row]) -> tuple[str, str]:
    usable = [row for row in rows if row.pace_in_company >= USABLE]
    if usable:
        best = max(usable, key=lambda row: row.slots)
        return best.label, f"the most that get {USABLE:g} tok/s each when all generate"
    best = max(rows, key=lambda row: row.pace_in_company * row.slots)
    return best.label, f"none gets {USABLE:g} tok/s each; together they generate most, for batch work"


def _longest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.context_tokens)


def _best_quality(rows: Sequence[Row]) -> Row:
    """The one of most bits a weight, but for those of which a smaller one was measured to be better."""
    return max((row for row in rows if not any(_surpasses(other, row) for other in rows)), key=_bits)


def _surpasses(one: Row, other: Row) -> bool:
    """Whether one is better than a larger other, both as measured in the same way."""
    if one.quality is None or other.quality is None or one.quality.imatrix != other.quality.imatrix:
        return False
    return one.bits_per_weight <= other.bits_per_weight and one.quality.perplexity < other.quality.perplexity


def _bits(row: Row) -> tuple[float, float]:
    return row.bits_per_weight, row.pace
