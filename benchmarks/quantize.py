#!/usr/bin/env python3
"""What pyllamarun adds to the time that llama-quantize takes; run it with the Python of an installation.

    python benchmarks/quantize.py [PAIRS [TYPE ...]]

A model of some 900 MB in Q4_K_M, with the widths of Llama 3 8B, six layers and random weights, is requantized by
`pyllamarun quantize`, with all that it does before and after, and by bare llama-quantize with the same threads: in
pairs, in turn, each into a new file that is removed afterwards; ratios are medians of the pairs'.  Before each run the
disk is told to finish writing.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import shapes

from pyllamarun.machine.host import read_cpu
from pyllamarun.output import table
from pyllamarun.run.binaries import find_binaries
from pyllamarun.run.command import environment
from pyllamarun.units import format_size

TYPES = ("Q3_K_M", "Q2_K")
LAYERS = 6


def seconds(argv: list[str], target: Path) -> tuple[float, float]:
    """Of wall time, and of all processors together."""
    os.sync()
    begin, before = time.perf_counter(), os.times()
    subprocess.run(argv, check=True, capture_output=True, env=environment(find_binaries()))
    taken, after = time.perf_counter() - begin, os.times()
    target.unlink()
    return taken, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    program = str(Path(sys.executable).with_name("pyllamarun"))
    quantizer, threads = str(find_binaries().path("llama-quantize")), str(read_cpu().physical_cores)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        model, target = Path(name) / "model-Q4_K_M.gguf", Path(name) / "made.gguf"
        shapes.fill(shapes.write(shapes.llama_8b(LAYERS), model))
        for type_name in sys.argv[2:] or TYPES:
            ours = [program, "quantize", str(model), type_name, "-o", str(target)]
            bare = [quantizer, "--allow-requantize", str(model), str(target), type_name, threads]
            taken = []
            for number in range(pairs):
                order = (ours, bare) if number % 2 == 0 else (bare, ours)
                times = {argv[0]: seconds(argv, target) for argv in order}
                taken.append((*times[program], *times[quantizer]))
                print(f"{type_name}: {' '.join(f'{one:.2f}' for one in taken[-1])}", file=sys.stderr)
            ratios = [statistics.median(one[i] / one[i + 2] for one in taken) for i in (0, 1)]
            medians = [f"{statistics.median(one[i] for one in taken):.2f} s" for i in (0, 2)]
            rows.append([type_name, *medians, *(f"{ratio:.3f}" for ratio in ratios)])
        size = format_size(model.stat().st_size)
    print(f"{size} of Q4_K_M, {threads} threads, medians of {pairs} pairs")
    print(table(rows, header=["type", "pyllamarun", "llama-quantize", "ratio", "of CPU time"], right=(1, 2, 3, 4)))


if __name__ == "__main__":
    main()
