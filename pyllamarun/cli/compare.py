"""pyllamarun compare: what a requantization, or another file of the same model, loses against it."""

from __future__ import annotations

import click

from pyllamarun.cli.options import (
    PASSTHROUGH,
    MachineOptions,
    TakesArguments,
    as_json,
    force,
    machine,
    overhead,
    ram,
    vram,
)

CHUNK_TOKENS = 512  # llama-perplexity's own, by which published figures are made
LONGEST_CHUNK_TOKENS = 1 << 20


@click.command(name="compare", cls=TakesArguments, short_help="Measure what a requantization loses.")
@click.argument("reference", metavar="MODEL")
@click.argument("others", metavar="OTHER...", nargs=-1, required=True)
@click.option(
    "--text", metavar="FILE", default=None,
    help="A text in UTF-8 like those that the models are for.  Default: some chapters of a novel, for a quick look.",
)  # fmt: skip
@click.option(
    "-c", "--context", "chunk_tokens", metavar="TOKENS", type=click.IntRange(256, LONGEST_CHUNK_TOKENS),
    default=CHUNK_TOKENS, show_default=True,
    help="The text is read in chunks of that length, of which the second half is predicted.",
)  # fmt: skip
@click.option("--chunks", metavar="N", type=click.IntRange(1), default=None, help="At most so many chunks of the text.")
@click.option("--again", is_flag=True, help="Measure anew what was measured before.")
@click.option(
    "--plot", metavar="FILE.svg|png", default=None,
    help="Draw how perplexity and KL divergence settle, and what each model's size costs.  Takes matplotlib: "
    "pip install 'pyllamarun[plot]'.",
)  # fmt: skip
@vram
@ram
@overhead
@machine
@force
@as_json
@click.pass_context
def command(
    ctx: click.Context,
    reference: str,
    others: tuple[str, ...],
    text: str | None,
    chunk_tokens: int,
    chunks: int | None,
    again: bool,
    plot: str | None,
    vram: str | None,
    ram: str | None,
    overhead: str | None,
    machine: MachineOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Measures by how much each OTHER predicts a text worse than MODEL, and how far its predictions are from MODEL's.

    MODEL is what the others were made from, or the best of them; names are those that `plan` knows.  All have to have
    the same vocabulary.  llama-perplexity reads the text with each, within the VRAM budget.  What was measured is kept:
    an interrupted comparison goes on where it was, and a finished one is answered at once.
    """
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.measuring import Wanted, compared
    from pyllamarun.cli.planning import wanted_machine
    from pyllamarun.models.text import read_text
    from pyllamarun.planning.plot import check_plot
    from pyllamarun.planning.request import make_request
    from pyllamarun.run.comparison import describe_comparison

    target = Path(plot).expanduser() if plot is not None else None
    if target is not None:
        check_plot(target)
    request = make_request(vram=vram, ram=ram, overhead=overhead, arguments=ctx.meta[PASSTHROUGH], force=force)
    wanted = Wanted(
        reference=reference,
        others=others,
        text=read_text(Path(text).expanduser() if text is not None else None),
        chunk_tokens=chunk_tokens,
        most_chunks=chunks,
        again=again,
        machine=wanted_machine(machine),
        request=request,
    )
    outcome = compared(wanted)
    if target is not None:
        from pyllamarun.run.comparison_plot import write_comparison_plot

        write_comparison_plot(target, outcome)
    if as_json:
        output.print_json(output.envelope("quality", outcome.to_dict()))
    else:
        output.print_text(describe_comparison(outcome))
