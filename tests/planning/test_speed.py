"""The speed model: what a token is made of, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
from harness import Machine

from pyllamarun.machine.core_rates import assumed, nominal
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.planning.hardware import ASSUMED, Hardware, hardware_of, of_size
from pyllamarun.planning.probe import Answer, Device
from pyllamarun.planning.speed import Speed, predict, verdict
from pyllamarun.planning.token_cost import CPU, TokenCost, Use, token_cost
from pyllamarun.units import GIB

HERE = Hardware(assumed(), {"VIRTUAL0": of_size(12 * GIB)})


@pytest.fixture
def asked(tmp_path: Path, machine: Callable[..., Machine]) -> Callable[..., tuple[Header, Answer]]:
    def ask(name: str, *arguments: str, layers: int = 8) -> tuple[Header, Answer]:
        path = tmp_path / f"{name}.gguf"
        if not path.exists():
            shapes.write(shapes.SHAPES[name](layers), path)
        return read_header(path), machine(48 * 1024).ask(["-m", str(path), "-c", "4096", "-np", "1", *arguments])

    return ask


def nowhere(_: str) -> None:
    return None


def on_gpu(_: str) -> str:
    return "VIRTUAL0"


def sum_of(cost: TokenCost, device: str, what: str) -> int:
    return sum(term.bytes for term in cost.terms if term.device == device and term.what.startswith(what))


def test_every_weight_is_read_once_but_for_embeddings(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "0")
    read = sum(tensor.size_bytes for tensor in header.tensors if len(tensor.shape) > 1)
    read -= next(tensor.size_bytes for tensor in header.tensors if tensor.name == "token_embd.weight")
    assert sum_of(token_cost(header, answer, nowhere, HERE), CPU, "weights") == read
    assert sum_of(token_cost(header, answer, on_gpu, HERE), "VIRTUAL0", "weights") == read


def test_where_there_is_no_output_matrix_the_embeddings_are_one(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("gemma3-12b", "-ngl", "0")
    read = sum(tensor.size_bytes for tensor in header.tensors if len(tensor.shape) > 1)
    assert sum_of(token_cost(header, answer, nowhere, HERE), CPU, "weights") == read


def test_a_token_reads_the_experts_that_it_uses(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("qwen3-30b-a3b", "-ngl", "0")
    experts = sum(tensor.size_bytes for tensor in header.tensors if "_exps" in tensor.name)
    cost = token_cost(header, answer, nowhere, HERE)
    assert sum_of(cost, CPU, "experts") == pytest.approx(experts * 8 / 128, abs=8)
    together = token_cost(header, answer, nowhere, HERE, Use(slots=16))
    assert sum_of(cost, CPU, "experts") < sum_of(together, CPU, "experts") < 16 * sum_of(cost, CPU, "experts")


def test_steps_are_those_of_the_graph(asked: Callable[..., tuple[Header, Answer]]) -> None:
    _, answer = asked("llama-8b", "-ngl", "4")
    (graph,) = answer.graphs
    products = {steps.device: steps.products for steps in graph.devices}
    assert products["VIRTUAL0"] >= 3 * 7 + 1  # three layers and the output
    assert sum(products.values()) >= 8 * 7 + 1
    assert graph.splits >= 2


def test_more_context_and_a_slower_place_cost_more(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "0")
    seconds = [token_cost(header, answer, nowhere, HERE, Use(filled=filled)).seconds for filled in (0, 0.5, 1)]
    assert seconds == sorted(set(seconds))
    assert token_cost(header, answer, on_gpu, HERE).seconds < seconds[0]
    slower = token_cost(header, answer, nowhere, replace(HERE, host=nominal(20e9, 8))).seconds
    assert slower > token_cost(header, answer, nowhere, replace(HERE, host=nominal(80e9, 8))).seconds


def test_slots_share_the_reading_of_weights(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "99")
    one, many = (token_cost(header, answer, on_gpu, HERE, Use(slots=slots)).seconds for slots in (1, 8))
    assert many < 3 * one


def predicted(header: Header, answer: Answer, hardware: Hardware = HERE, **wishes: bool) -> Speed:
    return predict(header, answer, nowhere, hardware, **wishes)


def test_a_band_is_as_wide_as_what_it_rests_on_is_uncertain(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "0")
    rough, named = predicted(header, answer), predicted(header, answer, Hardware(nominal(51.2e9, 6)))
    assert rough.generation
    assert named.generation
    assert rough.generation.low < named.generation.low < named.generation.high < rough.generation.high
    assert (rough.basis, named.basis) == (("assumed",), ("nominal",))


def test_a_model_that_is_read_from_disk_gets_no_figure(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "0")
    speed = predicted(header, answer, from_disk=True)
    assert speed.from_disk
    assert (speed.generation, speed.prompt, speed.verdict) == (None, None, "unusable")


def test_a_prompt_is_faster_than_generation(asked: Callable[..., tuple[Header, Answer]]) -> None:
    header, answer = asked("llama-8b", "-ngl", "99")
    speed = predict(header, answer, on_gpu, HERE)
    assert speed.prompt
    assert speed.generation
    assert speed.prompt.low > 3 * speed.generation.high


@pytest.mark.parametrize(
    ("rate", "called"),
    [(0.49, "unusable"), (0.5, "slow: batch work"), (1.99, "slow: batch work"), (2, "usable"), (10, "usable"),
     (10.1, "interactive")],
)  # fmt: skip
def test_verdicts(rate: float, called: str) -> None:
    assert verdict(rate) == called


def test_a_card_that_is_not_known_is_taken_for_a_slow_one_of_its_size() -> None:
    devices = [Device(f"GPU{i}", "a card", "VIRTUAL", "gpu", size * GIB, size * GIB) for i, size in enumerate((8, 24))]
    hardware = hardware_of(devices, [], (), assumed())
    assert [gpu.source for gpu in hardware.gpus.values()] == [ASSUMED, ASSUMED]
    assert hardware.gpu("GPU0").bandwidth_bytes_per_second < hardware.gpu("GPU1").bandwidth_bytes_per_second
