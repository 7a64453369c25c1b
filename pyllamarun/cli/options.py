"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from pyllamarun.errors import UsageError

Function = Callable[..., Any]

# llama.cpp's arguments that have their own place on our command line.
OURS = ("-m", "--model", "-c", "--ctx-size", "-np", "--parallel", "--host", "--port", "-p", "--prompt", "-fit", "--fit")

virtual_gpu = click.option(
    "--virtual-gpu", metavar="SIZE[,SIZE]", default=None,
    help="Cards that are not here: virtual GPUs of these sizes, which compute on the CPU.",
)  # fmt: skip
gpu = click.option(
    "--gpu", metavar="NAME[,NAME]", default=None,
    help="Cards that are not here, by name: 'RTX 3060'.  In a build with CUDA, llama.cpp's own CUDA backend runs on a "
    "stand-in for them; in one without, they are virtual GPUs of that size.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the llama.cpp command line and do nothing.")


@dataclass(frozen=True)
class PlanOptions:
    """What the shared planning options said."""

    model: str
    vram: str | None
    ram: str | None
    context: int
    slots: int
    overhead: str | None
    virtual_gpu: str | None
    gpu: str | None
    force: bool
    passthrough: tuple[str, ...]


def planning(function: Function) -> Function:
    """Adds MODEL, the planning options and `-- LLAMA.CPP ARGUMENTS`; passes them as one `options`."""

    @click.argument("model")
    @click.argument("passthrough", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA.CPP ARGUMENTS]")
    @click.option(
        "--vram", metavar="SIZE", default=None,
        help="What this process may hold on the GPU, at any moment: 11.5GiB, 12GB, 95%, max, max-300MiB; "
        "one value a GPU, comma-separated.  Default: all that is free.",
    )  # fmt: skip
    @click.option(
        "--ram", metavar="SIZE", default=None,
        help="What this process may take of host memory: 64GiB, 80%, max, max-4GiB; with a card that is not here, the "
        "RAM of that machine.  Default: all that is available.",
    )  # fmt: skip
    @click.option(
        "-c", "--context", metavar="TOKENS", type=click.IntRange(min=1), default=4096, show_default=True,
        help="Context, shared by the slots.",
    )  # fmt: skip
    @click.option("--slots", type=click.IntRange(min=1), default=1, show_default=True, help="Requests served at once.")
    @click.option(
        "--overhead", metavar="SIZE", default=None,
        help="What the process holds on each GPU besides llama.cpp's buffers.  Default: a CUDA context, assumed to be "
        "300MiB, and the scratch memory that ggml-cuda will take.",
    )  # fmt: skip
    @gpu
    @virtual_gpu
    @click.option("--force", is_flag=True, help="Go on with what does not fit.")
    @functools.wraps(function)
    def wrapper(
        model: str, passthrough: tuple[str, ...], vram: str | None, ram: str | None, context: int, slots: int,
        overhead: str | None, virtual_gpu: str | None, gpu: str | None, force: bool, **others: Any,
    ) -> Any:  # fmt: skip
        if passthrough and not passthrough[0].startswith("-"):
            raise UsageError(
                f'"{passthrough[0]}" is one argument too many.',
                remedy="Write `--` before arguments that are meant for llama.cpp.",
            )
        for word in passthrough:
            if word.partition("=")[0] in OURS:
                raise UsageError(
                    f"{word} cannot stand after `--`.",
                    remedy="It has a place before it: MODEL -c TOKENS --slots N -p PROMPT --host HOST --port PORT.",
                )
        options = PlanOptions(model, vram, ram, context, slots, overhead, virtual_gpu, gpu, force, passthrough)
        return function(options=options, **others)

    return wrapper
