"""From `quantize`'s options to files, step by step, shown.  Imported only when it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from pyllamarun import output, requantizing, shell
from pyllamarun.cli.options import MachineOptions
from pyllamarun.cli.planning import wanted_machine
from pyllamarun.errors import BinaryError, UsageError
from pyllamarun.models.model import Model
from pyllamarun.models.quantize import Order, Quantized, quantize
from pyllamarun.models.recipe import Recipe
from pyllamarun.models.requantize import Requantized
from pyllamarun.models.sources import resolve
from pyllamarun.paths import expanded
from pyllamarun.planner import Planner
from pyllamarun.planning.compare import Comparison
from pyllamarun.planning.quantize_report import describe_quantized, describe_what_if, what_if_rows
from pyllamarun.planning.request import Request, make_request
from pyllamarun.requantizing import Goal, Quantizer, Wish
from pyllamarun.run.imatrix import imatrix_arguments


@dataclass(frozen=True)
class Asked:
    """What the command line said."""

    model: str
    types: tuple[str, ...]
    output: str | None
    fit: str | None
    speed: float | None
    imatrix: str | None
    imatrix_text: str | None
    tensor_types: tuple[str, ...]
    output_type: str
    embedding_type: str
    pure: bool
    keep_split: bool
    hash_source: bool
    threads: int | None
    plans: bool
    vram: str | None
    context: int
    machine: MachineOptions
    as_json: bool
    dry_run: bool

    @property
    def wish(self) -> Wish:
        recipe = Recipe(
            imatrix=expanded(self.imatrix) if self.imatrix is not None else None,
            tensor_types=self.tensor_types,
            output_type=self.output_type,
            embedding_type=self.embedding_type,
            pure=self.pure,
            keep_split=self.keep_split,
        )
        text = expanded(self.imatrix_text) if self.imatrix_text is not None else None
        target = expanded(self.output) if self.output is not None else None
        if target is not None and str(self.output).endswith("/") and not target.is_dir():
            raise UsageError(f"There is no folder {target}.", remedy=f"mkdir -p {target}")
        return Wish(self.types, target, recipe, text, self.threads, self.hash_source)

    @property
    def request(self) -> Request:
        return make_request(vram=self.fit or self.vram, context=self.context)

    @property
    def goal(self) -> Goal | None:
        if self.fit is None:
            return None
        pace = f"as fast as {self.speed:g} tok/s" if self.speed is not None else "wholly on the GPU"
        return Goal(self.request, self.speed, f"{pace} within {self.fit} of VRAM")


@dataclass(frozen=True)
class Outlook:
    """What will be made, as far as it is known before."""

    wish: Wish
    made: tuple[Requantized, ...]
    comparison: Comparison | None
    stage: str


def run(asked: Asked) -> None:
    """Raises what can go wrong: UsageError, ModelError, DownloadError, DoesNotFit, Refused, BinaryError."""
    wish, request = asked.wish, asked.request
    source = resolve(asked.model)
    if not asked.dry_run and not source.is_here:
        raise UsageError(
            f"{source.name} is not on this machine.",
            why="Its header is enough for a look (--dry-run); to quantize it, all of it is needed.",
            remedy=f"Pull it first: {source.pull_command}",
        )
    quantizer = requantizing.find_quantizer()
    model = Model(source, source.read_header())
    with ExitStack() as stack:
        planner = _planner(asked, stack)
        outlook = _outlook(asked, quantizer, model, wish, request, planner)
        warnings = requantizing.warnings(model, [one.type for one in outlook.made])
        if not asked.as_json:
            output.print_text(describe_what_if(model.header, outlook.made, outlook.comparison, outlook.stage))
            output.print_text()
        for warning in warnings:
            output.note(f"warning: {warning}")
        facts = {"what_if": what_if_rows(model.header, outlook.made, outlook.comparison), "warnings": list(warnings)}
        if asked.dry_run:
            _print_commands(asked, quantizer, model, outlook, planner, request, facts)
            return
        wish = outlook.wish
        if wish.takes_long_before:
            requantizing.prepare(requantizing.orders(quantizer, model, wish, outlook.made))
        if wish.imatrix_text is not None and planner is not None:
            with output.progress("chunks", 0) as advance:
                wish = requantizing.with_imatrix(planner, model, wish, request, advance)
            output.note(f"The importance matrix is {wish.recipe.imatrix}.")
    results = _make(quantizer, model, wish, outlook.made, None if asked.as_json else output.print_text)
    if asked.as_json:
        output.print_json(output.envelope("quantize", _data(results, facts)))


def _planner(asked: Asked, stack: ExitStack) -> Planner | None:
    """Raises BinaryError only where something depends on a plan."""
    is_needed = asked.fit is not None or asked.imatrix_text is not None
    if not (asked.plans or is_needed):
        return None
    try:
        return stack.enter_context(Planner(wanted_machine(asked.machine)))
    except BinaryError as error:
        if is_needed:
            raise
        output.note(f"No plans: {error.what}")
        return None


def _outlook(
    asked: Asked, quantizer: Quantizer, model: Model, wish: Wish, request: Request, planner: Planner | None
) -> Outlook:
    goal = asked.goal
    with output.status("quantize") as show:
        if goal is not None and planner is not None:
            comparison, chosen = requantizing.choose(planner, quantizer, model, goal, wish, show)
            wish = replace(wish, types=(chosen.type,))
            return Outlook(wish, requantizing.forecasts(quantizer, model, wish), comparison, planner.stage.description)
        made = requantizing.forecasts(quantizer, model, wish)
        if planner is None or not asked.plans:
            return Outlook(wish, made, None, "")
        try:
            comparison = requantizing.what_if(planner, model, request, made, show)
        except BinaryError as error:
            output.note(f"No plans: {error.what}")
            planner.free_gpus()
            return Outlook(wish, made, None, "")
    return Outlook(wish, made, comparison, planner.stage.description)


def _print_commands(
    asked: Asked, quantizer: Quantizer, model: Model, outlook: Outlook, planner: Planner | None, request: Request,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """What would be run."""
    commands, wish = [], outlook.wish
    if wish.imatrix_text is not None and planner is not None:
        target = requantizing.imatrix_target(model, wish.imatrix_text, wish)
        if not target.exists():
            plan = requantizing.imatrix_plan(planner, model, request)
            program = str(quantizer.binaries.path("llama-imatrix"))
            commands.append(
                [program, *imatrix_arguments(plan.argv[1:], wish.imatrix_text, wish.threads), "-o", str(target)]
            )
    orders = requantizing.orders(quantizer, model, wish, outlook.made)
    for order in orders:
        argv = order.argv(quantizer.program, order.target.parent)
        if wish.imatrix_text is not None:
            argv[1:1] = ["--imatrix", str(requantizing.imatrix_target(model, wish.imatrix_text, wish))]
        commands.append(argv)
    if asked.as_json:
        targets = [str(target) for order in orders for target in order.targets]
        data = {"dry_run": True, "source": model.source.name, "targets": targets, "commands": commands}
        output.print_json(output.envelope("quantize", data | facts))
        return
    for argv in commands:
        output.print_text(shell.join(argv))


def _make(
    quantizer: Quantizer, model: Model, wish: Wish, made: Sequence[Requantized], tell: Callable[[str], None] | None
) -> list[Quantized]:
    sha256 = None
    if wish.hash_source:
        with output.progress("bytes", model.header.file_bytes) as advance:
            sha256 = requantizing.digests(model.header, compute=True, progress=advance)
    orders = requantizing.orders(quantizer, model, wish, made, sha256)
    requantizing.prepare(orders)
    results = []
    for order in orders:
        with output.weighted_progress(order.type, "tensors", _weights(order)) as advance:
            results.append(quantize(quantizer.start, quantizer.program, order, advance))
        if tell is not None:
            tell(describe_quantized(results[-1]))
    return results


def _weights(order: Order) -> list[int]:
    """What is to be read and computed of each tensor: its elements."""
    return [math.prod(tensor.shape) for tensor in order.tensors]


def _data(results: Sequence[Quantized], facts: dict[str, Any]) -> dict[str, Any]:
    """The first file's facts stand for themselves too, as they did when there was one."""
    from dataclasses import asdict

    every = [asdict(result) for result in results]
    return every[0] | {"dry_run": False, "results": every} | facts
