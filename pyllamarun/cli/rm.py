"""pyllamarun rm: a model that is no longer wanted."""

from __future__ import annotations

import click

from pyllamarun.cli.options import as_json


@click.command(name="rm", short_help="Remove a model, and say what that frees.")
@click.argument("model")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@as_json
def command(model: str, yes: bool, as_json: bool) -> None:
    """Removes MODEL from pyllamarun's own folder or from Hugging Face's cache, with all its parts.

    There, content goes only when no other revision has it, as huggingface_hub removes it.  What came of a pull that has
    not ended goes, too.  What other programs keep is never removed.
    """
    from dataclasses import asdict

    from pyllamarun import output
    from pyllamarun.errors import UsageError
    from pyllamarun.models.removal import removable, remove
    from pyllamarun.models.store import open_index
    from pyllamarun.models.stores import NAMES
    from pyllamarun.output import printable
    from pyllamarun.units import format_size

    with open_index(output.note) as index:
        found = removable(model, index)
        name = printable(found.name)
        if not yes:
            question = f"Remove {name} from {NAMES[found.store]}, {format_size(found.freed_bytes)}?"
            answer = output.ask(question)
            if not answer:
                why = "" if answer is False else "It is not removed unasked, and there is nobody to ask."
                raise UsageError(f"{name} was not removed.", why=why, remedy="To remove it unasked: --yes.")
        removed = remove(found, index)
    if as_json:
        output.print_json(output.envelope("rm", asdict(removed)))
        return
    shared = ""
    if removed.shared_bytes:
        shared = f"  Another file of the cache has {format_size(removed.shared_bytes)} of it, which stay."
    output.print_text(f"{name} is removed: {format_size(removed.freed_bytes)} are free again.{shared}")
