"""pyllamarun inspect: what a model is made of."""

from __future__ import annotations

import click

from pyllamarun.cli.options import as_json


@click.command(name="inspect", short_help="What a model is made of: tensors, types, metadata.")
@click.argument("model")
@as_json
def command(model: str, as_json: bool) -> None:
    """Shows MODEL's metadata, its tensors by type and by role, and what its KV cache takes.

    MODEL is a path, a name that `pyllamarun list` shows, hf:OWNER/REPO:Q4_K_M or https://HOST/FILE.gguf.  Only its
    header is read.
    """
    from dataclasses import asdict

    from pyllamarun import output
    from pyllamarun.models.report import describe_summary
    from pyllamarun.models.sources import resolve
    from pyllamarun.models.summary import summarize

    source = resolve(model)
    summary = summarize(source.read_header())
    if as_json:
        facts = {"source": source.name, "here": source.is_here}
        output.print_json(output.envelope("inspect", asdict(summary) | facts))
    else:
        output.print_text(describe_summary(summary))
