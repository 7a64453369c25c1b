"""Rehearsals: a plan carried out by the real llama-server, without the model's data, every byte counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import shapes
from harness import run_cli

from pyllamarun.machine.cards import find_card
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.stage import standin_stage
from pyllamarun.units import GIB, MIB

on_standin = pytest.mark.usefixtures("cuda_build")


def rehearse(model: Path, *arguments: str, exit_code: int = 0, **environment: str) -> dict[str, Any]:
    result = run_cli("rehearse", "--json", model, *arguments, **environment)
    assert result.returncode == exit_code, result.stdout + result.stderr
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


def plan(model: Path, *arguments: str) -> dict[str, Any]:
    result = run_cli("plan", "--json", model, *arguments)
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(result.stdout)["data"]
    return data


@on_standin
def test_the_founding_case(header_70b: Path) -> None:
    """39.6 GiB of weights, a 12 GiB card, 11.5 GiB of it."""
    start = time.monotonic()
    result = rehearse(header_70b, "--gpu", "RTX 3060", "--vram", "11.5GiB", "-c", "4096")
    assert time.monotonic() - start < 120
    assert result["stage"] == "standin"
    (gpu,) = result["devices"]
    assert gpu["peak_bytes"] == gpu["predicted_bytes"]
    assert 10.5 * GIB < gpu["peak_bytes"] <= gpu["budget_bytes"] == 11.5 * GIB
    assert gpu["peak_bytes"] == gpu["context_bytes"] + gpu["buffer_bytes"] + gpu["pool_bytes"]
    assert gpu["pool_bytes"] == 16 * MIB


CASES = {
    "8B, all of it on the card, large ubatches": (
        ("llama-8b", 32), ["--gpu", "RTX 3060", "--vram", "11.5GiB", "-c", "8192", "--", "-ub", "2048"], 33
    ),
    "experts on the CPU": (
        ("mixtral-8x7b", 32), ["--gpu", "RTX 3060", "--vram", "11.5GiB", "--", "-ncmoe", "32"], 33
    ),
    "fewer tokens that take more than many": (
        ("mixtral-8x7b", 32),
        ["--gpu", "RTX 4090", "-c", "4096", "--", "-ngl", "33", "-ncmoe", "20", "-ub", "2304", "-b", "2304", "-ot",
         r"blk\.20\.ffn_down_exps\.weight=CPU,blk\.22\.ffn_down_exps\.weight=CPU"],
        33,
    ),
    "two unequal cards, all of it on them": (
        ("llama-8b", 32), ["--gpu", "RTX 3060,RTX 4060", "--vram", "3GiB,4GiB", "-c", "4096", "--slots", "2"], 33
    ),
    "two unequal cards, layers divided": (
        ("llama-8b", 32), ["--gpu", "RTX 3060,RTX 4060", "--vram", "1.9GiB,1.3GiB", "-c", "4096"], 17
    ),
    "two unequal cards, experts on the CPU": (
        ("qwen3-30b-a3b", 48), ["--gpu", "RTX 4060,RTX 3060", "--vram", "4GiB,6GiB", "-c", "4096"], 49
    ),
    "two unequal cards, feed-forward matrices on the CPU": (
        ("llama-8b", 32), ["--gpu", "RTX 3060,RTX 4060", "--vram", "4GiB,3.6GiB", "-c", "32768",
         "--", "-ncffn", "28"], 33
    ),
}  # fmt: skip


@on_standin
@pytest.mark.parametrize(("shape", "options", "layers"), CASES.values(), ids=CASES)
def test_predicted_is_the_peak(shape: tuple[str, int], options: list[str], layers: int, tmp_path: Path) -> None:
    model = shapes.write(shapes.SHAPES[shape[0]](shape[1]), tmp_path / "model.gguf")
    result = rehearse(model, *options)
    assert result["argv"][result["argv"].index("-ngl") + 1] == str(layers)
    for gpu in result["devices"]:
        assert gpu["peak_bytes"] == gpu["predicted_bytes"] <= gpu["budget_bytes"]
        assert gpu["pool_bytes"] > 0


def random_request(random: Random) -> tuple[str, int, list[str]]:
    name, layers = random.choice([("llama-8b", 32), ("mixtral-8x7b", 32), ("qwen3-30b-a3b", 48), ("gemma3-12b", 48)])
    cards = random.choice(["RTX 3060", "RTX 2060", "RTX 4090", "RTX 4060", "GTX 1080", "V100", "RTX 5080",
                           "RTX 3060,RTX 3060", "RTX 4090,RTX 3060"])  # fmt: skip
    options = [
        "--gpu",
        cards,
        "-c",
        random.choice(["2048", "8192", "32768"]),
        "--slots",
        random.choice(["1", "2", "4"]),
    ]
    passthrough = ["-ub", random.choice(["128", "512", "2048"])]
    attention = random.choice(["on", "on", "off"])
    passthrough += ["-fa", attention, "-ctk", (keys := random.choice(["f16", "q8_0", "q4_0"]))]
    passthrough += ["-ctv", keys] if attention == "on" else []
    return name, layers, [*options, "--vram", f"{random.randrange(60, 100)}%", "--", *passthrough]


@on_standin
@pytest.mark.parametrize("seed", range(30))
def test_any_prediction_is_no_less_than_the_peak_and_hardly_more(seed: int, tmp_path: Path) -> None:
    name, layers, options = random_request(Random(seed))
    model = shapes.write(shapes.SHAPES[name](layers), tmp_path / "model.gguf")
    for gpu in rehearse(model, *options)["devices"]:
        assert gpu["peak_bytes"] <= gpu["predicted_bytes"] <= 1.005 * gpu["peak_bytes"], (name, options, gpu)


@on_standin
def test_a_plan_rests_on_a_rehearsal_of_it(header_70b: Path, tiny: Callable[[str], Path]) -> None:
    options = ("--gpu", "RTX 3060", "--vram", "11.5GiB", "-c", "2048")
    before = plan(header_70b, *options)
    assert before["devices"][0]["scratch_source"] == "computed"
    (gpu,) = rehearse(header_70b, *options)["devices"]
    (after,) = plan(header_70b, *options)["devices"]
    assert after["scratch_source"] == "rehearsed"
    assert after["scratch_bytes"] == gpu["pool_bytes"] + gpu["workspace_bytes"]
    assert after["total_bytes"] == gpu["peak_bytes"]
    other = plan(header_70b, "--gpu", "RTX 3060", "--vram", "11.5GiB", "-c", "2048", "--", "-ub", "256")
    assert other["devices"][0]["scratch_source"] == "computed"
    assert plan(tiny("llama"), *options)["devices"][0]["scratch_source"] == "computed"


@on_standin
@pytest.mark.parametrize(
    "options",
    [["--embedding", "--pooling", "mean"], ["--embedding", "--pooling", "none"], ["--api-key", "secret,other"]],
    ids=" ".join,
)
def test_servers_that_are_asked_otherwise(options: list[str], tiny: Callable[[str], Path]) -> None:
    (gpu,) = rehearse(tiny("qwen3"), "--gpu", "RTX 3060", "--", *options)["devices"]
    assert gpu["peak_bytes"] <= gpu["predicted_bytes"] <= 1.02 * gpu["peak_bytes"]


@on_standin
def test_a_budget_that_is_exceeded_is_exit_code_3(header_70b: Path) -> None:
    data = rehearse(
        header_70b, "--gpu", "RTX 3060", "--vram", "10GiB", "--force", "--", "-ngl", "20", exit_code=3
    )  # fmt: skip
    (gpu,) = data["devices"]
    assert gpu["peak_bytes"] > gpu["budget_bytes"] == 10 * GIB
    assert not data["fits"]


@on_standin
def test_memory_that_runs_out_is_exit_code_3(header_70b: Path) -> None:
    result = run_cli("rehearse", header_70b, "--gpu", "RTX 3060", "--force", "--", "-ngl", "30")
    assert result.returncode == 3
    assert "memory ran out when 15" in result.stderr
    assert result.stdout == ""


@on_standin
def test_a_rehearsal_leaves_the_real_card_alone_unless_it_is_asked_for(
    binaries: Binaries, tiny: Callable[[str], Path]
) -> None:
    """A stand-in plays this machine's own card, and its NVML the driver."""
    with standin_stage(binaries, [find_card("RTX 3060")], 250 * MIB) as stage:
        mine = {
            name: value
            for name, value in stage.environment.items()
            if name.startswith(("LD_", "PYLLAMARUN_STANDIN", "GGML_CUDA"))
        }
        refused = run_cli("rehearse", tiny("mixtral"), **mine)
        assert refused.returncode == 2
        assert "--for-real" in refused.stderr
        (gpu,) = rehearse(tiny("mixtral"), "--for-real", **mine)["devices"]
        assert gpu["context_bytes"] == 250 * MIB
        assert gpu["difference_bytes"] == -50 * MIB
        both = run_cli("rehearse", tiny("mixtral"), "--for-real", "--gpu", "RTX 3060", **mine)
        assert both.returncode == 2


def test_a_rehearsal_on_a_virtual_gpu_counts_buffers(header_70b: Path) -> None:
    (gpu,) = rehearse(header_70b, "--virtual-gpu", "12GiB", "--vram", "11.5GiB")["devices"]
    (planned,) = plan(header_70b, "--virtual-gpu", "12GiB", "--vram", "11.5GiB")["devices"]
    assert gpu["buffer_bytes"] == planned["total_bytes"] - planned["overhead_bytes"]
    assert (gpu["context_bytes"], gpu["pool_bytes"]) == (0, 0)


def test_without_a_card_there_is_nothing_to_rehearse(smollm2: Path) -> None:
    result = run_cli("rehearse", smollm2)
    assert result.returncode == 2
    assert "--gpu" in result.stderr


# ------------------------------------------------------------------------------------------------ --gpu


@on_standin
def test_doctor_shows_the_card() -> None:
    result = run_cli("doctor", "--gpu", "RTX 3060")
    assert result.returncode == 0, result.stdout
    assert "NVIDIA GeForce RTX 3060, 12.00 GiB, 11.63 GiB free, compute capability 8.6" in result.stdout
    assert "On the CUDA stand-in: RTX 3060 12GB." in result.stdout


@on_standin
def test_run_and_serve_say_that_nothing_is_computed(smollm2: Path) -> None:
    result = run_cli("run", smollm2, "--gpu", "RTX 3060", "-p", "hello")
    assert (result.returncode, result.stdout) == (0, "")
    assert "there is no answer" in result.stderr
    dry = run_cli("serve", smollm2, "--gpu", "RTX 3060", "--dry-run")
    assert "--alias 'rehearsal: nothing is computed, and no answer means anything'" in dry.stdout


def test_a_card_without_cuda_is_a_virtual_gpu_of_its_size(binaries: Binaries, smollm2: Path) -> None:
    if binaries.build.backend == "cuda":
        pytest.skip("this build has CUDA, and takes the stand-in")
    data = plan(smollm2, "--gpu", "RTX 3060")
    assert data["stage"] == "virtual"
    assert data["devices"][0]["description"] == "virtual RTX 3060 12GB"
    assert (
        data["devices"][0]["budget_bytes"] == find_card("RTX 3060").memory_bytes - find_card("RTX 3060").reserved_bytes
    )


@pytest.mark.parametrize("arguments", [["--gpu", "RTX 3060", "--virtual-gpu", "12GiB"], ["--gpu", "RTX 9999"]])
def test_cards_that_make_no_sense_are_refused(arguments: list[str], smollm2: Path) -> None:
    result = run_cli("plan", smollm2, *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
