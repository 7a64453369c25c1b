"""Says of models that are on this machine whether they fit now, and how: by a plan for each, with one planner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pyllamarun.errors import BinaryError, DoesNotFit, PyllamarunError
from pyllamarun.machine.host import Memory
from pyllamarun.models.model import Model
from pyllamarun.models.sources import Source
from pyllamarun.output import printable
from pyllamarun.planner import Planner
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import Request, make_request
from pyllamarun.planning.residency import SWAPPED
from pyllamarun.planning.speed import Range
from pyllamarun.planning.speed_report import span

# All of it on GPUs; a part; none; more than memory has, so that a part is read again for every token, or is swapped;
# not at all; and where there could be no plan.
GPU, PARTLY, RAM, DISK, SWAP, NO, UNKNOWN = "gpu", "partly", "ram", "disk", "swap", "no", "unknown"


# What a person should be asked about before a model is got for this machine.
POOR = (DISK, SWAP, NO)


@dataclass(frozen=True)
class Fit:
    """Whether and how a model fits, by a plan.

    `generation` is tokens a second, None where nothing is predicted, and `speed` what that is called.  `words` says
    all in a few words, and `reason` why it does not fit or has no plan; "" where it has one.
    """

    verdict: str
    words: str
    gpu_layers: int = 0
    layers: int = 0
    vram_bytes: int = 0
    ram_bytes: int = 0
    generation: Range | None = None
    speed: str = ""
    reason: str = ""

    @property
    def pace(self) -> str:
        return span(self.generation) if self.generation else ""


def fits(planner: Planner, sources: Iterable[Source], show: Callable[[str], None] = lambda _: None) -> list[Fit]:
    """One for each, all against the memory that is available at the start.  No model fails the others."""
    memory = planner.memory()
    found = []
    for source in sources:
        show(printable(source.name))
        found.append(_fit(planner, source, memory))
    return found


def _fit(planner: Planner, source: Source, memory: Memory) -> Fit:
    try:
        return fit(planner, Model(source, source.read_header()), make_request(), memory)
    except PyllamarunError as error:
        return Fit(UNKNOWN, "not known", reason=_reason(error))


def fit(planner: Planner, model: Model, request: Request, memory: Memory | None = None) -> Fit:
    """Of one model whose header is read, by the plan that is asked for."""
    try:
        return _of_plan(planner.plan(model, request, memory))
    except DoesNotFit as error:
        return Fit(NO, "no", reason=_reason(error))
    except BinaryError as error:
        planner.free_gpus()  # the next one gets a new probe
        return Fit(UNKNOWN, "not known", reason=_reason(error))
    except PyllamarunError as error:
        return Fit(UNKNOWN, "not known", reason=_reason(error))


def _reason(error: PyllamarunError) -> str:
    return printable(" ".join(f"{error.what} {error.why}".split()))


def _of_plan(plan: Plan) -> Fit:
    verdict, words = _verdict(plan)
    return Fit(
        verdict=verdict,
        words=words,
        gpu_layers=plan.gpu_layers,
        layers=plan.layers,
        vram_bytes=sum(device.total_bytes for device in plan.devices),
        ram_bytes=plan.host.total_bytes,
        generation=plan.speed.generation,
        speed=plan.speed.verdict,
    )


def _verdict(plan: Plan) -> tuple[str, str]:
    if plan.speed.from_disk:
        return (SWAP, "with swap") if plan.residency.verdict == SWAPPED else (DISK, "from disk")
    if not plan.devices or plan.gpu_layers == 0:
        return RAM, "in RAM"
    if plan.gpu_layers < plan.layers:
        return PARTLY, f"{plan.gpu_layers} of {plan.layers} layers"
    if plan.left_on_cpu:
        return PARTLY, f"{plan.layers} layers in part"
    return GPU, "all on the GPU" + "s" * (sum(device.layers > 0 for device in plan.devices) > 1)
