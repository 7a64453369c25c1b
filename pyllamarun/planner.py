"""Opens what a plan is asked of, once for as many plans as are wanted: stage, probe, devices, memory."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pyllamarun import paths
from pyllamarun.errors import ModelError
from pyllamarun.machine.bandwidth import known_rates, measure
from pyllamarun.machine.cards import identify
from pyllamarun.machine.core_rates import ASSUMED_BANDWIDTH, ASSUMED_CORES, assumed, nominal
from pyllamarun.machine.gpu import GpuSurvey
from pyllamarun.machine.host import Memory, memory_of, read_memory
from pyllamarun.machine.machine import HERE, Machine
from pyllamarun.machine.rates import HostRates
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.model import Model
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.output import printable
from pyllamarun.planning.hardware import Hardware, hardware_of
from pyllamarun.planning.plan import Plan, make_plan
from pyllamarun.planning.probe import Answer, Crashed, Device, Probe, Refused
from pyllamarun.planning.request import RPC, SERVER, Budget, Request, fixed_value, has_option
from pyllamarun.planning.saved import confirm
from pyllamarun.run.binaries import PROBE, Binaries, find_binaries
from pyllamarun.run.command import environment
from pyllamarun.run.process import output_of
from pyllamarun.run.rehearsed import Rehearsals
from pyllamarun.run.stage import CARDS, REAL, Stage, list_rpc_devices, open_probe, open_stage, survey_stage

# Samplers that run on the GPU look into the vocabulary, which a skeleton does not have.
NEEDS_VOCABULARY = ("-bs", "--backend-sampling")
# Files beside the model that llama.cpp is to read too: a draft model, a multimodal projector.
COMPANIONS = (("-md", "--model-draft", "--spec-draft-model"), ("-mm", "--mmproj"))
UNKNOWN_ARCHITECTURE = "unknown model architecture"  # llama_model_create
NEIGHBOUR_SECONDS = 2.0  # for the driver to say who holds memory; a plan does without


# What the shapes in a graph depend on besides the model.
ABOUT_SHAPES = (
    RPC,
    ("-c",),
    ("-np",),
    ("-ub", "--ubatch-size"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
)


class Planner:
    """Plans for one machine, as long as its `with` block lasts: the memory probe is started once, at its beginning.

    The probe holds a CUDA context on each card; `free_gpus` ends it, before a plan is carried out.

    `overhead_bytes` is what a process holds on each GPU besides llama.cpp's buffers; None: assumed.  `host` is how fast
    RAM and CPU are, where that is known; None: as measured, described or assumed.
    """

    def __init__(
        self, machine: Machine = HERE, *, overhead_bytes: int | None = None, host: HostRates | None = None
    ) -> None:
        self.machine = machine
        self._host = host
        self.binaries: Binaries = find_binaries()
        self._overhead_bytes = overhead_bytes
        self._stack = ExitStack()
        self._probing = ExitStack()
        self._probe: Probe | None = None
        self._probe_knows_cards = False
        self._rpc_devices: dict[str, tuple[Device, ...]] = {}
        self._rpc_probe: tuple[Sequence[str | None], Probe] | None = None
        self._skeletons: list[tuple[Header, Path]] = []
        self._sound: set[str] = set()

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

    def devices_of(self, rpc: str) -> tuple[Device, ...]:
        """These with those of RPC servers before them, as llama.cpp has them."""
        if not rpc:
            return self.devices
        if rpc not in self._rpc_devices:
            self._rpc_devices[rpc] = list_rpc_devices(self.binaries, self._stage, rpc)
        return (*self._rpc_devices[rpc], *self.devices)

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
        self._probe = self._rpc_probe = None

    def memory(self, ram: Budget | None = None) -> Memory:
        """Host memory of the machine: as it was described, or by --ram alone where it is not here; else this one's."""
        described = self.machine.ram_bytes
        if described is None and not self.machine.is_here and ram and ram.kind == "bytes":
            described = int(ram.amount)
        if described is not None:
            return memory_of(described)
        return replace(read_memory(), assumed=not self.machine.is_here)

    @functools.cached_property
    def hardware(self) -> Hardware:
        """How fast its parts are.  NVML is asked about cards that are not in the table only: it takes time."""
        cards = self.stage.cards
        asked = self.stage.kind == REAL and bool(self.devices) and not all(cards)
        return hardware_of(self.devices, cards, self._survey.gpus if asked else (), self._host or self._host_rates())

    def _host_rates(self) -> HostRates:
        """Measured, where that was done on this machine; as the machine is described; or assumed."""
        bandwidth, cores = self.machine.ram_bandwidth_bytes_per_second, self.machine.cores
        if bandwidth is None and cores is None:
            measured = known_rates(paths.state_folder(), self.binaries.build.commit) if self.machine.is_here else None
            return measured or assumed()
        return nominal(bandwidth or ASSUMED_BANDWIDTH, cores or ASSUMED_CORES)

    def plan(self, model: Model, request: Request, memory: Memory | None = None) -> Plan:
        """`memory`, where plans are to be compared, is what was read for all of them.

        Raises DoesNotFit, UsageError, ModelError, Refused or BinaryError.
        """
        self._check_companions(request.arguments)
        memory, ask = memory or self.memory(request.ram), self._ask(model.header, request.program)
        devices, hardware = self.devices_of(request.rpc), self.hardware
        return make_plan(model.header, request, devices, memory, ask, hardware, lambda: self._survey)

    def confirm(self, model: Model, plan: Plan) -> None:
        """Holds a plan that was made before against what llama.cpp answers now: see `confirm` in planning/saved.py."""
        self._check_companions(plan.argv)
        devices = self.devices_of(fixed_value(plan.argv, *RPC) or "")  # as they are without a probe on them
        confirm(plan, self._ask(model.header)(plan.argv[1:]), devices)

    def _check_companions(self, arguments: Sequence[str]) -> None:
        """They are files from strangers, too: what our reader refuses, llama.cpp is not asked about."""
        for names in COMPANIONS:
            path = fixed_value(arguments, *names)
            if path is not None and path not in self._sound:
                read_header(Path(path))
                self._sound.add(path)

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

    def _ask(self, header: Header, program: str = SERVER) -> _Questions:
        skeleton, rehearsals = self.skeleton(header), self.rehearsals(header)
        return _Questions(self._probe_for, self.free_gpus, header, skeleton, rehearsals, program)

    def _probe_for(self, arguments: Sequence[str]) -> Probe:
        """The probe that can answer: with RPC servers it is another, and a new one wherever more than places changes.

        ggml-rpc remembers how much room an operation takes by the shape of its result alone, not of its sources
        (ggml_backend_rpc_buffer_type_get_alloc_size): so also for another context than it was asked about.
        """
        cards = self.stage.environment.get(CARDS)
        if not has_option(arguments, *RPC):
            probe = self._running_probe()
            if not self._probe_knows_cards and cards is not None:
                probe.tell_cards(cards)
            self._probe_knows_cards = True
            return probe
        about = [fixed_value(arguments, *names) for names in ABOUT_SHAPES]
        if self._rpc_probe is None or self._rpc_probe[0] != about:
            probe = self._probing.enter_context(open_probe(self.binaries, self.stage))
            if self.stage.kind == REAL and cards is not None:
                probe.tell_cards(cards)
            self._rpc_probe = about, probe
        return self._rpc_probe[1]

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

    def __init__(
        self,
        probe_for: Callable[[Sequence[str]], Probe],
        forget_probe: Callable[[], None],
        header: Header,
        skeleton: Path,
        rehearsals: Rehearsals,
        program: str,
    ) -> None:
        self._probe_for, self._forget_probe = probe_for, forget_probe
        self._rehearsals, self._program = rehearsals, program
        self._model, self._architecture, self._skeleton = str(header.path), header.architecture, str(skeleton)

    def __call__(self, arguments: Sequence[str]) -> Answer:
        try:
            answer = self._answer(arguments)
        except Crashed as error:
            self._forget_probe()  # the next question gets a new one
            raise ModelError(
                f"{self._model}: llama.cpp crashes on this model, or on it with these arguments.",
                why=error.why,
                remedy="What the file says of itself may not go together: take another one of this model.",
            ) from None
        return self._rehearsals.applied(arguments, answer) if self._program == SERVER else answer

    def _answer(self, arguments: Sequence[str]) -> Answer:
        if any(argument in NEEDS_VOCABULARY for argument in arguments):
            return self._probe_for(arguments).ask(arguments, self._program)
        try:
            return self._probe_for(arguments).ask(["-m", self._skeleton, *arguments[2:]], self._program)
        except Refused as error:
            what, why = (text.replace(self._skeleton, self._model) for text in (error.what, error.why))
            if UNKNOWN_ARCHITECTURE in why and self._model in what:
                raise ModelError(
                    f"{self._model}: llama.cpp does not know the architecture {printable(self._architecture)}.",
                    why="It is newer than this llama.cpp, or not meant for it.",
                    remedy="Take another model; `pyllamarun --version` says which llama.cpp this is.",
                ) from None
            raise Refused(what, why=why) from None


def read_bandwidth() -> HostRates:
    """Measures this machine's CPU and RAM, for the plans to come until it is started again; takes some two seconds.

    Raises BinaryError where that fails.
    """
    binaries = find_binaries()
    probe = binaries.path(PROBE)

    def run() -> str:
        return output_of([probe, "--read-bandwidth"], environment(binaries, ()))[1]

    return measure(paths.state_folder(), binaries.build.commit, run)
