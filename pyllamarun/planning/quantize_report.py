"""What a quantization will make of a model, and what it made, in words and columns and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pyllamarun.models.gguf import Header
from pyllamarun.models.quantize import Quantized, type_of
from pyllamarun.models.requantize import Requantized
from pyllamarun.models.summary import ROLES, role
from pyllamarun.output import printable, table
from pyllamarun.planning.compare import Comparison
from pyllamarun.planning.compare_report import describe_rows
from pyllamarun.units import format_size


def describe_what_if(
    source: Header, made: Sequence[Requantized], comparison: Comparison | None, stage: str = ""
) -> str:
    """The files with their plans, the types of their tensors by role, and what falls back."""
    lines = [stage] if stage else []
    if comparison is not None:
        lines += describe_rows(comparison)
        lines += [f"{comparison.recommended} is {comparison.reason}."] if comparison.recommended else []
    else:
        sizes = [(type_of(source), source), *((one.type, one.header) for one in made)]
        rows = [[name, format_size(one.file_bytes), f"{_bits(one):.2f}"] for name, one in sizes]
        lines.append(table(rows, header=["type", "file", "bits"], right=(1, 2)))
    headers = [(type_of(source), source), *((one.type, one.header) for one in made)]
    lines += ["", _role_table(headers)]
    for one in made:
        lines += _fallback_lines(one)
    return "\n".join(lines)


def _bits(header: Header) -> float:
    return 8 * header.weights_bytes / header.parameters if header.parameters else 0.0


def types_by_role(header: Header) -> dict[str, Counter[str]]:
    """How many matrices of each role have which type; vectors, which are not quantized, are left out."""
    found: dict[str, Counter[str]] = {}
    for tensor in header.tensors:
        if len(tensor.shape) > 1:
            found.setdefault(role(tensor), Counter())[tensor.type.name] += 1
    return found


def _role_table(headers: Sequence[tuple[str, Header]]) -> str:
    by_type = [(name, types_by_role(header)) for name, header in headers]
    roles = [name for name in ROLES if any(name in found for _, found in by_type)]
    rows = [[name, *(_counts(found.get(one, Counter())) for one in roles)] for name, found in by_type]
    return table(rows, header=["type", *roles])


def _counts(types: Counter[str]) -> str:
    if sum(types.values()) == 1:
        return next(iter(types))
    return ", ".join(f"{count} {name}" for name, count in types.most_common())


def _fallback_lines(made: Requantized) -> list[str]:
    if not made.fallbacks:
        return []
    each = ", ".join(f"{one.tensors} are {one.given} in place of {one.wanted}" for one in made.fallbacks)
    return [
        f"{made.type}: {made.fallback_tensors} of {len(made.header.tensors)} tensors have rows that do not fill its "
        f"blocks, and fall back: {each}."
    ]


def what_if_rows(source: Header, made: Sequence[Requantized], comparison: Comparison | None) -> list[dict[str, Any]]:
    """The same for a program: the source first."""
    rows = {row.label: row for row in comparison.rows} if comparison else {}
    sources = [(type_of(source), source, ()), *((one.type, one.header, one.fallbacks) for one in made)]
    found = []
    for name, header, fallbacks in sources:
        row = rows.get(name)
        roles = [
            {"role": one, "type": kind, "tensors": count}
            for one, counts in types_by_role(header).items()
            for kind, count in counts.most_common()
        ]
        facts: dict[str, Any] = {
            "type": name,
            "file_bytes": header.file_bytes,
            "weights_bytes": header.weights_bytes,
            "bits_per_weight": round(_bits(header), 3),
            "roles": roles,
            "fallbacks": [asdict(one) for one in fallbacks],
            "plan": None,
        }
        if row is not None:
            facts["plan"] = {
                "fits": row.fits, "reason": row.reason, "gpu_layers": row.gpu_layers, "layers": row.layers,
                "vram_bytes": row.vram_bytes, "ram_bytes": row.ram_bytes, "stays_in_memory": row.stays_in_memory,
                "generation": asdict(row.generation) if row.generation else None,
            }  # fmt: skip
        found.append(facts)
    return found


def describe_quantized(result: Quantized) -> str:
    """One file, or several, and what came of it."""
    parts = f" and {len(result.targets) - 1} more" if len(result.targets) > 1 else ""
    share = result.after_bytes / result.before_bytes
    lines = [
        f"{printable(result.target)}{parts}: {format_size(result.before_bytes)} -> {format_size(result.after_bytes)} "
        f"({share:.0%}), {result.tensors} tensors as forecast"
    ]
    if result.without_weights:
        lines.append(f"The importance matrix said nothing of {result.without_weights} tensors.")
    return "\n".join(lines)
