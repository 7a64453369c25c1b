"""The virtual GPU: sizes, reserve, state file, real offload, real out-of-memory."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Machine, read_state

from pyllamarun.planning.request import VirtualGpu
from pyllamarun.run.binaries import PROBE, Binaries
from pyllamarun.run.command import environment
from pyllamarun.units import MIB


def devices(binaries: Binaries, *gpus: VirtualGpu, **variables: str) -> list[dict[str, object]]:
    result = subprocess.run(
        [binaries.path(PROBE), "--devices"],
        env=environment(binaries, gpus) | variables,
        capture_output=True,
        check=True,
    )
    found: list[dict[str, object]] = json.loads(result.stdout)
    return [device for device in found if device["type"] == "gpu"]


def test_it_is_only_there_when_it_is_asked_for(binaries: Binaries) -> None:
    assert devices(binaries) == []


def test_sizes_and_reserve(binaries: Binaries, tmp_path: Path) -> None:
    state = tmp_path / "state"
    found = devices(
        binaries, VirtualGpu(12 * 1024 * MIB, 300 * MIB), VirtualGpu(8 * 1024 * MIB + 1, 300 * MIB),
        PYLLAMARUN_VIRTUAL_STATE=str(state),
    )  # fmt: skip
    assert [d["name"] for d in found] == ["VIRTUAL0", "VIRTUAL1"]
    assert [d["total_bytes"] for d in found] == [12 * 1024 * MIB, 8 * 1024 * MIB + 1]
    assert found[0]["free_bytes"] == 12 * 1024 * MIB - 300 * MIB
    assert [s.used_bytes for s in read_state(state)] == [300 * MIB] * 2


def test_it_computes_what_the_cpu_computes(smollm2: Path, machine: Callable[..., Machine]) -> None:
    prompt = "The capital of France is"
    texts = []
    for layers in ("0", "15", "99"):
        arguments = ["-m", str(smollm2), "-c", "512", "-np", "1", "-ngl", layers, "-fit", "off", "--temp", "0"]
        with machine(1024).serve(arguments) as server:
            texts.append(server.complete(prompt, predict=12)["content"])
    assert " Paris" in texts[0]
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]


def test_what_does_not_fit_is_refused_as_on_a_card(
    binaries: Binaries, smollm2: Path, machine: Callable[..., Machine]
) -> None:
    arguments = ["-m", str(smollm2), "-c", "512", "-np", "1", "-ngl", "99", "-fit", "off"]
    needed = machine(1024).ask(arguments).bytes(device="VIRTUAL0")
    for size, fits in ((needed, True), (needed - 1, False)):
        result = subprocess.run(
            [binaries.path("llama-cli"), *arguments, "-p", "Hi", "-n", "1", "-st"],
            env=environment(binaries, [VirtualGpu(size)]), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        ran_out = "virtual GPU out of memory" in result.stdout + result.stderr
        assert ran_out is not fits, f"a card of {size} bytes: {result.stderr}"
        assert (result.returncode == 0) is fits


@pytest.mark.parametrize("name", ["llama-cli", "llama-server", "llama-quantize"])
def test_programs_report_the_pinned_commit(name: str, binaries: Binaries) -> None:
    result = subprocess.run(
        [binaries.path(name), "--version"], env=environment(binaries), capture_output=True, text=True, check=False
    )
    if name == "llama-quantize":  # it has no --version, and prints it when it works
        result = subprocess.run([binaries.path(name), "/none", "Q4_0"], capture_output=True, text=True, check=False)
    assert "commit 0c1e570" in result.stdout + result.stderr
