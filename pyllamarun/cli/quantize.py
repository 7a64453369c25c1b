"""pyllamarun quantize: smaller files of the same model."""

from __future__ import annotations

import re
from typing import Any

import click

from pyllamarun.cli.options import DEFAULTS, as_json, dry_run, machine


class _Command(click.Command):
    """`--imatrix auto TEXT` has two words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for i, word in enumerate(args[:-1]):
            if word == "--":
                break
            if word == "--imatrix=auto" or args[i : i + 2] == ["--imatrix", "auto"]:
                args[i : i + 3 - ("=" in word)] = ["--imatrix-text", *args[i + 2 - ("=" in word) :][:1]]
                break
        return super().parse_args(ctx, args)


@click.command(name="quantize", cls=_Command, short_help="Make a smaller file of a model.")
@click.argument("model")
@click.argument("types", nargs=-1, metavar="[TYPE]...")
@click.option(
    "-o", "--output", metavar="PATH", default=None,
    help="The file to write, or a folder.  Default: beside the model; for a model that another program keeps, "
    "pyllamarun's own folder.",
)  # fmt: skip
@click.option(
    "--fit", metavar="SIZE", default=None,
    help="In place of TYPE: the largest with which all layers are on the GPU within this much VRAM; with --speed, the "
    "largest that is that fast within it.",
)  # fmt: skip
@click.option("--speed", metavar="TOK/S", default=None, help="With --fit: how fast it is to generate, as 2tok/s.")
@click.option(
    "--imatrix", metavar="FILE", default=None,
    help="An importance matrix; `--imatrix auto TEXT` computes one from a text, within the VRAM budget, and keeps it.",
)  # fmt: skip
@click.option("--imatrix-text", metavar="TEXT", default=None, hidden=True)
@click.option(
    "--tensor-type", "tensor_types", metavar="PATTERN=TYPE", multiple=True,
    help="This type for tensors whose name matches: attn_v=q6_K.  May be repeated.",
)  # fmt: skip
@click.option("--output-tensor-type", "output_type", metavar="TYPE", default="", help="The type of output.weight.")
@click.option("--token-embedding-type", "embedding_type", metavar="TYPE", default="", help="That of token_embd.weight.")
@click.option("--pure", is_flag=True, help="The same type for all matrices, in place of the type's mixture.")
@click.option("--keep-split", is_flag=True, help="As many files as the source has; default: one.")
@click.option("--hash-source", is_flag=True, help="Also compute the sha256 of the source, to be recorded in the file.")
@click.option("-t", "--threads", type=click.IntRange(min=1), default=None, help="Default: the physical cores.")
@click.option("--plan/--no-plan", "plans", default=True, help="Whether to plan the files first; with --fit, always.")
@click.option("--vram", metavar="SIZE", default=None, help="The VRAM to plan for.  Default: all that is free.")
@click.option(
    "-c", "--context", metavar="TOKENS", type=click.IntRange(min=1), default=DEFAULTS["-c"], show_default=True,
    help="The context to plan for.",
)  # fmt: skip
@machine
@as_json
@dry_run
def command(model: str, types: tuple[str, ...], **said: Any) -> None:
    """Makes smaller files of MODEL, one of each TYPE (Q3_K_M, Q2_K, ...), by llama-quantize.

    MODEL is a path or the name of a model on this machine (`pyllamarun list`).  Of one that is not here, --dry-run says
    what it would become, from its header.

    First is shown what the files will be, tensor by tensor, and how they would run.  They appear under their names when
    they are complete and have been read back; nothing is overwritten.
    """
    from pyllamarun.cli.quantizing import Asked, run
    from pyllamarun.errors import UsageError

    if bool(types) == (said["fit"] is not None):
        raise UsageError(
            "Neither a type nor --fit is given." if not types else "TYPE and --fit exclude each other.",
            remedy="pyllamarun quantize MODEL Q3_K_M, or pyllamarun quantize MODEL --fit 11.5GiB",
        )
    if said["fit"] is not None and said["vram"] is not None:
        raise UsageError("--fit says how much VRAM there is; --vram does too.", remedy="Leave --vram out.")
    if said["speed"] is not None and said["fit"] is None:
        raise UsageError("--speed is a goal for --fit.", remedy="--fit max --speed 2tok/s")
    if said["imatrix"] is not None and said["imatrix_text"] is not None:
        raise UsageError("One importance matrix at a time.", remedy="Leave one --imatrix out.")
    speed = said.pop("speed")
    run(Asked(model=model, types=types, speed=_speed(speed) if speed is not None else None, **said))


def _speed(text: str) -> float:
    """Tokens a second, in words as they are printed: "2tok/s", "2 t/s", "2"."""
    from pyllamarun.errors import UsageError

    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(?:(?:tok(?:en)?s?|t)\s*/\s*s)?\s*", text, re.ASCII)
    if match is None or not 0 < float(match[1]) < 1e9:
        raise UsageError(f'"{text}" is no speed.', remedy="Write tokens a second: --speed 2tok/s")
    return float(match[1])
