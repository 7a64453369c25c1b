"""Where the llama.cpp programs are and what they were built from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyllamarun.errors import BinaryError

PROBE = "pyllamarun-probe"
VIRTUAL_GPU = "libggml-virtual.so"
HOLLOW_CPU = "libhollow-cpu.so"
STANDIN, NVML_STANDIN = "libcuda-standin.so", "libnvml-standin.so"
REINSTALL = "Install the package again: pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Build:
    """What bin/build.json records of the build."""

    tag: str
    commit: str
    backend: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_commit(self) -> str:
        return self.commit[:7]

    @property
    def has_chat_page(self) -> bool:
        return bool(self.facts.get("chat_page"))

    def compiled_for(self, compute_capability: str) -> str:
        """The highest compute capability, such as "8.6", that the CUDA backend has kernels for and the card can run.

        "0" if it has none; the card's own where the build does not say, or has no CUDA backend.
        """
        listed = re.findall(r"(?:^|;)(\d+)(\d)", str(self.facts.get("cuda_architectures") or ""))
        if not listed:
            return compute_capability
        wanted = tuple(map(int, compute_capability.split(".")))
        best = max((pair for pair in ((int(a), int(b)) for a, b in listed) if pair <= wanted), default=None)
        return f"{best[0]}.{best[1]}" if best else "0"


@dataclass(frozen=True)
class Binaries:
    """A folder of programs that belong together."""

    folder: Path
    build: Build

    def path(self, name: str) -> Path:
        """The program or library of that name; BinaryError when it is not there."""
        path = self.folder / name
        if not path.is_file():
            raise BinaryError(f"{name} is missing from {self.folder}.", remedy=REINSTALL)
        return path


def find_binaries() -> Binaries:
    """The first folder that has a build.json: PYLLAMARUN_BIN_DIR, then the package's own."""
    candidates = []
    override = os.environ.get("PYLLAMARUN_BIN_DIR")
    if override:
        candidates.append(Path(override).expanduser())
    candidates.append(Path(__file__).resolve().parent.parent / "bin")
    for folder in candidates:
        record = folder / "build.json"
        if record.is_file():
            return Binaries(folder, _read_build(record))
    raise BinaryError(
        "The llama.cpp programs are not installed.",
        why="Looked for build.json in: " + ", ".join(str(folder) for folder in candidates),
        remedy="Run `pip install .` in the project's folder, and pyllamarun from outside it.",
    )


def _read_build(record: Path) -> Build:
    try:
        facts = json.loads(record.read_text(encoding="utf-8"))
        return Build(facts["tag"], facts["commit"], facts["backend"], facts)
    except (OSError, ValueError, KeyError) as error:
        raise BinaryError(f"{record} is damaged.", why=repr(error), remedy=REINSTALL) from None
