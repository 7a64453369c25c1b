#!/usr/bin/env python3
"""How long a plan takes, beside llama.cpp's llama-fit-params and llama-mdl's `mdl fit`, and how exact each is.

    python benchmarks/plan_speed.py [RUNS]

Run it with the Python that pyllamarun is installed in; tests/ is used too, and llama-mdl is installed from PyPI into a
temporary folder.  All three place one file, the header of a Llama 3 70B with its whole vocabulary, on one virtual GPU
of 12 GiB, with 4,096 tokens of context, within 11.5 GiB of which a CUDA context takes 300 MiB.  Their runs alternate.
The command is a cold process; the library, one with its probe running.  Both read the header each time.  Advice is what
would help a plan this slow: some six plans more, made after this one is printed.

Then the real llama-server carries out each choice on that card, and takes the prompt that needs most: what is left of
the budget then, and how far from it the prediction was.  (What ggml-cuda takes besides, as scratch memory, a virtual
GPU does not; only pyllamarun keeps room for it.)  mdl has no option for how much RAM there is and leaves out what does
not fit there, so it is told of 64 GiB in place of what it reads from the system.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import llama_70b_header
from harness import serve

from pyllamarun import Machine, Model, Planner
from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.output import table
from pyllamarun.planning.request import VirtualGpu, make_request
from pyllamarun.run.binaries import Binaries, find_binaries
from pyllamarun.run.stage import Stage, open_probe, virtual_stage
from pyllamarun.units import GIB, MIB, format_size

RUNS = 9
CARD_BYTES, BUDGET_BYTES, CUDA_CONTEXT_BYTES = 12 * GIB, 23 * GIB // 2, 300 * MIB
BUFFER_BYTES = BUDGET_BYTES - CUDA_CONTEXT_BYTES
CONTEXT_TOKENS = 4096
MDL = "llama-mdl==0.14.0"
MDL_MARGIN_BYTES = 256 * MIB  # what it keeps free: DEFAULT_MARGIN in its mdl_fit/hw.py
MDL_FIT = """
import sys
import mdl_fit.hw
import mdl
mdl_fit.hw.ram = lambda: (64 << 30, 60 << 30)
sys.argv[0] = "mdl"
mdl.main()
"""


@dataclass(frozen=True)
class Choice:
    """What a planner chose: llama-server's arguments besides the model, and what it says that these take on the GPU."""

    arguments: tuple[str, ...]
    predicted_bytes: int


def output_of(argv: Sequence[str | Path], environment: dict[str, str]) -> str:
    result = subprocess.run([str(word) for word in argv], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{shlex.join(map(str, argv))}\n{result.stderr}")
    return result.stdout


class Ours:
    """A cold process, and the library with its probe running; both read the header each time."""

    def __init__(self, model: Path, planner: Planner) -> None:
        self._model, self._planner = model, planner
        program = Path(sys.executable).with_name("pyllamarun")
        self._argv = [program, "plan", model, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "-c", CONTEXT_TOKENS,
                      "--json"]  # fmt: skip

    def advised(self) -> None:
        """With advice: what would help a plan this slow, each change a plan of its own."""
        output_of(self._argv, dict(os.environ))

    def cold(self) -> Choice:
        plan = json.loads(output_of([*self._argv, "--no-advice"], dict(os.environ)))["data"]
        (gpu,) = plan["devices"]
        predicted = gpu["weights_bytes"] + gpu["context_bytes"] + gpu["compute_bytes"]
        return Choice(tuple(plan["argv"][3:]), predicted)

    def warm(self) -> None:
        self._planner.plan(Model.open(self._model), make_request(vram="11.5GiB", context=CONTEXT_TOKENS))


class FitParams:
    """llama-fit-params, whose target is what stays free."""

    def __init__(self, model: Path, binaries: Binaries, stage: Stage) -> None:
        self._environment = dict(stage.environment)
        self._argv = [binaries.path("llama-fit-params"), "-m", model, "-np", "1"]
        free = CARD_BYTES - CUDA_CONTEXT_BYTES
        self._fit = ["-c", str(CONTEXT_TOKENS), "-fitt", str((free - BUFFER_BYTES) // MIB)]

    def fit(self) -> tuple[str, ...]:
        return tuple(shlex.split(output_of([*self._argv, *self._fit], self._environment)))

    def choice(self) -> Choice:
        arguments = self.fit()
        text = output_of([*self._argv, *arguments, "-fitp", "on"], self._environment)
        sizes = re.search(r"^VIRTUAL0 (\d+) (\d+) (\d+)", text, re.MULTILINE)
        assert sizes, text
        return Choice((*arguments, "-np", "1"), sum(map(int, sizes.groups())) * MIB)


class Mdl:
    """`mdl fit`, on a card of which as much is free as the budget and its margin come to."""

    def __init__(self, model: Path, binaries: Binaries, folder: Path) -> None:
        target = folder / "mdl"
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", target, MDL]
        subprocess.run(list(map(str, pip)), check=True)
        reserved = CARD_BYTES - BUFFER_BYTES - MDL_MARGIN_BYTES
        self._binaries, self._gpu = binaries, VirtualGpu(CARD_BYTES, reserved)
        home = str(folder / "mdl-home")
        self._variables = {
            "PYTHONPATH": str(target),
            "MDL_FIT_HOME": home,
            "XDG_CONFIG_HOME": home,
            "MDL_LLAMA_SERVER": str(binaries.path("llama-server")),
        }
        self._argv = [sys.executable, "-c", MDL_FIT, "fit", model, "--profile", "speed", "--min-ctx", CONTEXT_TOKENS,
                      "--max-ctx", CONTEXT_TOKENS, "--kv-floor", "f16", "--json"]  # fmt: skip

    def choice(self) -> Choice:
        with virtual_stage(self._binaries, [self._gpu]) as stage:
            found = json.loads(output_of(self._argv, {**stage.environment, **self._variables}))
        best = found["picks"][0]
        argv = best["argv"]
        return Choice(tuple(argv[argv.index("-m") + 2 :]), best["gpu_total"])


def allocated_bytes(choice: Choice, skeleton: Path, binaries: Binaries, folder: Path) -> int:
    """What llama-server holds at most, in buffers, on the virtual GPU, while it takes the prompt that needs most."""
    with virtual_stage(binaries, [VirtualGpu(CARD_BYTES)]) as stage:
        with open_probe(binaries, stage) as probe:
            answer = probe.ask(["-m", str(skeleton), *choice.arguments, "-fit", "off"])
        # Mapped, whatever was chosen: on the GPU it is the same, and this machine may have less RAM.
        arguments = ["-m", str(skeleton), *choice.arguments, "--ctx-checkpoints", "0", "--load-mode", "mmap"]
        with serve(stage.hollow(binaries), binaries, arguments, folder / "server.log") as server:
            server.wait_until_ready()
            server.complete([0] * (answer.worst_prompt_tokens or CONTEXT_TOKENS - 1))
            (usage,) = stage.usage(server.process.pid)
            return usage.peak_bytes


def medians(runs: int, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    for name, measured in seconds.items():
        print(f"{name}: {min(measured):.3f} to {max(measured):.3f} s", file=sys.stderr)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def row(name: str, seconds: float, ratio: str, choice: Choice, allocated: int) -> list[str]:
    left = BUFFER_BYTES - allocated
    shown = format_size(left) if left >= 0 else f"OVER by {format_size(-left)}"
    return [name, f"{seconds:.3f} s", ratio, shown, f"{allocated - choice.predicted_bytes:+,} B"]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    binaries = find_binaries()
    with (
        tempfile.TemporaryDirectory() as name,
        virtual_stage(binaries, [VirtualGpu(CARD_BYTES, CUDA_CONTEXT_BYTES)]) as stage,
        Planner(Machine.of(gpus="12GiB")) as planner,
    ):
        folder = Path(name)
        model = llama_70b_header.write(folder / "llama-3-70b-Q4_K_M.gguf", with_vocabulary=True)
        ours, fit_params, mdl = Ours(model, planner), FitParams(model, binaries, stage), Mdl(model, binaries, folder)
        choices = {"ours": ours.cold(), "fit": fit_params.choice(), "mdl": mdl.choice()}
        ours.warm()
        seconds = medians(
            runs,
            {"cold": ours.cold, "warm": ours.warm, "advised": ours.advised, "fit": fit_params.fit, "mdl": mdl.choice},
        )
        skeleton = write_skeleton(read_header(model), folder / "skeleton.gguf", servable=True)
        allocated = {name: allocated_bytes(choice, skeleton, binaries, folder) for name, choice in choices.items()}
    rows = []
    for title, timed, chosen in (
        ("pyllamarun plan --no-advice", "cold", "ours"),
        ("pyllamarun's library, the probe running", "warm", "ours"),
        ("pyllamarun plan, with advice", "advised", "ours"),
        ("llama-fit-params", "fit", "fit"),
        (f"mdl fit, {MDL.replace('==', ' ')}", "mdl", "mdl"),
    ):
        ratio = f"{seconds['fit'] / seconds[timed]:.1f}"
        rows.append(row(title, seconds[timed], ratio, choices[chosen], allocated[chosen]))
    print(table(rows, header=["planner", "median", "llama-fit-params' time / its", "left", "allocated - predicted"]))
    for name, choice in choices.items():
        print(f"{name}: {shlex.join(choice.arguments)}", file=sys.stderr)


if __name__ == "__main__":
    main()
