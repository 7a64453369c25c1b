"""What the probe predicts is what llama-server allocates, in bytes, when it is ready and after prompts.

"Allocated" is the virtual GPU's own count in a real llama-server.  Where layers are split between GPU and CPU, the
compute buffer grows with the prompt; the probe names a prompt that makes it grow the most, and that one is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
from harness import Machine, RunningServer

from pyllamarun.planning.probe import Answer
from pyllamarun.planning.request import DEFAULT_BATCH_TOKENS

CONTEXT = ["-c", "1024", "-fit", "off"]
# Checkpoints would split a prompt's last ubatch in two.
UNSPLIT = ["--ctx-checkpoints", "0"]

OPTION_SETS = {
    "none": ["-ngl", "0"],
    "half": ["-ngl", "2"],
    "all": ["-ngl", "99"],
    "all q8_0 KV": ["-ngl", "99", "-ctk", "q8_0", "-ctv", "q8_0"],
    "half q8_0 KV": ["-ngl", "2", "-ctk", "q8_0", "-ctv", "q8_0"],
    "all one slot": ["-ngl", "99", "-np", "1"],
    "half one slot": ["-ngl", "2", "-np", "1"],
    "half four slots": ["-ngl", "2", "-np", "4"],
    "all small ubatch": ["-ngl", "99", "-ub", "128"],
    "half small ubatch": ["-ngl", "2", "-ub", "128"],
    "all large ubatch": ["-ngl", "99", "-ub", "1024"],
    "half large ubatch": ["-ngl", "2", "-ub", "1024"],
    "half with a CPU layer's FFN on the GPU": ["-ngl", "2", "-ot", r"blk\.0\.ffn_(up|down).*=VIRTUAL0"],
    "all with a layer's FFN on the CPU": ["-ngl", "99", "-ot", r"blk\.1\.ffn_.*=CPU"],
    "half no host buffers": ["-ngl", "2", "--no-host"],
    "half not mapped": ["-ngl", "2", "-lm", "none"],
    "all flash attention off": ["-ngl", "99", "-fa", "off"],
    "half flash attention off": ["-ngl", "2", "-fa", "off"],
    "all flash attention on": ["-ngl", "99", "-fa", "on"],
    "half flash attention on": ["-ngl", "2", "-fa", "on"],
}

# With everything offloaded to two GPUs, llama.cpp works as a pipeline and keeps four copies of what crosses over.
TWO_GPU_OPTION_SETS = {
    "pipeline": ["-ngl", "99"],
    "pipeline small ubatch": ["-ngl", "99", "-ub", "128"],
    "pipeline one slot, large ubatch": ["-ngl", "99", "-np", "1", "-ub", "1024"],
    "pipeline unequal split": ["-ngl", "99", "-ts", "3,1"],
    "half": ["-ngl", "2"],
}


def prompt_slots_together(server: RunningServer, answer: Answer) -> None:
    """Prompts that fill all slots, and then, in all of them and in two, equal parts of a full context's end at once."""
    longest = answer.slot_context_tokens - 1
    server.complete_together([[4] * longest] * answer.slots)
    for token, slots in ((5, answer.slots), (6, 2)):
        start = longest - min(DEFAULT_BATCH_TOKENS // slots, longest)
        for length in filter(None, (start, longest)):
            server.complete_together([[token] * length] * slots)


def check(machine: Machine, model: Path, options: list[str]) -> None:
    arguments = ["-m", str(model), *CONTEXT, *options]
    answer = machine.ask(arguments)
    in_use = [answer.bytes(device=name) for name in machine.device_names]
    growth = [
        sum(b.bytes for b in answer.buffers if b.device == name and b.use == "compute_growth")
        for name in machine.device_names
    ]
    at_ready = [total - grown for total, grown in zip(in_use, growth)]
    prompt_tokens = answer.worst_prompt_tokens or answer.slot_context_tokens - 1
    with machine.serve([*arguments, *UNSPLIT]) as server:
        assert server.used_bytes() == at_ready, f"{model.name} {options}: at ready"
        server.complete([3 + i % 200 for i in range(prompt_tokens)])
        if answer.slots > 1 and "-np" in options:  # without, they share one cache
            prompt_slots_together(server, answer)
        assert server.used_bytes() == in_use, f"{model.name} {options}: after a prompt of {prompt_tokens} tokens"
        assert server.peak_bytes() == in_use, f"{model.name} {options}: peak"


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_predicted_is_allocated(
    architecture: str, options: list[str], tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    check(machine(4096), tiny(architecture), options)


@pytest.mark.parametrize("options", TWO_GPU_OPTION_SETS.values(), ids=TWO_GPU_OPTION_SETS)
@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_predicted_is_allocated_on_two_gpus(
    architecture: str, options: list[str], tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    check(machine(4096, 2048), tiny(architecture), options)


def test_a_draft_model_is_counted(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    draft = ["-md", str(tiny("llama")), "-ngld", "99"]
    check(machine(4096), tiny("llama-k-quants"), ["-ngl", "99", *draft, "--spec-type", "draft-simple"])


def test_a_draft_model_that_is_loaded_in_vain_is_counted(
    tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    """Without --spec-type, llama-server loads the draft and drops it again: for a moment it is there."""
    arguments = ["-m", str(tiny("llama-k-quants")), *CONTEXT, "-ngl", "99", "-md", str(tiny("llama")), "-ngld", "99"]
    answer = machine(4096).ask(arguments)
    with machine(4096).serve(arguments) as server:
        assert server.peak_bytes() == [answer.bytes(device="VIRTUAL0")]
        assert server.used_bytes()[0] < server.peak_bytes()[0]


@pytest.mark.parametrize("layers", ["2", "99"])
def test_a_multi_token_prediction_context_is_counted(
    layers: str, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    check(machine(4096), tiny("deepseek2-mtp"), ["-ngl", layers, "--spec-type", "draft-mtp"])


def test_a_multimodal_projector_is_counted(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    """With the warm-up, which is llama-server's default: without it, the projector's buffers come with an image."""
    model = ["-m", str(tiny("gemma3")), "--mmproj", str(tiny("projector"))]
    arguments = [*model, *CONTEXT, "-ngl", "99"]
    answer = machine(4096).ask(arguments)
    assert answer.bytes(device="VIRTUAL0", use="total") > 4_000_000
    with machine(4096).serve(arguments, warmup=True) as server:
        assert server.used_bytes() == [answer.bytes(device="VIRTUAL0")]


def test_an_embedding_server_is_counted(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    arguments = ["-m", str(tiny("qwen3")), *CONTEXT, "-ngl", "99", "--embedding", "--pooling", "mean"]
    answer = machine(4096).ask(arguments)
    with machine(4096).serve(arguments) as server:
        assert server.used_bytes() == [answer.bytes(device="VIRTUAL0")]


def test_a_real_model_partly_offloaded(smollm2: Path, machine: Callable[..., Machine]) -> None:
    check(machine(512), smollm2, ["-ngl", "12", "-np", "1"])
