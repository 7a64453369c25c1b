"""Plots of plans and comparisons, as SVG or PNG, with matplotlib, which is an extra.

The same plans give the same bytes: neither time nor chance goes into a file.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamarun.errors import UsageError
from pyllamarun.models.gguf import Header
from pyllamarun.output import printable
from pyllamarun.planning.compare import USABLE, Comparison, Row
from pyllamarun.planning.plan import Plan
from pyllamarun.units import GIB, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]

SUFFIXES = (".svg", ".png")
ON_GPU, ON_CPU, BUDGET, USED, MARKED = "#2a7f62", "#c9ced6", "#b3261e", "#1f4e79", "#d98e04"
PANEL_INCHES = (7.0, 3.6)
STYLE: Any = {
    "svg.hashsalt": "pyllamarun",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # which matplotlib brings along
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": False,
    "text.parse_math": False,  # names are no formulas
}


def check_plot(path: Path) -> None:
    """Raises UsageError where no plot can be made, or none at that path."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} does not end in .svg or .png.", remedy="Name a file that does.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"There is no folder {path.parent}.", remedy=f"mkdir -p {path.parent}")
    try:
        missing = find_spec("matplotlib") is None
    except ValueError:  # it is there, and shut out
        missing = True
    if missing:
        raise UsageError("Plots are made with matplotlib, which is not here.", remedy="pip install 'pyllamarun[plot]'")


def write_plot(path: Path, comparisons: Sequence[Comparison], placed: tuple[Plan, Header] | None = None) -> None:
    """One panel for the plan's layers, where there is one, and one for each comparison; replaces what was there.

    Raises UsageError where the file cannot be written.
    """
    panels: list[Panel] = [functools.partial(draw_comparison, comparison=comparison) for comparison in comparisons]
    if placed:
        panels.insert(0, functools.partial(draw_layers, plan=placed[0], header=placed[1]))
    write_panels(path, panels)


def write_panels(path: Path, panels: Sequence[Panel]) -> None:
    """Panels one below the other; replaces what was there.  Raises UsageError where the file cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure

    temporary = path.with_name(f".{os.getpid()}{path.suffix.lower()}")
    is_svg = path.suffix.lower() == ".svg"
    try:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(PANEL_INCHES[0], PANEL_INCHES[1] * len(panels)), layout="constrained")
            for draw, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0]):
                draw(axes)
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if is_svg else {"Software": None})
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written.", why=error.strerror or str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def draw_layers(axes: Axes, plan: Plan, header: Header) -> None:
    """Each layer's weights, by where they are, and the VRAM that is used from the last layer back to each."""
    on_gpu, on_cpu = weights_by_layer(plan, header)
    layers = range(len(on_gpu))
    axes.bar(layers, _gib(on_gpu), color=ON_GPU, label="weights on the GPU")
    axes.bar(layers, _gib(on_cpu), bottom=_gib(on_gpu), color=ON_CPU, label="weights in RAM")
    axes.set_xlabel(f"layer, the last ({len(on_gpu) - 1}) being the output")
    axes.set_ylabel("GiB a layer")
    axes.set_xlim(-1, plan.layers)
    axes.set_ylim(0, 1.1 * max(map(sum, zip(on_gpu, on_cpu))) / GIB)
    axes.set_title(f"{printable(plan.model_name)}: {plan.gpu_layers} of {plan.layers} layers on the GPU")
    handles, labels = axes.get_legend_handles_labels()
    if plan.devices:
        budget = sum(device.budget_bytes for device in plan.devices)
        used = axes.twinx()
        there = [layer for layer in layers if layer >= plan.layers - plan.gpu_layers]
        total = _gib(used_from(plan, on_gpu))[len(layers) - len(there) :]
        used.step(there, total, where="mid", color=USED, label="VRAM from the last layer on")
        words = f"budget, {format_size(budget)}"
        used.axhline(budget / GIB, color=BUDGET, linestyle="--", label=words)
        used.set_ylim(0, 1.08 * budget / GIB)
        used.set_ylabel("GiB of VRAM")
        used.spines["right"].set_visible(True)
        more_handles, more_labels = used.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, fontsize=7, frameon=False)


def weights_by_layer(plan: Plan, header: Header) -> tuple[list[int], list[int]]:
    """Bytes of weights on GPUs and in RAM, by layer; what comes after the last layer counts as one more.

    Embeddings, and what else comes before the first layer, stay in RAM and belong to none; but where there is no matrix
    for the output, llama.cpp uses that of the embeddings there, and copies it.
    """
    output = "output" if any(tensor.name == "output.weight" for tensor in header.tensors) else ("output", "token_embd.")
    on_gpu, on_cpu = [0] * plan.layers, [0] * plan.layers
    first, left = plan.layers - plan.gpu_layers, set(plan.left_on_cpu)
    for tensor in header.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if not block and not tensor.name.startswith(output):
            continue
        layer = min(int(block[1]), plan.layers - 1) if block else plan.layers - 1
        is_there = bool(plan.devices) and layer >= first and tensor.name not in left
        (on_gpu if is_there else on_cpu)[layer] += tensor.size_bytes
    return on_gpu, on_cpu


def used_from(plan: Plan, on_gpu: Sequence[int]) -> list[int]:
    """For each layer the VRAM that it, those after it, and all that is no layer's weights take together."""
    used = sum(device.total_bytes for device in plan.devices) - sum(on_gpu)
    total = []
    for size in reversed(on_gpu):
        used += size
        total.append(used)
    return total[::-1]


def draw_comparison(axes: Axes, comparison: Comparison) -> None:
    """Tokens a second, from low to high: over the budget as a band, else one bar a row."""
    rows = [row for row in comparison.rows if row.pace]
    axes.set_title(f"{printable(comparison.model_name)}: tokens a second by {TITLES[comparison.axis]}")
    axes.set_ylabel("tokens a second")
    if not rows:
        axes.text(0.5, 0.5, comparison.reason, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    if comparison.axis == "vram":
        _draw_band(axes, rows, comparison.recommended)
    else:
        _draw_bars(axes, rows, comparison.recommended)
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] > USABLE:
        axes.axhline(USABLE, color=BUDGET, linestyle=":", linewidth=1, label=f"{USABLE:g} tok/s: usable")
    axes.legend(loc="best", fontsize=7)


TITLES = {
    "quants": "quantization", "models": "model", "ctx": "context", "vram": "VRAM", "slots": "slots",
}  # fmt: skip


def _draw_band(axes: Axes, rows: Sequence[Row], recommended: str) -> None:
    budgets = _gib([row.budget_bytes for row in rows])
    low, high = _ends(rows)
    axes.fill_between(budgets, low, high, color=ON_GPU, alpha=0.3, label="low to high")
    axes.plot(budgets, [row.pace for row in rows], color=ON_GPU, marker="o", markersize=3)
    for budget, row in zip(budgets, rows):
        if row.label == recommended:
            axes.plot([budget], [row.pace], color=MARKED, marker="D", linestyle="", label="recommended")
    axes.set_xlabel("VRAM budget, GiB")


def _draw_bars(axes: Axes, rows: Sequence[Row], recommended: str) -> None:
    low, high = _ends(rows)
    places = range(len(rows))
    colors = [MARKED if row.label == recommended else ON_GPU for row in rows]
    axes.bar(places, [h - b for b, h in zip(low, high)], bottom=low, color=colors, label="low to high")
    axes.set_xticks(places, [printable(row.label) for row in rows], rotation=45, ha="right")


def _ends(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    found = [row.generation for row in rows if row.generation]
    return [one.low for one in found], [one.high for one in found]


def _gib(sizes_bytes: Sequence[int]) -> list[float]:
    return [size / GIB for size in sizes_bytes]
