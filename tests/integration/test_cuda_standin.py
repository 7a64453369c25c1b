"""The real ggml-cuda on a machine without a card: what it allocates, when it runs out, what NVML says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness import ask, serve

from pyllamarun.machine.cards import Card, find_card
from pyllamarun.run.binaries import PROBE, Binaries
from pyllamarun.run.stage import Stage, standin_stage
from pyllamarun.units import MIB

pytestmark = pytest.mark.usefixtures("cuda_build")


@contextmanager
def standin(binaries: Binaries, *cards: str | Card, context_bytes: int = 0) -> Iterator[Stage]:
    known = [find_card(card) if isinstance(card, str) else card for card in cards]
    with standin_stage(binaries, known, context_bytes) as stage:
        yield stage


def test_every_function_that_ggml_cuda_calls_is_there(binaries: Binaries) -> None:
    def symbols(library: str, defined: bool) -> set[str]:
        argv = ["nm", "-D", "--defined-only" if defined else "--undefined-only", binaries.path(library)]
        text = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        return {line.split()[-1].partition("@")[0] for line in text.splitlines()}

    needed = {name for name in symbols("libggml-cuda.so", False) if re.match(r"(__)?cu(da|blas)?[A-Z_]", name)}
    assert "cudaMalloc" in needed
    assert needed - symbols("libcuda-standin.so", True) == set()


def test_a_card_is_listed(binaries: Binaries) -> None:
    with standin(binaries, "RTX 3060", "RTX 2060") as machine:
        argv = [binaries.path(PROBE), "--devices"]
        result = subprocess.run(argv, env=machine.environment, capture_output=True, text=True, check=True)
        gpus = [device for device in json.loads(result.stdout.splitlines()[-1]) if device["type"] == "gpu"]
        assert [(gpu["name"], gpu["description"]) for gpu in gpus] == [
            ("CUDA0", "NVIDIA GeForce RTX 3060"),
            ("CUDA1", "NVIDIA GeForce RTX 2060"),
        ]
        assert [gpu["total_bytes"] for gpu in gpus] == [12288 * MIB, 6144 * MIB]


def test_without_a_driver_there_is_no_cuda_device(binaries: Binaries) -> None:
    from pyllamarun.run.command import environment

    argv = [binaries.path(PROBE), "--devices"]
    result = subprocess.run(argv, env=environment(binaries), capture_output=True, text=True, check=True)
    if any(device["backend"] == "CUDA" for device in json.loads(result.stdout.splitlines()[-1])):
        pytest.skip("an NVIDIA card is here")


# ggml-cuda gives cuBLAS a workspace when it is first used (common.cuh, cublas_handle); 32 MiB from Hopper on.
CUBLAS_WORKSPACE_BYTES = 4 * MIB

OPTION_SETS = {
    "all": ["-ngl", "99"],
    "half": ["-ngl", "2"],
    "all q8_0 KV": ["-ngl", "99", "-ctk", "q8_0", "-ctv", "q8_0"],
    "half flash attention off": ["-ngl", "2", "-fa", "off"],
    "all small ubatch": ["-ngl", "99", "-ub", "128", "-np", "1"],
}


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gemma3", "qwen3moe", "gpt-oss", "deepseek2", "jamba"])
def test_predicted_is_allocated_by_the_real_cuda_backend(
    architecture: str, options: list[str], binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["-m", str(tiny(architecture)), "-c", "1024", *options]
    with standin(binaries, "RTX 3060", context_bytes=300 * MIB) as machine:
        answer = ask(machine, binaries, arguments)
        growth = sum(b.bytes for b in answer.buffers if b.device == "CUDA0" and b.use == "compute_growth")
        in_use = answer.bytes(device="CUDA0")
        with serve(machine, binaries, [*arguments, "--ctx-checkpoints", "0"], tmp_path / "log") as server:
            server.wait_until_ready()
            (ready,) = machine.usage(server.process.pid)
            assert ready.context_bytes == 300 * MIB
            assert ready.buffer_bytes == in_use - growth
            server.complete([3 + i % 200 for i in range(answer.worst_prompt_tokens or answer.slot_context_tokens - 1)])
            (after,) = machine.usage(server.process.pid)
            assert after.buffer_bytes - in_use in (0, CUBLAS_WORKSPACE_BYTES)
            assert 0 < after.pool_peak_bytes <= 64 * MIB


def card_of(size_bytes: int) -> Card:
    return replace(find_card("RTX 3060"), memory_bytes=size_bytes, reserved_bytes=0)


@pytest.mark.parametrize("part", ["weights", "context", "compute"])
def test_memory_that_runs_out_while_loading(
    part: str, binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["-m", str(tiny("mixtral")), "-c", "1024", "-ngl", "99"]
    with standin(binaries, "RTX 3060") as machine:
        answer = ask(machine, binaries, arguments)
    before = {"weights": 0, "context": answer.bytes(device="CUDA0", use="weights")}
    before["compute"] = before["context"] + answer.bytes(device="CUDA0", use="context")
    size = before[part] + answer.bytes(device="CUDA0", use=part) // 2
    log = tmp_path / "log"
    with standin(binaries, card_of(size)) as machine, serve(machine, binaries, arguments, log) as server:
        assert server.process.wait(60) == 1
    assert re.search(r"allocating [\d.]+ MiB on device 0: cudaMalloc failed: out of memory", log.read_text())


def test_memory_that_runs_out_in_the_scratch_pool_after_ready(
    binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["-m", str(tiny("llama")), "-c", "1024", "-ngl", "99", "-np", "1"]
    log = tmp_path / "log"
    with standin(binaries, "RTX 3060") as machine, serve(machine, binaries, arguments, log) as server:
        server.wait_until_ready()
        (ready,) = machine.usage(server.process.pid)
    small = card_of(ready.buffer_bytes + ready.pool_bytes)
    with standin(binaries, small) as machine, serve(machine, binaries, arguments, log) as server:
        server.wait_until_ready()
        with pytest.raises(OSError):
            server.complete([3] * 1000)
        assert server.process.wait(60) == -6  # SIGABRT, and no debugger attached
    assert "CUDA error" in log.read_text()


def test_a_neighbour_s_memory_counts_until_it_dies(
    binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["-m", str(tiny("mixtral")), "-c", "1024", "-ngl", "99"]
    with standin(binaries, "RTX 3060") as machine:
        needed = ask(machine, binaries, arguments).bytes(device="CUDA0")
    small, log = card_of(int(needed * 1.5)), tmp_path / "log"
    with standin(binaries, small) as machine, serve(machine, binaries, arguments, log) as first:
        first.wait_until_ready()
        with serve(machine, binaries, arguments, tmp_path / "second") as second:
            assert second.process.wait(60) == 1
        first.process.kill()
        first.process.wait()
        with serve(machine, binaries, arguments, tmp_path / "third") as third:
            third.wait_until_ready()


def survey(machine: Stage, **variables: str) -> dict[str, object]:
    """What machine/gpu.py reads of the stand-in, in a process of its own."""
    code = """
        import dataclasses, json
        from pyllamarun.machine.gpu import survey_gpus
        print(json.dumps(dataclasses.asdict(survey_gpus(timeout_seconds=2))))
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(argv, env={**machine.environment, **variables}, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_nvml_shows_cards_and_processes(binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["-m", str(tiny("llama")), "-c", "1024", "-ngl", "99"]
    with standin(binaries, "RTX 3060", context_bytes=300 * MIB) as machine:
        with serve(machine, binaries, arguments, tmp_path / "log") as server:
            server.wait_until_ready()
            (usage,) = machine.usage(server.process.pid)
            (gpu,) = survey(machine)["gpus"]
            held = usage.context_bytes + usage.buffer_bytes + usage.pool_bytes
            assert gpu["processes"] == [{"pid": server.process.pid, "name": "llama-server", "used_bytes": held}]
            assert gpu["free_bytes"] == gpu["total_bytes"] - held - find_card("RTX 3060").reserved_bytes
        (gpu,) = survey(machine)["gpus"]
        assert gpu["processes"] == []
        assert gpu["name"] == "NVIDIA GeForce RTX 3060"
        assert gpu["compute_capability"] == "8.6"
        assert gpu["memory_bandwidth_bytes_per_second"] == 360_048_000_000
        assert (gpu["pcie_generation"], gpu["pcie_width"]) == (4, 16)


def test_nvml_that_is_absent(binaries: Binaries) -> None:
    """Only the CUDA libraries are there, as in a container without the driver's utilities."""
    with standin(binaries, "RTX 3060") as machine:
        (Path(machine.environment["LD_LIBRARY_PATH"]) / "libnvidia-ml.so.1").unlink()
        found = survey(machine)
    if found["gpus"]:
        pytest.skip("an NVIDIA driver is here")
    assert found["problem"] == "no NVIDIA driver is installed"


def test_nvml_that_fails(binaries: Binaries) -> None:
    with standin(binaries, "RTX 3060") as machine:
        (gpu,) = survey(machine, PYLLAMARUN_STANDIN_FAIL="nvml=na")["gpus"]
        assert gpu["total_bytes"] == 12288 * MIB
        assert gpu["memory_bandwidth_bytes_per_second"] is None
        assert "did not answer" in str(survey(machine, PYLLAMARUN_STANDIN_FAIL="nvml=hang")["problem"])
        lost = survey(machine, PYLLAMARUN_STANDIN_FAIL="lost=0")
        assert lost["gpus"] == []
        assert lost["problem"]


def test_a_lost_card_ends_the_server(binaries: Binaries, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["-m", str(tiny("llama")), "-c", "1024", "-ngl", "99"]
    with standin(binaries, "RTX 3060") as machine:
        lost = replace(machine, environment={**machine.environment, "PYLLAMARUN_STANDIN_FAIL": "lost=0"})
        with serve(lost, binaries, arguments, tmp_path / "log") as server:
            assert server.process.wait(60) != 0
