"""CPU, memory and disk of this computer, as Linux tells them."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
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

CAP_IPC_LOCK = 14  # linux/capability.h


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
    """Host memory, of this machine or of one that is not here, in bytes.

    `limit_bytes` is the tightest cgroup limit above this process; `left_bytes`, how much more the limits of all groups
    above it leave, not counting what they hold of files, which can be dropped; `swap_left_bytes`, the same of swap.
    `lockable_bytes` is what mlock may lock.  All of these are None where nothing limits.  `assumed`: it is this
    machine's, taken for that of another, of which nobody said how much it has.
    """

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int
    limit_bytes: int | None = None
    left_bytes: int | None = None
    swap_left_bytes: int | None = None
    lockable_bytes: int | None = None
    assumed: bool = False

    @property
    def usable_bytes(self) -> int:
        """All that this process could ever have."""
        return _least(self.total_bytes, self.limit_bytes)

    @property
    def free_bytes(self) -> int:
        """What it can take now, without anything being swapped."""
        return _least(self.available_bytes, self.left_bytes, self.limit_bytes)

    @property
    def free_swap_bytes(self) -> int:
        return _least(self.swap_free_bytes, self.swap_left_bytes)


def _least(size_bytes: int, *limits: int | None) -> int:
    return min([size_bytes, *(limit for limit in limits if limit is not None)])


def memory_of(total_bytes: int) -> Memory:
    """The memory of a machine that is not here: so much, nothing else running, and no swap."""
    return Memory(total_bytes, total_bytes, 0, 0)


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
    groups = list(_memory_groups(proc, cgroup))
    return Memory(
        total_bytes=fields["MemTotal"],
        available_bytes=fields.get("MemAvailable", fields["MemFree"]),
        swap_total_bytes=fields["SwapTotal"],
        swap_free_bytes=fields["SwapFree"],
        limit_bytes=min((group.limit_bytes for group in groups if group.limit_bytes is not None), default=None),
        left_bytes=min((group.left_bytes for group in groups if group.left_bytes is not None), default=None),
        swap_left_bytes=min((g.swap_left_bytes for g in groups if g.swap_left_bytes is not None), default=None),
        lockable_bytes=_lockable_bytes(proc),
    )


@dataclass(frozen=True)
class _Group:
    limit_bytes: int | None
    left_bytes: int | None
    swap_left_bytes: int | None


def _memory_groups(proc: Path, cgroup: Path) -> Iterator[_Group]:
    """This process's cgroup and all above it, of either version."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, read = (cgroup / "memory", _first_version) if controllers else (cgroup, _second_version)
        relative = Path(group.lstrip("/"))
        for folder in (relative, *relative.parents):
            yield read(root / folder)


def _second_version(folder: Path) -> _Group:
    """Above memory.high a group is throttled until it hardly runs, above memory.max its processes are ended."""
    limits = (_number(folder / "memory.max"), _number(folder / "memory.high"))
    limit = min((one for one in limits if one is not None), default=None)
    files = _statistic(folder, "active_file") + _statistic(folder, "inactive_file")
    swap, swapped = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    return _Group(
        limit_bytes=limit,
        left_bytes=_left(limit, _number(folder / "memory.current"), files),
        swap_left_bytes=_left(swap, swapped, 0),
    )


def _first_version(folder: Path) -> _Group:
    """memory.memsw limits memory and swap together."""
    limit = _number(folder / "memory.limit_in_bytes")
    files = _statistic(folder, "total_active_file") + _statistic(folder, "total_inactive_file")
    left = _left(limit, _number(folder / "memory.usage_in_bytes"), files)
    both = _number(folder / "memory.memsw.limit_in_bytes")
    both_left = _left(both, _number(folder / "memory.memsw.usage_in_bytes"), files)
    swap_left = None if both_left is None else max(0, both_left - (left or 0))
    return _Group(limit, left, swap_left)


def _left(limit: int | None, used: int | None, droppable: int) -> int | None:
    return None if limit is None else max(0, limit - max(0, (used or 0) - droppable))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """A limit or a usage in a cgroup's file; None where there is no file, or it says that nothing limits."""
    text = _text(path).strip()
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None  # v1 says "no limit" by a huge number


def _statistic(folder: Path, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    return int(match[1]) if match else 0


def _lockable_bytes(proc: Path) -> int | None:
    """RLIMIT_MEMLOCK, which a process with CAP_IPC_LOCK need not heed."""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", _text(proc / "self" / "status"), re.MULTILINE)
    if capabilities and int(capabilities[1], 16) >> CAP_IPC_LOCK & 1:
        return None
    limit = re.search(r"^Max locked memory\s+(\d+)\s", _text(proc / "self" / "limits"), re.MULTILINE)
    return int(limit[1]) if limit else None


def read_disk(folder: Path) -> Disk:
    """Space where `folder` is, or would be made."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    usage = shutil.disk_usage(existing)
    return Disk(folder, usage.free, usage.total)
