"""From a command's options to a comparison, printed.  Imported only when a command compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyllamarun import output, shell
from pyllamarun.cli.options import PlanOptions
from pyllamarun.cli.planning import Planned, wanted_machine, wanted_request
from pyllamarun.errors import DoesNotFit
from pyllamarun.models.model import Model
from pyllamarun.models.sources import Source
from pyllamarun.planner import Planner
from pyllamarun.planning.compare import Comparison
from pyllamarun.planning.compare_report import describe_comparison
from pyllamarun.planning.plot import write_plot
from pyllamarun.whatif import compare, compare_models


def print_comparison(options: PlanOptions, axis: str, plot: str | None, *, as_json: bool) -> None:
    """Of the model with itself, one thing changed at a time.  Raises what planning raises."""
    request = wanted_request(options)
    model = Model.open(options.model)
    with Planner(wanted_machine(options.machine), overhead_bytes=request.overhead_bytes) as planner:
        with output.status("comparing") as show:
            comparison = compare(planner, model, request, axis, show)
        _print(comparison, options, planner, plot, as_json=as_json)


def print_models(options: PlanOptions, sources: Sequence[Source], plot: str | None, *, as_json: bool) -> None:
    """Of a repository's models with each other."""
    request = wanted_request(options)
    with Planner(wanted_machine(options.machine), overhead_bytes=request.overhead_bytes) as planner:
        with output.status("comparing") as show:
            comparison = compare_models(planner, sources, request, show)
        _print(comparison, options, planner, plot, as_json=as_json)


def plot_plan(planned: Planned, options: PlanOptions, path: Path) -> None:
    """The plan's layers, and how fast it would be with other budgets and other quantizations."""
    request = wanted_request(options)
    axes = [("vram", planned.model)] * bool(planned.plan.devices) + [("quants", planned.named)]
    with output.status("comparing") as show:
        comparisons = [compare(planned.planner, model, request, axis, show) for axis, model in axes]
    write_plot(path, comparisons, (planned.plan, planned.model.header))


def _print(comparison: Comparison, options: PlanOptions, planner: Planner, plot: str | None, *, as_json: bool) -> None:
    if plot is not None:
        write_plot(Path(plot).expanduser(), [comparison])
    commands = _commands(comparison, options)
    if as_json:
        facts = {"stage": planner.stage.kind, "commands": commands}
        output.print_json(output.envelope("compare", comparison.to_dict() | facts))
    else:
        output.print_text(describe_comparison(comparison, commands, planner.stage.description))
    if not any(row.fits for row in comparison.rows):
        raise DoesNotFit(f"No plan for {comparison.model} fits.", why=comparison.rows[0].reason)


def _commands(comparison: Comparison, options: PlanOptions) -> list[str]:
    """What to type for the recommended row."""
    row = comparison.recommended_row
    if row is None:
        return []
    plan = shell.join(options.words("plan", row.source, row.words))
    return [row.command, plan] if row.command else [plan]
