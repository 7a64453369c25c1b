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
