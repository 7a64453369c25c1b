"""Judges a machine against what the mission needs: a model larger than the GPU, the rest of it in RAM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyllamarun.machine.gpu import Gpu, GpuSurvey
from pyllamarun.machine.host import Cpu, Disk, Memory
from pyllamarun.output import printable
from pyllamarun.planning.probe import Device
from pyllamarun.run.binaries import Build
from pyllamarun.units import GIB, format_size

OK, WARNING, FAILURE = "ok", "warning", "failure"

# The founding case: a 64 GB GGUF on a 12 GB card.
ENOUGH_VRAM_BYTES = int(7.5 * GIB)  # an 8 GB card, as NVML counts
ENOUGH_RAM_BYTES = 60 * GIB  # 64 GB, as Linux counts
ENOUGH_CORES = 8
ENOUGH_DISK_BYTES = 64 * 10**9
CUDA_BUILD = "PYLLAMARUN_BACKEND=cuda pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Row:
    status: str
    topic: str
    text: str
    remedy: str = ""


def check_stage(description: str) -> list[Row]:
    """What the machine's GPUs are taken to be, where they are not its own."""
    return [Row(OK, "stage", description)] if description else []


def check_gpus(survey: GpuSurvey, backend: str) -> list[Row]:
    rows = []
    if not survey.gpus:
        remedy = "Plan for a card that is not here with --virtual-gpu 12GiB; the CPU alone works too."
        if survey.problem.startswith("no NVIDIA driver"):
            remedy = "With an NVIDIA card in the machine: apt install nvidia-driver.  " + remedy
        return [Row(WARNING, "GPU", f"none: {survey.problem}", remedy)]
    for gpu in survey.gpus:
        enough = gpu.total_bytes >= ENOUGH_VRAM_BYTES
        remedy = "" if enough else "8 GB and more are recommended; smaller cards take few layers."
        rows.append(Row(OK if enough else WARNING, f"GPU {gpu.index}", _gpu_text(gpu), remedy))
        for process in gpu.processes:
            used = format_size(process.used_bytes) if process.used_bytes is not None else "an unknown amount"
            rows.append(Row(OK, f"GPU {gpu.index}", f"{process.name} ({process.pid}) holds {used}"))
    versions = f"driver {survey.driver_version or 'unknown'}, CUDA up to {survey.cuda_version or 'unknown'}"
    rows.append(Row(OK, "driver", versions))
    if backend == "cpu":
        rows.append(Row(FAILURE, "backend", "this build does not use the GPU", CUDA_BUILD))
    return rows


def _gpu_text(gpu: Gpu) -> str:
    parts = [f"{gpu.name}, {format_size(gpu.total_bytes)}, {format_size(gpu.free_bytes)} free"]
    if gpu.is_divided:
        parts.append("divided (MIG): llama.cpp sees one instance in its place")
    if gpu.compute_capability:
        parts.append(f"compute capability {gpu.compute_capability}")
    if gpu.pcie_generation and gpu.pcie_width:
        parts.append(f"PCIe {gpu.pcie_generation}.0 x{gpu.pcie_width}")
    if gpu.memory_bandwidth_bytes_per_second:
        parts.append(f"{gpu.memory_bandwidth_bytes_per_second / 1e9:.0f} GB/s")
    return ", ".join(parts)


def check_visible(value: str | None, survey: GpuSurvey, devices: Sequence[Device]) -> list[Row]:
    """What CUDA_VISIBLE_DEVICES leaves of the cards, where it is set."""
    if value is None or not survey.gpus:
        return []
    seen = sum(device.backend == "CUDA" for device in devices)
    text = f"'{printable(value)}' shows llama.cpp {seen} of {len(survey.gpus)} cards"
    remedy = "" if seen else "unset CUDA_VISIBLE_DEVICES, or list cards by index or UUID: nvidia-smi -L"
    return [Row(OK if seen else WARNING, "CUDA_VISIBLE_DEVICES", text, remedy)]


def check_memory(memory: Memory) -> list[Row]:
    text = f"{format_size(memory.total_bytes)}, {format_size(memory.available_bytes)} available"
    if memory.limit_bytes:
        text += f", limited to {format_size(memory.limit_bytes)} by a cgroup"
    if memory.left_bytes is not None:
        text += f", which leaves {format_size(memory.left_bytes)}"
    enough = memory.usable_bytes >= ENOUGH_RAM_BYTES
    remedy = "" if enough else "64 GB are recommended for a 64 GB model; a smaller quantization needs less."
    rows = [Row(OK if enough else WARNING, "RAM", text, remedy)]
    if memory.swap_total_bytes:
        swap = f"{format_size(memory.swap_total_bytes)}, {format_size(memory.swap_free_bytes)} free"
        rows.append(Row(OK, "swap", swap))
    else:
        remedy = "fallocate -l 16G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile"
        rows.append(Row(WARNING, "swap", "none: when RAM runs out, the kernel ends a process", remedy))
    return rows


def check_cpu(cpu: Cpu) -> list[Row]:
    text = f"{cpu.model}, {cpu.physical_cores} cores, {cpu.usable_cores} usable"
    if cpu.max_mhz:
        text += f", {cpu.max_mhz / 1000:.1f} GHz"
    text += ", " + (" ".join(cpu.isa) or "no AVX")
    if "avx2" not in cpu.isa and "x86" in cpu.model.lower():
        return [Row(WARNING, "CPU", text, "Without AVX2 the layers on the CPU are slow.")]
    if cpu.physical_cores < ENOUGH_CORES:
        return [Row(WARNING, "CPU", text, f"{ENOUGH_CORES} and more cores are recommended.")]
    return [Row(OK, "CPU", text)]


def check_disk(disk: Disk) -> list[Row]:
    text = f"{format_size(disk.free_bytes)} free for models in {disk.folder}"
    enough = disk.free_bytes >= ENOUGH_DISK_BYTES
    remedy = "" if enough else "Set PYLLAMARUN_HOME to a folder on a larger disk."
    return [Row(OK if enough else WARNING, "disk", text, remedy)]


def check_kernels(build: Build, survey: GpuSurvey) -> list[Row]:
    """Whether the CUDA backend was compiled for the cards."""
    rows = []
    for gpu in survey.gpus:
        capability = gpu.compute_capability
        if build.backend == "cuda" and capability and build.compiled_for(capability) == "0":
            text = f"the CUDA backend has no kernels for compute capability {capability}"
            remedy = (
                f"PYLLAMARUN_CUDA_ARCHITECTURES={capability.replace('.', '')} pip install --force-reinstall --no-deps ."
            )
            rows.append(Row(FAILURE, f"GPU {gpu.index}", text, remedy))
    return rows


def check_build(build: Build, reported_commit: str, devices: Sequence[Device]) -> list[Row]:
    """`reported_commit` is what llama-server --version says."""
    text = f"llama.cpp {build.tag} ({build.short_commit}), backend {build.backend}"
    if build.facts.get("cuda_architectures"):
        text += f" for {build.facts['cuda_architectures']}"
    rows = []
    if reported_commit and build.commit.startswith(reported_commit):
        rows.append(Row(OK, "binaries", text))
    else:
        why = f"; llama-server says it is {reported_commit or 'unable to start'}"
        rows.append(Row(FAILURE, "binaries", text + why, "pip install --force-reinstall --no-deps ."))
    page = "built in" if build.has_chat_page else "not built in: the API works, the page does not"
    remedy = "" if build.has_chat_page else "Install npm and install pyllamarun again."
    rows.append(Row(OK if build.has_chat_page else WARNING, "chat page", page, remedy))
    if build.backend != "cpu" and not devices:
        rows.append(Row(WARNING, "backend", f"{build.backend} lists no device here"))
    return rows
