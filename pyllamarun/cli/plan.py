"""pyllamarun plan: where a model goes and what it takes."""

from __future__ import annotations

import click

from pyllamarun.cli.options import PlanOptions, as_json, dry_run, planning
from pyllamarun.errors import UsageError


@click.command(name="plan", short_help="Where a model goes and what it takes, to the byte.")
@planning
@click.option(
    "--save", metavar="FILE", default=None, help="Keep the plan, for `run`, `serve` and `rehearse --plan FILE`."
)
@click.option(
    "--compare", "axis", type=click.Choice(["quants", "ctx", "vram", "slots"]), default=None,
    help="Plans beside this one: with every requantization of the model, other contexts, budgets, or numbers of slots.",
)  # fmt: skip
@click.option("--explain", is_flag=True, help="Show what the predicted speed is made of.")
@click.option(
    "--read-bandwidth", is_flag=True,
    help="First measure how fast this machine's RAM and CPU are, in some two seconds; kept until the next boot.",
)  # fmt: skip
@as_json
@dry_run
def command(
    options: PlanOptions, save: str | None, axis: str | None, explain: bool, read_bandwidth: bool, as_json: bool,
    dry_run: bool,
) -> None:  # fmt: skip
    """Says how many layers of MODEL go to the GPU within the VRAM budget, and what that takes, to the byte.

    MODEL is a path, the name of a model that is on this machine (`pyllamarun list`), hf:OWNER/REPO:Q4_K_M,
    hf:OWNER/REPO/FILE.gguf, or https://HOST/FILE.gguf; of those on the network only the header is read.  With
    hf:OWNER/REPO all the models of a repository are planned, and one is recommended.
    llama.cpp itself is asked what it would allocate; nothing is loaded.
    """
    if read_bandwidth:
        from pyllamarun.planner import read_bandwidth as measure

        measure()
    one_plan = dry_run or save is not None
    if axis is not None and one_plan:
        raise UsageError("--compare makes several plans; --save and --dry-run are for one.", remedy="Leave one out.")
    if axis is not None:
        from pyllamarun.cli.comparing import print_comparison

        print_comparison(options, axis, as_json=as_json)
    elif not (options.model.startswith("hf:") and not one_plan and _printed_models(options, as_json)):
        _print_plan(options, save, explain=explain, as_json=as_json, dry_run=dry_run)


def _printed_models(options: PlanOptions, as_json: bool) -> bool:
    """Whether MODEL is a repository with several models, which were planned and compared."""
    from pyllamarun.models.network import repository

    models = repository(options.model)
    if len(models) > 1:
        from pyllamarun.cli.comparing import print_models

        print_models(options, models, as_json=as_json)
    return len(models) > 1


def _print_plan(options: PlanOptions, save: str | None, *, explain: bool, as_json: bool, dry_run: bool) -> None:
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.planning import planned
    from pyllamarun.plan.report import describe
    from pyllamarun.plan.saved import write_plan

    with planned(options) as plan:
        line = plan.shell_line(plan.argv("llama-server"))
        envelope = plan.envelope()
    if save is not None:
        write_plan(Path(save).expanduser(), envelope)
    if as_json:
        output.print_json(envelope)
    elif dry_run:
        output.print_text(line)
    else:
        output.print_text(describe(plan.plan, line, plan.stage.description, output.screen(), explain=explain))
        if not plan.model.source.is_here:
            output.print_text(f"The model is not on this machine yet: {plan.model.source.pull_command}")
