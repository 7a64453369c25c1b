#!/usr/bin/env python3
"""How long a plan takes, and what a skeleton saves; run it with the Python that pyllamarun is installed in.

    python benchmarks/plan.py [MODEL.gguf]

Prints the median over several runs of `pyllamarun plan` for a 70B header on a virtual 12 GiB card; and, for a real
model, the ratio of the probe's time on the model to that on its skeleton, both asked in turn in one run.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import llama_70b_header

from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.plan.request import VirtualGpu
from pyllamarun.run.binaries import find_binaries
from pyllamarun.run.stage import open_probe, virtual_stage
from pyllamarun.units import GIB

RUNS = 9


def seconds_of_plan(model: Path) -> float:
    program = Path(sys.executable).with_name("pyllamarun")
    argv = [program, "plan", model, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "-c", "4096", "--json"]
    start = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_of_questions(model: Path, skeleton: Path) -> tuple[list[float], list[float]]:
    """Of the model and of its skeleton, asked alternately of one warm probe."""
    seconds: dict[Path, list[float]] = {model: [], skeleton: []}
    binaries = find_binaries()
    with virtual_stage(binaries, [VirtualGpu(12 * GIB)]) as stage, open_probe(binaries, stage) as probe:
        for path in (model, skeleton):
            probe.ask(["-m", str(path), "-c", "4096"])
        for _ in range(RUNS):
            for path, measured in seconds.items():
                start = time.perf_counter()
                probe.ask(["-m", str(path), "-c", "4096", "-ngl", "8"])
                measured.append(time.perf_counter() - start)
    return seconds[model], seconds[skeleton]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        header = llama_70b_header.write(Path(folder) / "llama-3-70b-Q4_K_M.gguf")
        seconds_of_plan(header)
        plans = [seconds_of_plan(header) for _ in range(RUNS)]
        print(f"plan, 70B header: median {statistics.median(plans):.3f} s, {min(plans):.3f} to {max(plans):.3f}")
        if len(sys.argv) > 1:
            model = Path(sys.argv[1])
            skeleton = write_skeleton(read_header(model), Path(folder) / "skeleton.gguf")
            whole, bare = map(statistics.median, seconds_of_questions(model, skeleton))
            print(f"one question: the model takes {whole / bare:.1f} times as long as its skeleton")


if __name__ == "__main__":
    main()
