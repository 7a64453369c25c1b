"""What a plan's devices can do, as numbers for the speed model, and where each number comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyllamarun.machine.cards import Card
from pyllamarun.machine.core_rates import assumed
from pyllamarun.machine.gpu import Gpu
from pyllamarun.machine.rates import HostRates
from pyllamarun.planning.probe import Device
from pyllamarun.units import GIB

NVML, SPECIFICATION, ASSUMED = "NVML", "specification", "assumed"

# Of a card of which only the size is known, bytes per second by its memory: the slowest common card of that size.
BANDWIDTH_BY_SIZE = ((5 * GIB, 128e9), (7 * GIB, 192e9), (9 * GIB, 256e9), (13 * GIB, 360e9), (18 * GIB, 288e9),
                     (26 * GIB, 900e9), (50 * GIB, 768e9))  # fmt: skip
LARGEST_BANDWIDTH = 1555e9
ASSUMED_CAPABILITY, ASSUMED_MULTIPROCESSORS_PER_GIB = "8.6", 2.3

# Bytes per second of one lane, both of the link's directions apart: the PCI Express specifications.
PCIE_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}
ASSUMED_PCIE = (4, 16)


@dataclass(frozen=True)
class GpuRates:
    """One GPU.  `source` says where the bandwidth comes from: NVML, specification or assumed."""

    bandwidth_bytes_per_second: float
    source: str
    compute_capability: str
    multiprocessors: int
    pcie_bytes_per_second: float

    @property
    def capability(self) -> float:
        return float(self.compute_capability)


@dataclass(frozen=True)
class Hardware:
    """The GPUs by ggml's names, and the CPU."""

    host: HostRates
    gpus: Mapping[str, GpuRates] = field(default_factory=dict)

    def gpu(self, name: str) -> GpuRates:
        return self.gpus.get(name) or GPU_OF_UNKNOWN_SIZE


def hardware_of(
    devices: Sequence[Device], cards: Sequence[Card | None], survey: Sequence[Gpu], host: HostRates
) -> Hardware:
    """The cards stand in the devices' order, as far as they are known; NVML's own figures come first.

    `survey` are the GPUs that NVML lists on this machine; empty when the plan is for another.
    """
    by_address = {gpu.pci_address: gpu for gpu in survey if gpu.pci_address}
    known = [*cards, *[None] * len(devices)]
    gpus = {
        device.name: _gpu_rates(device, card, by_address.get(device.id) if device.id else None)
        for device, card in zip(devices, known)
    }
    return Hardware(host, gpus)


def _gpu_rates(device: Device, card: Card | None, gpu: Gpu | None) -> GpuRates:
    assumed_gpu = of_size(device.total_bytes)
    bandwidth, source = assumed_gpu.bandwidth_bytes_per_second, ASSUMED
    if card:
        bandwidth, source = float(card.bandwidth_bytes_per_second), SPECIFICATION
    if gpu and gpu.memory_bandwidth_bytes_per_second:
        bandwidth, source = float(gpu.memory_bandwidth_bytes_per_second), NVML
    generation, lanes = (card.pcie_generation, card.pcie_lanes) if card else ASSUMED_PCIE
    if gpu and gpu.pcie_generation and gpu.pcie_width:
        generation, lanes = gpu.pcie_generation, gpu.pcie_width
    capability = (gpu.compute_capability if gpu else None) or (card.compute_capability if card else ASSUMED_CAPABILITY)
    return GpuRates(
        bandwidth_bytes_per_second=bandwidth,
        source=source,
        compute_capability=capability,
        multiprocessors=card.multiprocessors if card else assumed_gpu.multiprocessors,
        pcie_bytes_per_second=pcie_bandwidth(generation, lanes),
    )


def of_size(total_bytes: int) -> GpuRates:
    """A GPU of which nothing but its memory is known."""
    bandwidth = next((rate for size, rate in BANDWIDTH_BY_SIZE if total_bytes <= size), LARGEST_BANDWIDTH)
    multiprocessors = min(132, max(10, round(ASSUMED_MULTIPROCESSORS_PER_GIB * total_bytes / GIB)))
    return GpuRates(bandwidth, ASSUMED, ASSUMED_CAPABILITY, multiprocessors, pcie_bandwidth(*ASSUMED_PCIE))


def pcie_bandwidth(generation: int, lanes: int) -> float:
    return PCIE_LANE.get(generation, PCIE_LANE[max(PCIE_LANE)]) * lanes


GPU_OF_UNKNOWN_SIZE = of_size(12 * GIB)
UNKNOWN = Hardware(assumed())
