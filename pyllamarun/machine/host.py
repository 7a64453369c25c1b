"""CPU, memory and disk of this computer, as Linux tells them."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

# The instruction sets that ggml-cpu has kernels for.
ISA = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
)


@dataclass(frozen=True)
class Cpu:
    model: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    isa: tuple[str, ...]
    max_mhz: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes.  `limit_bytes` is the tightest cgroup limit above this process, None without one."""

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True)
class Disk:
    folder: Path
    free_bytes: int
    total_bytes: int


def read_cpu() -> Cpu:
    import psutil

    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    frequency = psutil.cpu_freq()
    logical = os.cpu_count() or 1
    return Cpu(
        model=model[1].strip() if model else platform.machine(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)),
        isa=tuple(name for name in ISA if name in present),
        max_mhz=(frequency.max or frequency.current or None) if frequency else None,
    )


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    fields = {}
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        fields[key] = int(value.split()[0]) * 1024 if value.split() else 0
    return Memory(
        total_bytes=fields["MemTotal"],
        available_bytes=fields.get("MemAvailable", fields["MemFree"]),
        swap_total_bytes=fields["SwapTotal"],
        swap_free_bytes=fields["SwapFree"],
        limit_bytes=_cgroup_limit(proc, cgroup),
    )


def _cgroup_limit(proc: Path, cgroup: Path) -> int | None:
    """The smallest memory.max (v2) or memory.limit_in_bytes (v1) from this process's group up to the root."""
    limits = []
    try:
        groups = (proc / "self" / "cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (cgroup / "memory", "memory.limit_in_bytes") if controllers else (cgroup, "memory.max")
        relative = Path(group.lstrip("/"))
        for folder in (relative, *relative.parents):
            try:
                text = (root / folder / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < 1 << 60:  # v1 says "no limit" by a huge number
                limits.append(int(text))
    return min(limits, default=None)


def read_disk(folder: Path) -> Disk:
    """Space where `folder` is, or would be made."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    return Disk(folder, usage.free, usage.total)
