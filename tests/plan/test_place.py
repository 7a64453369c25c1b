"""The search: never over the budget, and one more layer would be, asked of the real probe and in few questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from harness import Machine

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.plan.place import Placement, apportion, place, resolve_limits
from pyllamarun.plan.probe import Answer, Device
from pyllamarun.plan.request import Budget, Request
from pyllamarun.units import GIB, MIB


def device(name: str, total_bytes: int, free_bytes: int | None = None) -> Device:
    return Device(name, name, "VIRTUAL", "gpu", total_bytes if free_bytes is None else free_bytes, total_bytes)


def request(*budgets_bytes: int, passthrough: Sequence[str] = (), force: bool = False) -> Request:
    budgets = tuple(Budget("bytes", amount) for amount in budgets_bytes)
    return Request(1024, 1, budgets, 0, tuple(passthrough), force)


def placed(machine: Machine, model: Path, wanted: Request, *sizes_bytes: int) -> tuple[Placement, int]:
    devices = [device(name, size) for name, size in zip(machine.device_names, sizes_bytes)]
    questions = 0

    def ask(arguments: Sequence[str]) -> Answer:
        nonlocal questions
        questions += 1
        return machine.ask(arguments)

    return place(str(model), wanted, resolve_limits(wanted, devices), ask), questions


def one_more_layer_fits(machine: Machine, placement: Placement) -> bool:
    arguments = list(placement.arguments)
    arguments[arguments.index("-ngl") + 1] = str(placement.gpu_layers + 1)
    answer = machine.ask(arguments)
    return all(answer.bytes(device=limit.device.name) <= limit.limit_bytes for limit in placement.limits)


@pytest.mark.parametrize("architecture", ["llama", "qwen3moe", "gemma3", "mamba", "jamba", "deepseek2"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_fills_the_budget_and_keeps_to_it(
    architecture: str, share: float, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpu, model = machine(4096), tiny(architecture)
    needs = [gpu.ask(["-m", str(model), "-c", "1024", "-np", "1", "-ngl", n, "-fit", "off"]) for n in ("0", "99")]
    least, most = (answer.bytes(device="VIRTUAL0") for answer in needs)
    budget = int(least + (most - least) * share)
    placement, _ = placed(gpu, model, request(budget), 4 * GIB)
    assert placement.used_bytes(placement.limits[0]) <= budget
    assert placement.gpu_layers < placement.answer.offloadable_layers
    assert not one_more_layer_fits(gpu, placement)


def test_the_founding_case(header_70b: Path, machine: Callable[..., Machine]) -> None:
    budget = int(11.5 * GIB)
    placement, questions = placed(machine(12288), header_70b, request(budget), 12 * GIB)
    assert placement.used_bytes(placement.limits[0]) <= budget
    assert not one_more_layer_fits(machine(12288), placement)
    assert questions <= 6


def test_everything_goes_to_a_gpu_that_is_large_enough(
    tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    placement, questions = placed(machine(4096), tiny("llama"), request(), 4 * GIB)
    assert placement.gpu_layers == placement.answer.offloadable_layers == 5
    assert questions == 2


def test_two_gpus_are_each_kept_to_their_budget(header_70b: Path, machine: Callable[..., Machine]) -> None:
    budgets = (8 * GIB, 5 * GIB)
    placement, _ = placed(machine(12288, 8192), header_70b, request(*budgets), 12 * GIB, 8 * GIB)
    used = [placement.used_bytes(limit) for limit in placement.limits]
    assert all(u <= b for u, b in zip(used, budgets))
    assert all(u >= 0.85 * b for u, b in zip(used, budgets))
    assert sum(placement.split) == placement.gpu_layers


def test_a_fixed_number_of_layers_stays(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    placement, questions = placed(machine(4096), tiny("llama"), request(passthrough=["-ngl", "3"]), 4 * GIB)
    assert (placement.gpu_layers, questions) == (3, 1)
    assert placement.arguments.count("-ngl") == 1
    with pytest.raises(DoesNotFit, match="With -ngl 3 as you asked"):
        placed(machine(4096), tiny("llama"), request(MIB, passthrough=["-ngl", "3"]), 4 * GIB)


def test_a_budget_below_the_least_is_refused_with_numbers(
    tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        placed(machine(4096), tiny("llama"), request(MIB), 4 * GIB)
    assert caught.value.exit_code == 3
    assert "Even with every layer on the CPU" in caught.value.what
    assert "--vram" in caught.value.remedy
    placement, _ = placed(machine(4096), tiny("llama"), request(MIB, force=True), 4 * GIB)
    assert placement.gpu_layers == 0


def test_more_memory_never_means_fewer_layers(header_70b: Path, machine: Callable[..., Machine]) -> None:
    layers = [
        placed(machine(12288), header_70b, request(budget * GIB), 12 * GIB)[0].gpu_layers for budget in range(1, 13)
    ]
    assert layers == sorted(layers)


def test_more_context_never_takes_less(header_70b: Path, machine: Callable[..., Machine]) -> None:
    taken = [
        machine(12288).ask(["-m", str(header_70b), "-ngl", "20", "-c", str(context)]).bytes(device="VIRTUAL0")
        for context in (512, 1024, 2048, 4096, 8192)
    ]
    assert taken == sorted(taken)


def test_limits() -> None:
    gpus = [device("A", 12 * GIB), device("B", 8 * GIB, free_bytes=4 * GIB)]
    one_for_all = resolve_limits(request(6 * GIB), gpus)
    assert [limit.budget_bytes for limit in one_for_all] == [6 * GIB] * 2
    assert one_for_all[1].limit_bytes < 6 * GIB, "less is free than the budget"
    with pytest.raises(DoesNotFit, match=r"the card has 8\.00 GiB"):
        resolve_limits(request(12 * GIB), gpus)
    with pytest.raises(UsageError, match="3 values"):
        resolve_limits(request(1, 2, 3), gpus)
    with pytest.raises(UsageError, match="there is no GPU"):
        resolve_limits(request(1), [])
    only_b = resolve_limits(request(passthrough=["-dev", "B"]), gpus)
    assert [limit.device.name for limit in only_b] == ["B"]
    assert resolve_limits(request(passthrough=["--device", "none"]), gpus) == ()
    with pytest.raises(UsageError, match="no device C"):
        resolve_limits(request(passthrough=["--device", "C"]), gpus)


@pytest.mark.parametrize(
    ("count", "shares", "parts"),
    [(10, (3, 1), (8, 2)), (1, (1, 1), (1, 0)), (7, (1, 1, 1), (3, 2, 2)), (5, (0, 0), (5, 0)), (0, (1, 2), (0, 0))],
)
def test_apportioning(count: int, shares: tuple[float, ...], parts: tuple[int, ...]) -> None:
    assert apportion(count, shares) == parts
