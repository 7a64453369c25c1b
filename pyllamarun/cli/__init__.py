"""The command line: one module a command, loaded only when it is used."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

from pyllamarun import __version__
from pyllamarun.errors import PyllamarunError

COMMANDS = (
    "doctor", "list", "inspect", "plan", "rehearse", "pull", "verify", "rm", "quantize", "compare", "run", "serve",
)  # fmt: skip
INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM.  Like KeyboardInterrupt no Exception: on its way out, everything that a command started is stopped."""


def _terminate(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"pyllamarun.cli.{cmd_name}")
        command: click.Command = module.command
        return command


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from pyllamarun.run.binaries import find_binaries

    build = find_binaries().build
    click.echo(f"pyllamarun {__version__}, llama.cpp {build.tag} ({build.short_commit}), backend {build.backend}")
    ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "PYLLAMARUN",
        "max_content_width": 110,
    },
)
@click.option(
    "--version", is_flag=True, callback=_print_version, expose_value=False, is_eager=True,
    help="Versions of pyllamarun and llama.cpp, and the backend.",
)  # fmt: skip
def group() -> None:
    """Runs a model that is larger than your GPU, at exactly the VRAM you allow."""


def main(argv: list[str] | None = None) -> None:
    """Runs a command and exits.

    0 ok, 1 unexpected, 2 usage, 3 does not fit, 4 model or download, 5 binaries, 6 server.
    """
    arguments = sys.argv[1:] if argv is None else argv
    _mend_streams()
    code = _exit_code(arguments)
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_stdout()
    sys.exit(code)


def _mend_streams() -> None:
    """Streams that were closed lead nowhere, and what a terminal cannot show is escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            while os.open(os.devnull, os.O_RDWR) < number:
                pass
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _give_up_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit_code(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = group.main(arguments, prog_name="pyllamarun", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        if "--json" in arguments:
            from pyllamarun.errors import UsageError

            return _report(UsageError(error.format_message()), arguments)
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    except PyllamarunError as error:
        return _report(error, arguments)
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except Exception as error:
        if os.environ.get("PYLLAMARUN_DEBUG") == "1":
            raise
        return _report(
            PyllamarunError(
                f"Something unexpected went wrong: {type(error).__name__}: {error}",
                remedy="Set PYLLAMARUN_DEBUG=1 and run it again for a traceback, and please report it.",
            ),
            arguments,
        )


def _report(error: PyllamarunError, arguments: list[str]) -> int:
    from pyllamarun import output

    if os.environ.get("PYLLAMARUN_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    try:
        if "--json" in arguments:
            output.print_json(output.error_envelope(command, error))
        else:
            output.print_error(error)
    except BrokenPipeError:
        _give_up_stdout()
    return error.exit_code
