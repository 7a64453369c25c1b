"""From options to a plan: reads the model, sets the stage, asks the probe.  Imported only when a command runs."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyllamarun import paths
from pyllamarun.cli.options import PlanOptions
from pyllamarun.errors import BinaryError, UsageError
from pyllamarun.machine.cards import find_card, identify
from pyllamarun.machine.host import read_memory
from pyllamarun.models.gguf import Header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.models.sources import Source, resolve
from pyllamarun.plan.plan import Plan, make_plan
from pyllamarun.plan.probe import Answer, Device, Probe, Refused, parse_devices
from pyllamarun.plan.request import Request, VirtualGpu, context_bytes, parse_budget, parse_budgets, parse_virtual_gpus
from pyllamarun.run.binaries import PROBE, Binaries, find_binaries
from pyllamarun.run.command import shell_line
from pyllamarun.run.process import output_of, running
from pyllamarun.run.rehearsal import Rehearsals
from pyllamarun.run.stage import REAL, Stage, real_stage, standin_stage, virtual_stage
from pyllamarun.units import parse_size

# Samplers that run on the GPU look into the vocabulary, which a skeleton does not have.
NEEDS_VOCABULARY = ("-bs", "--backend-sampling")


@dataclass(frozen=True)
class Planned:
    """A plan, with what is needed to carry it out; the stage is there until the plan is left."""

    plan: Plan
    source: Source
    header: Header
    binaries: Binaries
    stage: Stage
    devices: tuple[Device, ...]
    rehearsals: Rehearsals

    def argv(self, program: str, *more: str) -> list[str]:
        """The plan's arguments for llama-server or llama-cli."""
        return [str(self.binaries.path(program)), *self.plan.argv[1:], *more]

    def shell_line(self, argv: Sequence[str]) -> str:
        return shell_line(argv, {name: self.stage.environment[name] for name in self.stage.shown})


@contextmanager
def planned(options: PlanOptions) -> Iterator[Planned]:
    """Raises what can go wrong on the way: UsageError, ModelError, DownloadError, DoesNotFit, Refused, BinaryError."""
    source = resolve(options.model)
    if any(argument in NEEDS_VOCABULARY for argument in options.passthrough):
        source.check_here()
    header = source.read_header()
    overhead_bytes = parse_size(options.overhead) if options.overhead is not None else None
    request = Request(
        context_tokens=options.context,
        slots=options.slots,
        budgets=parse_budgets(options.vram) if options.vram is not None else (),
        overhead_bytes=overhead_bytes,
        passthrough=options.passthrough,
        force=options.force,
        ram=parse_budget(options.ram) if options.ram is not None else None,
    )
    binaries = find_binaries()
    with open_stage(binaries, options.gpu, options.virtual_gpu, overhead_bytes) as stage:
        devices = list_devices(binaries, stage)
        if stage.kind == REAL:
            stage = stage.knowing([identify(device.description, device.total_bytes) for device in devices], binaries)
        rehearsals = Rehearsals(paths.state_folder() / "rehearsals", header, stage, binaries.build)
        with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder, open_probe(binaries, stage) as probe:
            ask = _Questions(probe, header, Path(folder) / "skeleton.gguf", rehearsals)
            plan = make_plan(header, request, devices, read_memory(), ask)
        yield Planned(plan, source, header, binaries, stage, devices, rehearsals)


class _Questions:
    """Asks the probe about a model by its skeleton, and takes into account what rehearsals of it have shown."""

    def __init__(self, probe: Probe, header: Header, skeleton: Path, rehearsals: Rehearsals) -> None:
        self._probe, self._rehearsals = probe, rehearsals
        self._model, self._skeleton = str(header.path), str(write_skeleton(header, skeleton))

    def __call__(self, arguments: Sequence[str]) -> Answer:
        return self._rehearsals.applied(arguments, self._answer(arguments))

    def _answer(self, arguments: Sequence[str]) -> Answer:
        if any(argument in NEEDS_VOCABULARY for argument in arguments):
            return self._probe.ask(arguments)
        try:
            return self._probe.ask(["-m", self._skeleton, *arguments[2:]])
        except Refused as error:
            what, why = (text.replace(self._skeleton, self._model) for text in (error.what, error.why))
            raise Refused(what, why=why) from None


def open_stage(
    binaries: Binaries, gpu: str | None, virtual_gpu: str | None, overhead_bytes: int | None = None
) -> AbstractContextManager[Stage]:
    """The stage that --gpu and --virtual-gpu ask for.  A card that is not here holds a context, as a real one would."""
    if gpu is not None and virtual_gpu is not None:
        raise UsageError("--gpu and --virtual-gpu exclude each other.", remedy="Name cards or give sizes.")
    context = context_bytes(overhead_bytes)
    if gpu is not None:
        cards = [find_card(name) for name in gpu.split(",")]
        if binaries.build.backend == "cuda":
            return standin_stage(binaries, cards, context)
        return virtual_stage(
            binaries, [VirtualGpu(card.memory_bytes, card.reserved_bytes + context, card) for card in cards]
        )
    if virtual_gpu is not None:
        return virtual_stage(binaries, parse_virtual_gpus(virtual_gpu, context))
    return real_stage(binaries)


def list_devices(binaries: Binaries, stage: Stage) -> tuple[Device, ...]:
    """The GPUs that llama.cpp would see."""
    status, text = output_of([binaries.path(PROBE), "--devices"], stage.environment)
    lines = [line for line in text.splitlines() if line.startswith("[")]
    if status != 0 or not lines:
        raise BinaryError("llama.cpp cannot list its devices.", why=text.strip(), remedy="Run `pyllamarun doctor`.")
    return parse_devices(lines[-1])


@contextmanager
def open_probe(binaries: Binaries, stage: Stage) -> Iterator[Probe]:
    argv, pipe = [binaries.path(PROBE)], subprocess.PIPE
    with running(argv, stage.environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        yield Probe(process)
