"""pyllamarun quantize: a smaller file of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pyllamarun.cli.options import as_json, dry_run


@click.command(name="quantize", short_help="Make a smaller file of a model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("type_name", metavar="TYPE")
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), default=None, help="The file to write.")
@click.option("-t", "--threads", type=click.IntRange(min=1), default=None, help="Default: the physical cores.")
@as_json
@dry_run
def command(
    model: Path,
    type_name: str,
    target: Path | None,
    threads: int | None,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Requantizes MODEL to TYPE (Q3_K_M, Q2_K, ...), into a new file beside it.

    The new file appears under its name only when it is complete; nothing is overwritten.
    """
    import subprocess
    import tempfile
    from contextlib import AbstractContextManager

    from pyllamarun import output, shell
    from pyllamarun.machine.host import read_cpu
    from pyllamarun.models import quantize as quantizing
    from pyllamarun.models.gguf import read_header
    from pyllamarun.models.requantize import requantized
    from pyllamarun.models.skeleton import write_skeleton
    from pyllamarun.run.binaries import find_binaries
    from pyllamarun.run.command import environment
    from pyllamarun.run.process import output_of, running
    from pyllamarun.units import format_size

    binaries = find_binaries()
    quantizer = binaries.path("llama-quantize")
    variables = environment(binaries, virtual_gpus=())

    def start(argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running(argv, variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    _, help_text = output_of([quantizer, "--help"], variables)
    type_name = quantizing.check_type(type_name, quantizing.known_types(help_text))
    source = read_header(model.expanduser())
    target = target.expanduser() if target else quantizing.default_target(source, type_name)
    quantizing.check_target(source, target, type_name)
    threads = threads or read_cpu().physical_cores
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder:
        skeleton = write_skeleton(source, Path(folder) / "skeleton.gguf")
        forecast = requantized(start, quantizer, skeleton, source, type_name)
    if forecast.needs_imatrix:
        raise quantizing.needs_imatrix(type_name)
    if dry_run:
        argv = [quantizer, "--allow-requantize", source.path, target, type_name, threads]
        output.print_text(shell.join(map(str, argv)))
        return
    warning = quantizing.quality_warning(type_name, source)
    for line in warning.splitlines():
        output.note(f"warning: {line}")
    output.note(f"{format_size(source.weights_bytes)} will become {format_size(forecast.header.weights_bytes)}.")
    quantizing.check_disk(target, forecast.header.file_bytes)
    with output.progress("tensors", len(source.tensors)) as advance:
        result = quantizing.quantize(start, quantizer, source, target, type_name, threads, advance)
    if as_json:
        data = asdict(result) | {"warnings": warning.splitlines()}
        output.print_json(output.envelope("quantize", data))
        return
    output.print_text(
        f"{result.target}: {format_size(result.before_bytes)} -> {format_size(result.after_bytes)} "
        f"({result.after_bytes / result.before_bytes:.0%})"
    )
    if result.fallback_tensors:
        output.print_text(
            f"{result.fallback_tensors} of {result.tensors} tensors have rows that do not fit {type_name}'s blocks "
            "and were given another type, as llama.cpp chose."
        )
