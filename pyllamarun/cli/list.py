"""pyllamarun list: the models that are on this machine, and whether each fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from pyllamarun.cli.options import MachineOptions, as_json, machine

if TYPE_CHECKING:
    from pyllamarun.fitting import Fit
    from pyllamarun.models.catalog import Entry
    from pyllamarun.models.store import Begun


@click.command(name="list", short_help="The models on this machine, and whether each fits now.")
@machine
@click.option(
    "--plan/--no-plan", "with_plans", default=True, show_default=True,
    help="Whether to plan each model, which takes a tenth of a second or so, to say whether it fits.",
)  # fmt: skip
@as_json
def command(machine: MachineOptions, with_plans: bool, as_json: bool) -> None:
    """Lists models in pyllamarun's own folder, Hugging Face's cache, LM Studio's folder and Ollama's store.

    Every command that takes a MODEL takes these names.  Nothing is copied: they are used where they lie.

    Whether a model fits is said by a plan of it with 4096 tokens of context, within the memory that is free now; with
    --gpu or --machine, on a machine that is not this one.
    """
    from dataclasses import asdict

    from pyllamarun import output, paths
    from pyllamarun.models.catalog import Catalog
    from pyllamarun.models.pulling import is_here
    from pyllamarun.models.report import describe_entries
    from pyllamarun.models.store import open_index
    from pyllamarun.models.stores import all_stored
    from pyllamarun.units import format_size

    with open_index(output.note) as index:
        catalog = Catalog(index)
        entries = list(catalog.entries(all_stored()))
        catalog.save()
        begun = [_begun(one) for one in index.begun() if not is_here(one)]
    sound = [entry for entry in entries if not entry.problem]
    planned = dict(zip((entry.path for entry in sound), _planned(sound, machine) if with_plans and sound else ()))
    if as_json:
        models = [asdict(entry) | {"fits": _as_data(planned.get(entry.path))} for entry in entries]
        output.print_json(output.envelope("list", {"models": models, "begun": begun}))
    elif not entries and not begun:
        output.note(f"There is no model on this machine.  pyllamarun keeps its own in {paths.models_folder()}.")
    elif entries and not planned:
        output.print_text(describe_entries(entries))
    elif entries:
        found = [planned.get(entry.path) for entry in entries]
        columns = {
            "FITS": [one.words if one else "" for one in found],
            "TOK/S": [one.pace if one else "" for one in found],
        }
        remarks = {entry.name: one.reason for entry, one in zip(entries, found) if one and one.reason}
        output.print_text(describe_entries(entries, columns, remarks))
    if not as_json:
        for one in begun:
            output.print_text(
                output.printable(
                    f"Begun: {one['source']}, {format_size(one['present_bytes'])} of {format_size(one['size_bytes'])}."
                    f"  To go on: {one['command']}"
                )
            )


def _begun(one: Begun) -> dict[str, Any]:
    """A pull that has not ended; one that goes on just now, too."""
    from pyllamarun import shell
    from pyllamarun.models.pulling import present_bytes

    return {
        "source": one.source,
        "path": one.path,
        "size_bytes": one.size_bytes,
        "present_bytes": present_bytes(one.targets),
        "since": one.since,
        "command": shell.join(["pyllamarun", "pull", one.source]),
    }


def _planned(entries: Sequence[Entry], machine: MachineOptions) -> list[Fit]:
    """Whether each fits; nothing, said once, where llama.cpp's programs cannot be asked."""
    from pathlib import Path

    from pyllamarun import output
    from pyllamarun.cli.planning import wanted_machine
    from pyllamarun.errors import BinaryError
    from pyllamarun.fitting import fits
    from pyllamarun.models.sources import Source
    from pyllamarun.planner import Planner

    try:
        with Planner(wanted_machine(machine)) as planner, output.status("planning") as show:
            planner.hardware  # noqa: B018  what cannot be asked at all is said once, and not of each model
            return fits(planner, [Source(entry.name, Path(entry.path)) for entry in entries], show)
    except BinaryError as error:
        output.note("Whether they fit is not known:")
        output.print_error(error)
        return []


def _as_data(fit: Fit | None) -> dict[str, object] | None:
    from dataclasses import asdict

    return asdict(fit) if fit else None
