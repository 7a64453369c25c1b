"""pyllamarun plan: where a model goes and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from pyllamarun.cli.options import PlanOptions, as_json, dry_run, planning
from pyllamarun.errors import UsageError

if TYPE_CHECKING:
    from pyllamarun.cli.planning import Planned


@dataclass(frozen=True)
class Shown:
    """What is wanted of a plan."""

    save: str | None
    plot: str | None
    advice: bool | None
    explain: bool
    as_json: bool
    dry_run: bool


@click.command(name="plan", short_help="Where a model goes and what it takes, to the byte.")
@planning
@click.option(
    "--save", metavar="FILE", default=None, help="Keep the plan, for `run`, `serve` and `rehearse --plan FILE`."
)
@click.option(
    "--compare", "axis", type=click.Choice(["quants", "ctx", "vram", "slots"]), default=None,
    help="Plans beside this one: with every requantization of the model, other contexts, budgets, or numbers of slots.",
)  # fmt: skip
@click.option(
    "--plot", metavar="FILE.svg|png", default=None,
    help="Draw it: VRAM by layer, and tokens a second by VRAM and by quantization; with --compare, along that axis.  "
    "Takes matplotlib: pip install 'pyllamarun[plot]'.",
)  # fmt: skip
@click.option(
    "--advice/--no-advice", default=None,
    help="Whether to look for what would help a plan that is slow or does not stay in memory.  Default: yes, after the "
    "plan is printed; not with --json.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Show what the predicted speed is made of.")
@click.option(
    "--read-bandwidth", is_flag=True,
    help="First measure how fast this machine's RAM and CPU are, in some two seconds; kept until the next boot.",
)  # fmt: skip
@as_json
@dry_run
def command(options: PlanOptions, axis: str | None, read_bandwidth: bool, **wanted: Any) -> None:
    """Says how many layers of MODEL go to the GPU within the VRAM budget, and what that takes, to the byte.

    MODEL is a path, the name of a model that is on this machine (`pyllamarun list`), hf:OWNER/REPO:Q4_K_M,
    hf:OWNER/REPO/FILE.gguf, or https://HOST/FILE.gguf; of those on the network only the header is read.  With
    hf:OWNER/REPO all the models of a repository are planned, and one is recommended.
    llama.cpp itself is asked what it would allocate; nothing is loaded.
    """
    shown = Shown(**wanted)
    one_plan = shown.dry_run or shown.save is not None or options.plan_file is not None
    if axis is not None and one_plan:
        raise UsageError(
            "--compare makes several plans; --save, --plan and --dry-run are for one.", remedy="Leave one out."
        )
    if shown.plot is not None and options.plan_file is not None:
        raise UsageError("--plot compares several plans; --plan is one.", remedy="Leave one out.")
    if shown.plot is not None:
        from pathlib import Path

        from pyllamarun.planning.plot import check_plot

        check_plot(Path(shown.plot).expanduser())
    if read_bandwidth:
        from pyllamarun.planner import read_bandwidth as measure

        measure()
    if axis is not None:
        from pyllamarun.cli.comparing import print_comparison

        print_comparison(options, axis, shown.plot, as_json=shown.as_json)
    elif not (options.model.startswith("hf:") and not one_plan and _printed_models(options, shown)):
        _print_plan(options, shown)


def _printed_models(options: PlanOptions, shown: Shown) -> bool:
    """Whether MODEL is a repository with several models, which were planned and compared."""
    from pyllamarun.models.network import repository

    models = repository(options.model)
    if len(models) > 1:
        from pyllamarun.cli.comparing import print_models

        print_models(options, models, shown.plot, as_json=shown.as_json)
    return len(models) > 1


def _print_plan(options: PlanOptions, shown: Shown) -> None:
    """The plan as soon as there is one; what would help takes longer."""
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.planning import planned
    from pyllamarun.planning.advice import is_wanting
    from pyllamarun.planning.saved import write_plan

    with planned(options) as plan:
        line = plan.shell_line(plan.argv("llama-server"))
        if shown.dry_run:
            output.print_text(line)
        elif not shown.as_json:
            _print_words(plan, line, explain=shown.explain)
        wants_advice = not shown.as_json if shown.advice is None else shown.advice
        if wants_advice and not shown.dry_run and options.plan_file is None and is_wanting(plan.plan):
            plan = _advised(plan, options, shown.as_json)
        if shown.plot is not None:
            from pyllamarun.cli.comparing import plot_plan

            plot_plan(plan, options, Path(shown.plot).expanduser())
    if shown.save is not None:
        write_plan(Path(shown.save).expanduser(), plan.envelope())
    if shown.as_json:
        output.print_json(plan.envelope())


def _print_words(plan: Planned, line: str, *, explain: bool) -> None:
    from pyllamarun import output
    from pyllamarun.planning.report import describe

    output.print_text(describe(plan.plan, line, plan.stage.description, output.screen(), explain=explain))
    if not plan.is_here:
        output.print_text(f"The model is not on this machine yet.  First: {plan.first}")


def _advised(plan: Planned, options: PlanOptions, as_json: bool) -> Planned:
    """With what would help it; printed, where that is not for a program."""
    from pyllamarun import output
    from pyllamarun.cli.advising import advice_for, advice_lines

    advice = advice_for(plan, options)
    if advice and not as_json:
        output.print_text("\n".join(["", *advice_lines(advice, options)]))
    return replace(plan, plan=replace(plan.plan, advice=advice))
