"""The environment and command lines of the llama.cpp programs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyllamarun import shell
from pyllamarun.planning.request import VirtualGpu
from pyllamarun.run.binaries import VIRTUAL_GPU, Binaries
from pyllamarun.units import MIB


def environment(binaries: Binaries, virtual_gpus: Sequence[VirtualGpu] | None = None) -> dict[str, str]:
    """This process's environment, for a llama.cpp program; with virtual GPUs, or none, they are all the cards it sees.

    Without LLAMA_ARG_*, which would add arguments that no plan shows.
    """
    result = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    result["GGML_NO_BACKTRACE"] = "1"  # llama.cpp would attach a debugger to itself when it aborts
    result.pop("GGML_BACKEND_PATH", None)
    if virtual_gpus is not None:
        result["CUDA_VISIBLE_DEVICES"] = ""
        result["GGML_VK_VISIBLE_DEVICES"] = ""
    if virtual_gpus:
        result["GGML_BACKEND_PATH"] = str(binaries.path(VIRTUAL_GPU))
        result["PYLLAMARUN_VIRTUAL_GPUS"] = ",".join(exact_mib(gpu.total_bytes) for gpu in virtual_gpus)
        result["PYLLAMARUN_VIRTUAL_RESERVED"] = ",".join(exact_mib(gpu.reserved_bytes) for gpu in virtual_gpus)
        result["PYLLAMARUN_VIRTUAL_NAMES"] = ";".join(gpu.name for gpu in virtual_gpus)
    return result


def exact_mib(size_bytes: int) -> str:
    """MiB that give back the same bytes when they are read as a floating point number."""
    return repr(size_bytes / MIB).removesuffix(".0")


def _from_here(word: str) -> str:
    """A path below the working directory without that: shorter to read.  Anything else as it stands."""
    try:
        below = Path(word).relative_to(Path.cwd())
    except (ValueError, OSError):
        return word
    return str(below) if len(below.parts) > 1 else f"./{below}"


def shell_line(argv: Sequence[str], variables: Mapping[str, str] | None = None) -> str:
    """A command line that a person can paste here, with the variables that it needs."""
    words = [f"{name}={shell.quote(_from_here(value))}" for name, value in (variables or {}).items()]
    return " ".join([*words, shell.join(map(_from_here, argv))])
