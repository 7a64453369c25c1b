"""Budgets where the command sees cards as this machine's own: the CUDA stand-in takes the driver's place."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import run_cli, serve

from pyllamarun.machine.cards import find_card
from pyllamarun.run.binaries import PROBE, Binaries
from pyllamarun.run.stage import Stage, standin_stage
from pyllamarun.units import MIB

pytestmark = pytest.mark.usefixtures("cuda_build")

CARDS = ("RTX 3060", "RTX 4060")  # 12 and 8 GiB


@contextmanager
def machine(binaries: Binaries, *cards: str) -> Iterator[Stage]:
    with standin_stage(binaries, [find_card(card) for card in cards], 300 * MIB) as stage:
        yield stage


def driver(stage: Stage, **more: str) -> dict[str, str]:
    """What makes a command see the stage's driver as this machine's own."""
    own = ("LD_LIBRARY_PATH", "PYLLAMARUN_STANDIN_CARDS", "PYLLAMARUN_STANDIN_STATE", "PYLLAMARUN_STANDIN_CONTEXT")
    return {name: stage.environment[name] for name in own} | more


def planned(stage: Stage, *arguments: str | Path, **more: str) -> dict[str, Any]:
    result = run_cli("plan", *arguments, "--json", **driver(stage, **more))
    assert result.returncode == 0, result.stdout + result.stderr
    plan: dict[str, Any] = json.loads(result.stdout)["data"]
    return plan


VISIBLE = {
    "not set": (None, [0, 1]),
    "one": ("1", [1]),
    "another order": ("1,0", [1, 0]),
    "empty": ("", []),
    "-1": ("-1", []),
    "an entry that is none ends the list": ("0,-1,1", [0]),
    "an index that is none": ("7", []),
    "a UUID": ("GPU-57a2d111-0000-0000-0000-000000000001", [1]),
    "the beginning of a UUID": ("GPU-57a2d111,GPU-57a2d110", [1, 0]),
    "the beginning of two UUIDs": ("GPU-57a2", []),
    "an unknown UUID": ("GPU-ffff", []),
    "an instance of a card that is not divided": ("MIG-57a2d110", []),
    "no index and no UUID": ("NoDevFiles", []),
}


@pytest.mark.parametrize(("value", "cards"), VISIBLE.values(), ids=VISIBLE)
def test_cuda_visible_devices(value: str | None, cards: list[int], binaries: Binaries) -> None:
    with machine(binaries, *CARDS) as stage:
        variables = {**stage.environment} | ({} if value is None else {"CUDA_VISIBLE_DEVICES": value})
        argv = [binaries.path(PROBE), "--devices"]
        result = subprocess.run(argv, env=variables, capture_output=True, text=True, check=True)
    found = [device for device in json.loads(result.stdout.splitlines()[-1]) if device["backend"] == "CUDA"]
    assert [device["name"] for device in found] == [f"CUDA{i}" for i in range(len(cards))]
    assert [device["id"] for device in found] == [f"0000:{card + 1:02x}:00.0" for card in cards]
    assert [device["total_bytes"] for device in found] == [find_card(CARDS[card]).memory_bytes for card in cards]


def test_budgets_follow_cuda_visible_devices(binaries: Binaries, smollm2: Path) -> None:
    with machine(binaries, *CARDS) as stage:
        budgets = ("--vram", "400MiB,450MiB")
        plan = planned(stage, smollm2, *budgets, CUDA_VISIBLE_DEVICES="GPU-57a2d111,0")
        named = [(device["description"], device["budget_bytes"]) for device in plan["devices"]]
        assert named == [("NVIDIA GeForce RTX 4060", 400 * MIB), ("NVIDIA GeForce RTX 3060", 450 * MIB)]
        alone = run_cli("plan", smollm2, *budgets, **driver(stage, CUDA_VISIBLE_DEVICES="1"))
        assert (alone.returncode, "there are 1 GPUs" in alone.stderr) == (2, True)
        assert planned(stage, smollm2, CUDA_VISIBLE_DEVICES="-1")["devices"] == []
        hidden = run_cli("plan", smollm2, "--vram", "1GiB", **driver(stage, CUDA_VISIBLE_DEVICES=""))
        assert (hidden.returncode, "CUDA_VISIBLE_DEVICES hides" in hidden.stderr) == (2, True)
        seen = run_cli("doctor", **driver(stage, CUDA_VISIBLE_DEVICES="-1")).stdout
        assert "'-1' shows llama.cpp 0 of 2 cards" in seen


def test_cards_that_are_not_here_are_not_hidden(smollm2: Path) -> None:
    """CUDA_VISIBLE_DEVICES counts this machine's cards, and says nothing of those that are not here."""
    result = run_cli("plan", smollm2, "--gpu", "RTX 3060", "--json", CUDA_VISIBLE_DEVICES="-1")
    (gpu,) = json.loads(result.stdout)["data"]["devices"]
    assert gpu["description"] == "NVIDIA GeForce RTX 3060"


def test_a_divided_card_has_the_memory_of_its_instance(binaries: Binaries, smollm2: Path) -> None:
    with machine(binaries, "RTX 3060") as stage:
        divided = {"PYLLAMARUN_STANDIN_CARDS": stage.environment["PYLLAMARUN_STANDIN_CARDS"] + ",5120"}
        for visible in ({}, {"CUDA_VISIBLE_DEVICES": "MIG-57a2d110"}):
            (gpu,) = planned(stage, smollm2, **divided, **visible)["devices"]
            assert (gpu["memory_bytes"], gpu["budget_bytes"]) == (5120 * MIB, gpu["free_bytes"])
            assert gpu["free_bytes"] <= 5120 * MIB
        above = run_cli("plan", smollm2, "--vram", "6GiB", **driver(stage, **divided))
        assert (above.returncode, "the card has 5.00 GiB" in above.stderr) == (3, True)
        (short,) = planned(stage, smollm2, "--vram", "5GiB", **divided)["warnings"]
        assert "a part of a divided card (MIG)" in short
        assert "divided (MIG)" in run_cli("doctor", **driver(stage, **divided)).stdout


def test_who_holds_memory_is_said_where_a_budget_is_above_what_is_free(
    binaries: Binaries, smollm2: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    budget = ("--vram", "11.5GiB")
    with machine(binaries, "RTX 3060") as stage:
        plan = planned(stage, smollm2, *budget)
        assert plan["warnings"] == []
        assert plan["devices"][0]["free_bytes"] > plan["devices"][0]["budget_bytes"]
        arguments = ["-m", str(tiny("llama")), "-c", "1024", "-ngl", "99"]
        with serve(stage, binaries, arguments, tmp_path / "log") as server:
            server.wait_until_ready()
            (usage,) = stage.usage(server.process.pid)
            (warning,) = planned(stage, smollm2, *budget)["warnings"]
            held = usage.context_bytes + usage.buffer_bytes + usage.pool_bytes
            assert "are free now, less than the budget of 11.50 GiB; the plan keeps to what is free" in warning
            assert f"Held by llama-server ({server.process.pid}) {held / MIB:.1f} MiB.  What they free later" in warning
            unknown = planned(stage, smollm2, *budget, PYLLAMARUN_STANDIN_FAIL="nvml=na")["warnings"]
            assert f"llama-server ({server.process.pid}) an unknown amount" in unknown[0]
            least = ("--vram", "max-11.25GiB")
            refused = run_cli("plan", smollm2, *least, **driver(stage))
            assert refused.returncode == 3
            assert f"CUDA0:  Held by llama-server ({server.process.pid})" in refused.stderr
        assert planned(stage, smollm2, *budget)["warnings"] == [], "it has ended, and freed what it held"


def test_a_plan_does_without_nvml(binaries: Binaries, smollm2: Path) -> None:
    """It is asked only who holds memory, and a driver that never answers is given up."""
    short = ("--vram", "12GiB")
    with machine(binaries, "RTX 3060") as stage:
        hangs = {"PYLLAMARUN_STANDIN_FAIL": "nvml=hang"}
        assert planned(stage, smollm2, **hangs)["warnings"] == []
        (given_up,) = planned(stage, smollm2, *short, **hangs)["warnings"]
        assert "not known: the NVIDIA driver did not answer within 2 seconds" in given_up
        assert "did not answer" not in run_cli("doctor", "--virtual-gpu", "4GiB", **driver(stage, **hangs)).stdout
        (Path(stage.environment["LD_LIBRARY_PATH"]) / "libnvidia-ml.so.1").unlink()
        assert len(planned(stage, smollm2, *short)["warnings"]) == 1


def test_a_lost_card_is_an_error(binaries: Binaries, smollm2: Path) -> None:
    with machine(binaries, "RTX 3060") as stage:
        result = run_cli("plan", smollm2, **driver(stage, PYLLAMARUN_STANDIN_FAIL="lost=0"))
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert "doctor" in result.stderr
