"""pyllamarun verify: whether models are what they should be."""

from __future__ import annotations

import click

from pyllamarun.cli.options import as_json


@click.command(name="verify", short_help="Check models: headers, sizes, parts; with --deep, every byte.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--deep", is_flag=True,
    help="Also compute the checksums, and hold them against those that were recorded when a model was pulled, or by "
    "which its store calls it.",
)  # fmt: skip
@as_json
def command(models: tuple[str, ...], deep: bool, as_json: bool) -> None:
    """Checks each MODEL, or all that `pyllamarun list` shows: its header, its size against its tensors, its parts."""
    import os
    from dataclasses import asdict

    from pyllamarun import output
    from pyllamarun.errors import ModelError
    from pyllamarun.models.report import describe_checked
    from pyllamarun.models.sources import stored_model
    from pyllamarun.models.store import open_index
    from pyllamarun.models.stores import all_stored, file_bytes
    from pyllamarun.models.verify import DAMAGED, verify

    stored = [stored_model(model) for model in models] if models else all_stored()
    checked = []
    with open_index(output.note) as index:
        for one in stored:
            total_bytes = sum(map(file_bytes, one.parts))
            with output.transfer(output.printable(one.name), total_bytes) as progress:
                found = verify(one, index, deep=deep, progress=progress)
            if models or one.problem or os.path.lexists(one.path):  # else it was removed meanwhile
                checked.append(found)
    damaged = [one for one in checked if one.verdict == DAMAGED]
    if as_json:
        output.print_json(output.envelope("verify", {"models": [asdict(one) for one in checked]}))
    elif checked:
        output.print_text(describe_checked(checked))
    else:
        output.note("There is no model on this machine.")
    if damaged and as_json:
        raise click.exceptions.Exit(ModelError.exit_code)
    if damaged:
        raise ModelError(
            f"{len(damaged)} of {len(checked)} models {'is' if len(damaged) == 1 else 'are'} not sound.",
            remedy="Remove what is damaged (`pyllamarun rm`), and pull it again.",
        )
