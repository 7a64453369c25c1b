"""pyllamarun list: the models that are on this machine."""

from __future__ import annotations

import click

from pyllamarun.cli.options import as_json


@click.command(name="list", short_help="The models on this machine, whoever keeps them.")
@as_json
def command(as_json: bool) -> None:
    """Lists models in pyllamarun's own folder, Hugging Face's cache, LM Studio's folder and Ollama's store.

    Every command that takes a MODEL takes these names.  Nothing is copied: they are used where they lie.
    """
    from dataclasses import asdict

    from pyllamarun import output, paths
    from pyllamarun.models.catalog import Catalog
    from pyllamarun.models.report import describe_entries
    from pyllamarun.models.stores import all_stored

    catalog = Catalog(paths.state_folder() / "catalog.json")
    entries = list(catalog.entries(all_stored()))
    catalog.save()
    if as_json:
        output.print_json(output.envelope("list", {"models": [asdict(entry) for entry in entries]}))
    elif entries:
        output.print_text(describe_entries(entries))
    else:
        output.note(f"There is no model on this machine.  pyllamarun keeps its own in {paths.models_folder()}.")
