"""Advice: what is said to help was planned, and helps."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import run_cli

from pyllamarun import Machine, Model, Plan, Planner
from pyllamarun.machine.cards import all_cards
from pyllamarun.models.gguf import read_header
from pyllamarun.planning.advice import advice_from, down_to_usable, is_wanting, larger_card
from pyllamarun.planning.compare import Row, rows_of
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.request import make_request
from pyllamarun.planning.speed import Range
from pyllamarun.planning.variants import Variant


def data_of(*arguments: str | Path) -> dict[str, Any]:
    command, *others = arguments
    result = run_cli(command, "--advice", "--json", *others)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["data"]


def test_every_advice_is_a_plan_that_can_be_had(header_70b: Path) -> None:
    machine = ["--virtual-gpu", "12GiB", "--ram", "64GiB"]
    asked = data_of("plan", header_70b, *machine, "--vram", "4GiB", "-c", "32768")
    found = {one["kind"]: one for one in asked["advice"]}
    assert set(found) == {"quant", "context", "vram", "card"}
    typed = {
        "context": [*machine, "--vram", "4GiB", "-c", "8192"],
        "vram": [*machine, "-c", "32768"],
    }
    for kind, arguments in typed.items():
        plan, advice = data_of("plan", header_70b, "--no-advice", *arguments), found[kind]
        assert advice["vram_bytes"] == sum(device["total_bytes"] for device in plan["devices"]), kind
        assert (advice["gpu_layers"], advice["ram_bytes"]) == (plan["gpu_layers"], plan["host"]["total_bytes"]), kind
        assert advice["generation"] == plan["speed"]["generation"], kind
        assert advice["generation"]["low"] > asked["speed"]["generation"]["low"], kind


def test_a_model_that_leaves_memory_is_told_what_stays_there(header_70b: Path) -> None:
    asked = data_of("plan", header_70b, "--virtual-gpu", "12GiB", "--vram", "11GiB", "--ram", "25GiB")
    assert asked["residency"]["verdict"] == "reread"
    assert all(one["stays_in_memory"] for one in asked["advice"])
    assert {one["kind"] for one in asked["advice"]} == {"quant", "ram", "card"}
    (ram,) = (one for one in asked["advice"] if one["kind"] == "ram")
    assert (ram["words"], ram["gpu_layers"]) == (["--ram", "48GiB"], asked["gpu_layers"])


def test_what_does_not_fit_is_told_with_a_command_that_does(tiny: Callable[[str], Path]) -> None:
    failed = run_cli("plan", tiny("llama"), "--virtual-gpu", "1GiB", "--vram", "299MiB")
    assert failed.returncode == 3
    lines = [line.strip() for line in failed.stderr.splitlines()]
    place = next(number for number, line in enumerate(lines) if line.startswith("all of the VRAM that is free"))
    command = shlex.split(lines[place + 1])
    assert command[:2] == ["pyllamarun", "plan"]
    assert run_cli(*command[1:]).returncode == 0


def test_a_plan_that_lacks_nothing_gets_no_advice(tiny: Callable[[str], Path]) -> None:
    assert data_of("plan", tiny("llama"), "--virtual-gpu", "1GiB", "--ram", "4GiB")["advice"] == []


# ------------------------------------------------------------------------------------------------------- the choices


@pytest.fixture(scope="module")
def plan(tiny: Callable[[str], Path]) -> Plan:
    with Planner(Machine.of(gpus="1GiB", ram="8GiB")) as planner:
        request = make_request(vram="306MiB", overhead="300MiB", context=1024)
        return planner.plan(Model.open(tiny("llama")), request)


@pytest.fixture
def row(plan: Plan, tiny: Callable[[str], Path]) -> Callable[..., Row]:
    def of(label: str, pace: float | None, **changes: Any) -> Row:
        variant = Variant(label, read_header(tiny("llama")), make_request(), "quant", "m.gguf")
        (plain,) = rows_of([variant], lambda _: plan)
        return replace(plain, generation=None if pace is None else Range(pace, pace), **changes)

    return of


@pytest.mark.parametrize("usable", range(7))
def test_the_largest_usable_type_is_found_in_few_plans(usable: int, row: Callable[..., Row]) -> None:
    types = [f"Q{number}" for number in range(6)]
    asked = []

    def planned(name: str) -> Row:
        asked.append(name)
        return row(name, 3.0 if types.index(name) >= usable else 1.0)

    found = down_to_usable(types, planned)
    assert found[-1].label == types[min(usable, 5)]
    assert [one.label for one in found] == sorted(name for name in asked if name <= found[-1].label)
    assert len(asked) <= 3
    assert down_to_usable([], planned) == []


def test_only_what_is_clearly_better_is_advised(plan: Plan, row: Callable[..., Row]) -> None:
    assert not is_wanting(plan)
    assert plan.speed.generation is not None
    pace = plan.speed.generation.middle
    rows = [row("same", pace), row("faster", 1.1 * pace), row("fastest", 2 * pace), row("none", None, plan=None)]
    assert [one.change for one in advice_from(rows, plan)] == ["fastest", "faster"]
    assert [one.change for one in advice_from(rows, None)] == ["fastest", "faster", "same"]


def test_a_card_is_as_large_as_it_takes_and_no_larger(plan: Plan, tiny: Callable[[str], Path]) -> None:
    header = read_header(tiny("llama"))
    with Planner(Machine.of(gpus="RTX 3060")) as planner:
        limits = resolve_limits(make_request(), planner.devices)

    def title(needed_bytes: int) -> str:
        needing = replace(plan, host=replace(plan.host, total_bytes=needed_bytes))
        card = larger_card(needing, header, limits, all_cards())
        return card.short_name if card else ""

    assert title(14 * 2**30) == "RTX 4060 Ti 16GB"
    assert title(21 * 2**30).startswith("RTX 3090")
    assert title(99 * 2**30) == "RTX 5090"
    assert larger_card(plan, header, [*limits, *limits], all_cards()) is None
