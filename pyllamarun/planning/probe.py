"""Talks to the memory probe: one question, one answer, in llama.cpp's own bytes."""

from __future__ import annotations

import json
import selectors
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from pyllamarun.errors import BinaryError, UsageError
from pyllamarun.planning.request import SERVER

ABORTED = "llama.cpp aborted"  # answer_abort() in native/probe/main.cpp
CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL)
WAIT = "PYLLAMARUN_DRIVER_SECONDS"  # how long, in the environment
DEVICES_SECONDS = 60.0  # a driver may take some for its first answer, as on a machine with many cards


class Refused(UsageError):
    """The program would refuse these arguments, or this model with them."""

    code = "refused"


class Crashed(BinaryError):
    """llama.cpp was ended by a signal of its own making as it was asked about a model; the probe is gone."""

    def __init__(self, signal_number: int, why: str = "") -> None:
        name = signal.Signals(signal_number).name
        super().__init__("llama.cpp crashed.", why=why or f"It was ended by {name}.", remedy="Run `pyllamarun doctor`.")


@dataclass(frozen=True)
class Buffer:
    """Memory of one use in one buffer type; the fields are the probe's, see native/probe/measure.h."""

    device: str
    buffer: str
    part: str
    use: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Scratch:
    """What ggml-cuda allocates on a device while it computes: its scratch pool, and the workspace it gives cuBLAS."""

    device: str
    part: str
    pool_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class Steps:
    """How many steps of the graph of a generated token a device computes: products with matrices, and others."""

    device: str
    products: int
    others: int


@dataclass(frozen=True)
class Graph:
    """What a generated token takes; `splits` are the runs of steps on one device."""

    part: str
    splits: int
    devices: tuple[Steps, ...]


@dataclass(frozen=True)
class Answer:
    """What a program would allocate with the arguments that were asked about.

    `scratch_source` says where `scratch` comes from: "computed" by the probe, or "rehearsed".  Of what a slot's memory
    cannot roll back, llama-server keeps up to `checkpoints` copies a slot, of up to `checkpoint_bytes` each.
    """

    layers: int
    nextn_layers: int
    context_tokens: int
    slot_context_tokens: int
    slots: int
    trained_context_tokens: int
    experts: int
    buffers: tuple[Buffer, ...]
    worst_prompt_tokens: int
    scratch: tuple[Scratch, ...] = ()
    scratch_source: str = "computed"
    graphs: tuple[Graph, ...] = ()
    checkpoints: int = 0
    checkpoint_bytes: int = 0

    def scratch_bytes(self, device: str) -> int | None:
        """Scratch pool and workspace on a device; None where the probe has no rules for it."""
        sizes = [one.pool_bytes + one.workspace_bytes for one in self.scratch if one.device == device]
        return sum(sizes) if sizes else None

    @property
    def offloadable_layers(self) -> int:
        """The -ngl that offloads everything: repeating layers, multi-token prediction layers, and the output."""
        return self.layers + self.nextn_layers + 1

    def bytes(self, *, device: str | None = None, use: str | None = None, kind: str | None = None) -> int:
        """The sum over the buffers that match."""
        return sum(
            buffer.bytes
            for buffer in self.buffers
            if (device is None or buffer.device == device)
            and (use is None or buffer.use == use or (use == "compute" and buffer.use == "compute_growth"))
            and (kind is None or buffer.kind == kind)
        )


@dataclass(frozen=True)
class Device:
    """A device as ggml lists it; `id` is a CUDA card's PCI address."""

    name: str
    description: str
    backend: str
    type: str
    free_bytes: int
    total_bytes: int
    id: str | None = None


class Probe:
    """A running pyllamarun-probe; `process` has pipes for stdin and stdout.

    It is waited for `devices_seconds` to list the devices, and without end for what a model takes: a driver may hang,
    arithmetic does not.
    """

    def __init__(self, process: subprocess.Popen[str], devices_seconds: float = DEVICES_SECONDS) -> None:
        self._process = process
        self._devices_seconds = devices_seconds
        self.questions = 0

    def ask(self, arguments: Sequence[str], program: str = SERVER) -> Answer:
        """Raises Refused with llama.cpp's reason, Crashed, or BinaryError when the probe ended otherwise."""
        self.questions += 1
        line = self._answer_to({"program": program, "arguments": list(arguments)})
        try:
            data = json.loads(line)
        except ValueError:
            raise Refused(f"{program} would print this and end.", why=line.strip()) from None
        if str(data.get("error", "")).startswith(ABORTED):  # its last words
            self._process.wait()
            raise Crashed(signal.SIGABRT, data["error"])
        return _answer(data)

    def devices(self) -> tuple[Device, ...]:
        """The GPUs that llama.cpp sees, as they were when the probe started; BinaryError when it cannot say."""
        names = ("name", "description", "backend", "type", "id", "free_bytes", "total_bytes")
        entries = json.loads(self._answer_to("devices", self._devices_seconds))
        devices = (Device(**{name: entry[name] for name in names}) for entry in entries)
        return tuple(device for device in devices if device.type == "gpu")

    def tell_cards(self, cards: str) -> None:
        """Which cards the devices are, as native/cuda_rules/card.h describes them; before the first question."""
        self._answer_to({"cards": cards})

    def _answer_to(self, question: object, seconds: float | None = None) -> str:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            if not _is_readable(self._process.stdout, seconds):
                raise BinaryError(
                    f"llama.cpp did not list the GPUs within {seconds:g} seconds.",
                    why="It waits for their driver, which hangs, or needs longer.",
                    remedy="See whether `nvidia-smi` answers, and restart the machine if it does not.  Cards that are "
                    f"not here need no driver: --gpu 'RTX 3060'.  {WAIT}=300 waits longer.",
                )
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            if -status in CRASHES:
                raise Crashed(-status)
            raise BinaryError(
                "The memory probe ended without an answer.",
                why=f"Exit status {status}, asked about: {question}",
                remedy="Run `pyllamarun doctor`.",
            )
        return line


def _is_readable(stream: IO[str], seconds: float | None) -> bool:
    """Whether it has anything to read, or has ended, within that time; nothing of it may be left in its buffer."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _answer(data: dict[str, object]) -> Answer:
    if "error" in data:
        log = data.get("log")
        lines = [str(line) for line in log] if isinstance(log, list) else []
        raise Refused(f"{data['error']}.", why="\n".join(lines))
    raw = _list(data, "buffers")
    names = ("device", "buffer", "part", "use", "kind", "bytes")
    return Answer(
        layers=_integer(data, "n_layer"),
        nextn_layers=_integer(data, "n_layer_nextn"),
        context_tokens=_integer(data, "n_ctx"),
        slot_context_tokens=_integer(data, "n_ctx_slot"),
        slots=_integer(data, "n_slots"),
        trained_context_tokens=_integer(data, "n_ctx_train"),
        experts=_integer(data, "n_expert"),
        buffers=tuple(Buffer(**{name: entry[name] for name in names}) for entry in raw),
        worst_prompt_tokens=max((entry.get("worst_prompt_tokens", 0) for entry in raw), default=0),
        scratch=tuple(Scratch(**entry) for entry in _list(data, "scratch")),
        graphs=tuple(_graph(entry) for entry in _list(data, "graphs")),
        checkpoints=_integer(data, "checkpoints"),
        checkpoint_bytes=_integer(data, "checkpoint_bytes"),
    )


def _graph(entry: dict[str, Any]) -> Graph:
    return Graph(entry["part"], entry["splits"], tuple(Steps(**steps) for steps in entry["devices"]))


def _list(data: dict[str, object], key: str) -> list[dict[str, Any]]:
    value = data.get(key, [])
    assert isinstance(value, list)
    return value


def _integer(data: dict[str, object], key: str) -> int:
    value = data[key]
    assert isinstance(value, int)
    return value
