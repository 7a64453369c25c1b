"""What the planner chooses, carried out by llama-server on the real ggml-cuda: as predicted, and within the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import synthetic

from pyllamarun import Machine, Model, Planner
from pyllamarun.planning.request import Budget, Request
from pyllamarun.run.process import running
from pyllamarun.run.rehearsal import StageMeter, rehearse
from pyllamarun.run.server import free_port
from pyllamarun.units import MIB

pytestmark = pytest.mark.usefixtures("cuda_build")

CUDA_CONTEXT_BYTES = 300 * MIB
CUBLAS_WORKSPACE_BYTES = 4 * MIB  # what ggml-cuda's first use of cuBLAS takes on these cards
CARDS = {"small": (0.25,), "middling": (0.7,), "two unequal": (0.5, 0.2)}  # shares of what everything would take
NAMES = ["RTX 3060", "RTX 4060"]
CONTEXTS = [pytest.param(512, marks=pytest.mark.slow), 1024, pytest.param(4096, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def planner_of() -> Iterator[Callable[[int], Planner]]:
    """Planners for one card or two, opened once."""
    planners: dict[int, Planner] = {}

    def of(count: int) -> Planner:
        if count not in planners:
            planners[count] = Planner(Machine.of(gpus=NAMES[:count], cores=1, ram_bandwidth="0.1GB/s")).__enter__()
        return planners[count]

    yield of
    for planner in planners.values():
        planner.__exit__(None, None, None)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("shares", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_planned_is_taken(
    architecture: str,
    shares: Sequence[float],
    context: int,
    tiny: Callable[[str], Path],
    planner_of: Callable[[int], Planner],
) -> None:
    planner, model = planner_of(len(shares)), Model.open(tiny(architecture))

    def needed(layers: str) -> int:
        (device, *_) = planner.plan(model, Request(context, 2, passthrough=("-ngl", layers, "-dev", "CUDA0"))).devices
        return device.total_bytes

    least, most = needed("0"), needed("99")
    budgets = tuple(Budget("bytes", int(least + (most - least) * share)) for share in shares)
    # Checkpoints would cut prompts of models with sliding windows into other ubatches than those of the worst case.
    plan = planner.plan(model, Request(context, 2, budgets, passthrough=("--ctx-checkpoints", "0")))
    stage, port = planner.stage.hollow(planner.binaries), free_port()
    argv = [str(planner.binaries.path("llama-server")), *plan.argv[1:], "--port", str(port)]
    result = rehearse(running, argv, port, plan, stage, StageMeter(stage), lambda _: None, lambda _: None)
    for planned, taken in zip(plan.devices, result.devices, strict=True):
        case = (planned.name, plan.argv)
        assert taken.peak_bytes <= planned.total_bytes <= planned.budget_bytes, case
        buffers = planned.total_bytes - planned.overhead_bytes
        assert taken.buffer_bytes - buffers in (0, CUBLAS_WORKSPACE_BYTES), case
        assert taken.context_bytes in (0, CUDA_CONTEXT_BYTES)
        assert taken.pool_bytes <= planned.scratch_bytes, case
