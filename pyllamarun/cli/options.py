"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from pyllamarun.errors import UsageError

Function = Callable[..., Any]

GOALS = ("latency", "throughput")  # planning/request.py's, which is not loaded for --help

# What a saved plan has settled.
SETTLED = ("model", "passthrough", "vram", "ram", "context", "slots", "overhead", "machine_file", "gpu", "virtual_gpu",
           "ram_bandwidth", "cores", "allow", "goal", "rpc", "force")  # fmt: skip

# llama.cpp's arguments that have their own place on our command line.
OURS = ("-m", "--model", "-c", "--ctx-size", "-np", "--parallel", "--host", "--port", "-p", "--prompt", "-fit", "--fit")

PASSTHROUGH = "pyllamarun.passthrough"

DEFAULTS = {"-c": 4096, "--goal": "latency"}

as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
vram = click.option(
    "--vram", metavar="SIZE", default=None,
    help="What this process may hold on the GPU, at any moment: 11.5GiB, 12GB, 95%, max, max-300MiB; "
    "one value a GPU, comma-separated.  Default: all that is free.",
)  # fmt: skip
ram = click.option(
    "--ram", metavar="SIZE", default=None,
    help="What this process may take of host memory: 64GiB, 80%, max, max-4GiB; with a card that is not here, the "
    "RAM of that machine.  Default: all that is available.",
)  # fmt: skip
overhead = click.option(
    "--overhead", metavar="SIZE", default=None,
    help="What the process holds on each GPU besides llama.cpp's buffers.  Default: a CUDA context, assumed to be "
    "300MiB, and the scratch memory that ggml-cuda will take.",
)  # fmt: skip
force = click.option("--force", is_flag=True, help="Go on with what does not fit.")
dry_run = click.option("--dry-run", is_flag=True, help="Print the llama.cpp command line and do nothing.")


@dataclass(frozen=True)
class MachineOptions:
    """What was said of a machine that is not this one."""

    file: str | None
    gpu: str | None
    virtual_gpu: str | None
    ram_bandwidth: str | None
    cores: int | None


@dataclass(frozen=True)
class PlanOptions:
    """What the shared planning options said."""

    model: str
    plan_file: str | None
    machine: MachineOptions
    vram: str | None
    ram: str | None
    context: int
    slots: int | None
    overhead: str | None
    allow: str | None
    goal: str
    rpc: str | None
    force: bool
    passthrough: tuple[str, ...]

    def words(
        self, command: str, model: str, instead: tuple[str, ...] = (), arguments: tuple[str, ...] = ()
    ) -> list[str]:
        """What to type for a command with these options, some of them replaced: ("-c", "8192"), or with "" taken away.

        `arguments` go to llama.cpp, beside those that were given.  This very model was planned, so no other type of it
        is allowed.
        """
        allowed = ",".join(word for word in (self.allow or "").split(",") if word.strip() != "quant")
        said: dict[str, Any] = {
            "--vram": self.vram, "--ram": self.ram, "-c": self.context, "--slots": self.slots,
            "--overhead": self.overhead, "--allow": allowed, "--goal": self.goal, "--rpc": self.rpc,
            "--machine": self.machine.file, "--gpu": self.machine.gpu,
            "--virtual-gpu": self.machine.virtual_gpu, "--ram-bandwidth": self.machine.ram_bandwidth,
            "--cores": self.machine.cores,
        }  # fmt: skip
        said |= dict(zip(instead[::2], instead[1::2]))
        words = ["pyllamarun", command, model]
        for option, value in said.items():
            if value not in (None, "") and str(value) != str(DEFAULTS.get(option)):
                words += [option, str(value)]
        words += ["--force"] * self.force
        passed_on = [*self.passthrough, *arguments]
        return words + (["--", *passed_on] if passed_on else [])


def machine(function: Function) -> Function:
    """Adds the options that describe a machine; passes them as one `machine`."""

    @click.option(
        "--machine", "machine_file", metavar="FILE.toml", default=None,
        help="A machine that is not this one: gpus, ram, ram_bandwidth, cores.",
    )  # fmt: skip
    @click.option(
        "--gpu", metavar="NAME[,NAME]", default=None,
        help="Cards that are not here, by name: 'RTX 3060'.  In a build with CUDA, llama.cpp's own CUDA backend runs "
        "on a stand-in for them; in one without, they are virtual GPUs of that size.",
    )  # fmt: skip
    @click.option(
        "--virtual-gpu", metavar="SIZE[,SIZE]", default=None,
        help="Cards that are not here: virtual GPUs of these sizes, which compute on the CPU.",
    )  # fmt: skip
    @click.option(
        "--ram-bandwidth", metavar="SPEED", default=None,
        help="Nominal bandwidth of RAM, all channels together: 51.2GB/s.  Default: as measured here, or assumed.",
    )  # fmt: skip
    @click.option("--cores", type=click.IntRange(1, 4096), default=None, help="Physical cores of that machine.")
    @functools.wraps(function)
    def wrapper(
        machine_file: str | None, gpu: str | None, virtual_gpu: str | None, ram_bandwidth: str | None,
        cores: int | None, **others: Any,
    ) -> Any:  # fmt: skip
        return function(machine=MachineOptions(machine_file, gpu, virtual_gpu, ram_bandwidth, cores), **others)

    return wrapper


class TakesArguments(click.Command):
    """A command with any number of MODELs, after which `-- LLAMA.CPP ARGUMENTS` may stand: in the context's meta."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        position = args.index("--") if "--" in args else len(args)
        ctx.meta[PASSTHROUGH] = tuple(args[position + 1 :])
        _check_passthrough(ctx.meta[PASSTHROUGH])
        return super().parse_args(ctx, args[:position])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- LLAMA.CPP ARGUMENTS]"]


def planning(function: Function) -> Function:
    """Adds MODEL, the planning options and `-- LLAMA.CPP ARGUMENTS`; passes them as one `options`."""

    @click.argument("model", required=False)
    @click.argument("passthrough", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA.CPP ARGUMENTS]")
    @vram
    @ram
    @click.option(
        "-c", "--context", metavar="TOKENS", type=click.IntRange(min=1), default=DEFAULTS["-c"], show_default=True,
        help="Context, shared by the slots.",
    )  # fmt: skip
    @click.option(
        "--slots", type=click.IntRange(min=1), default=None,
        help="Requests served at once.  Default: 1; with --goal throughput, as many as generate most together.",
    )  # fmt: skip
    @click.option(
        "--goal", type=click.Choice(GOALS), default=DEFAULTS["--goal"], show_default=True,
        help="The least time a token for one request, or the most tokens a second for all slots together.",
    )  # fmt: skip
    @click.option(
        "--allow", metavar="WHAT[,WHAT]", default=None,
        help="What may be changed where that gains clearly: kv (a KV cache in q8_0 or q4_0), ub (other ubatches), ctx "
        "(half of the context, as often as need be); quant (a smaller type of the model, where it is slow or does not "
        "fit with all that: `plan` says which, and how to make it).",
    )  # fmt: skip
    @click.option(
        "--rpc", metavar="HOST:PORT[,HOST:PORT]", default=None,
        help="GPUs of other machines, where ggml-rpc-server runs: they count as GPUs before this machine's own, also "
        "in the order of --vram.  In a network that you trust only.",
    )  # fmt: skip
    @overhead
    @machine
    @click.option(
        "--plan", "plan_file", metavar="FILE", default=None,
        help="In place of MODEL and all of the above: a plan that `pyllamarun plan --save FILE` kept.",
    )  # fmt: skip
    @force
    @functools.wraps(function)
    def wrapper(
        model: str | None, plan_file: str | None, passthrough: tuple[str, ...], machine: MachineOptions,
        vram: str | None, ram: str | None, context: int, slots: int | None, goal: str, allow: str | None,
        rpc: str | None, overhead: str | None, force: bool, **others: Any,
    ) -> Any:  # fmt: skip
        if plan_file is not None:
            _check_alone()
        elif model is None:
            raise UsageError("No model is named.", remedy="Name one: a path, or what `pyllamarun list` shows.")
        if passthrough and not passthrough[0].startswith("-"):
            raise UsageError(
                f'"{passthrough[0]}" is one argument too many.',
                remedy="Write `--` before arguments that are meant for llama.cpp.",
            )
        _check_passthrough(passthrough)
        options = PlanOptions(
            model or "", plan_file, machine, vram, ram, context, slots, overhead, allow, goal, rpc, force, passthrough
        )
        return function(options=options, **others)

    return wrapper


def _check_passthrough(passthrough: tuple[str, ...]) -> None:
    for word in passthrough:
        if word.partition("=")[0] in OURS:
            raise UsageError(
                f"{word} cannot stand after `--`.",
                remedy="It has a place before it: MODEL -c TOKENS --slots N -p PROMPT --host HOST --port PORT.",
            )


def _check_alone() -> None:
    """Raises UsageError where something is asked besides what a saved plan has settled."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in SETTLED and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(
                f"{parameter.opts[0]} and --plan exclude each other.",
                why="A saved plan is carried out as it is.",
                remedy="Leave one of them out, or plan again with `pyllamarun plan MODEL --save FILE`.",
            )
