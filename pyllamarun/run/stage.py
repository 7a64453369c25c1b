"""What llama.cpp's programs run on: this machine's own GPUs, virtual ones, or cards on the CUDA stand-in."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pyllamarun.errors import UsageError
from pyllamarun.machine.cards import Card
from pyllamarun.machine.gpu import NVML_TIMEOUT_SECONDS, GpuSurvey, read_survey, survey_gpus
from pyllamarun.machine.machine import Machine
from pyllamarun.planning.probe import DEVICES_SECONDS, WAIT, Device, Probe
from pyllamarun.planning.request import VirtualGpu, context_bytes
from pyllamarun.run.binaries import HOLLOW_CPU, NVML_STANDIN, PROBE, STANDIN, Binaries
from pyllamarun.run.command import environment, exact_mib
from pyllamarun.run.process import output_of, running
from pyllamarun.units import KIB, MIB

STATE = "PYLLAMARUN_VIRTUAL_STATE"
CARDS = "PYLLAMARUN_CARDS"
MOST_SECONDS = 3600
REAL, VIRTUAL, ON_STANDIN = "real", "virtual", "standin"

_STANDIN_NAMES = ("libcudart.so.12", "libcudart.so.13", "libcublas.so.12", "libcublas.so.13", "libcublasLt.so.12",
                  "libcublasLt.so.13", "libcuda.so.1")  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What one process holds on one device, in bytes; context, pool and allocations are 0 on a virtual GPU.

    `peak_bytes` is the most that the first three came to at any moment.
    """

    context_bytes: int
    buffer_bytes: int
    pool_bytes: int
    peak_bytes: int
    pool_peak_bytes: int
    allocations: int


@dataclass(frozen=True)
class Stage:
    """`environment` is for the programs; `shown`, those of its variables that a pasted command line needs.

    `cards` are the models of card that its GPUs are or stand for, in ggml's order, as far as they are known;
    `without_kernels`, those of them that the CUDA backend was not compiled for.
    """

    kind: str
    environment: Mapping[str, str]
    cards: tuple[Card | None, ...] = ()
    without_kernels: tuple[Card, ...] = ()
    shown: tuple[str, ...] = ()
    folder: Path | None = None

    @property
    def description(self) -> str:
        """What it is if it is not this machine's own."""
        names = ", ".join(card.short_name for card in self.cards if card)
        if self.kind == ON_STANDIN:
            lacking = ", ".join(f"{card.short_name} ({card.compute_capability})" for card in self.without_kernels)
            warning = (
                f"  This build has no kernels for {lacking}, and takes other memory than one that has."
                if lacking
                else ""
            )
            return f"On the CUDA stand-in: {names}.{warning}"
        if self.kind == VIRTUAL and names:
            return f"On virtual GPUs of that size, since this build has no CUDA: {names}."
        return ""

    def knowing(self, cards: Sequence[Card | None], binaries: Binaries) -> Stage:
        """This stage with its cards known to the memory probe, which counts their scratch pools."""
        variables = {CARDS: ";".join(_rules_line(card, binaries) for card in cards)} if any(cards) else {}
        without = tuple(card for card in cards if card and binaries.build.compiled_for(card.compute_capability) == "0")
        return replace(self, environment={**self.environment, **variables}, cards=tuple(cards), without_kernels=without)

    def hollow(self, binaries: Binaries) -> Stage:
        """This stage for a rehearsal: nothing is computed, and no weight is looked at."""
        variables = {"LD_PRELOAD": str(binaries.path(HOLLOW_CPU)), "PYLLAMARUN_VIRTUAL_HOLLOW": "1"}
        return replace(self, environment={**self.environment, **variables})

    def usage(self, pid: int) -> tuple[Usage, ...]:
        """What a process holds on each device of a stage that counts it: not the real one."""
        assert self.folder
        if self.kind == VIRTUAL:
            rows = (map(int, line.split()) for line in _lines(Path(self.environment[STATE])))
            reserved = [int(float(mib) * MIB) for mib in self.environment["PYLLAMARUN_VIRTUAL_RESERVED"].split(",")]
            return tuple(
                Usage(0, used - reserved[index], 0, peak - reserved[index], 0, 0) for index, used, _, peak in rows
            )
        rows = (map(int, line.split()[1:]) for line in _lines(self.folder / "state" / "processes" / str(pid)))
        return tuple(Usage(*row) for row in rows)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:  # the process has not looked at a GPU yet
        return []


@contextmanager
def real_stage(binaries: Binaries) -> Iterator[Stage]:
    yield Stage(REAL, environment(binaries))


@contextmanager
def virtual_stage(binaries: Binaries, gpus: Sequence[VirtualGpu]) -> Iterator[Stage]:
    shown = ["GGML_BACKEND_PATH", "PYLLAMARUN_VIRTUAL_GPUS", "PYLLAMARUN_VIRTUAL_RESERVED"] if gpus else []
    if binaries.build.backend != "cpu":
        shown += ["CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES"]
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder:
        variables = {STATE: str(Path(folder) / "virtual")} | environment(binaries, gpus)  # the user's, where it is set
        stage = Stage(VIRTUAL, variables, shown=tuple(shown), folder=Path(folder))
        yield stage.knowing([gpu.card for gpu in gpus], binaries)


@contextmanager
def standin_stage(binaries: Binaries, cards: Sequence[Card], context_bytes: int) -> Iterator[Stage]:
    """A machine with these cards, on which the real ggml-cuda runs; each process's context costs that much.

    BinaryError where the build has no CUDA backend.
    """
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as name:
        folder = Path(name)
        libraries = folder / "lib"
        libraries.mkdir()
        for link in _STANDIN_NAMES:
            (libraries / link).symlink_to(binaries.path(STANDIN))
        (libraries / "libnvidia-ml.so.1").symlink_to(binaries.path(NVML_STANDIN))
        variables = environment(binaries) | {
            "LD_LIBRARY_PATH": str(libraries),
            "PYLLAMARUN_STANDIN_CARDS": ";".join(map(_standin_line, cards)),
            "PYLLAMARUN_STANDIN_STATE": str(folder / "state"),
            "PYLLAMARUN_STANDIN_CONTEXT": str(context_bytes),
            "GGML_CUDA_DISABLE_GRAPHS": "1",
        }
        variables.pop("CUDA_VISIBLE_DEVICES", None)
        yield Stage(ON_STANDIN, variables, folder=folder).knowing(cards, binaries)


def open_stage(
    binaries: Binaries, machine: Machine, overhead_bytes: int | None = None
) -> AbstractContextManager[Stage]:
    """The stage for a machine.  A card that is not here holds a context, as a real one would."""
    if machine.gpus is None:
        return real_stage(binaries)
    context = context_bytes(overhead_bytes)
    cards = [gpu for gpu in machine.gpus if isinstance(gpu, Card)]
    if cards and len(cards) == len(machine.gpus) and binaries.build.backend == "cuda":
        return standin_stage(binaries, cards, context)
    return virtual_stage(binaries, [_virtual(gpu, context) for gpu in machine.gpus])


def _virtual(gpu: Card | int, context: int) -> VirtualGpu:
    if isinstance(gpu, Card):
        return VirtualGpu(gpu.memory_bytes, gpu.reserved_bytes + context, gpu)
    return VirtualGpu(gpu, context)


def list_devices(binaries: Binaries, stage: Stage) -> tuple[Device, ...]:
    """The GPUs that llama.cpp would see."""
    with open_probe(binaries, stage) as probe:
        return probe.devices()


def survey_stage(stage: Stage, timeout_seconds: float = NVML_TIMEOUT_SECONDS) -> GpuSurvey:
    """What the driver tells of a stage's cards; of virtual ones there is nothing to tell."""
    if stage.kind == REAL:
        return survey_gpus(timeout_seconds)
    if stage.kind == VIRTUAL:
        return GpuSurvey((), None, None)
    # As its NVML shows it, to a process that finds that one.
    argv = [sys.executable, "-m", "pyllamarun.machine.gpu", str(timeout_seconds)]
    _, text = output_of(argv, stage.environment)
    return read_survey(text)


def list_rpc_devices(binaries: Binaries, stage: Stage, servers: str) -> tuple[Device, ...]:
    """The devices of RPC servers, "HOST:PORT,HOST:PORT", each with the memory that its server says, in whole MiB.

    llama-server is asked for its list, since llama.cpp gives RPC devices their names as it reads its arguments.
    """
    status, text = output_of([binaries.path("llama-server"), "--rpc", servers, "--list-devices"], stage.environment)
    found = re.findall(r"^ +(RPC\d+): (.*) \((\d+) MiB, (\d+) MiB free\)$", text, re.MULTILINE)
    if status != 0 or not found:
        said = re.findall(r"Failed to .*|.*RPC.*", text)
        raise UsageError(
            f"No RPC server answers as {servers}.",
            why=said[0] if said else text.strip()[-500:],
            remedy="Start ggml-rpc-server there, of the same llama.cpp, and give its HOST:PORT.",
        )
    return tuple(
        Device(name, address, "RPC", "gpu", int(free) * MIB, int(total) * MIB) for name, address, total, free in found
    )


@contextmanager
def open_probe(binaries: Binaries, stage: Stage) -> Iterator[Probe]:
    argv, pipe = [binaries.path(PROBE)], subprocess.PIPE
    with running(argv, stage.environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        yield Probe(process, _devices_seconds(stage.environment.get(WAIT, "")))


def _devices_seconds(said: str) -> float:
    """How long the driver may take to list its cards."""
    if not said:
        return DEVICES_SECONDS
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= MOST_SECONDS:
        raise UsageError(
            f"{WAIT} is {said!r}, and is no number of seconds up to {MOST_SECONDS}.",
            remedy="Unset it, or set it to 120.",
        )
    return seconds


def _standin_line(card: Card) -> str:
    """A card as native/cuda_standin/machine.h describes it."""
    fields = [card.name, exact_mib(card.memory_bytes), card.compute_capability, card.multiprocessors,
              card.shared_memory_bytes // KIB, card.bus_bits, card.memory_mhz, card.pcie_generation, card.pcie_lanes,
              exact_mib(card.reserved_bytes)]  # fmt: skip
    return ",".join(map(str, fields))


def _rules_line(card: Card | None, binaries: Binaries) -> str:
    """A card as native/cuda_rules/card.h describes it."""
    if card is None:
        return ""
    fields = [card.compute_capability, card.multiprocessors, card.shared_memory_bytes // KIB]
    return ",".join(map(str, [*fields, binaries.build.compiled_for(card.compute_capability)]))
