"""A rehearsal in words and columns, for a person."""

from __future__ import annotations

from pyllamarun.output import table
from pyllamarun.run.rehearsal import DeviceRehearsal, Rehearsal
from pyllamarun.run.stage import REAL, VIRTUAL
from pyllamarun.units import format_size


def describe_rehearsal(rehearsal: Rehearsal, stage: str) -> str:
    """What was done and on what, each GPU's peak beside prediction and budget, and the verdict."""
    tokens = f"{rehearsal.prompts} prompt{'s' * (rehearsal.prompts != 1)}, {rehearsal.prompt_tokens:,} tokens"
    lines = [f"llama-server loaded and took {tokens}, in {rehearsal.seconds:.1f} s.", ""]
    lines[:0] = [stage] if stage else []
    header = ["GPU", "context", "buffers", "pool", "peak", "predicted", "difference", "budget"]
    lines.append(table([_row(device) for device in rehearsal.devices], header=header, right=range(1, len(header))))
    if rehearsal.stage == VIRTUAL:
        lines.append("A virtual GPU has neither context nor scratch pool; the prediction counts both.")
    if rehearsal.stage == REAL:
        lines.append("The driver shows their sum; buffers and pool are as predicted, and the context is the rest.")
    over = [device for device in rehearsal.devices if device.peak_bytes > device.budget_bytes]
    if not over:
        return "\n".join([*lines, "Within the budget."])
    excess = ", ".join(f"{device.name} by {_exactly(device.peak_bytes - device.budget_bytes)}" for device in over)
    return "\n".join([*lines, f"OVER the budget: {excess}."])


def _row(device: DeviceRehearsal) -> list[str]:
    sizes = [device.context_bytes, device.buffer_bytes, device.pool_bytes, device.peak_bytes, device.predicted_bytes]
    difference = _exactly(device.difference_bytes)
    return [device.name, *map(format_size, sizes), difference, format_size(device.budget_bytes)]


def _exactly(size_bytes: int) -> str:
    """A difference, where a byte counts."""
    return f"{size_bytes:+,} B" if abs(size_bytes) < 1 << 20 else format_size(size_bytes)
