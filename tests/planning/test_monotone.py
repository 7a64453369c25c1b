"""More memory never makes a plan slower, and more context never makes it smaller: whatever the model is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import shapes
from harness import SLOW_CPU, Machine

from pyllamarun.models.gguf import read_header
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.place import place
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import Budget, Request
from pyllamarun.units import GIB

# Of real widths where the search weighs what handing an activation over costs: beside tiny layers that is much.
MODELS = {
    "dense": ("llama-8b", ()),
    "experts": ("mixtral-8x7b", ()),
    "many experts": ("qwen3-30b-a3b", ()),
    "sliding window": ("gemma3-12b", ()),
    "sliding window and experts": ("gpt-oss-120b", ()),
    "MLA": ("deepseek2", ()),
    "recurrent": ("mamba", ()),
    "hybrid": ("jamba", ()),
    "quantized KV cache": ("llama-8b", ("-ctk", "q8_0", "-ctv", "q4_0")),
}
WIDE = {what: (name, options) for what, (name, options) in MODELS.items() if name in shapes.SHAPES}
LAYERS = 6
SHARES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.1)


@pytest.fixture(scope="module")
def model_of(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("wide")

    def path_of(name: str) -> Path:
        if name not in shapes.SHAPES:
            return tiny(name)
        path = folder / f"{name}.gguf"
        return path if path.exists() else shapes.write(shapes.SHAPES[name](LAYERS), path)

    return path_of


def needs(machine: Machine, model: Path, options: Sequence[str], layers: str) -> int:
    """What the first GPU takes, with none of the layers or with all."""
    asked = ["-m", str(model), "-c", "1024", "-np", "1", "-ngl", layers, "-fit", "off", *options]
    if len(machine.device_names) > 1:
        asked += ["-dev", machine.device_names[0]]
    return machine.ask(asked).bytes(device=machine.device_names[0])


def placed(
    machine: Machine, model: Path, options: Sequence[str], budgets: Sequence[int], context: int = 1024
) -> Placement:
    devices = [Device(name, name, "VIRTUAL", "gpu", 24 * GIB, 24 * GIB) for name in machine.device_names]
    request = Request(context, 1, tuple(Budget("bytes", size) for size in budgets), 0, tuple(options))
    placement = place(read_header(model), request, resolve_limits(request, devices), machine.ask, SLOW_CPU)
    for limit in placement.limits:
        assert placement.used_bytes(limit) <= limit.budget_bytes
    return placement


@pytest.mark.parametrize(("name", "options"), WIDE.values(), ids=WIDE)
def test_more_vram_is_never_slower(
    name: str, options: Sequence[str], model_of: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpu, model = machine(24576), model_of(name)
    least, most = (needs(gpu, model, options, layers) for layers in ("0", "99"))
    header = read_header(model)
    budgets = [int(least + (most - least) * share) for share in SHARES]
    costs = [placed(gpu, model, options, [budget]).cost(header, SLOW_CPU).seconds for budget in budgets]
    assert costs == sorted(costs, reverse=True), dict(zip(SHARES, costs))
    assert costs[-1] < costs[0]


@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS)
def test_more_context_is_never_smaller(
    name: str, options: Sequence[str], model_of: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpu, model = machine(24576), model_of(name)
    for layers in ("0", "2", "99"):
        taken = [
            gpu.ask(["-m", str(model), "-c", str(context), "-np", "1", "-ngl", layers, *options]).bytes()
            for context in (256, 512, 1024, 2048, 4096, 8192)
        ]
        assert taken == sorted(taken), layers


@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS)
def test_unequal_gpus_are_each_kept_to_their_budget(
    name: str, options: Sequence[str], model_of: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpus, model = machine(24576, 12288), model_of(name)
    least, most = (needs(gpus, model, options, layers) for layers in ("0", "99"))
    budgets = [int(least + (most - least) * share) for share in (0.6, 0.25)]
    placement = placed(gpus, model, options, budgets)
    assert placement.gpu_layers > 0
