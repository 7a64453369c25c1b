"""GPUs of other machines: what is planned on an RPC server is what it allocates, in bytes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Machine, read_state, run_cli

from pyllamarun.errors import UsageError
from pyllamarun.machine.machine import Machine as Described
from pyllamarun.models.model import Model
from pyllamarun.planner import Planner
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import VirtualGpu, make_request
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment
from pyllamarun.run.process import running
from pyllamarun.run.server import free_port
from pyllamarun.units import MIB


@contextmanager
def rpc_server(binaries: Binaries, total_bytes: int, state: Path) -> Iterator[str]:
    """A ggml-rpc-server with a virtual GPU, which answers; its address."""
    port = free_port()
    variables = environment(binaries, [VirtualGpu(total_bytes)]) | {"PYLLAMARUN_VIRTUAL_STATE": str(state)}
    argv = [binaries.path("ggml-rpc-server"), "-p", str(port), "-t", "2"]
    with running(argv, variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        _wait_until_it_listens(port)
        yield f"127.0.0.1:{port}"


def _wait_until_it_listens(port: int) -> None:
    """By the kernel's table: a connection to try would be a client, of which the server takes one at a time."""
    wanted = f":{port:04X} "
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        rows = Path("/proc/net/tcp").read_text().splitlines()
        if any(wanted in row and " 0A " in row for row in rows):
            return
        time.sleep(0.01)
    raise AssertionError("ggml-rpc-server does not listen")


@pytest.mark.parametrize(
    ("architecture", "budgets_mib"),
    [
        ("llama", (13, 7)),
        ("llama-k-quants", (30, 12)),
        ("mixtral", (18, 16)),
        ("gemma3", (13, 12)),
        ("deepseek2", (60, 20)),
    ],
)
def test_planned_is_allocated_on_an_rpc_server(
    architecture: str,
    budgets_mib: tuple[int, int],
    tiny: Callable[[str], Path],
    binaries: Binaries,
    machine: Callable[..., Machine],
    tmp_path: Path,
) -> None:
    state, local = tmp_path / "state", machine(256)
    vram = ",".join(f"{size}MiB" for size in budgets_mib)
    with rpc_server(binaries, 256 * MIB, state) as address:
        with Planner(Described.of(gpus="256MiB"), overhead_bytes=0) as planner:
            wanted = make_request(vram=vram, rpc=address, overhead="0", context=1024)
            plan: Plan = planner.plan(Model.open(tiny(architecture)), wanted)
        assert [device.name for device in plan.devices] == ["RPC0", "VIRTUAL0"]
        assert all(device.total_bytes <= device.budget_bytes for device in plan.devices)
        assert plan.devices[0].layers > 0
        with local.serve([*plan.argv[1:], "--ctx-checkpoints", "0"]) as server:
            prompt = [3 + i % 200 for i in range(plan.worst_prompt_tokens or plan.slot_context_tokens - 1)]
            server.complete(prompt)
            used = [read_state(state)[0].used_bytes, *server.used_bytes()]
        assert used == [device.total_bytes for device in plan.devices], plan.argv


def test_a_server_that_does_not_answer_is_told(tiny: Callable[[str], Path]) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = run_cli("plan", tiny("llama"), "--virtual-gpu", "256MiB", "--rpc", address)
    assert result.returncode == 2
    assert f"No RPC server answers as {address}." in result.stderr
    assert "Failed to connect" in result.stderr
    with Planner(Described.of(gpus="256MiB")) as planner, pytest.raises(UsageError):
        planner.devices_of(address)
