"""Speeds that others have measured and published, with some layers on the GPU, against the specifications alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapes
from harness import Machine
from synthetic import Spec, attention, common, feed_forward

from pyllamarun.machine.cards import find_card
from pyllamarun.machine.core_rates import nominal
from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.planning.hardware import SPECIFICATION, GpuRates, Hardware, pcie_bandwidth
from pyllamarun.planning.token_cost import Use, token_cost

TOML = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
TABLES = TOML.loads((Path(__file__).parent.parent / "data" / "partial_offload.toml").read_text(encoding="utf-8"))[
    "table"
]
WITHIN = 0.25
CONTEXT_TOKENS, FILLED_TOKENS = 4096, 256  # what such measurements fill, at most some hundred tokens


def dense(architecture: str, layers: int, n_vocab: int, **widths: int) -> Spec:
    spec = Spec(architecture, n_layer=layers, **widths)
    common(spec, n_vocab=n_vocab)
    for i in range(layers):
        attention(spec, i, bias=architecture == "qwen2", norms=architecture == "qwen3")
        feed_forward(spec, i)
    return shapes.quantized(spec)


def gemma_3_12b() -> Spec:
    spec = shapes.gemma3_12b(48)
    shape, kind = spec.tensors["token_embd.weight"]
    spec.tensors["token_embd.weight"] = ((shape[0], 262208), "Q6_K" if kind == "Q4_K" else kind)
    spec.metadata["vocab_size"] = 262208
    return spec


MODELS: dict[str, Callable[[], Spec]] = {  # by their published configurations
    "qwen2.5-14b": lambda: dense("qwen2", 48, 152064, n_embd=5120, n_ff=13824, n_head=40, n_head_kv=8, head_dim=128),
    "qwen3-14b": lambda: dense("qwen3", 40, 151936, n_embd=5120, n_ff=17408, n_head=40, n_head_kv=8, head_dim=128),
    "phi-4": lambda: dense("llama", 40, 100352, n_embd=5120, n_ff=17920, n_head=40, n_head_kv=10, head_dim=128),
    "mistral-small-24b": lambda: dense(
        "llama", 40, 131072, n_embd=5120, n_ff=32768, n_head=32, n_head_kv=8, head_dim=128
    ),
    "gemma-3-12b": gemma_3_12b,
}


def predictions(table: dict[str, Any], folder: Path, machine: Machine) -> list[float]:
    """Tokens per second, for each row."""
    header = read_header(shapes.write(MODELS[table["model"]](), folder / "model.gguf"))
    skeleton = write_skeleton(header, folder / "skeleton.gguf")
    card = find_card(table["card"])
    gpu = GpuRates(
        card.bandwidth_bytes_per_second, SPECIFICATION, card.compute_capability, card.multiprocessors,
        pcie_bandwidth(card.pcie_generation, card.pcie_lanes),
    )  # fmt: skip
    (name,) = machine.device_names
    hardware = Hardware(nominal(table["ram_gbs"] * 1e9, table["cores"]), {name: gpu})
    rates = []
    for layers, _ in table["rows"]:
        answer = machine.ask(["-m", str(skeleton), "-c", str(CONTEXT_TOKENS), "-np", "1", "-ngl", str(layers)])
        first = answer.offloadable_layers - layers

        def device_of(tensor: str, first: int = first, layers: int = layers) -> str | None:
            layer = int(tensor.split(".")[1]) if tensor.startswith("blk.") else first if layers else -1
            return name if layers and layer >= first else None

        cost = token_cost(header, answer, device_of, hardware, Use(filled=FILLED_TOKENS / CONTEXT_TOKENS))
        rates.append(1 / cost.seconds)
    return rates


@pytest.mark.parametrize("table", TABLES, ids=[table["name"] for table in TABLES])
def test_partial_offload_is_within_25_percent(
    table: dict[str, Any], tmp_path: Path, machine: Callable[..., Machine]
) -> None:
    off = dict(table.get("off", []))
    for (layers, published), predicted in zip(table["rows"], predictions(table, tmp_path, machine(48 * 1024))):
        error = predicted * table.get("counted", 1.0) / published - 1
        print(
            f"{table['name']}, -ngl {layers}: predicted {predicted:.2f}, published {published} ({100 * error:+.0f} %)"
        )
        assert (abs(error) > WITHIN) == (layers in off), f"-ngl {layers}: {100 * error:+.0f} %"


def test_there_are_tables_of_several_cards_and_models() -> None:
    assert len({(table["card"], table["model"]) for table in TABLES}) >= 4
    assert all(table["source"].startswith("https://") for table in TABLES)
