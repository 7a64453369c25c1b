"""Memory and its cgroup limits, disk, CPU, and a driver that is not there or does not answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pyllamarun.machine import gpu
from pyllamarun.machine.host import read_cpu, read_disk, read_memory
from pyllamarun.units import GIB

MEMINFO = """MemTotal:       65536000 kB
MemFree:         1024000 kB
MemAvailable:   32768000 kB
SwapTotal:       8388608 kB
SwapFree:        8000000 kB
"""


def machine(folder: Path, group: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup."""
    proc, cgroup = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self" / "cgroup").write_text(group)
    for name, text in limits.items():
        file = cgroup / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return proc, cgroup


@pytest.mark.parametrize(
    ("group", "limits", "limit_bytes"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": str(16 * GIB), "memory.max": "max"}, 16 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": str(8 * GIB), "a/memory.max": str(16 * GIB)}, 8 * GIB),
        ("0::/\n", {}, None),
        ("5:memory:/x\n4:cpu:/y\n", {"memory/x/memory.limit_in_bytes": str(4 * GIB)}, 4 * GIB),
        ("5:memory:/x\n", {"memory/x/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu:/y\n", {"memory/y/memory.limit_in_bytes": str(4 * GIB)}, None),
    ],
)
def test_the_tightest_cgroup_limit_counts(
    group: str, limits: dict[str, str], limit_bytes: int | None, tmp_path: Path
) -> None:
    memory = read_memory(*machine(tmp_path, group, limits))
    assert memory.limit_bytes == limit_bytes
    assert (memory.total_bytes, memory.available_bytes) == (65536000 * 1024, 32768000 * 1024)
    assert (memory.swap_total_bytes, memory.swap_free_bytes) == (8 * GIB, 8000000 * 1024)


LEFT = {
    "what files hold can be dropped": (
        "0::/a\n",
        {"a/memory.max": 16 * GIB, "a/memory.current": 12 * GIB, "a/memory.stat": (GIB, 3 * GIB)},
        (8 * GIB, None),
    ),
    "the level with least left counts": (
        "0::/a/b\n",
        {"a/b/memory.max": 8 * GIB, "a/b/memory.current": GIB, "a/memory.max": 16 * GIB, "a/memory.current": 15 * GIB},
        (GIB, None),
    ),
    "a group that is above its limit": ("0::/a\n", {"a/memory.max": GIB, "a/memory.current": 2 * GIB}, (0, None)),
    "memory.high throttles before": (
        "0::/a\n",
        {"a/memory.max": 16 * GIB, "a/memory.high": 12 * GIB, "a/memory.current": 2 * GIB},
        (10 * GIB, None),
    ),
    "no swap": ("0::/a\n", {"a/memory.max": GIB, "a/memory.swap.max": 0, "a/memory.swap.current": 0}, (GIB, 0)),
    "some swap": (
        "0::/a\n",
        {"a/memory.max": GIB, "a/memory.swap.max": 4 * GIB, "a/memory.swap.current": 3 * GIB},
        (GIB, GIB),
    ),
    "version 1": (
        "5:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": 8 * GIB,
            "memory/a/memory.usage_in_bytes": 6 * GIB,
            "memory/a/memory.stat": (GIB, GIB),
        },
        (4 * GIB, None),
    ),
    "version 1, memory and swap together": (
        "5:memory:/a\n",
        {
            "memory/a/memory.limit_in_bytes": 8 * GIB,
            "memory/a/memory.usage_in_bytes": 2 * GIB,
            "memory/a/memory.memsw.limit_in_bytes": 9 * GIB,
            "memory/a/memory.memsw.usage_in_bytes": 2 * GIB,
        },
        (6 * GIB, GIB),
    ),
}


@pytest.mark.parametrize(("group", "files", "left"), LEFT.values(), ids=LEFT)
def test_what_a_cgroup_leaves(
    group: str, files: dict[str, int | tuple[int, int]], left: tuple[int, int | None], tmp_path: Path
) -> None:
    total = "total_" if group.startswith("5") else ""
    texts = {
        name: str(size)
        if isinstance(size, int)
        else f"anon 5\n{total}inactive_file {size[0]}\n{total}active_file {size[1]}\n"
        for name, size in files.items()
    }
    memory = read_memory(*machine(tmp_path, group, texts))
    assert (memory.left_bytes, memory.swap_left_bytes) == left
    assert memory.free_bytes == min(memory.available_bytes, left[0])


def test_a_limit_that_is_wider_than_the_machine_changes_nothing(tmp_path: Path) -> None:
    memory = read_memory(*machine(tmp_path, "0::/a\n", {"a/memory.max": str(1 << 42), "a/memory.current": "0"}))
    assert (memory.usable_bytes, memory.free_bytes) == (memory.total_bytes, memory.available_bytes)
    assert memory.free_swap_bytes == memory.swap_free_bytes


@pytest.mark.parametrize(
    ("status", "limits", "lockable_bytes"),
    [
        (
            "CapEff:\t0000000000000000\n",
            "Max locked memory  8388608  8388608  bytes\n",
            8 << 20,
        ),
        (
            "CapEff:\t0000000000000000\n",
            "Max locked memory  unlimited  unlimited  bytes\n",
            None,
        ),
        (
            "CapEff:\t0000000000004000\n",
            "Max locked memory  65536  65536  bytes\n",
            None,
        ),
        ("", "", None),
    ],
)
def test_what_may_be_locked(status: str, limits: str, lockable_bytes: int | None, tmp_path: Path) -> None:
    proc, cgroup = machine(tmp_path, "0::/\n", {})
    (proc / "self" / "status").write_text(status)
    (proc / "self" / "limits").write_text(limits)
    assert read_memory(proc, cgroup).lockable_bytes == lockable_bytes


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    memory, cpu = read_memory(), read_cpu()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert 1 <= cpu.physical_cores <= cpu.logical_cores
    assert cpu.model
    disk = read_disk(tmp_path / "not" / "yet" / "made")
    assert 0 < disk.free_bytes <= disk.total_bytes


def test_no_driver_is_a_reason_and_no_crash() -> None:
    survey = gpu.survey_gpus()
    if survey.gpus:
        pytest.skip("an NVIDIA card is here")
    assert survey.problem


def test_a_driver_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_survey", lambda: time.sleep(2))
    start = time.monotonic()
    survey = gpu.survey_gpus(timeout_seconds=0.1)
    assert time.monotonic() - start < 1
    assert "did not answer" in survey.problem
