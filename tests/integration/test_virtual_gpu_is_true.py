"""The probe's answer on the virtual GPU is its answer on the real ggml-cuda, buffer by buffer and byte for byte.

The cards are one of each generation; those that the build has no kernels for are told so, and are then compared as
ggml-cuda treats such a card.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic

from pyllamarun.machine.cards import find_card
from pyllamarun.planning.probe import Probe
from pyllamarun.planning.request import VirtualGpu
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.stage import Stage, open_probe, standin_stage, virtual_stage
from pyllamarun.units import GIB

pytestmark = pytest.mark.usefixtures("cuda_build")

OPTION_SETS = (
    [], ["-np", "1"], ["-ctk", "q8_0", "-ctv", "q8_0"], ["-ctk", "q4_0", "-ctv", "q4_0"], ["-fa", "off"],
    ["-fa", "off", "-ub", "2048"], ["-ub", "128"], ["-ub", "2048"], ["-ctk", "q8_0", "-ctv", "q8_0", "-ub", "2048"],
)  # fmt: skip
AMPERE, PAIR = ("RTX 3060",), ("RTX 3060", "RTX 4060")
OTHERS = (("GTX 1080",), ("V100",), ("RTX 2060",), ("RTX 4090",), ("RTX 5090",))  # Pascal to Blackwell
SAMPLE = [
    (AMPERE, "mixtral"),
    (AMPERE, "deepseek2"),
    (AMPERE, "gemma3"),
    (("RTX 2060",), "qwen3moe"),
    (PAIR, "gpt-oss"),
]

Twins = tuple[Probe, Probe]


@pytest.fixture(scope="module")
def twins(binaries: Binaries) -> Iterator[Callable[..., Twins]]:
    """Two probes that see the same cards: as virtual GPUs, and through ggml-cuda.  With room for every model."""
    stack = ExitStack()
    known: dict[tuple[str, ...], Twins] = {}

    def probe(stage: Stage) -> Probe:
        return stack.enter_context(open_probe(binaries, stage))

    def of(names: tuple[str, ...]) -> Twins:
        if names not in known:
            cards = [replace(find_card(name), memory_bytes=256 * GIB) for name in names]
            virtual = virtual_stage(binaries, [VirtualGpu(card.memory_bytes, 0, card) for card in cards])
            standin = standin_stage(binaries, cards, 0)
            known[names] = (probe(stack.enter_context(virtual)), probe(stack.enter_context(standin)))
        return known[names]

    with stack:
        yield of


def buffers(probe: Probe, arguments: list[str]) -> Counter[tuple[str, ...]]:
    total: Counter[tuple[str, ...]] = Counter()
    for buffer in probe.ask(arguments).buffers:
        device = buffer.device.replace("VIRTUAL", "CUDA")
        total[device, buffer.part, buffer.use, buffer.kind] += buffer.bytes
    return total


def check(twins: Twins, model: Path, contexts: tuple[str, ...]) -> None:
    virtual, real = twins
    everything = real.ask(["-m", str(model), "-c", "512", "-ngl", "0"]).offloadable_layers
    for context, options in itertools.product(contexts, OPTION_SETS):
        for layers in (0, everything // 2, everything - 1, everything):
            arguments = ["-m", str(model), "-c", context, "-fit", "off", *options, "-ngl", str(layers)]
            expected = buffers(real, arguments)
            assert (expected["CUDA0", "model", "weights", "device"] > 0) == (layers > 0)
            assert buffers(virtual, arguments) == expected, f"{model.name} {arguments[2:]}"


@pytest.mark.parametrize(("cards", "architecture"), SAMPLE, ids=str)
def test_a_sample_is_the_same(
    cards: tuple[str, ...], architecture: str, twins: Callable[..., Twins], tiny: Callable[[str], Path]
) -> None:
    check(twins(cards), tiny(architecture), ("4096",))


@pytest.mark.slow
@pytest.mark.parametrize("cards", [AMPERE, PAIR], ids=" + ".join)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_every_architecture_is_the_same(
    cards: tuple[str, ...], architecture: str, twins: Callable[..., Twins], tiny: Callable[[str], Path]
) -> None:
    check(twins(cards), tiny(architecture), ("1024", "16384"))


@pytest.mark.slow
@pytest.mark.parametrize("cards", OTHERS, ids=" + ".join)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_every_generation_is_the_same(
    cards: tuple[str, ...], architecture: str, twins: Callable[..., Twins], tiny: Callable[[str], Path]
) -> None:
    check(twins(cards), tiny(architecture), ("4096",))


@pytest.mark.slow
@pytest.mark.parametrize("cards", [AMPERE, PAIR, *OTHERS], ids=" + ".join)
def test_a_70b_is_the_same(cards: tuple[str, ...], twins: Callable[..., Twins], header_70b: Path) -> None:
    check(twins(cards), header_70b, ("4096",))
