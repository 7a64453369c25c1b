"""Plans of what was asked for, with a requantization of the model where that is allowed and the model serves badly.

from pyllamarun import Machine, Model, plan
print(plan(Model.open("llama-3-70b-Q4_K_M.gguf"), Machine.of(gpus="RTX 3060"), vram="11.5GiB").gpu_layers)

Nothing is made here: a requantization is planned from the header that llama-quantize says its file would have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyllamarun.errors import DoesNotFit, ModelError, UsageError
from pyllamarun.machine.machine import HERE, Machine
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.model import Model
from pyllamarun.models.quality import Quality, quality
from pyllamarun.models.sources import Source
from pyllamarun.planner import Planner
from pyllamarun.planning.advice import LADDER, is_better, is_wanting, pace
from pyllamarun.planning.choose import faster
from pyllamarun.planning.compare import Row, recommend, rows_of
from pyllamarun.planning.plan import Plan, Requantization
from pyllamarun.planning.request import QUANT, Request, make_request
from pyllamarun.planning.residency import RESIDENT
from pyllamarun.planning.saved import outdated
from pyllamarun.planning.variants import Variant
from pyllamarun.whatif import loses_more, quantizations, requantized_models

Show = Callable[[str], None]


def plan(model: Model | str | Path, machine: Machine = HERE, **wishes: Any) -> Plan:
    """One plan.  `wishes` are those of `make_request`: vram="11.5GiB", context=8192, slots=4, arguments=["-ub", "256"].

    Raises UsageError, ModelError, DownloadError, DoesNotFit, Refused or BinaryError, each with what to do next.
    """
    request = make_request(**wishes)
    with Planner(machine, overhead_bytes=request.overhead_bytes) as planner:
        return allowed_plan(planner, model if isinstance(model, Model) else Model.open(model), request)[0]


def allowed_plan(planner: Planner, model: Model, request: Request, show: Show = lambda _: None) -> tuple[Plan, Model]:
    """The plan of a model, or where QUANT is allowed and it serves badly, of a requantization that is better; and which
    model that is.

    It serves badly where it does not fit, does not stay in memory or is slower than usable, whatever else may be
    changed.  Of its requantizations the largest that is usable is taken, else the fastest; `show` is told which
    is being planned.  Raises DoesNotFit, UsageError, Refused or BinaryError.
    """
    if QUANT not in request.allow:
        return planner.plan(model, request), model
    memory = planner.memory(request.ram)
    as_it_is: Plan | None = None
    refusal: DoesNotFit | None = None
    try:
        as_it_is = planner.plan(model, request, memory)
    except DoesNotFit as error:
        refusal = error
    if as_it_is and not is_wanting(as_it_is):
        return as_it_is, model
    variants, warnings = _candidates(planner, _named_from_anywhere(model), request)
    rows: list[Row] = []
    for variant in variants:
        show(f"planning {variant.label}")
        rows += rows_of([variant], lambda one: planner.plan(_model(one), one.request, memory))
        if rows[-1].is_usable:
            break
    row = _best(rows)
    if row and row.plan and is_better(row, as_it_is):
        variant = variants[rows.index(row)]
        return _chosen(row.plan, row, variant, _named_from_anywhere(model), as_it_is, warnings), _model(variant)
    if as_it_is is None:
        assert refusal
        raise refusal
    warnings += ("quant was allowed, and no smaller type of this model is clearly better.",)
    return replace(as_it_is, warnings=(*as_it_is.warnings, *warnings)), model


def reopened(planner: Planner, saved: Plan) -> tuple[Plan, Model]:
    """A saved plan of a requantization, and its model: the file, or as long as it is not made, what it would be.

    Raises UsageError, ModelError, DownloadError or BinaryError.
    """
    chosen = saved.requantization
    assert chosen
    if os.path.lexists(saved.model):
        return replace(saved, requantization=replace(chosen, is_made=True)), Model.open(saved.model)
    original = Model.open(chosen.source)
    offered = requantized_models(planner, original.header, [chosen.type]).offered
    if not offered:
        raise outdated(f"It is for {saved.model}, which is not there.", f"{chosen.source} is another model now.")
    path = Path(saved.model)
    model = Model(Source(saved.model, path), replace(offered[0].header, parts=(path,)))
    return replace(saved, requantization=replace(chosen, is_made=False)), model


def _named_from_anywhere(model: Model) -> Model:
    """A path as it holds in any folder; other names do."""
    source = model.source
    if not source.is_here or source.name != str(source.path):
        return model
    return replace(model, source=replace(source, name=str(source.path.absolute())))


def _candidates(planner: Planner, model: Model, request: Request) -> tuple[list[Variant], tuple[str, ...]]:
    """The requantizations, the largest first, each as its file is where that is there; and which are passed over."""
    found, passed_over = [], []
    for variant in quantizations(model, request, requantized_models(planner, model.header, LADDER))[1:]:
        made = _made(variant)
        if made is not None:
            found.append(replace(variant, header=made))
        elif not _is_there(variant):
            found.append(variant)
        else:
            passed_over.append(f"{variant.type} was passed over: {variant.header.path} is there, and is not that.")
    return found, tuple(passed_over)


def _is_there(variant: Variant) -> bool:
    return os.path.lexists(variant.header.path)


def _made(variant: Variant) -> Header | None:
    """What the file is, where it was made already."""
    try:
        header = read_header(variant.header.path)
    except (UsageError, ModelError):
        return None
    return header if header.file_type == variant.type and _identity(header) == _identity(variant.header) else None


def _identity(header: Header) -> tuple[str, str, dict[str, tuple[int, ...]]]:
    """What a model keeps when it is requantized."""
    return header.architecture, header.name, {tensor.name: tensor.shape for tensor in header.tensors}


def _model(variant: Variant) -> Model:
    return Model(Source(variant.source, variant.header.path), variant.header)


def _best(rows: Sequence[Row]) -> Row | None:
    """The usable one, or of those that stay in memory, if any does, the one that is recommended."""
    label, _ = recommend("quants", [row for row in rows if row.stays_in_memory] or rows)
    return next((row for row in rows if label and row.label == label), None)


def _chosen(
    plan: Plan, row: Row, variant: Variant, model: Model, before: Plan | None, warnings: tuple[str, ...]
) -> Plan:
    """With what was chosen, what that gains, and what it costs."""
    source_type = model.header.file_type
    note = f"{row.type} in place of {source_type or 'what it is'}, as allowed: {_gain(plan, before)}."
    costs = [_published(source_type, model.header.parameters, row.quality), loses_more(model.header, "it")]
    return replace(
        plan,
        changes=(note, *filter(None, costs), *plan.changes),
        warnings=(*plan.warnings, *warnings),
        requantization=Requantization(
            source=model.source.name,
            source_type=source_type,
            type=row.type,
            file_bytes=row.file_bytes,
            command=variant.command,
            is_made=_is_there(variant),
            gpu_layers_before=before.gpu_layers if before else None,
            generation_before=before.speed.generation if before else None,
        ),
    )


def _gain(plan: Plan, before: Plan | None) -> str:
    if before is None:
        return "otherwise it would not fit"
    gains = []
    if plan.gpu_layers != before.gpu_layers:
        gains.append(f"{plan.gpu_layers} layers on the GPU in place of {before.gpu_layers}")
    if before.residency.verdict != RESIDENT and plan.residency.verdict == RESIDENT:
        gains.append("all of it stays in memory")
    if pace(before) > 0:
        gains.append(f"by prediction {faster(pace(plan) / pace(before))}")
    return ", ".join(gains)


def _published(source_type: str, parameters: int, after: Quality | None) -> str:
    """By how much perplexity rises, where that was published."""
    before = quality(source_type, parameters)
    if after is None:
        return ""
    rises = [f"{one.perplexity_rise:+.1%} in {one.type}" + " (imatrix)" * one.imatrix for one in (after, before) if one]
    return f"Perplexity, as published for {after.model}: {', '.join(rises)}."
