"""Machines of CUDA cards that are not here: the stand-in's libraries put before the real ones of a child."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment

# Name, MiB as NVML shows them, compute capability, SMs, shared memory a block may ask for (KiB), memory bus (bits),
# memory clock (MHz), PCIe generation and lanes: NVIDIA's specifications and CUDA's programming guide.
CARDS = {
    "GTX 1080": "NVIDIA GeForce GTX 1080,8192,6.1,20,48,256,5005,3,16",
    "V100": "Tesla V100-SXM2-16GB,16384,7.0,80,96,4096,877,3,16",
    "RTX 2060": "NVIDIA GeForce RTX 2060,6144,7.5,30,64,192,7001,3,16",
    "RTX 3060": "NVIDIA GeForce RTX 3060,12288,8.6,28,99,192,7501,4,16",
    "RTX 4090": "NVIDIA GeForce RTX 4090,24564,8.9,128,99,384,10501,4,16",
}
CUDA_LIBRARIES = ("libcudart.so.12", "libcudart.so.13", "libcublas.so.12", "libcublas.so.13", "libcublasLt.so.12",
                  "libcublasLt.so.13", "libcuda.so.1")  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What one process holds on one card, in bytes: a line of its file in the state folder."""

    context_bytes: int
    buffer_bytes: int
    pool_bytes: int
    peak_bytes: int
    pool_peak_bytes: int
    allocations: int


class StandIn:
    """One machine; its state folder is shared by the processes that run with its environment."""

    def __init__(self, binaries: Binaries, cards: tuple[str, ...], folder: Path, context_bytes: int) -> None:
        libraries = folder / "lib"
        libraries.mkdir()
        for name in CUDA_LIBRARIES:
            (libraries / name).symlink_to(binaries.path("libcuda-standin.so"))
        (libraries / "libnvidia-ml.so.1").symlink_to(binaries.path("libnvml-standin.so"))
        self._state = folder / "state"
        self.environment = environment(binaries) | {
            "LD_LIBRARY_PATH": str(libraries),
            "PYLLAMARUN_STANDIN_CARDS": ";".join(CARDS.get(card, card) for card in cards),
            "PYLLAMARUN_STANDIN_STATE": str(self._state),
            "PYLLAMARUN_STANDIN_CONTEXT": str(context_bytes),
            "GGML_CUDA_DISABLE_GRAPHS": "1",
        }
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)

    def usage(self, pid: int) -> list[Usage]:
        lines = (self._state / "processes" / str(pid)).read_text().splitlines()
        return [Usage(*map(int, line.split()[1:])) for line in lines]


@contextmanager
def standin(binaries: Binaries, *cards: str, context_bytes: int = 0) -> Iterator[StandIn]:
    with tempfile.TemporaryDirectory() as folder:
        yield StandIn(binaries, cards, Path(folder), context_bytes)
