"""pyllamarun pull: a model from the network, whole and checked, where every command finds it."""

from __future__ import annotations

from typing import Any

import click

from pyllamarun.cli.options import PlanOptions, as_json, planning
from pyllamarun.errors import UsageError


@click.command(name="pull", short_help="Get a model: planned, resumed, checked.")
@planning
@click.option(
    "--fit", metavar="SIZE", default=None,
    help="Of hf:OWNER/REPO the model that a plan of each recommends within this much VRAM.",
)  # fmt: skip
@click.option("--mmproj", is_flag=True, help="Also the vision projector that lies beside it in the repository.")
@click.option(
    "--quantize", "type_name", metavar="TYPE", default=None,
    help="Then requantize it, as `pyllamarun quantize` does; disk space is checked for both first.",
)  # fmt: skip
@click.option("--sha256", metavar="HEX", default="", help="The checksum that the file must have.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask, also where it does not fit this machine.")
@as_json
def command(options: PlanOptions, **said: Any) -> None:
    """Gets MODEL: hf:OWNER/REPO:Q4_K_M, hf:OWNER/REPO/FILE.gguf, each with @REVISION if need be, or https://....

    First its header is read and planned for this machine, and disk space is looked at; what does not fit is asked
    about.  All parts of a split come.  What was interrupted goes on where it was.  Files of Hugging Face are kept in
    its own cache, where other programs find them, and others in pyllamarun's folder.  What is on this machine already,
    in another program's store, too, is used.
    """
    from pyllamarun.cli.pulling import Wishes, pull

    if options.plan_file is not None:
        raise UsageError("pull takes a model, not a plan.", remedy="pyllamarun pull MODEL")
    if said["fit"] is not None and options.vram is not None:
        raise UsageError("--fit and --vram exclude each other.", remedy="--fit is the VRAM that it is to fit.")
    pull(options, Wishes(**said))
