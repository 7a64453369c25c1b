#!/usr/bin/env python3
"""How much of a VRAM budget a plan uses, beside llama-server's own --fit; run it with the Python of a CUDA build.

    python benchmarks/fill.py

Each row is one model on one card that is not here, with one budget: what pyllamarun plans, carried out by llama-server
on the CUDA stand-in, as asked and with --allow ub, and what llama-server chooses with --fit, by default and with
--fit-target set so that the budget is its target.  Used is the peak of what the process held, context of 300 MiB
included, while a prompt filled the context; over the budget is marked.  The models are headers of the published
dimensions, without data.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import llama_70b_header
import shapes
from harness import RunningServer, free_port

from pyllamarun.machine.cards import find_card
from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.output import table
from pyllamarun.run.binaries import find_binaries
from pyllamarun.run.process import running
from pyllamarun.run.stage import standin_stage
from pyllamarun.units import GIB, MIB, format_size

CONTEXT_TOKENS = 4096
CUDA_CONTEXT_BYTES = 300 * MIB
MODELS = {
    "Llama 3 70B": None,
    "Qwen3 32B": ("qwen3-32b", 64),
    "Mixtral 8x7B": ("mixtral-8x7b", 32),
    "gpt-oss 120B": ("gpt-oss-120b", 36),
}
CARDS = {"RTX 4060": 7.5, "RTX 3060": 11.5, "RTX 4090": 23.5}  # budgets in GiB


def make(name: str, folder: Path) -> Path:
    shape = MODELS[name]
    if shape is None:
        return llama_70b_header.write(folder / "70b.gguf")
    return shapes.write(shapes.SHAPES[shape[0]](shape[1]), folder / f"{shape[0]}.gguf")


def planned(model: Path, card: str, budget_gib: float, *options: str) -> int:
    """Peak bytes of our plan."""
    program = Path(sys.executable).with_name("pyllamarun")
    argv = [program, "rehearse", "--json", model, "--gpu", card, "--vram", f"{budget_gib}GiB", "-c", CONTEXT_TOKENS]
    argv += options
    result = subprocess.run(list(map(str, argv)), check=True, capture_output=True, text=True)
    (gpu,) = json.loads(result.stdout)["data"]["devices"]
    peak: int = gpu["peak_bytes"]
    return peak


def fitted(skeleton: Path, card_name: str, options: list[str]) -> int | str:
    """Peak bytes of what llama-server fits by itself, or why there are none."""
    binaries, port = find_binaries(), free_port()
    argv = [binaries.path("llama-server"), "-m", skeleton, "-c", str(CONTEXT_TOKENS), "-np", "1", *options]
    with (
        tempfile.NamedTemporaryFile() as log,
        standin_stage(binaries, [find_card(card_name)], CUDA_CONTEXT_BYTES) as stage,
        running([*argv, "--port", str(port)], stage.hollow(binaries).environment, stdout=log, stderr=log) as process,
    ):
        server = RunningServer(process, port, Path(), Path(log.name))
        try:
            server.wait_until_ready()
            server.complete([0] * (CONTEXT_TOKENS - 1))
        except (AssertionError, OSError):
            return "out of memory" if "out of memory" in Path(log.name).read_text() else "failed"
        (usage,) = stage.usage(process.pid)
        return usage.peak_bytes


def shown(used: int | str, budget: float) -> str:
    if isinstance(used, str):
        return used
    share = f"{100 * used / budget:.2f} %"
    return f"{share}, OVER by {format_size(round(used - budget))}" if used > budget else share


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model_name in MODELS:
            model = make(model_name, folder)
            skeleton = write_skeleton(read_header(model), folder / "skeleton.gguf", servable=True)
            for card_name, budget_gib in CARDS.items():
                card, budget = find_card(card_name), budget_gib * GIB
                free = card.memory_bytes - card.reserved_bytes
                target = max(0, round((free - budget) / MIB))
                ours = planned(model, card_name, budget_gib)
                filled = planned(model, card_name, budget_gib, "--allow", "ub")
                default = fitted(skeleton, card_name, [])
                same = fitted(skeleton, card_name, ["-fitt", str(target)])
                used = [shown(one, budget) for one in (ours, filled, default, same)]
                rows.append([model_name, card_name, f"{budget_gib} GiB", *used])
                print(" ".join(rows[-1]), file=sys.stderr)
    print(table(rows, header=["model", "card", "budget", "pyllamarun", "--allow ub", "--fit", "--fit-target"]))


if __name__ == "__main__":
    main()
