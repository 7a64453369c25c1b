"""What the probe predicts for llama-perplexity and llama-imatrix is the most that they allocate, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Machine

ARCHITECTURES = ["llama-k-quants", "mixtral", "gemma3", "jamba"]
OPTION_SETS = {
    "all": ["-ngl", "99", "-b", "256"],
    "half": ["-ngl", "2", "-b", "256"],
    "half, chunks in small ubatches": ["-ngl", "2", "-b", "256", "-ub", "64"],
    "half, three chunks at once": ["-ngl", "2", "-b", "768", "-ub", "768"],
    "half, two batches a chunk": ["-ngl", "2", "-b", "128"],
    "all flash attention off": ["-ngl", "99", "-b", "256", "-fa", "off"],
}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of many different bytes, which is some chunks of any vocabulary."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"{n * n} is the square of {n}." for n in range(400)))
    return path


def check(machine: Machine, program: str, model: Path, options: list[str], words: list[str]) -> None:
    arguments = ["-m", str(model), "-c", "256", "-fit", "off", *options]
    answer = machine.ask(arguments, program)
    devices, _ = machine.run(program, [*arguments, "--chunks", "4", *words])
    peaks = [device.peak_bytes for device in devices]
    assert peaks == [answer.bytes(device=name) for name in machine.device_names], f"{program} {model.name} {options}"


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_perplexity_takes(
    options: list[str], architecture: str, text: Path, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    check(machine(4096), "llama-perplexity", tiny(architecture), options, ["-f", str(text), "--no-warmup"])


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
@pytest.mark.parametrize("architecture", ["mixtral", "gemma3"])
def test_what_an_importance_matrix_takes(
    options: list[str], architecture: str, text: Path, tmp_path: Path, tiny: Callable[[str], Path],
    machine: Callable[..., Machine],
) -> None:  # fmt: skip
    words = ["-f", str(text), "-o", str(tmp_path / "imatrix.gguf")]
    check(machine(4096), "llama-imatrix", tiny(architecture), options, words)


@pytest.mark.parametrize("options", [["-ngl", "99", "-b", "256"], ["-ngl", "2", "-b", "512"]], ids=["all", "half"])
def test_on_two_gpus(
    options: list[str], text: Path, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    words = ["-f", str(text), "--no-warmup"]
    check(machine(4096, 2048), "llama-perplexity", tiny("llama-k-quants"), options, words)
