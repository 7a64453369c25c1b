"""Draws the outcome of a comparison: how perplexity and KL divergence settle, and what each model's size costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyllamarun.output import printable
from pyllamarun.planning.plot import BUDGET, MARKED, ON_CPU, ON_GPU, USED, write_panels
from pyllamarun.run.comparison import Compared, Outcome
from pyllamarun.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (ON_GPU, USED, MARKED, BUDGET, "#7a5195", "#8c6d31", "#5b8fb9", "#444444")
REFERENCE_COLOR = ON_CPU


def write_comparison_plot(path: Path, outcome: Outcome) -> None:
    """Replaces what was there; UsageError where the file cannot be written."""

    def draw_running_perplexity(axes: Axes) -> None:
        for color, one in zip((REFERENCE_COLOR, *_colors(outcome)), (outcome.reference, *outcome.others)):
            _draw_running(axes, one.running_perplexity, _label(one), color)
        axes.set_ylabel("perplexity so far")
        axes.set_title(f"{outcome.tokens:,} predicted tokens of {printable(outcome.text)}")
        axes.legend(fontsize=7, frameon=False)

    def draw_running_divergence(axes: Axes) -> None:
        for color, one in zip(_colors(outcome), outcome.others):
            _draw_running(axes, one.running_kl_divergence, _label(one), color)
        axes.set_ylabel("KL divergence so far")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.legend(fontsize=7, frameon=False)

    def draw_sizes(axes: Axes) -> None:
        for color, one in zip(_colors(outcome), outcome.others):
            assert one.difference
            lost, error = one.difference.kl_divergence, one.difference.kl_divergence_error
            axes.errorbar(one.file_bytes / GIB, lost, yerr=error, fmt="o", color=color, capsize=3)
            axes.annotate(_label(one), (one.file_bytes / GIB, lost), (5, 5), textcoords="offset points", fontsize=7)
        axes.axvline(outcome.reference.file_bytes / GIB, color=REFERENCE_COLOR, linestyle="--")
        axes.set_xlabel(f"GiB; dashed: {_label(outcome.reference)}")
        axes.set_ylabel("KL divergence")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))

    write_panels(path, [draw_running_perplexity, draw_running_divergence, draw_sizes])


def _draw_running(axes: Axes, values: tuple[float, ...], label: str, color: str) -> None:
    axes.plot(range(1, len(values) + 1), values, color=color, label=label)
    axes.set_xlabel("chunks")
    axes.locator_params(axis="x", integer=True)


def _label(one: Compared) -> str:
    return printable(one.type or Path(one.path).name)


def _colors(outcome: Outcome) -> list[str]:
    return [COLORS[number % len(COLORS)] for number in range(len(outcome.others))]
