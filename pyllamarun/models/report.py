"""Models in words and columns, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pyllamarun.models.catalog import Entry
from pyllamarun.models.summary import Field, Group, Summary
from pyllamarun.models.verify import DAMAGED, MATCHES, RECORDED, SOUND, Checked
from pyllamarun.output import printable, table
from pyllamarun.units import format_size

SHOWN_CHARACTERS = 72
WORDS = {
    MATCHES: "sound, and its checksum agrees",
    SOUND: "sound, by its header",
    RECORDED: "sound, by its header; no checksum was known, and now it is recorded",
    DAMAGED: "damaged",
}
NOTHING: Mapping[str, Any] = MappingProxyType({})


def describe_entries(
    entries: Sequence[Entry], columns: Mapping[str, Sequence[str]] = NOTHING, remarks: Mapping[str, str] = NOTHING
) -> str:
    """A line for each model, and below them what is wrong with the damaged ones.

    `columns` stand before the path, by their titles; `remarks`, by a model's name, below all.
    """
    header = ["NAME", "STORE", "SIZE", "TYPE", "ARCHITECTURE", "CONTEXT", *columns, "PATH"]
    more = zip(*columns.values()) if columns else [()] * len(entries)
    rows = [[*_row(entry), *cells, _path(entry)] for entry, cells in zip(entries, more)]
    below = {entry.name: entry.problem for entry in entries if entry.problem} | dict(remarks)
    lines = [table(rows, header=header, right=(2, 5)), *[""] * bool(below)]
    return "\n".join(lines + [f"{printable(name)}: {text}" for name, text in below.items()])


def describe_checked(checked: Sequence[Checked]) -> str:
    """A line for each model, and below them what is wrong with the damaged ones."""
    rows = [[printable(one.name), one.store, format_size(one.file_bytes), WORDS[one.verdict]] for one in checked]
    problems = [f"{printable(one.name)}: {one.problem}" for one in checked if one.problem]
    lines = [table(rows, header=["NAME", "STORE", "SIZE", "FOUND"], right=(2,)), *[""] * bool(problems)]
    return "\n".join(lines + problems)


def _row(entry: Entry) -> list[str]:
    architecture = "damaged" if entry.problem else entry.architecture
    context = f"{entry.trained_context_tokens:,}" if entry.trained_context_tokens else ""
    size = format_size(entry.file_bytes)
    return [printable(entry.name), entry.store, size, entry.file_type, architecture, context]


def _path(entry: Entry) -> str:
    return printable(entry.path + (f" and {entry.parts - 1} more" if entry.parts > 1 else ""))


def describe_summary(summary: Summary) -> str:
    """The model, its attention and KV cache, its tensors, and its metadata."""
    bits = f"{summary.bits_per_weight:.2f} bits per weight"
    lines = [
        f"{summary.name}: {summary.architecture}, {summary.file_type or 'of no type that it tells'}",
        f"{summary.parameters:,} parameters, {format_size(summary.weights_bytes)} of weights, {bits}",
        f"{summary.layers} layers, {summary.embedding_length:,} wide, {summary.vocabulary_size:,} tokens known",
        _context(summary),
    ]
    if summary.experts:
        shared = f", and {summary.experts_shared} that every token uses" if summary.experts_shared else ""
        lines.append(f"{summary.experts} experts, of which a token uses {summary.experts_used}{shared}")
    if len(summary.parts) > 1:
        lines.append(f"{len(summary.parts)} parts, {format_size(summary.file_bytes)} together")
    lines += map(printable, summary.parts)
    lines += ["", _group_table("TYPE", summary.types), "", _group_table("ROLE", summary.roles), ""]
    lines.append(table([_field_row(field) for field in summary.metadata], header=["KEY", "TYPE", "VALUE"]))
    return "\n".join(lines)


def _context(summary: Summary) -> str:
    text = f"trained for {summary.trained_context_tokens:,} tokens of context"
    if summary.kv_bytes_per_token:
        text += f"; KV cache of {summary.kv_bytes_per_token:,} bytes a token in f16, in {summary.kv_layers} layers"
    if summary.sliding_window_tokens:
        text += f"; layers with a sliding window keep the last {summary.sliding_window_tokens:,} tokens"
    return text


def _group_table(title: str, groups: Sequence[Group]) -> str:
    header = [title, "TENSORS", "PARAMETERS", "SIZE", "BITS PER WEIGHT"]
    rows = [
        [g.name, f"{g.tensors:,}", f"{g.parameters:,}", format_size(g.size_bytes), f"{g.bits_per_weight:.2f}"]
        for g in groups
    ]
    return table(rows, header=header, right=range(1, len(header)))


def _field_row(field: Field) -> list[str]:
    values = field.value if isinstance(field.value, list) else [field.value]
    text = ", ".join(f"{value:.7g}" if isinstance(value, float) else str(value) for value in values)
    shortened = len(text) > SHOWN_CHARACTERS
    text = text[: SHOWN_CHARACTERS - 1] + "…" if shortened else text
    more = isinstance(field.value, list) and field.length is not None and len(field.value) < field.length
    if field.length is not None and (shortened or more):
        text += f"  ({field.length:,})"
    return [field.key, field.type, text]
