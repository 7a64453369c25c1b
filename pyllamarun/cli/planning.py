"""From a command's options to a plan.  Imported only when a command runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyllamarun import output
from pyllamarun.cli.options import MachineOptions, PlanOptions
from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.machine.machine import Machine
from pyllamarun.models.model import Model
from pyllamarun.models.sources import resolve
from pyllamarun.planner import NEEDS_VOCABULARY, Planner
from pyllamarun.planning.limits import GIVEN
from pyllamarun.planning.plan import Plan, Requantization
from pyllamarun.planning.request import QUANT, Request, make_request
from pyllamarun.planning.saved import SavedPlan, read_plan
from pyllamarun.planning.speed_report import span
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import shell_line
from pyllamarun.run.stage import Stage
from pyllamarun.units import parse_size


@dataclass(frozen=True)
class Planned:
    """A plan, with what is needed to carry it out; the planner's stage is there until the plan is left.

    `model` is what is planned: `named`, which was asked for, or as allowed a requantization of it, made or not.
    """

    plan: Plan
    model: Model
    named: Model
    planner: Planner

    @property
    def is_here(self) -> bool:
        """Whether the model is on this machine."""
        chosen = self.plan.requantization
        return chosen.is_made if chosen else self.model.source.is_here

    @property
    def first(self) -> str:
        """What to type before the plan can be carried out; "" if nothing."""
        if self.is_here:
            return ""
        chosen = self.plan.requantization
        return chosen.command if chosen else self.model.source.pull_command

    def check_here(self) -> None:
        """Raises UsageError, or for a requantization DoesNotFit, where the model itself is needed and is not here."""
        chosen = self.plan.requantization
        if not chosen:
            self.model.source.check_here()
        elif not chosen.is_made:
            raise DoesNotFit(
                f"{chosen.source} {_as_it_is(chosen)} as it is, and its {chosen.type} is not made yet.",
                why=" ".join(self.plan.changes[:1]),
                remedy=f"First: {chosen.command}",
            )

    @property
    def stage(self) -> Stage:
        return self.planner.stage

    @property
    def binaries(self) -> Binaries:
        return self.planner.binaries

    def argv(self, program: str, *more: str) -> list[str]:
        """The plan's arguments for llama-server or llama-cli."""
        return [str(self.binaries.path(program)), *self.plan.argv[1:], *more]

    def envelope(self) -> dict[str, Any]:
        """What `plan --json` prints and `plan --save` writes: good for any folder, so its paths are whole."""
        source = self.model.source
        path = self.model.path.absolute()
        facts = {
            "stage": self.stage.kind,
            "source": str(path) if source.is_here else source.name,
            "here": self.is_here,
            "machine": self.planner.machine.to_words(),
        }
        return output.envelope("plan", self.plan.of_model_at(path).to_dict() | facts)

    def shell_line(self, argv: Sequence[str]) -> str:
        return shell_line(argv, {name: self.stage.environment[name] for name in self.stage.shown})


def _as_it_is(chosen: Requantization) -> str:
    """Why the model was to be requantized."""
    if chosen.gpu_layers_before is None:
        return "does not fit"
    return f"generates {span(chosen.generation_before)} tok/s" if chosen.generation_before else "leaves memory"


@contextmanager
def planned(options: PlanOptions) -> Iterator[Planned]:
    """Raises what can go wrong on the way: UsageError, ModelError, DownloadError, DoesNotFit, Refused, BinaryError."""
    if options.plan_file is not None:
        with _as_saved(Path(options.plan_file).expanduser()) as saved:
            yield saved
        return
    request = wanted_request(options)
    source = resolve(options.model)
    if any(argument in NEEDS_VOCABULARY for argument in options.passthrough):
        source.check_here()
    with Planner(wanted_machine(options.machine), overhead_bytes=request.overhead_bytes) as planner:
        named = Model(source, source.read_header())
        try:
            plan, model = _allowed_plan(planner, named, request)
        except DoesNotFit as error:
            from pyllamarun.cli.advising import with_advice

            raise with_advice(error, planner, named, request, options) from None
        planner.free_gpus()
        yield Planned(plan, model, named, planner)


def _allowed_plan(planner: Planner, model: Model, request: Request) -> tuple[Plan, Model]:
    """Requantizations are thought of only where they are allowed: a plan starts sooner without."""
    if QUANT not in request.allow:
        return planner.plan(model, request), model
    from pyllamarun.plans import allowed_plan

    with output.status("planning") as show:
        return allowed_plan(planner, model, request, show)


@contextmanager
def _as_saved(path: Path) -> Iterator[Planned]:
    """A plan that was made before, if it still holds."""
    saved = read_plan(path)
    overhead_bytes = max(
        (device.overhead_bytes for device in saved.plan.devices if device.overhead_source == GIVEN), default=None
    )
    with Planner(saved.machine, overhead_bytes=overhead_bytes) as planner:
        plan, model = _reopened(planner, saved)
        planner.confirm(model, plan)
        planner.free_gpus()
        yield Planned(plan, model, model, planner)


def _reopened(planner: Planner, saved: SavedPlan) -> tuple[Plan, Model]:
    if saved.plan.requantization:
        from pyllamarun.plans import reopened

        return reopened(planner, saved.plan)
    model = Model.open(saved.source)
    return saved.plan.of_model_at(model.path), model


def wanted_request(options: PlanOptions) -> Request:
    return make_request(
        vram=options.vram,
        ram=options.ram,
        context=options.context,
        slots=options.slots,
        overhead=options.overhead,
        arguments=options.passthrough,
        force=options.force,
        allow=options.allow or "",
        goal=options.goal,
        rpc=options.rpc or "",
    )


def wanted_machine(options: MachineOptions) -> Machine:
    """The machine that --machine, --gpu and the like describe; this one where they do not."""
    if options.gpu is not None and options.virtual_gpu is not None:
        raise UsageError("--gpu and --virtual-gpu exclude each other.", remedy="Name cards or give sizes.")
    if options.virtual_gpu is not None:
        for text in options.virtual_gpu.split(","):
            parse_size(text)
    gpus = options.gpu if options.gpu is not None else options.virtual_gpu
    said = Machine.of(gpus=gpus, ram_bandwidth=options.ram_bandwidth, cores=options.cores)
    if options.file is None:
        return said
    machine = Machine.read(Path(options.file).expanduser())
    changes = {name: value for name, value in vars(said).items() if value not in (None, "")}
    return replace(machine, **changes)
