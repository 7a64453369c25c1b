"""What holds of every plan: on random models with the parts of real ones, each plan asked of the real probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import pytest
import shapes
from harness import Machine
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from synthetic import Spec, attention, common, experts, feed_forward

from pyllamarun import Machine as LibraryMachine
from pyllamarun import Model, Planner
from pyllamarun.errors import DoesNotFit
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.sources import Source
from pyllamarun.output import envelope
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.place import place
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import Budget, Request
from pyllamarun.planning.saved import read_plan, write_plan
from pyllamarun.units import GIB, MIB

FEW = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MACHINE = LibraryMachine.of(gpus="64GiB", ram="256GiB")
CARD_BYTES = 64 * GIB
SHARES = st.floats(0.02, 1.1)
Machines = Callable[..., Machine]


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Dense models and models of experts, with and without sliding windows, from some 60 million to 30 billion
    parameters."""

    def pick(*choices: int) -> int:
        return draw(st.sampled_from(choices))

    architecture = draw(st.sampled_from(["llama", "qwen3", "gemma3", "qwen3moe"]))
    head_dim, heads_kv = pick(64, 128), pick(4, 8)  # rows of whole blocks of 256
    heads, width = heads_kv * pick(1, 2, 4), 256 * pick(4, 8, 16, 24)
    spec = Spec(architecture, pick(3, 8, 24, 40), width, width * pick(2, 3, 4), heads, heads_kv, head_dim)
    common(spec, tied=architecture == "gemma3", n_vocab=shapes.N_VOCAB)
    if architecture == "gemma3":
        spec.metadata |= {"attention.sliding_window": 512}
    if architecture == "qwen3moe":
        spec.metadata |= {"expert_count": 16, "expert_used_count": 2, "expert_feed_forward_length": 512}
    for layer in range(spec.n_layer):
        attention(spec, layer, norms=architecture != "llama")
        if architecture == "qwen3moe":
            spec.block(layer, "ffn_norm.weight", width)
            experts(spec, layer, 16, 512)
        else:
            feed_forward(spec, layer)
        if architecture == "gemma3":
            spec.block(layer, "post_attention_norm.weight", width)
            spec.block(layer, "post_ffw_norm.weight", width)
    return shapes.quantized(spec)


class Case:
    """One of the models, on a machine whose GPUs differ in their budgets alone."""

    def __init__(self, spec: Spec, path: Path, machine: Machine) -> None:
        self.header: Header = read_header(shapes.write(spec, path))
        self._machine = machine

    def asked(self, context: int, slots: int, layers: int) -> tuple[int, int]:
        """Bytes on the GPU and altogether."""
        words = ("-c", str(context), "-np", str(slots), "-ngl", str(layers), "-fit", "off")
        answer = self._machine.ask(["-m", str(self.header.path), *words])
        return answer.bytes(device=self._machine.device_names[0]), answer.bytes()

    def budgets(self, shares: Sequence[float]) -> list[int]:
        """Shares of what a GPU holds of the model between none of its layers and all."""
        first = self._machine.device_names[0]
        words = ["-m", str(self.header.path), "-c", "2048", "-np", "1", "-fit", "off", "-dev", first]
        least, most = (self._machine.ask([*words, "-ngl", n]).bytes(device=first) for n in ("0", "999"))
        return [int(least + share * (most - least)) for share in shares]

    def placed(self, budgets: Sequence[int]) -> Placement | None:
        """None where it does not fit."""
        devices = [Device(name, "GPU", "VIRTUAL", "gpu", CARD_BYTES, CARD_BYTES) for name in self._machine.device_names]
        request = Request(2048, 1, tuple(Budget("bytes", size) for size in budgets), 0)
        try:
            placement = place(self.header, request, resolve_limits(request, devices), self._machine.ask)
        except DoesNotFit:
            return None
        for limit in placement.limits:
            assert placement.used_bytes(limit) <= limit.budget_bytes
        return placement

    def seconds(self, budgets: Sequence[int]) -> float:
        placement = self.placed(budgets)
        return placement.cost(self.header).seconds if placement else inf


@pytest.fixture
def case(machine: Machines, tmp_path: Path) -> Callable[..., Case]:
    def of(spec: Spec, gpus: int = 1) -> Case:
        return Case(spec, tmp_path / "random.gguf", machine(*[CARD_BYTES // MIB] * gpus))

    return of


Cases = Callable[..., Case]


@FEW
@given(spec=specs(), shares=st.lists(SHARES, min_size=3, max_size=4))
def test_more_vram_never_predicts_slower(spec: Spec, shares: list[float], case: Cases) -> None:
    one = case(spec)
    budgets = one.budgets(sorted(shares))
    costs = [one.seconds([budget]) for budget in budgets]
    assert costs == sorted(costs, reverse=True), list(zip(sorted(shares), costs))


@FEW
@given(
    spec=specs(), contexts=st.lists(st.integers(1, 64), min_size=2, max_size=4), slots=st.sampled_from([1, 2]),
    layers=st.integers(0, 41),
)  # fmt: skip
def test_more_context_never_needs_less(spec: Spec, contexts: list[int], slots: int, layers: int, case: Cases) -> None:
    one = case(spec)
    taken = [one.asked(512 * context, slots, layers) for context in sorted(contexts)]
    for of_one_kind in zip(*taken):
        assert list(of_one_kind) == sorted(of_one_kind), list(zip(sorted(contexts), taken))


@FEW
@given(spec=specs(), shares=st.tuples(SHARES, SHARES))
def test_permuted_gpus_have_the_permuted_plan(spec: Spec, shares: tuple[float, float], case: Cases) -> None:
    two = case(spec, gpus=2)
    budgets = two.budgets(shares)
    assume(budgets[0] != budgets[1])
    found = [two.placed(order) for order in (budgets, budgets[::-1])]
    used = [one and [one.used_bytes(limit) for limit in one.limits] for one in found]
    assert used[0] == (used[1] and used[1][::-1])


@FEW
@given(spec=specs(), share=SHARES, slots=st.sampled_from([1, 3]))
def test_a_saved_plan_has_the_same_command(spec: Spec, share: float, slots: int, case: Cases, tmp_path: Path) -> None:
    one, file = case(spec), tmp_path / "plan.json"
    (budget,) = one.budgets([share])
    request = Request(6144, slots, (Budget("bytes", budget + 400 * MIB),))
    with Planner(MACHINE) as planner:
        plan = planner.plan(Model(Source("random", one.header.path), one.header), request)
    data = plan.to_dict() | {"machine": MACHINE.to_words(), "source": "random"}
    write_plan(file, envelope("plan", data))
    assert read_plan(file).plan == plan
    assert read_plan(file).plan.argv == plan.argv
