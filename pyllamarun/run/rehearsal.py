"""Rehearsals: the real llama-server, loaded with a model's skeleton and prompted on every slot, its memory counted."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pyllamarun.errors import ServerError
from pyllamarun.machine.gpu import GpuSurvey, normal_pci_address
from pyllamarun.planning.plan import DevicePlan, Plan
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import DEFAULT_BATCH_TOKENS, DEFAULT_UBATCH_TOKENS, fixed_value, has_option
from pyllamarun.run.server import Running, Server, ready_server
from pyllamarun.run.stage import ON_STANDIN, Stage, Usage

PROMPT_SECONDS = 3600.0
ENDING_SECONDS = 10.0  # for a server that has failed a prompt to be gone
MEASURE_SECONDS = 0.05
UBATCH_PARTS = 16
EMBEDDING = ("--embedding", "--embeddings", "--rerank", "--reranking")


class Meter(Protocol):
    """Tells what a process takes on each GPU of a plan."""

    def start(self, pid: int) -> None:
        """From now on it is watched."""

    def read(self) -> Sequence[Usage]:
        """What it has come to."""


@dataclass(frozen=True)
class DeviceRehearsal:
    """One GPU, in bytes.

    `buffer_bytes` is what was allocated at the end besides the pool: llama.cpp's buffers and `workspace_bytes` of
    cuBLAS's.  `difference_bytes` is the peak less what was predicted.  On a real card only context, buffers and pool
    together can be seen, as the driver counts them: `context_bytes` is then what the prediction of the others leaves.
    """

    name: str
    description: str
    budget_bytes: int
    predicted_bytes: int
    peak_bytes: int
    difference_bytes: int
    context_bytes: int
    buffer_bytes: int
    workspace_bytes: int
    pool_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    model: str
    stage: str
    argv: tuple[str, ...]
    prompts: int
    prompt_tokens: int
    seconds: float
    devices: tuple[DeviceRehearsal, ...]

    @property
    def fits(self) -> bool:
        return all(device.peak_bytes <= device.budget_bytes for device in self.devices)


def rehearse(
    running: Running,
    argv: Sequence[str],
    port: int,
    plan: Plan,
    stage: Stage,
    meter: Meter,
    progress: Callable[[str], None],
    log: Callable[[str], None],
) -> Rehearsal:
    """Starts `argv`, the plan's llama-server, lets every slot take prompts that fill it, and reads what it took.

    Raises DoesNotFit when memory runs out on the way, ServerError when the server fails otherwise.
    """
    start = time.monotonic()
    progress("loading")
    with ready_server(running, argv, stage.environment, "127.0.0.1", port, log) as server:
        meter.start(server.process.pid)
        lengths: list[int] = []
        for number, prompts in enumerate(_prompts(plan)):
            progress(" + ".join(f"{length:,}" for length in prompts) + " tokens")
            _prompt(server, plan, prompts, token=int(number == 0))
            lengths += prompts
        usages = meter.read()
    devices = [_compare(device, usage, stage) for device, usage in zip(plan.devices, usages, strict=True)]
    return Rehearsal(
        model=plan.model,
        stage=stage.kind,
        argv=plan.argv,
        prompts=len(lengths),
        prompt_tokens=sum(lengths),
        seconds=time.monotonic() - start,
        devices=tuple(devices),
    )


def _compare(device: DevicePlan, usage: Usage, stage: Stage) -> DeviceRehearsal:
    predicted_buffers = device.total_bytes - device.overhead_bytes
    workspace = max(0, usage.buffer_bytes - predicted_buffers) if stage.kind == ON_STANDIN else 0
    return DeviceRehearsal(
        name=device.name,
        description=device.description,
        budget_bytes=device.budget_bytes,
        predicted_bytes=device.total_bytes,
        peak_bytes=usage.peak_bytes,
        difference_bytes=usage.peak_bytes - device.total_bytes,
        context_bytes=usage.context_bytes,
        buffer_bytes=usage.buffer_bytes,
        workspace_bytes=workspace,
        pool_bytes=usage.pool_peak_bytes,
    )


def _prompts(plan: Plan) -> Iterator[list[int]]:
    """Token counts of the prompts to send at once, one after the other; what a slot has of a prompt it need not redo.

    The prompt of which the plan says that it makes the compute buffer grow most, of which nothing else has a part; a
    full context in every slot; and ends of a full context, in ubatches of many sizes and of several slots together: how
    a kernel's work is divided depends on them, and the largest does not always need the most scratch memory.
    """
    # server_context_impl::load_model caps a slot's context at what the model was trained for.
    longest = min(plan.slot_context_tokens, plan.trained_context_tokens or plan.slot_context_tokens) - 1
    ubatch = int(fixed_value(plan.argv, "-ub", "--ubatch-size") or DEFAULT_UBATCH_TOKENS)
    if has_option(plan.argv, *EMBEDDING):
        longest = min(longest, ubatch)  # it has to be taken in at once
    if plan.worst_prompt_tokens:
        yield [min(plan.worst_prompt_tokens, longest)]
    yield [longest] * plan.slots
    yield [longest]
    for part in range(UBATCH_PARTS - 1, 0, -1):
        size = ubatch * part // UBATCH_PARTS
        if 0 < size < longest:
            yield [longest - size]
            yield [longest]
    slots = 2
    while slots <= plan.slots:
        new = min(DEFAULT_BATCH_TOKENS // slots, longest - 1)
        yield [longest - new] * slots
        yield [longest] * slots
        slots = min(2 * slots, plan.slots) if slots < plan.slots else slots + 1


def _prompt(server: Server, plan: Plan, lengths: Sequence[int], token: int) -> None:
    """Sends prompts of so many tokens in one request, so that they are batched, and waits for a token from each."""
    reason = _complete(_request(server, plan, [[token] * length for length in lengths]))
    if not reason:
        return
    try:
        server.process.wait(timeout=ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        raise ServerError("llama-server refused a prompt.", why=reason) from None
    raise server.failure()


def _request(server: Server, plan: Plan, prompts: Sequence[Sequence[int]]) -> urllib.request.Request:
    path, body = "/completion", {"prompt": prompts, "n_predict": 1, "cache_prompt": True}
    if has_option(plan.argv, *EMBEDDING):
        path, body = "/embeddings", {"content": prompts}
    headers = {"Content-Type": "application/json"}
    if key := fixed_value(plan.argv, "--api-key"):
        headers["Authorization"] = f"Bearer {key.partition(',')[0]}"
    return urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)


def _complete(request: urllib.request.Request) -> str:
    """The reason when it failed."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=PROMPT_SECONDS) as answer:
            answer.read()
        return ""
    except urllib.error.HTTPError as error:
        return error.read().decode("utf-8", "replace")
    except (OSError, ValueError) as error:
        return str(error)


class StageMeter:
    """Reads what a stage has counted of a process."""

    def __init__(self, stage: Stage) -> None:
        self._stage, self._pid = stage, 0

    def start(self, pid: int) -> None:
        self._pid = pid

    def read(self) -> Sequence[Usage]:
        return self._stage.usage(self._pid)


class DriverMeter:
    """Follows what a driver says that a process holds on each GPU, and keeps the most it saw.

    `held` gives bytes by GPU of the plan.  Buffers and scratch memory are taken as predicted, and the rest is context.
    """

    def __init__(self, held: Callable[[int], Sequence[int]], devices: Sequence[DevicePlan]) -> None:
        self._held, self._devices = held, devices
        self._peaks = [0] * len(devices)
        self._pid = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self, pid: int) -> None:
        self._pid = pid
        self._thread.start()

    def _look(self) -> None:
        self._peaks = [max(pair) for pair in zip(self._peaks, self._held(self._pid))]

    def _follow(self) -> None:
        while not self._stop.wait(MEASURE_SECONDS):
            self._look()

    def read(self) -> Sequence[Usage]:
        self._stop.set()
        self._thread.join()
        self._look()
        usages = []
        for device, peak in zip(self._devices, self._peaks):
            buffers = device.total_bytes - device.overhead_bytes
            context = max(0, peak - buffers - device.scratch_bytes)
            usages.append(Usage(context, buffers, device.scratch_bytes, peak, device.scratch_bytes, 0))
        return usages


def driver_usage(survey: Callable[[], GpuSurvey], devices: Sequence[Device]) -> Callable[[int], list[int]]:
    """Asks the driver what a process holds on each of llama.cpp's devices, which it knows by their PCI addresses."""

    def held(pid: int) -> list[int]:
        by_address: dict[str, int] = {}
        for gpu in survey().gpus:
            own = [process.used_bytes or 0 for process in gpu.processes if process.pid == pid]
            by_address[gpu.pci_address or ""] = sum(own)
        return [by_address.get(normal_pci_address(device.id or ""), 0) for device in devices]

    return held
