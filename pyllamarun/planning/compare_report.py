"""A comparison in columns, for a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyllamarun.models.quality import Quality
from pyllamarun.models.quantize import loss_warning
from pyllamarun.output import printable, table
from pyllamarun.planning.compare import Comparison, Row
from pyllamarun.planning.speed_report import span
from pyllamarun.units import format_size

Column = tuple[str, Callable[[Row], str]]
AS_ASKED, RECOMMENDED, IMATRIX, NOT_RESIDENT = "*", ">", "i", "!"
FROM_DISK = "disk"  # in place of a speed
HEADINGS = {"quants": "type", "models": "model", "ctx": "context", "vram": "budget", "slots": "slots"}
OF_QUALITY = ("quants", "models")


def describe_comparison(comparison: Comparison, commands: Sequence[str], stage: str = "") -> str:
    """The rows, what was left out, and what to type for the recommended one."""
    lines = [f"{printable(comparison.model_name)}: {printable(comparison.model)}", *([stage] if stage else []), ""]
    lines += [*describe_rows(comparison), ""]
    lines += _recommendation(comparison, commands)
    return "\n".join(lines)


def describe_rows(comparison: Comparison) -> list[str]:
    """The rows, what their marks mean, and what was left out."""
    lines = [_table(comparison), ""]
    lines += [f"{row.label} does not fit: {row.reason}" for row in comparison.rows if not row.fits]
    return lines + [*_legend(comparison), *_left_out(comparison), *comparison.notes, *_sources(comparison)]


def _table(comparison: Comparison) -> str:
    columns = _columns(comparison)
    rows = [[cell(row) for _, cell in columns] for row in comparison.rows]
    return table(rows, header=[name for name, _ in columns], right=range(2, len(columns)))


def _columns(comparison: Comparison) -> list[Column]:
    def mark(row: Row) -> str:
        return AS_ASKED * row.is_current + RECOMMENDED * (row.label == comparison.recommended)

    middle: list[Column] = [
        ("GPU layers", _layers),
        ("VRAM", lambda row: _size(row, row.vram_bytes)),
        ("RAM", _ram),
        ("tok/s", pace),
    ]
    if comparison.axis in OF_QUALITY:
        return [
            ("", mark),
            (HEADINGS[comparison.axis], lambda row: printable(row.label)),
            ("file", lambda row: format_size(row.file_bytes)),
            ("bits", lambda row: f"{row.bits_per_weight:.2f}"),
            *middle,
            ("perplexity", perplexity),
        ]
    first: list[Column] = [("", mark), (HEADINGS[comparison.axis], lambda row: row.label)]
    if comparison.axis == "slots":
        first.append(("context", lambda row: f"{row.context_tokens:,}"))
        middle.append(("all together", total_pace))
    return first + middle


def _layers(row: Row) -> str:
    return f"{row.gpu_layers}/{row.layers}" if row.fits else "does not fit"


def _size(row: Row, size_bytes: int) -> str:
    return format_size(size_bytes) if row.fits else ""


def _ram(row: Row) -> str:
    return _size(row, row.ram_bytes) + (NOT_RESIDENT if row.fits and not row.stays_in_memory else " ")


def pace(row: Row) -> str:
    """Tokens a second, from low to high; "" where it does not fit."""
    return FROM_DISK if row.from_disk else span(row.generation) if row.generation else ""


def total_pace(row: Row) -> str:
    return span(row.throughput) if row.throughput else ""


def perplexity(row: Row) -> str:
    """By how much it rises, as published; "" where nothing was."""
    if row.quality is None:
        return ""
    return f"{row.quality.perplexity_delta:+.2f} ({row.quality.perplexity_rise:+.1%})" + IMATRIX * row.quality.imatrix


def _legend(comparison: Comparison) -> list[str]:
    marks = {
        f"{AS_ASKED} as asked": any(row.is_current for row in comparison.rows),
        f"{RECOMMENDED} recommended": bool(comparison.recommended),
        f"{NOT_RESIDENT} more than memory has, so read from disk or swapped for every token": any(
            row.fits and not row.stays_in_memory for row in comparison.rows
        ),
        f"{IMATRIX} with an importance matrix": any(one.imatrix for one in _qualities(comparison)),
    }
    shown = [text for text, is_there in marks.items() if is_there]
    return ["   ".join(shown)] if shown else []


def _left_out(comparison: Comparison) -> list[str]:
    """The names that were left out, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in comparison.left_out:
        by_reason.setdefault(reason, []).append(printable(name))
    return [f"Left out, {printable(reason)}: {', '.join(names)}" for reason, names in by_reason.items()]


def _qualities(comparison: Comparison) -> list[Quality]:
    """Those that are shown."""
    return [row.quality for row in comparison.rows if row.quality and comparison.axis in OF_QUALITY]


def _sources(comparison: Comparison) -> list[str]:
    """Where the perplexities are from."""
    found = dict.fromkeys((one.model, one.source) for one in _qualities(comparison))
    return [f"Perplexity: measured by others with {model} on Wikitext-2: {source}." for model, source in found]


def _recommendation(comparison: Comparison, commands: Sequence[str]) -> list[str]:
    row = comparison.recommended_row
    if row is None:
        return [f"No recommendation: {comparison.reason}"]
    fast = f", {pace(row)} tok/s" if pace(row) else ""
    if comparison.axis == "slots" and total_pace(row):
        fast = f", {total_pace(row)} tok/s together"
    lines = [f"Recommended: {printable(row.label)}{fast}: {comparison.reason}."]
    if comparison.axis in OF_QUALITY and loss_warning(row.type):
        lines.append(loss_warning(row.type))
    return lines + [f"  {line}" for line in commands]
