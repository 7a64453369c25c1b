"""What ggml-cuda allocates besides its buffers: the prediction against the real ggml-cuda, on a card that is not here.

Nothing is computed, so a prompt of thousands of tokens takes milliseconds, and each case sends the prompts that need
most: ubatches of many sizes at the end of a full context, in one slot and in several at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
import shapes
import synthetic
from harness import RunningServer, ask, serve

from pyllamarun.machine.cards import find_card
from pyllamarun.planning.probe import Answer
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.stage import Usage, standin_stage
from pyllamarun.units import GIB, MIB

pytestmark = pytest.mark.usefixtures("cuda_build")

CARDS = ("GTX 1080", "V100", "RTX 2060", "RTX 3060", "RTX 4090")  # Pascal, Volta, Turing, Ampere, Ada
BATCH = 2048  # llama-server's -b
UNCACHED = ("--ctx-checkpoints", "0", "--cache-ram", "0")
KEPT_FREE = 3  # tokens of a slot, for what is generated
POOL_STEP = 2 * MIB  # in which the pool grows


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model, or one with the widths of a real one."""
    folder = tmp_path_factory.mktemp("shapes")

    def path_of(name: str) -> Path:
        if name not in shapes.SHAPES:
            return tiny(name)
        path = folder / f"{name}.gguf"
        return path if path.exists() else shapes.write(shapes.SHAPES[name](), path)

    return path_of


@dataclass(frozen=True)
class Case:
    """A server with everything on its cards; ubatches of `ubatch`, and of every `step` tokens less, are sent to it."""

    cards: str  # separated by ";"
    model: str
    ubatch: int = 512
    kv: str = "f16"
    flash_attention: str = "on"
    slots: int = 1
    context: int = 2048
    step: int = 64
    draft: bool = False  # the same model once more, to guess tokens

    def __str__(self) -> str:
        options = f"ub{self.ubatch}-{self.kv}-fa-{self.flash_attention}-np{self.slots}-c{self.context}"
        return f"{self.cards}-{self.model}-{options}{'-draft' if self.draft else ''}"

    def arguments(self, path: Path) -> list[str]:
        # Without flash attention, llama.cpp has no kernel for values in another type.
        values = ["-ctv", self.kv] if self.flash_attention == "on" else []
        numbers = ["-ub", str(self.ubatch), "-np", str(self.slots), "-c", str(self.context), "-b", str(BATCH)]
        draft = ["-md", str(path), "-ngld", "99", "--spec-type", "draft-simple"] if self.draft else []
        return ["-m", str(path), "-ngl", "99", "-fa", self.flash_attention, "-ctk", self.kv, *values, *numbers, *draft]


def tokens(count: int, variant: int = 0) -> list[int]:
    return [3 + (i * (variant + 1) + variant) % 200 for i in range(count)]


def send_prompts(server: RunningServer, case: Case, slot_tokens: int) -> None:
    full = slot_tokens - KEPT_FREE
    sizes = range(min(case.ubatch, full - 1), 0, -case.step)
    server.complete(tokens(full), predict=2)
    for size in sizes:  # as the whole context, and as the end of a full one
        server.complete(tokens(size, variant=7))
    for size in sizes:
        server.complete(tokens(full - size), cache_prompt=True)
        server.complete(tokens(full), cache_prompt=True)
    for slots in range(2, case.slots + 1):
        new = min(BATCH // slots, full - 2)
        server.complete_together([tokens(full - new, variant) for variant in range(slots)])
        server.complete_together([tokens(full, variant) for variant in range(slots)])


Usages = Sequence[Usage]


def after_prompts(case: Case, path: Path, binaries: Binaries, log: Path) -> tuple[Answer, Usages, Usages]:
    """The prediction, and what the server holds on each card when it is ready and after all prompts."""
    # The pool does not depend on how much memory there is; every case shall have enough.
    cards = [replace(find_card(card), memory_bytes=256 * GIB) for card in case.cards.split(";")]
    with standin_stage(binaries, cards, 0) as machine:
        answer = ask(machine, binaries, case.arguments(path))
        with serve(machine, binaries, [*case.arguments(path), *UNCACHED], log) as server:
            server.wait_until_ready()
            ready = machine.usage(server.process.pid)
            send_prompts(server, case, answer.slot_context_tokens)
            return answer, ready, machine.usage(server.process.pid)


def check(case: Case, path: Path, binaries: Binaries, log: Path) -> None:
    answer, ready, after = after_prompts(case, path, binaries, log)
    parts = ("model", "draft") if case.draft else ("model",)
    devices = [f"CUDA{i}" for i in range(len(ready))]
    assert {(scratch.device, scratch.part) for scratch in answer.scratch} == set(itertools.product(devices, parts))
    # No prompt fills a ubatch that is as long as the context: there, the prediction is a bound.
    spare = POOL_STEP if case.ubatch >= answer.slot_context_tokens else 0
    for device, before, now in zip(devices, ready, after):
        pool = sum(scratch.pool_bytes for scratch in answer.scratch if scratch.device == device)
        assert 0 <= pool - now.pool_peak_bytes <= spare, f"{case}: pool on {device}"
        workspace = answer.scratch_bytes(device) - pool
        growth = answer.bytes(device=device, use="compute_growth")
        assert 0 <= now.buffer_bytes - before.buffer_bytes - workspace <= growth, f"{case}: workspace on {device}"


SAMPLE = [
    Case("RTX 3060", "llama-8b"),
    Case("RTX 3060", "llama-8b", flash_attention="off"),
    Case("RTX 3060", "llama-8b", flash_attention="off", kv="q8_0", context=8192, ubatch=128),
    Case("RTX 3060", "llama-8b-f16", kv="q8_0", slots=4, context=8192),
    Case("RTX 3060", "mixtral-8x7b", ubatch=2048, context=8192, step=512),
    Case("RTX 3060", "qwen3-30b-a3b", slots=4, context=8192, flash_attention="off"),
    Case("RTX 3060", "gemma3-12b", kv="q4_0"),
    Case("RTX 4090", "llama-8b"),  # the pool is largest after ubatches of 384 tokens
    Case("RTX 4090", "mixtral-8x7b", ubatch=128),
    Case("RTX 4090", "gemma3-12b", slots=4, context=8192),
    Case("RTX 2060", "llama-8b"),
    Case("RTX 2060", "qwen3-30b-a3b", flash_attention="off"),
    Case("GTX 1080", "llama-8b-f16", kv="q8_0"),
    Case("GTX 1080", "gemma3-12b", ubatch=128),
    Case("V100", "llama-8b", slots=4, context=8192),
    Case("V100", "qwen3-30b-a3b", step=4),
    Case("RTX 3060;RTX 4090", "llama-8b"),
    Case("RTX 4090;RTX 3060", "qwen3-30b-a3b", flash_attention="off"),
    Case("RTX 3060", "llama", draft=True),
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_predicted_scratch_is_allocated(
    case: Case, model: Callable[[str], Path], binaries: Binaries, tmp_path: Path
) -> None:
    check(case, model(case.model), binaries, tmp_path / "log")


@pytest.mark.parametrize("card", ["RTX 3060", "RTX 4090", "GTX 1080"])
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_predicted_scratch_is_allocated_for_every_architecture(
    architecture: str, card: str, model: Callable[[str], Path], binaries: Binaries, tmp_path: Path
) -> None:
    check(Case(card, architecture, step=32), model(architecture), binaries, tmp_path / "log")


def all_options() -> list[Case]:
    cases = []
    for card, name, ubatch, kv, attention, (slots, context) in itertools.product(
        CARDS,
        shapes.SHAPES,
        (128, 512, 2048),
        ("f16", "q8_0", "q4_0"),
        ("on", "off"),
        ((1, 2048), (1, 8192), (4, 8192)),
    ):
        # Without tensor cores, attention needs most for numbers of tokens that few steps meet.
        step = 4 if card == "V100" else max(ubatch // 16, 16)
        cases.append(Case(card, name, ubatch, kv, attention, slots, context, step))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("case", Random(1).sample(all_options(), 100), ids=str)
def test_predicted_scratch_is_allocated_for_any_options(
    case: Case, model: Callable[[str], Path], binaries: Binaries, tmp_path: Path
) -> None:
    check(case, model(case.model), binaries, tmp_path / "log")
