"""pyllamarun run: one prompt, one answer."""

from __future__ import annotations

import click

from pyllamarun.cli.options import PlanOptions, dry_run, planning

REHEARSED_TOKENS = 16  # on the CUDA stand-in, where no answer ever comes to an end


@click.command(name="run", short_help="Answer one prompt, within the VRAM budget.")
@planning
@click.option("-p", "--prompt", required=True, help="What to ask the model; `-` reads it from stdin.")
@click.option("-n", "--predict", metavar="TOKENS", type=int, default=None, help="The longest answer.")
@dry_run
def command(options: PlanOptions, prompt: str, predict: int | None, dry_run: bool) -> None:
    """Plans MODEL, answers one prompt with it, and prints the answer to stdout as it comes."""
    import sys

    from pyllamarun import output
    from pyllamarun.cli.planning import planned
    from pyllamarun.errors import UsageError
    from pyllamarun.run.answer import cli_arguments, stream_answer
    from pyllamarun.run.process import running
    from pyllamarun.run.stage import ON_STANDIN

    if prompt == "-":
        prompt = sys.stdin.read()
    prompt = prompt.rstrip("\n")
    if not prompt.strip():
        raise UsageError("The prompt is empty.", remedy="Give one with -p.")
    with planned(options) as plan:
        rehearsing = plan.stage.kind == ON_STANDIN
        if rehearsing and predict is None:
            predict = REHEARSED_TOKENS
        argv = plan.argv("llama-cli", *cli_arguments(prompt, predict))
        if dry_run:
            output.print_text(plan.shell_line(argv))
            return
        plan.check_here()
        for warning in plan.plan.warnings:
            output.note(f"warning: {warning}")
        if plan.stage.description:
            output.note(plan.stage.description)
        if not rehearsing:
            stream_answer(running, argv, plan.stage.environment, output.write)
            return
        stream_answer(running, argv, plan.stage.hollow(plan.binaries).environment, lambda _: None)
        output.note("It ran within its memory.  Nothing was computed, so there is no answer.")
