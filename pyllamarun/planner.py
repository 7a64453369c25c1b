"""Plans, as a library: opens what a plan is asked of, once for as many plans as are wanted.

from pyllamarun import Machine, Model, plan
print(plan(Model.open("llama-3-70b-Q4_K_M.gguf"), Machine.of(gpus="RTX 3060"), vram="11.5GiB").gpu_layers)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pyllamarun import paths
from pyllamarun.errors import ModelError
from pyllamarun.machine.cards import identify
from pyllamarun.machine.gpu import GpuSurvey
from pyllamarun.machine.host import Memory, memory_of, read_memory
from pyllamarun.machine.machine import HERE, Machine
from pyllamarun.models.gguf import Header
from pyllamarun.models.model import Model
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.output import printable
from pyllamarun.plan.plan import Plan, make_plan
from pyllamarun.plan.probe import Answer, Device, Probe, Refused
from pyllamarun.plan.request import Budget, Request, make_request
from pyllamarun.plan.saved import confirm
from pyllamarun.run.binaries import Binaries, find_binaries
from pyllamarun.run.rehearsed import Rehearsals
from pyllamarun.run.stage import CARDS, REAL, Stage, open_probe, open_stage, survey_stage

# Samplers that run on the GPU look into the vocabulary, which a skeleton does not have.
NEEDS_VOCABULARY = ("-bs", "--backend-sampling")
UNKNOWN_ARCHITECTURE = "unknown model architecture"  # llama_model_create
NEIGHBOUR_SECONDS = 2.0  # for the driver to say who holds memory; a plan does without


class Planner:
    """Plans for one machine, as long as its `with` block lasts: the memory probe is started once, at its beginning.

    The probe holds a CUDA context on each card; `free_gpus` ends it, before a plan is carried out.

    `overhead_bytes` is what a process holds on each GPU besides llama.cpp's buffers; None: assumed.
    """

    def __init__(self, machine: Machine = HERE, *, overhead_bytes: int | None = None) -> None:
        self.machine = machine
        self.binaries: Binaries = find_binaries()
        self._overhead_bytes = overhead_bytes
        self._stack = ExitStack()
        self._probing = ExitStack()
        self._probe: Probe | None = None
        self._probe_knows_cards = False
        self._skeletons: list[tuple[Header, Path]] = []

    def __enter__(self) -> Planner:
        with self._stack:
            self._stage = self._stack.enter_context(open_stage(self.binaries, self.machine, self._overhead_bytes))
            self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pyllamarun-")))
            self._start_probe()  # which takes its time, while a header is read
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free_gpus()
        self._stack.close()

    @functools.cached_property
    def devices(self) -> tuple[Device, ...]:
        """The GPUs that llama.cpp sees."""
        return self._running_probe().devices()

    @functools.cached_property
    def stage(self) -> Stage:
        """What llama.cpp's programs run on, its cards known."""
        if self._stage.kind != REAL:
            return self._stage
        cards = [identify(device.description, device.total_bytes) for device in self.devices]
        return self._stage.knowing(cards, self.binaries)

    def free_gpus(self) -> None:
        """Ends the probe; the next plan starts it again."""
        self._probing.close()
        self._probe = None

    def memory(self, ram: Budget | None = None) -> Memory:
        """Host memory of the machine: as it was described, or by --ram alone where it is not here; else this one's."""
        described = self.machine.ram_bytes
        if described is None and not self.machine.is_here and ram and ram.kind == "bytes":
            described = int(ram.amount)
        if described is not None:
            return memory_of(described)
        return replace(read_memory(), assumed=not self.machine.is_here)

    def plan(self, model: Model, request: Request) -> Plan:
        """Raises DoesNotFit, UsageError, Refused or BinaryError."""
        memory, ask = self.memory(request.ram), self._ask(model.header)
        return make_plan(model.header, request, self.devices, memory, ask, lambda: self._survey)

    def confirm(self, model: Model, plan: Plan) -> None:
        """Holds a plan that was made before against what llama.cpp answers now: see `confirm` in plan/saved.py."""
        devices = self.devices  # as they are without a probe on them
        confirm(plan, self._ask(model.header)(plan.argv[1:]), devices)

    @functools.cached_property
    def _survey(self) -> GpuSurvey:
        """Who holds memory of the GPUs, asked once for all plans that need to say it."""
        return survey_stage(self.stage, NEIGHBOUR_SECONDS)

    def rehearsals(self, header: Header) -> Rehearsals:
        """What rehearsals of a model have shown on this stage."""
        return Rehearsals(paths.state_folder() / "rehearsals", header, self.stage, self.binaries.build)

    def _start_probe(self) -> Probe:
        self._probe = self._probing.enter_context(open_probe(self.binaries, self._stage))
        self._probe_knows_cards = self._stage.kind != REAL
        return self._probe

    def _running_probe(self) -> Probe:
        return self._probe or self._start_probe()

    def _ask(self, header: Header) -> _Questions:
        probe, cards = self._running_probe(), self.stage.environment.get(CARDS)
        if not self._probe_knows_cards and cards is not None:
            probe.tell_cards(cards)
        self._probe_knows_cards = True
        return _Questions(probe, header, self.skeleton(header), self.rehearsals(header))

    def skeleton(self, header: Header) -> Path:
        """The model's skeleton, which is there as long as the planner."""
        for known, path in self._skeletons:
            if known is header:
                return path
        path = write_skeleton(header, self._folder / f"{len(self._skeletons)}.gguf")
        self._skeletons.append((header, path))
        return path


class _Questions:
    """Asks the probe about a model by its skeleton, and takes into account what rehearsals of it have shown."""

    def __init__(self, probe: Probe, header: Header, skeleton: Path, rehearsals: Rehearsals) -> None:
        self._probe, self._rehearsals = probe, rehearsals
        self._model, self._architecture, self._skeleton = str(header.path), header.architecture, str(skeleton)

    def __call__(self, arguments: Sequence[str]) -> Answer:
        return self._rehearsals.applied(arguments, self._answer(arguments))

    def _answer(self, arguments: Sequence[str]) -> Answer:
        if any(argument in NEEDS_VOCABULARY for argument in arguments):
            return self._probe.ask(arguments)
        try:
            return self._probe.ask(["-m", self._skeleton, *arguments[2:]])
        except Refused as error:
            what, why = (text.replace(self._skeleton, self._model) for text in (error.what, error.why))
            if UNKNOWN_ARCHITECTURE in why and self._model in what:
                raise ModelError(
                    f"{self._model}: llama.cpp does not know the architecture {printable(self._architecture)}.",
                    why="It is newer than this llama.cpp, or not meant for it.",
                    remedy="Take another model; `pyllamarun --version` says which llama.cpp this is.",
                ) from None
            raise Refused(what, why=why) from None


def plan(model: Model | str | Path, machine: Machine = HERE, **wishes: Any) -> Plan:
    """One plan.  `wishes` are those of `make_request`: vram="11.5GiB", context=8192, slots=4, arguments=["-ub", "256"].

    Raises UsageError, ModelError, DownloadError, DoesNotFit, Refused or BinaryError, each with what to do next.
    """
    request = make_request(**wishes)
    with Planner(machine, overhead_bytes=request.overhead_bytes) as planner:
        return planner.plan(model if isinstance(model, Model) else Model.open(model), request)
