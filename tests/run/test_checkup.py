"""What doctor says of machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyllamarun.machine.gpu import Gpu, GpuProcess, GpuSurvey
from pyllamarun.machine.host import Cpu, Disk, Memory
from pyllamarun.planning.probe import Device
from pyllamarun.run import checkup
from pyllamarun.run.binaries import Build
from pyllamarun.units import GIB

FOUNDING_GPU = Gpu(
    index=0, name="NVIDIA GeForce RTX 3060", uuid="GPU-1", pci_address="0000:01:00.0",
    total_bytes=12 * GIB, free_bytes=11 * GIB, used_bytes=GIB,
    processes=(GpuProcess(42, "Xorg", GIB // 2), GpuProcess(43, "game", None)), compute_capability="8.6",
    pcie_generation=4, pcie_width=16, memory_bandwidth_bytes_per_second=360_048_000_000,
)  # fmt: skip
NO_ANSWERS = Gpu(0, "GPU 0", "", None, 4 * GIB, 4 * GIB, 0, (), None, None, None, None)
BUILD = Build("b11312", "0c1e57098bba", "cuda", {"cuda_architectures": "86", "chat_page": True})


def statuses(rows: list[checkup.Row]) -> list[str]:
    return [row.status for row in rows]


def test_the_founding_machine_is_ok() -> None:
    survey = GpuSurvey((FOUNDING_GPU,), "580.65", "13.0")
    rows = checkup.check_gpus(survey, "cuda")
    rows += checkup.check_memory(Memory(62 * GIB, 60 * GIB, 16 * GIB, 16 * GIB, None))
    rows += checkup.check_cpu(Cpu("AMD Ryzen 9", 16, 32, 32, ("avx", "avx2", "fma"), 5700.0))
    rows += checkup.check_disk(Disk(Path("/models"), 500 * GIB, 1000 * GIB))
    rows += checkup.check_build(BUILD, "0c1e570", [])[:2]
    assert set(statuses(rows)) == {"ok"}
    text = "\n".join(row.text for row in rows)
    assert "NVIDIA GeForce RTX 3060, 12.00 GiB, 11.00 GiB free, compute capability 8.6, PCIe 4.0 x16, 360 GB/s" in text
    assert "Xorg (42) holds 512.0 MiB" in text
    assert "game (43) holds an unknown amount" in text
    assert "driver 580.65, CUDA up to 13.0" in text


def test_a_card_that_the_build_has_no_kernels_for_is_a_failure() -> None:
    turing = replace(FOUNDING_GPU, compute_capability="7.5")
    (row,) = checkup.check_kernels(BUILD, GpuSurvey((turing, FOUNDING_GPU), None, None))
    assert row.status == "failure"
    assert row.remedy.startswith("PYLLAMARUN_CUDA_ARCHITECTURES=75 ")


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [("no NVIDIA driver is installed", "nvidia-driver"), ("the NVIDIA driver did not answer", "--virtual-gpu")],
)
def test_no_gpu_is_a_warning_with_a_remedy(problem: str, remedy: str) -> None:
    (row,) = checkup.check_gpus(GpuSurvey((), None, None, problem), "cuda")
    assert row.status == "warning"
    assert problem in row.text
    assert remedy in row.remedy


def test_a_card_that_tells_nothing_is_shown() -> None:
    row, versions = checkup.check_gpus(GpuSurvey((NO_ANSWERS,), None, None), "cuda")
    assert (row.status, row.text) == ("warning", "GPU 0, 4.00 GiB, 4.00 GiB free")
    assert "unknown" in versions.text


def test_a_build_that_does_not_use_the_card_is_a_failure() -> None:
    rows = checkup.check_gpus(GpuSurvey((FOUNDING_GPU,), "580", "13.0"), "cpu")
    assert statuses(rows)[-1] == "failure"
    assert "PYLLAMARUN_BACKEND=cuda pip install" in rows[-1].remedy


def test_a_container_s_limit_counts() -> None:
    ram, swap = checkup.check_memory(Memory(128 * GIB, 100 * GIB, 0, 0, 16 * GIB))
    assert (ram.status, swap.status) == ("warning", "warning")
    assert "limited to 16.00 GiB by a cgroup" in ram.text
    assert "swapon" in swap.remedy


def test_what_a_container_has_left_is_said() -> None:
    memory = Memory(128 * GIB, 100 * GIB, 0, 0, limit_bytes=64 * GIB, left_bytes=40 * GIB)
    assert "limited to 64.00 GiB by a cgroup, which leaves 40.00 GiB" in checkup.check_memory(memory)[0].text


def test_a_divided_card_is_shown_as_one() -> None:
    divided = replace(FOUNDING_GPU, is_divided=True)
    assert "divided (MIG)" in checkup.check_gpus(GpuSurvey((divided,), "580", "13.0"), "cuda")[0].text


def test_hidden_cards_are_a_warning() -> None:
    survey = GpuSurvey((FOUNDING_GPU,), "580", "13.0")
    (row,) = checkup.check_visible("-1", survey, [])
    assert (row.status, row.text) == ("warning", "'-1' shows llama.cpp 0 of 1 cards")
    assert "unset CUDA_VISIBLE_DEVICES" in row.remedy
    seen = Device("CUDA0", "RTX 3060", "CUDA", "gpu", GIB, GIB)
    assert checkup.check_visible("0", survey, [seen])[0].status == "ok"
    assert checkup.check_visible(None, survey, []) == []


@pytest.mark.parametrize("reported", ["", "deadbee"])
def test_programs_of_another_commit_are_a_failure(reported: str) -> None:
    assert checkup.check_build(BUILD, reported, [])[0].status == "failure"


def test_a_full_disk_is_a_warning() -> None:
    (row,) = checkup.check_disk(Disk(Path("/models"), GIB, 100 * GIB))
    assert (row.status, "PYLLAMARUN_HOME" in row.remedy) == ("warning", True)
