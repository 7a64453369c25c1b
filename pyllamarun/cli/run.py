"""pyllamarun run: one prompt, one answer."""

from __future__ import annotations

import click

from pyllamarun.cli.options import PlanOptions, dry_run, planning


@click.command(name="run", short_help="Answer one prompt, within the VRAM budget.")
@planning
@click.option("-p", "--prompt", required=True, help="What to ask the model; `-` reads it from stdin.")
@click.option("-n", "--predict", metavar="TOKENS", type=int, default=None, help="The longest answer.")
@dry_run
def command(options: PlanOptions, prompt: str, predict: int | None, dry_run: bool) -> None:
    """Plans MODEL, answers one prompt with it, and prints the answer to stdout as it comes."""
    import sys

    from pyllamarun import output
    from pyllamarun.cli.planning import plan_model
    from pyllamarun.errors import UsageError
    from pyllamarun.run.answer import cli_arguments, stream_answer
    from pyllamarun.run.process import running

    if prompt == "-":
        prompt = sys.stdin.read()
    prompt = prompt.rstrip("\n")
    if not prompt.strip():
        raise UsageError("The prompt is empty.", remedy="Give one with -p.")
    planned = plan_model(options)
    argv = planned.argv("llama-cli", *cli_arguments(prompt, predict))
    if dry_run:
        output.print_text(planned.shell_line(argv))
        return
    for warning in planned.plan.warnings:
        output.note(f"warning: {warning}")
    stream_answer(running, argv, planned.environment(), output.write)
