"""What the planner chooses is what llama-server allocates: on every device, in bytes, at ready and after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import synthetic
from harness import SLOW_CPU, Machine

from pyllamarun.models.gguf import read_header
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.place import place
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import Budget, Request
from pyllamarun.units import MIB

CARDS = {"small": (0.25,), "middling": (0.7,), "two unequal": (0.5, 0.2)}  # shares of what everything would take


@pytest.mark.parametrize("context", [512, 1024, 4096])
@pytest.mark.parametrize("shares", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_planned_is_allocated(
    architecture: str,
    shares: Sequence[float],
    context: int,
    tiny: Callable[[str], Path],
    machine: Callable[..., Machine],
) -> None:
    model, gpus = tiny(architecture), machine(*[4096, 2048][: len(shares)])
    fixed = ["-m", str(model), "-c", str(context), "-np", "1", "-fit", "off"]
    least, most = (gpus.ask([*fixed, "-ngl", layers]).bytes(device="VIRTUAL0") for layers in ("0", "99"))
    budgets = tuple(Budget("bytes", int(least + (most - least) * share)) for share in shares)
    devices = [Device(name, name, "VIRTUAL", "gpu", 2048 * MIB, 2048 * MIB) for name in gpus.device_names]
    wanted = Request(context, 1, budgets, overhead_bytes=0)
    placement = place(read_header(model), wanted, resolve_limits(wanted, devices), gpus.ask, SLOW_CPU)
    predicted = [placement.used_bytes(limit) for limit in placement.limits]
    assert all(used <= budget.amount for used, budget in zip(predicted, budgets))
    with gpus.serve([*placement.arguments, "--ctx-checkpoints", "0"]) as server:
        answer = placement.answer
        server.complete([3 + i % 200 for i in range(answer.worst_prompt_tokens or answer.slot_context_tokens - 1)])
        assert server.used_bytes() == predicted, placement.arguments
        assert server.peak_bytes() == predicted


# What a server holds beside the model: options of it, and whether it holds that only after its warm-up.
BESIDES = {
    "a draft model": ("llama-k-quants", ["-md", "llama", "-ngld", "99", "--spec-type", "draft-simple"], False),
    "a multi-token prediction context": ("deepseek2-mtp", ["--spec-type", "draft-mtp"], False),
    "a multimodal projector": ("gemma3", ["--mmproj", "projector"], True),
}


@pytest.mark.parametrize("shares", [(0.7,), (0.6, 0.3)], ids=["one GPU", "two GPUs"])
@pytest.mark.parametrize(("architecture", "options", "warmup"), BESIDES.values(), ids=BESIDES)
def test_room_is_left_for_what_is_held_besides(
    architecture: str,
    options: list[str],
    warmup: bool,
    shares: Sequence[float],
    tiny: Callable[[str], Path],
    machine: Callable[..., Machine],
) -> None:
    model, gpus = tiny(architecture), machine(*[4096, 2048][: len(shares)])
    options = [str(tiny(word)) if word in ("llama", "projector") else word for word in options]
    fixed = ["-m", str(model), "-c", "1024", "-np", "1", "-fit", "off", "-dev", "VIRTUAL0", *options]
    least, most = (gpus.ask([*fixed, "-ngl", layers]).bytes(device="VIRTUAL0") for layers in ("0", "99"))
    budgets = tuple(Budget("bytes", int(least + (most - least) * share)) for share in shares)
    devices = [Device(name, name, "VIRTUAL", "gpu", 2048 * MIB, 2048 * MIB) for name in gpus.device_names]
    wanted = Request(1024, 1, budgets, overhead_bytes=0, passthrough=tuple(options))
    placement = place(read_header(model), wanted, resolve_limits(wanted, devices), gpus.ask, SLOW_CPU)
    predicted = [placement.used_bytes(limit) for limit in placement.limits]
    assert placement.gpu_layers > 0
    assert all(used <= budget.amount for used, budget in zip(predicted, budgets))
    with gpus.serve([*placement.arguments, "--ctx-checkpoints", "0"], warmup=warmup) as server:
        answer = placement.answer
        if not warmup:
            server.complete([3 + i % 200 for i in range(answer.worst_prompt_tokens or answer.slot_context_tokens - 1)])
            assert server.used_bytes() == predicted, placement.arguments
        assert all(peak <= used for peak, used in zip(server.peak_bytes(), predicted)), placement.arguments
