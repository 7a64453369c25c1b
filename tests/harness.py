"""The compiled programs on virtual GPUs, and the installed command, as tests use them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamarun.machine.core_rates import nominal
from pyllamarun.planning.hardware import Hardware
from pyllamarun.planning.probe import Answer, Probe
from pyllamarun.planning.request import SERVER, VirtualGpu
from pyllamarun.run.binaries import PROBE, Binaries
from pyllamarun.run.command import environment
from pyllamarun.run.process import output_of, running
from pyllamarun.run.server import free_port
from pyllamarun.run.stage import Stage, open_probe
from pyllamarun.units import MIB

SERVER_SECONDS = 120.0
# So slow a CPU that even a tiny model gains by every matrix that is on a GPU.
SLOW_CPU = Hardware(nominal(1e8, 1))
PYLLAMARUN = Path(sys.executable).with_name("pyllamarun")


def run_cli(
    *arguments: str | Path, stdin: str = "", timeout: float = 120.0, **environment_changes: str
) -> subprocess.CompletedProcess[str]:
    """Runs the installed `pyllamarun`."""
    return subprocess.run(
        [PYLLAMARUN, *map(str, arguments)],
        env=os.environ | environment_changes,
        capture_output=True,
        text=True,
        timeout=timeout,
        input=stdin,
        check=False,
    )


def start_cli(*arguments: str | Path, stdout: int, stderr: int) -> subprocess.Popen[str]:
    """Starts the installed `pyllamarun`, which heeds SIGINT even where the tests run in a shell's background."""
    return subprocess.Popen(
        [PYLLAMARUN, *map(str, arguments)],
        stdout=stdout,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@dataclass(frozen=True)
class DeviceState:
    """A line of the virtual GPU's state file."""

    used_bytes: int
    total_bytes: int
    peak_bytes: int


def read_state(path: Path) -> list[DeviceState]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [DeviceState(int(used), int(total), int(peak)) for _, used, total, peak in lines]


class RunningServer:
    """A llama-server on virtual GPUs."""

    def __init__(self, process: subprocess.Popen[str], port: int, state: Path, log: Path) -> None:
        self.process, self.port, self._state, self._log = process, port, state, log

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + SERVER_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"llama-server ended:\n{self._log.read_text()[-3000:]}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"llama-server was not ready in time:\n{self._log.read_text()[-3000:]}")

    def complete(self, prompt: Sequence[int] | str, predict: int = 1, *, cache_prompt: bool = False) -> dict[str, Any]:
        return self._post({"prompt": prompt, "n_predict": predict, "cache_prompt": cache_prompt})

    def complete_together(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prompts in as many slots at once, each after what its slot has cached of it."""
        self._post({"prompt": prompts, "n_predict": 1, "cache_prompt": True})

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            return json.load(answer)

    def device_states(self) -> list[DeviceState]:
        return read_state(self._state)

    def log(self) -> str:
        return self._log.read_text()

    def used_bytes(self) -> list[int]:
        return [device.used_bytes for device in self.device_states()]

    def peak_bytes(self) -> list[int]:
        return [device.peak_bytes for device in self.device_states()]


def ask(stage: Stage, binaries: Binaries, arguments: Sequence[str]) -> Answer:
    """The probe's answer on a stage."""
    with open_probe(binaries, stage) as probe:
        return probe.ask(arguments)


@contextmanager
def serve(stage: Stage, binaries: Binaries, arguments: Sequence[str], log: Path) -> Iterator[RunningServer]:
    """A real llama-server on a stage, which need not become ready."""
    port = free_port()
    argv = [binaries.path("llama-server"), *arguments, "--port", str(port), "-fit", "off", "--no-warmup", "-t", "2"]
    with log.open("w") as file, running(argv, stage.environment, stdout=file, stderr=file) as process:
        yield RunningServer(process, port, Path("/dev/null"), log)


class Machine:
    """The programs on a machine with virtual GPUs of these sizes."""

    def __init__(self, binaries: Binaries, sizes_mib: Sequence[int]) -> None:
        self._binaries = binaries
        self._gpus = tuple(VirtualGpu(size * MIB) for size in sizes_mib)
        self.device_names = [f"VIRTUAL{i}" for i in range(len(sizes_mib))]
        self._stack = ExitStack()
        self._probe: Probe | None = None

    def close(self) -> None:
        self._stack.close()

    def ask(self, arguments: Sequence[str], program: str = SERVER) -> Answer:
        """The probe's answer."""
        if self._probe is None:
            pipe = subprocess.PIPE
            process = self._stack.enter_context(
                running([self._binaries.path(PROBE)], environment(self._binaries, self._gpus), stdin=pipe, stdout=pipe)
            )
            self._probe = Probe(process)
        return self._probe.ask(arguments, program)

    def run(self, program: str, arguments: Sequence[str]) -> tuple[list[DeviceState], str]:
        """A program that comes to an end: what it held of each GPU, and what it said."""
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state"
            variables = environment(self._binaries, self._gpus) | {"PYLLAMARUN_VIRTUAL_STATE": str(state)}
            argv = [self._binaries.path(program), *arguments, "-t", "2"]
            status, text = output_of(argv, variables, timeout_seconds=SERVER_SECONDS)
            assert status == 0, text[-3000:]
            return read_state(state), text

    @contextmanager
    def serve(self, arguments: Sequence[str], *, warmup: bool = False) -> Iterator[RunningServer]:
        """A real llama-server with these arguments, ready."""
        if not warmup:
            arguments = [*arguments, "--no-warmup"]
        with tempfile.TemporaryDirectory() as folder:
            state, log, port = Path(folder) / "state", Path(folder) / "log", free_port()
            argv = [str(self._binaries.path("llama-server")), *arguments, "--port", str(port), "-t", "2"]
            variables = environment(self._binaries, self._gpus) | {"PYLLAMARUN_VIRTUAL_STATE": str(state)}
            with log.open("w") as file, running(argv, variables, stdout=file, stderr=file) as process:
                server = RunningServer(process, port, state, log)
                server.wait_until_ready()
                yield server
