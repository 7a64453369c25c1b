"""Who else holds memory of a GPU: told where a budget is above what is free now, or nothing fits beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyllamarun.errors import DoesNotFit
from pyllamarun.machine.gpu import Gpu, GpuSurvey, normal_pci_address
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.probe import Device
from pyllamarun.units import format_size

Survey = Callable[[], GpuSurvey]

LATER = "What they free later, a plan made then can use; if one is just ending, try again."


def nobody() -> GpuSurvey:
    return GpuSurvey((), None, None)


def card_of(device: Device, survey: GpuSurvey) -> Gpu | None:
    """The card that one of llama.cpp's devices is, or is a part of, by its PCI address."""
    if not device.id:
        return None
    address = normal_pci_address(device.id)
    return next((gpu for gpu in survey.gpus if gpu.pci_address == address), None)


def shortages(limits: Sequence[Limit], survey: Survey) -> list[str]:
    """A warning for each GPU on which less is free now than its budget."""
    short = [limit for limit in limits if limit.limit_bytes < limit.budget_bytes]
    found = survey() if short else nobody()  # a driver is not asked without need: it may not answer
    return [
        f"{limit.device.name}: {format_size(limit.limit_bytes)} are free now, less than the budget of "
        f"{format_size(limit.budget_bytes)}; the plan keeps to what is free.{_holders(limit.device, found)}"
        for limit in short
    ]


def naming_neighbours(error: DoesNotFit, limits: Sequence[Limit], survey: Survey) -> DoesNotFit:
    """The same error, which says who holds what of GPUs that are not free."""
    taken = [limit.device for limit in limits if limit.device.free_bytes < limit.device.total_bytes]
    found = survey() if taken else nobody()
    holders = [f"{device.name}:{text}" for device in taken if (text := _holders(device, found))]
    return DoesNotFit(error.what, why="\n".join([error.why, *holders]), remedy=error.remedy)


def _holders(device: Device, survey: GpuSurvey) -> str:
    """A sentence or two, with a space before them; nothing where nothing is known of anybody."""
    gpu = card_of(device, survey)
    if gpu is None:
        return f"  Who holds the rest is not known: {survey.problem}." if survey.problem and device.id else ""
    if gpu.is_divided:
        return "  It is a part of a divided card (MIG), and who else holds memory of a part is not told."
    processes = sorted(gpu.neighbours, key=lambda process: -(process.used_bytes or 0))
    if not processes:
        return ""
    held = [
        f"{process.name} ({process.pid}) "
        + ("an unknown amount" if process.used_bytes is None else format_size(process.used_bytes))
        for process in processes
    ]
    return f"  Held by {', '.join(held)}.  {LATER}"
