"""NVIDIA GPUs as NVML reports them.  The only module that talks to NVML."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NVML_TIMEOUT_SECONDS = 10.0
PROBE_NAME = "pyllamarun-prob"  # as the kernel shortens it


@dataclass(frozen=True)
class GpuProcess:
    pid: int
    name: str
    used_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One card.  What the driver does not tell ([N/A]) is None.

    `is_divided`: CUDA sees an instance (MIG) with a part of the memory in its place; the bytes are the whole card's.
    """

    index: int
    name: str
    uuid: str
    pci_address: str | None
    total_bytes: int
    free_bytes: int
    used_bytes: int
    processes: tuple[GpuProcess, ...]
    compute_capability: str | None
    pcie_generation: int | None
    pcie_width: int | None
    memory_bandwidth_bytes_per_second: int | None
    is_divided: bool = False

    @property
    def neighbours(self) -> tuple[GpuProcess, ...]:
        """The processes on it, but for memory probes, which only plan."""
        return tuple(process for process in self.processes if not process.name.startswith(PROBE_NAME))


@dataclass(frozen=True)
class GpuSurvey:
    """All cards, or the reason why there are none."""

    gpus: tuple[Gpu, ...]
    driver_version: str | None
    cuda_version: str | None
    problem: str = ""


def read_survey(text: str) -> GpuSurvey:
    """What `python -m pyllamarun.machine.gpu` prints in another process, such as one on the CUDA stand-in."""
    data = json.loads(text)
    gpus = []
    for gpu in data.pop("gpus"):
        processes = tuple(GpuProcess(**process) for process in gpu.pop("processes"))
        gpus.append(Gpu(**gpu, processes=processes))
    return GpuSurvey(tuple(gpus), **data)


def survey_gpus(timeout_seconds: float = NVML_TIMEOUT_SECONDS) -> GpuSurvey:
    """Asks NVML about every card; never raises, and gives up on a driver that does not answer in time."""
    result: list[GpuSurvey] = []
    thread = threading.Thread(target=lambda: result.append(_survey()), daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if result:
        return result[0]
    return GpuSurvey((), None, None, f"the NVIDIA driver did not answer within {timeout_seconds:.0f} seconds")


def _survey() -> GpuSurvey:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuSurvey((), None, None, _reason(pynvml, error))
    try:
        driver = _text(_asked(pynvml, pynvml.nvmlSystemGetDriverVersion))
        cuda = _asked(pynvml, pynvml.nvmlSystemGetCudaDriverVersion_v2)
        count = _asked(pynvml, pynvml.nvmlDeviceGetCount) or 0
        gpus = [_gpu(pynvml, index) for index in range(count)]
        cuda_version = f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None
        present = tuple(gpu for gpu in gpus if gpu is not None)
        problem = "" if present else "the NVIDIA driver is loaded, and it lists no card"
        return GpuSurvey(present, driver, cuda_version, problem)
    finally:
        pynvml.nvmlShutdown()


def _reason(pynvml: Any, error: Any) -> str:
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return "no NVIDIA driver is installed"
    if error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return "the NVIDIA driver is installed but not loaded"
    if error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "the NVIDIA driver's library and kernel module are of different versions; restart the machine"
    return f"NVML: {error}"


def _asked(pynvml: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's answer, or None where the driver has none."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def normal_pci_address(address: str) -> str:
    """NVML's "00000000:01:00.0" and CUDA's "0000:01:00.0", as CUDA writes them."""
    domain, _, rest = address.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "a process of another container"


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _gpu(pynvml: Any, index: int) -> Gpu | None:
    handle = _asked(pynvml, pynvml.nvmlDeviceGetHandleByIndex, index)
    memory = _asked(pynvml, pynvml.nvmlDeviceGetMemoryInfo, handle) if handle else None
    if memory is None:
        return None
    processes = []
    for function in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _asked(pynvml, function, handle) or []:
            processes.append(GpuProcess(process.pid, _process_name(process.pid), process.usedGpuMemory))
    capability = _asked(pynvml, pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    pci = _asked(pynvml, pynvml.nvmlDeviceGetPciInfo, handle)
    mig = _asked(pynvml, pynvml.nvmlDeviceGetMigMode, handle)
    width_bits = _asked(pynvml, pynvml.nvmlDeviceGetMemoryBusWidth, handle)
    clock_mhz = _asked(pynvml, pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM)
    bandwidth = None
    if width_bits and clock_mhz:
        bandwidth = width_bits // 8 * clock_mhz * 10**6 * 2  # double data rate: two transfers a clock
    return Gpu(
        index=index,
        name=_text(_asked(pynvml, pynvml.nvmlDeviceGetName, handle)) or f"GPU {index}",
        uuid=_text(_asked(pynvml, pynvml.nvmlDeviceGetUUID, handle)) or "",
        pci_address=normal_pci_address(_text(pci.busId) or "") if pci else None,
        total_bytes=memory.total,
        free_bytes=memory.free,
        used_bytes=memory.used,
        processes=tuple({process.pid: process for process in processes}.values()),
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        pcie_generation=_asked(pynvml, pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        pcie_width=_asked(pynvml, pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        memory_bandwidth_bytes_per_second=bandwidth,
        is_divided=bool(mig and mig[0]),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(survey_gpus(*map(float, sys.argv[1:2])))))
