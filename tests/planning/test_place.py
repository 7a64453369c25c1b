"""The search: never over the budget, and one more layer would be, asked of the real probe and in few questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import shapes
from harness import SLOW_CPU, Machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.models.gguf import read_header
from pyllamarun.planning.hardware import UNKNOWN, Hardware, of_size
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.place import place
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Answer, Device
from pyllamarun.planning.request import Budget, Request
from pyllamarun.planning.spill import OVERRIDES, Piece, cover
from pyllamarun.units import GIB, MIB


def device(name: str, total_bytes: int, free_bytes: int | None = None) -> Device:
    return Device(name, name, "VIRTUAL", "gpu", total_bytes if free_bytes is None else free_bytes, total_bytes)


def request(*budgets_bytes: int, passthrough: Sequence[str] = (), force: bool = False) -> Request:
    budgets = tuple(Budget("bytes", amount) for amount in budgets_bytes)
    return Request(1024, 1, budgets, 0, tuple(passthrough), force)


def placed(
    machine: Machine, model: Path, wanted: Request, *sizes_bytes: int, hardware: Hardware = SLOW_CPU
) -> tuple[Placement, int]:
    devices = [device(name, size) for name, size in zip(machine.device_names, sizes_bytes)]
    questions = 0

    def ask(arguments: Sequence[str]) -> Answer:
        nonlocal questions
        questions += 1
        return machine.ask(arguments)

    return place(read_header(model), wanted, resolve_limits(wanted, devices), ask, hardware), questions


def one_more_step_fits(machine: Machine, model: Path, placement: Placement) -> bool:
    """Whether the next step fits whole; the present one itself, where something of it was left behind."""
    step = placement.on_gpu + (0 if placement.left_behind else 1)
    where = placement.division.arguments(step)
    answer = machine.ask(["-m", str(model), "-c", "1024", "-np", "1", *where, "-fit", "off"])
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
    assert placement.on_gpu < placement.division.steps or placement.left_behind
    assert not one_more_step_fits(gpu, model, placement)


FILLED = {
    "70B on 8 GiB": ("70B", 8 * GIB),
    "70B on 11.5 GiB": ("70B", int(11.5 * GIB)),
    "70B on 23.5 GiB": ("70B", int(23.5 * GIB)),
    "Mixtral on 8 GiB": ("mixtral-8x7b", 8 * GIB),
    "Mixtral on 11.5 GiB": ("mixtral-8x7b", int(11.5 * GIB)),
    "8B on 4 GiB": ("llama-8b", 4 * GIB),
    "Qwen3 30B-A3B on 8 GiB": ("qwen3-30b-a3b", 8 * GIB),
    "Gemma 3 on 6 GiB": ("gemma3-12b", 6 * GIB),
}


@pytest.mark.parametrize(("name", "budget"), FILLED.values(), ids=FILLED)
def test_99_percent_of_the_budget_are_used(
    name: str, budget: int, header_70b: Path, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    model = header_70b
    if name != "70B":
        model = shapes.write(shapes.SHAPES[name](48 if name in ("qwen3-30b-a3b", "gemma3-12b") else 32), tmp_path / "m")
    placement, questions = placed(machine(24576), model, request(budget), 24 * GIB)
    assert 0.99 * budget <= placement.used_bytes(placement.limits[0]) <= budget
    assert questions <= 14
    again, _ = placed(machine(24576), model, request(budget), 24 * GIB)
    assert again.arguments == placement.arguments


def test_a_layout_that_cannot_be_bettered_is_the_last_that_is_asked_about(
    header_70b: Path, machine: Callable[..., Machine]
) -> None:
    wanted = Request(4096, budgets=(Budget("bytes", int(11.5 * GIB)),))
    placement, questions = placed(machine(12288), header_70b, wanted, 12 * GIB)
    assert questions == 2  # what a model on the CPU takes, and what this one does
    assert placement.left_behind


def test_experts_go_to_the_cpu_before_attention_does(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    model = shapes.write(shapes.mixtral_8x7b(32), tmp_path / "m")
    placement, _ = placed(machine(12288), model, request(8 * GIB), 12 * GIB)
    assert (placement.division.name, placement.gpu_layers) == ("experts", 33)
    assert all("_exps" in piece.name for piece in placement.left_behind)
    small, _ = placed(machine(12288), model, request(700 * MIB), 12 * GIB)
    assert small.division.name == "attention"
    assert 0 < small.gpu_layers < 33


def test_a_long_context_stays_on_the_gpu(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    """Where the KV cache of the layers on the CPU would cost more than their feed-forward matrices do."""
    model = shapes.write(shapes.llama_8b(32), tmp_path / "m")

    def division(context: int, budget_gib: int) -> str:
        wanted = replace(request(budget_gib * GIB), context_tokens=context)
        return placed(machine(24576), model, wanted, 24 * GIB, hardware=UNKNOWN)[0].division.name

    assert [division(4096, 4), division(131072, 20)] == ["layers", "feed_forward"]


def test_a_kv_cache_that_no_card_holds_is_not_asked_about_there(
    header_70b: Path, machine: Callable[..., Machine]
) -> None:
    """It is all on the GPU where only feed-forward matrices are not."""
    wanted = replace(request(12 * GIB), context_tokens=65536)
    placement, questions = placed(machine(12288), header_70b, wanted, 12 * GIB)
    assert (placement.division.name, questions) == ("layers", 3)  # no layer, as many as fit, and one more


def test_a_kv_cache_that_is_kept_in_ram_takes_no_room_on_the_gpu(
    header_70b: Path, machine: Callable[..., Machine]
) -> None:
    wanted = replace(request(12 * GIB, passthrough=["-nkvo"]), context_tokens=32768)
    placement, _ = placed(machine(12288), header_70b, wanted, 12 * GIB)
    assert placement.used_bytes(placement.limits[0]) >= 0.99 * 12 * GIB


@pytest.mark.parametrize("option", [["-ot", r"blk\.0\..*=CPU"], ["-ncmoe", "1"], ["-ncffn", "1"], ["-cmoe"]], ids=str)
def test_what_the_user_says_of_tensors_is_all_that_is_said(
    option: list[str], tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    model = tiny("mixtral")
    asked = ["-m", str(model), "-c", "1024", "-np", "1", *option, "-ngl"]
    least, most = (machine(4096).ask([*asked, layers]).bytes(device="VIRTUAL0") for layers in ("0", "99"))
    budget = least + (most - least) * 2 // 3
    placement, _ = placed(machine(4096), model, request(budget, passthrough=option), 4 * GIB)
    assert placement.division.name == "layers"
    assert placement.left_behind == ()
    assert sum(argument in OVERRIDES for argument in placement.arguments) == 1


def test_the_cheapest_cover() -> None:
    random = Random(0)
    for _ in range(200):
        pieces = [Piece(str(i), random.randrange(1, 60)) for i in range(random.randrange(1, 8))]
        needed = random.randrange(1, 200)
        found = cover(pieces, needed) or ()
        sums = [sum(p.size_bytes for p in c) for n in range(1, len(pieces) + 1) for c in combinations(pieces, n)]
        enough = [size for size in sums if size >= needed]
        assert sum(p.size_bytes for p in found) == min(enough, default=0)
    assert cover([Piece("a", 5), Piece("b", 3), Piece("c", 2)], 5) == (Piece("a", 5),)
    of_two = [Piece("blk.1.a.weight", 1), Piece("blk.2.a.weight", 1), Piece("blk.2.b.weight", 1)]
    assert [piece.name for piece in cover(of_two, 2) or ()] == ["blk.2.a.weight", "blk.2.b.weight"]


def test_the_founding_case(header_70b: Path, machine: Callable[..., Machine]) -> None:
    budget = int(11.5 * GIB)
    placement, questions = placed(machine(12288), header_70b, request(budget), 12 * GIB)
    assert placement.used_bytes(placement.limits[0]) <= budget
    assert placement.used_bytes(placement.limits[0]) >= 0.99 * budget
    assert questions <= 8


def test_everything_goes_to_a_gpu_that_is_large_enough(
    tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    placement, questions = placed(machine(4096), tiny("llama"), request(), 4 * GIB)
    assert placement.gpu_layers == placement.answer.offloadable_layers == 5
    assert questions == 2


SEVERAL = {
    "70B on 12 and 8 GiB": ("70B", (11.5, 7.5)),
    "70B on 24 and 12 GiB": ("70B", (23.5, 11.5)),
    "70B on two of 12 GiB": ("70B", (11.5, 11.5)),
    "70B on four": ("70B", (11.5, 7.5, 5.5, 3.5)),
    "70B and a card too small for the output": ("70B", (11.5, 0.6)),
    "Qwen3 30B-A3B on 8 and 6 GiB": ("qwen3-30b-a3b", (7.5, 5.5)),
}


@pytest.mark.parametrize(("name", "budgets_gib"), SEVERAL.values(), ids=SEVERAL)
def test_several_gpus_are_each_filled(
    name: str, budgets_gib: Sequence[float], header_70b: Path, tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    model = header_70b if name == "70B" else shapes.write(shapes.SHAPES[name](48), tmp_path / "m")
    budgets = [int(budget * GIB) for budget in budgets_gib]
    gpus = machine(*[24576] * len(budgets))
    wanted = replace(request(*budgets), context_tokens=4096)
    placement, questions = placed(gpus, model, wanted, *[24 * GIB] * len(budgets))
    used = [placement.used_bytes(limit) for limit in placement.limits]
    assert all(u <= budget for u, budget in zip(used, budgets))
    assert sum(used) >= 0.99 * sum(budgets)
    assert sum(placement.split) == placement.gpu_layers
    assert questions <= 10


def test_a_model_goes_to_as_few_gpus_as_hold_it(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    """The largest budget first; the others then hold nothing, not even a context."""
    model = shapes.write(shapes.llama_8b(32), tmp_path / "m")

    def used(*budgets_gib: float) -> list[bool]:
        wanted = replace(request(*[int(budget * GIB) for budget in budgets_gib]), overhead_bytes=300 * MIB)
        placement, _ = placed(machine(*[8192] * len(budgets_gib)), model, wanted, *[8 * GIB] * len(budgets_gib))
        assert placement.gpu_layers == 33
        return [placement.used_bytes(limit) > 0 for limit in placement.limits]

    assert used(3, 7) == [False, True]
    assert used(7, 3, 3) == [True, False, False]
    assert used(3, 1, 3.2) == [True, False, True]


def test_the_fastest_way_to_hold_all_of_a_model_is_taken(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    """A fast card that holds it alone; else one with the fast card's help, or a slow one alone if that crosses less."""
    model = shapes.write(shapes.llama_8b(32), tmp_path / "m")

    def layers(*speeds: float, fast_gib: float) -> tuple[int, ...]:
        gpus = {f"VIRTUAL{i}": replace(of_size(8 * GIB), bandwidth_bytes_per_second=speed, source="NVML")
                for i, speed in enumerate(speeds)}  # fmt: skip
        hardware = Hardware(UNKNOWN.host, gpus)
        wanted = replace(request(7 * GIB, int(fast_gib * GIB)), overhead_bytes=300 * MIB)
        found, _ = placed(machine(8192, 8192), model, wanted, 8 * GIB, 8 * GIB, hardware=hardware)
        return tuple(found.layers_of(f"VIRTUAL{i}") for i in range(2))

    assert layers(300e9, 1000e9, fast_gib=6.5) == (0, 33)
    slow, fast = layers(300e9, 1000e9, fast_gib=3)
    assert slow + fast == 33
    assert fast > 16
    assert layers(300e9, 301e9, fast_gib=1) == (33, 0)


def test_all_of_a_model_fits_where_a_layer_is_divided_between_gpus(
    tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    model = shapes.write(shapes.llama_8b(32), tmp_path / "m")
    wanted = replace(request(int(3.5 * GIB), 2 * GIB), overhead_bytes=300 * MIB, context_tokens=4096)
    placement, _ = placed(machine(8192, 8192), model, wanted, 8 * GIB, 8 * GIB)
    assert (placement.gpu_layers, placement.left_behind) == (33, ())
    assert {placement.device_of(piece.name) for piece, _ in placement.moved} == {"VIRTUAL0"}


def test_a_gpu_without_room_for_a_context_is_left_out(header_70b: Path, machine: Callable[..., Machine]) -> None:
    wanted = replace(request(8 * GIB, 200 * MIB), overhead_bytes=300 * MIB)
    placement, _ = placed(machine(24576, 24576), header_70b, wanted, 24 * GIB, 24 * GIB)
    assert [placement.used_bytes(limit) > 0 for limit in placement.limits] == [True, False]
    assert placement.arguments[placement.arguments.index("-dev") + 1] == "VIRTUAL0"
    chosen = replace(wanted, passthrough=("-dev", "VIRTUAL0,VIRTUAL1"))
    with pytest.raises(DoesNotFit, match="VIRTUAL1"):
        placed(machine(24576, 24576), header_70b, chosen, 24 * GIB, 24 * GIB)


@pytest.mark.parametrize(
    "option", [["-ts", "1,3"], ["-dev", "VIRTUAL1,VIRTUAL0"], ["-ngl", "4"], ["-sm", "none"]], ids=str
)
def test_what_the_user_says_of_gpus_is_all_that_is_said(
    option: list[str], tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpus, model = machine(4096, 4096), tiny("llama")
    needs = [gpus.ask(["-m", str(model), "-c", "1024", "-np", "1", *option, "-ngl", n]) for n in ("0", "99")]
    sizes = [max(answer.bytes(device=name) for answer in needs) * 9 // 10 for name in gpus.device_names]
    budgets = sizes[::-1] if option[0] == "-dev" else sizes
    placement, _ = placed(gpus, model, request(*budgets, passthrough=option), 4 * GIB, 4 * GIB)
    assert placement.fits
    assert placement.gpu_layers > 0
    assert placement.arguments.count(option[0]) == 1
    assert placement.arguments[-2:] == tuple(option)


TINY = ["llama", "llama-k-quants", "mixtral", "gemma3", "deepseek2", "jamba"]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    architecture=st.sampled_from(TINY),
    shares=st.lists(st.floats(0.05, 0.7), min_size=2, max_size=3),
)
def test_permuting_gpus_permutes_the_plan(
    data: st.DataObject,
    architecture: str,
    shares: list[float],
    tiny: Callable[[str], Path],
    machine: Callable[..., Machine],
) -> None:
    gpus, model = machine(*[4096] * len(shares)), tiny(architecture)
    everything = gpus.ask(["-m", str(model), "-c", "1024", "-np", "1", "-ngl", "99", "-dev", "VIRTUAL0"])
    budgets = [int(everything.bytes(device="VIRTUAL0") * share) for share in shares]
    order = data.draw(st.permutations(range(len(shares))))

    def bytes_by_budget(budgets: Sequence[int]) -> list[tuple[int, int]]:
        try:
            placement, _ = placed(gpus, model, request(*budgets), *[4 * GIB] * len(budgets))
        except DoesNotFit:
            return []
        assert placement.fits
        return sorted((limit.limit_bytes, placement.used_bytes(limit)) for limit in placement.limits)

    assert bytes_by_budget(budgets) == bytes_by_budget([budgets[i] for i in order])


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


def test_more_memory_never_costs_more(header_70b: Path, machine: Callable[..., Machine]) -> None:
    header = read_header(header_70b)
    costs = [
        placed(machine(12288), header_70b, request(budget * GIB), 12 * GIB)[0].cost(header).seconds
        for budget in range(1, 13)
    ]
    assert costs == sorted(costs, reverse=True)


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
