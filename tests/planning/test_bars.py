"""Bars: as wide as the screen allows, and each use in its share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllamarun import Machine, Model, Plan, Planner
from pyllamarun.output import Screen
from pyllamarun.planning.bars import bars
from pyllamarun.planning.request import make_request
from pyllamarun.units import GIB

SIZES = st.integers(0, 1 << 45)


@pytest.fixture(scope="module")
def plan(tiny: Callable[[str], Path]) -> Plan:
    with Planner(Machine.of(gpus="1GiB", ram="8GiB")) as planner:
        return planner.plan(Model.open(tiny("llama")), make_request(context=1024))


def with_gpu(plan: Plan, *, budget: int, weights: int, context: int = 0, compute: int = 0, overhead: int = 0) -> Plan:
    sizes = {"budget_bytes": budget, "weights_bytes": weights, "context_bytes": context, "compute_bytes": compute}
    return replace(plan, devices=(replace(plan.devices[0], name="GPU", overhead_bytes=overhead, **sizes),))


def test_each_use_has_its_share(plan: Plan) -> None:
    quarter = with_gpu(plan, budget=8 * GIB, weights=4 * GIB, context=2 * GIB, compute=GIB, overhead=GIB // 2)
    (gpu, ram, legend) = bars(quarter, Screen(len("GPU  ") + 32 + len("  7.50 GiB of 8.00 GiB"), shows_blocks=True))
    assert gpu.split()[1] == "█" * 16 + "▓" * 8 + "▒" * 4 + "░" * 2 + "·" * 2
    assert gpu.endswith("7.50 GiB of 8.00 GiB")
    assert ram.startswith("RAM  ")
    assert legend == "█ weights   ▓ KV cache   ▒ compute   ░ overhead   · left"


def test_what_is_more_than_there_is_room_for_is_seen(plan: Plan) -> None:
    gpu = bars(with_gpu(plan, budget=GIB, weights=3 * GIB, context=GIB), Screen(60))[0]
    assert gpu.split()[1] == "#" * (len(gpu.split()[1]) - 1) + ">"


@given(columns=st.integers(1, 300), blocks=st.booleans(), sizes=st.lists(SIZES, min_size=5, max_size=5))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_line_is_wider_than_the_screen(plan: Plan, columns: int, blocks: bool, sizes: list[int]) -> None:
    budget, weights, context, compute, overhead = sizes
    changed = with_gpu(plan, budget=budget, weights=weights, context=context, compute=compute, overhead=overhead)
    for line in bars(changed, Screen(columns, blocks)):
        assert len(line) <= max(columns, len("= KV cache"))


def test_a_terminal_without_blocks_gets_letters(tiny: Callable[[str], Path]) -> None:
    for encoding, weights in (("ascii", "# weights"), ("utf-8", "█ weights")):
        arguments = ("plan", tiny("llama"), "--virtual-gpu", "1GiB")
        result = run_cli(*arguments, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (result.returncode, weights in result.stdout) == (0, True), result.stderr
