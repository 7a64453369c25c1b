"""From options to a plan: reads the model, starts the probe, asks it.  Imported only when a command runs."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.cli.options import PlanOptions
from pyllamarun.errors import BinaryError
from pyllamarun.machine.host import read_memory
from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.plan.plan import Plan, make_plan
from pyllamarun.plan.probe import Answer, Device, Probe, Refused, parse_devices
from pyllamarun.plan.request import Request, VirtualGpu, context_bytes, parse_budgets, parse_virtual_gpus
from pyllamarun.run.binaries import PROBE, Binaries, find_binaries
from pyllamarun.run.command import environment, shell_line
from pyllamarun.run.process import output_of, running
from pyllamarun.units import parse_size

# Samplers that run on the GPU look into the vocabulary, which a skeleton does not have.
NEEDS_VOCABULARY = ("-bs", "--backend-sampling")


@dataclass(frozen=True)
class Planned:
    """A plan, with what is needed to carry it out."""

    plan: Plan
    binaries: Binaries
    virtual_gpus: tuple[VirtualGpu, ...]

    def argv(self, program: str, *more: str) -> list[str]:
        """The plan's arguments for llama-server or llama-cli."""
        return [str(self.binaries.path(program)), *self.plan.argv[1:], *more]

    def environment(self) -> dict[str, str]:
        return environment(self.binaries, self.virtual_gpus)

    def shell_line(self, argv: Sequence[str]) -> str:
        return shell_line(argv, self.virtual_gpus, self.binaries)


def plan_model(options: PlanOptions) -> Planned:
    """Raises what can go wrong on the way: UsageError, ModelError, DoesNotFit, Refused, BinaryError."""
    header = read_header(options.model.expanduser())
    overhead_bytes = parse_size(options.overhead) if options.overhead is not None else None
    request = Request(
        context_tokens=options.context,
        slots=options.slots,
        budgets=parse_budgets(options.vram) if options.vram is not None else (),
        overhead_bytes=overhead_bytes,
        passthrough=options.passthrough,
        force=options.force,
    )
    binaries = find_binaries()
    virtual_gpus = parse_virtual(options.virtual_gpu, overhead_bytes)
    devices = list_devices(binaries, virtual_gpus)
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder, open_probe(binaries, virtual_gpus) as probe:
        model, skeleton = str(header.path), str(Path(folder) / "skeleton.gguf")
        write_skeleton(header, Path(skeleton))

        def ask(arguments: Sequence[str]) -> Answer:
            if any(argument in NEEDS_VOCABULARY for argument in arguments):
                return probe.ask(arguments)
            try:
                return probe.ask(["-m", skeleton, *arguments[2:]])
            except Refused as error:
                raise Refused(error.what.replace(skeleton, model), why=error.why.replace(skeleton, model)) from None

        plan = make_plan(header, request, devices, read_memory(), ask)
    return Planned(plan, binaries, virtual_gpus)


def parse_virtual(text: str | None, overhead_bytes: int | None) -> tuple[VirtualGpu, ...]:
    """Virtual cards that hold a context, as a plan assumes of a real one."""
    return () if text is None else parse_virtual_gpus(text, context_bytes(overhead_bytes))


def list_devices(binaries: Binaries, virtual_gpus: Sequence[VirtualGpu]) -> tuple[Device, ...]:
    """The GPUs that llama.cpp would see."""
    status, text = output_of([binaries.path(PROBE), "--devices"], environment(binaries, virtual_gpus))
    lines = [line for line in text.splitlines() if line.startswith("[")]
    if status != 0 or not lines:
        raise BinaryError("llama.cpp cannot list its devices.", why=text.strip(), remedy="Run `pyllamarun doctor`.")
    return parse_devices(lines[-1])


@contextmanager
def open_probe(binaries: Binaries, virtual_gpus: Sequence[VirtualGpu]) -> Iterator[Probe]:
    argv, pipe = [binaries.path(PROBE)], subprocess.PIPE
    with running(
        argv, environment(binaries, virtual_gpus), stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as process:
        yield Probe(process)
