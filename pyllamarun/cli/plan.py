"""pyllamarun plan: where a model goes and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pyllamarun.cli.options import PlanOptions, as_json, dry_run, planning
from pyllamarun.errors import UsageError

if TYPE_CHECKING:
    from pyllamarun.cli.planning import Planned


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
    "--advice/--no-advice", default=True,
    help="Whether to look for what would help a plan that is slow or does not stay in memory.  Default: yes.",
)  # fmt: skip
@as_json
@dry_run
def command(
    options: PlanOptions,
    save: str | None,
    axis: str | None,
    plot: str | None,
    advice: bool,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Says how many layers of MODEL go to the GPU within the VRAM budget, and what that takes, to the byte.

    MODEL is a path, the name of a model that is on this machine (`pyllamarun list`), hf:OWNER/REPO:Q4_K_M,
    hf:OWNER/REPO/FILE.gguf, or https://HOST/FILE.gguf; of those on the network only the header is read.  With
    hf:OWNER/REPO all the models of a repository are planned, and one is recommended.
    llama.cpp itself is asked what it would allocate; nothing is loaded.
    """
    one_plan = dry_run or save is not None
    if axis is not None and one_plan:
        raise UsageError("--compare makes several plans; --save and --dry-run are for one.", remedy="Leave one out.")
    if plot is not None:
        from pathlib import Path

        from pyllamarun.plan.plot import check_plot

        check_plot(Path(plot).expanduser())
    if axis is not None:
        from pyllamarun.cli.comparing import print_comparison

        print_comparison(options, axis, plot, as_json=as_json)
    elif not (options.model.startswith("hf:") and not one_plan and _printed_models(options, plot, as_json)):
        _print_plan(options, save, plot, advice, as_json=as_json, dry_run=dry_run)


def _printed_models(options: PlanOptions, plot: str | None, as_json: bool) -> bool:
    """Whether MODEL is a repository with several models, which were planned and compared."""
    from pyllamarun.models.network import repository

    models = repository(options.model)
    if len(models) > 1:
        from pyllamarun.cli.comparing import print_models

        print_models(options, models, plot, as_json=as_json)
    return len(models) > 1


def _print_plan(
    options: PlanOptions, save: str | None, plot: str | None, advice: bool, *, as_json: bool, dry_run: bool
) -> None:
    """The plan as soon as there is one; what would help takes longer."""
    from dataclasses import replace
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.planning import planned, wanted_request
    from pyllamarun.plan.saved import write_plan

    with planned(options) as plan:
        line = plan.shell_line(plan.argv("llama-server"))
        if dry_run:
            output.print_text(line)
        elif not as_json:
            _print_words(plan, line)
        if advice and not dry_run:
            from pyllamarun.cli.advising import advice_for, advice_lines

            found = advice_for(plan.plan, plan.planner, plan.model, wanted_request(options))
            plan = replace(plan, plan=replace(plan.plan, advice=found))
            if found and not as_json:
                output.print_text("\n".join(["", *advice_lines(found, options)]))
        if plot is not None:
            from pyllamarun.cli.comparing import plot_plan

            plot_plan(plan, options, Path(plot).expanduser())
    if save is not None:
        write_plan(Path(save).expanduser(), plan.envelope())
    if as_json:
        output.print_json(plan.envelope())


def _print_words(plan: Planned, line: str) -> None:
    from pyllamarun import output
    from pyllamarun.plan.report import describe

    output.print_text(describe(plan.plan, line, plan.stage.description, output.screen()))
    if not plan.model.source.is_here:
        output.print_text(f"The model is not on this machine yet: {plan.model.source.pull_command}")
