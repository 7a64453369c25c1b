"""A plan's memory as bars of characters, one for each GPU and one for RAM, for a terminal of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyllamarun.output import Screen
from pyllamarun.planning.plan import DevicePlan, HostPlan, Plan
from pyllamarun.units import format_size

USES = ("weights", "KV cache", "compute", "overhead")
# By use, and what is left: in a terminal that shows blocks, and in one that does not.
BLOCKS, LETTERS = "█▓▒░·", "#=+-."
WIDEST, NARROWEST = 60, 8
OVERFULL = ">"


@dataclass(frozen=True)
class _Bar:
    name: str
    sizes: tuple[int, ...]  # as USES
    room_bytes: int

    @property
    def words(self) -> str:
        return f"{format_size(sum(self.sizes))} of {format_size(self.room_bytes)}"


def bars(plan: Plan, screen: Screen) -> list[str]:
    """Lines no wider than the screen, and what their characters mean; none where it is too narrow for that."""
    found = [_gpu(device) for device in plan.devices] + [_host(plan.host, plan.residency.limit_bytes)]
    found = [bar for bar in found if bar.room_bytes > 0]
    names = max(len(bar.name) for bar in found) if found else 0
    words = max(len(bar.words) for bar in found) if found else 0
    width = min(WIDEST, screen.columns - names - words - 4)
    if width < NARROWEST:
        words, width = 0, min(WIDEST, screen.columns - names - 2)
    if width < NARROWEST:
        return []
    fills = BLOCKS if screen.shows_blocks else LETTERS
    lines = [
        f"{bar.name:<{names}}  {_drawn(bar, width, fills)}  {bar.words if words else ''}".rstrip() for bar in found
    ]
    return [*lines, *_legend(fills, screen.columns)]


def _gpu(device: DevicePlan) -> _Bar:
    compute = device.compute_bytes + device.projector_bytes
    sizes = (device.weights_bytes, device.context_bytes, compute, device.overhead_bytes)
    return _Bar(device.name, sizes, device.budget_bytes)


def _host(host: HostPlan, limit_bytes: int) -> _Bar:
    weights = host.total_bytes - host.context_bytes - host.compute_bytes
    return _Bar("RAM", (weights, host.context_bytes, host.compute_bytes, 0), limit_bytes)


def _drawn(bar: _Bar, width: int, fills: str) -> str:
    """Each end where it is, rounded, so that no error adds up; what is more than there is room for ends in ">"."""
    drawn = ""
    so_far = 0
    for size, fill in zip(bar.sizes, fills):
        so_far += size
        drawn += fill * (min(width, round(width * so_far / bar.room_bytes)) - len(drawn))
    if so_far > bar.room_bytes:
        return drawn[: width - 1] + OVERFULL
    return drawn + fills[-1] * (width - len(drawn))


def _legend(fills: Sequence[str], columns: int) -> list[str]:
    """As many lines as it takes."""
    lines = [""]
    for text in (f"{fill} {use}" for fill, use in zip(fills, (*USES, "left"))):
        if lines[-1] and len(lines[-1]) + 3 + len(text) > columns:
            lines.append("")
        lines[-1] += "   " * bool(lines[-1]) + text
    return lines
