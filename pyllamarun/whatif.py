"""What-ifs for a model on a machine: plans along an axis, and across the models of a repository, compared."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import PurePosixPath

from pyllamarun import shell
from pyllamarun.errors import DoesNotFit, DownloadError, ModelError, PyllamarunError, UsageError
from pyllamarun.machine.cards import Card, all_cards
from pyllamarun.machine.machine import Machine
from pyllamarun.models.gguf import Header
from pyllamarun.models.hub import parse_name
from pyllamarun.models.model import Model
from pyllamarun.models.names import quantization
from pyllamarun.models.quantize import UNQUANTIZED, known_types
from pyllamarun.models.requantize import Requantizations, requantizations
from pyllamarun.models.sources import Source
from pyllamarun.planner import Planner
from pyllamarun.planning.advice import LADDER, advice_from, changes, down_to_usable, larger_card, more_ram
from pyllamarun.planning.compare import Comparison, Row, recommend, rows_of
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.plan import Advice, Plan
from pyllamarun.planning.request import Request
from pyllamarun.planning.variants import Variant, budgets, contexts, slot_counts
from pyllamarun.requantizing import Wish, target_of
from pyllamarun.run.command import environment
from pyllamarun.run.process import output_of, running
from pyllamarun.units import GIB, format_size

AXES = ("quants", "ctx", "vram", "slots")
MAX_MODELS = 32  # of a repository; each takes a header over the network
READ_AT_ONCE = 4

Show = Callable[[str], None]


def compare(planner: Planner, model: Model, request: Request, axis: str, show: Show = lambda _: None) -> Comparison:
    """The plan that was asked for beside others, with one thing changed at a time along an axis, one of AXES.

    `show` is told how far it is.  Raises UsageError, Refused where every plan is, or BinaryError.
    """
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    header, source = model.header, model.source.name
    if axis == "quants":
        found = requantized_models(planner, header)
        variants = quantizations(model, request, found)
        left_out = tuple((one.type, one.reason) for one in found.left_out)
        notes = tuple(filter(None, [loses_more(header, "each")]))
    elif axis == "ctx":
        variants = contexts(header, source, request)
    elif axis == "slots":
        variants = slot_counts(header, source, request)
        notes = (f"Each slot has {-(-request.context_tokens // request.slots):,} tokens of context.",)
    elif axis == "vram":
        devices = planner.devices_of(request.rpc)
        asked = resolve_limits(request, devices)
        if not asked:
            raise UsageError("There is no GPU to compare budgets of.", remedy="Name one: --gpu 'RTX 3060'.")
        variants = budgets(header, source, request, asked, resolve_limits(replace(request, budgets=()), devices))
    else:
        raise UsageError(f'"{axis}" cannot be compared.', remedy="Name one of these: " + ", ".join(AXES))
    rows = _planned(planner, variants, show)
    recommended, reason = recommend(axis, rows)
    return Comparison(axis, str(header.path), header.name, rows, recommended, reason, left_out, notes)


def compare_models(
    planner: Planner, sources: Sequence[Source], request: Request, show: Show = lambda _: None
) -> Comparison:
    """The models of a repository, which differ in their quantization; of those on the network the headers are read.

    Raises DownloadError or ModelError where not one of them can be read, UsageError, Refused or BinaryError.
    """
    show("reading headers")
    taken, others = sources[:MAX_MODELS], sources[MAX_MODELS:]
    read = _read_headers(taken)
    models = [(source, header) for source, header in zip(taken, read) if isinstance(header, Header)]
    if not models:
        raise next(error for error in read if isinstance(error, PyllamarunError))
    left_out = [(source.name, error.what) for source, error in zip(taken, read) if isinstance(error, PyllamarunError)]
    left_out += [(source.name, f"only the {MAX_MODELS} smallest are looked at") for source in others]
    variants = [_published(source, header, request) for source, header in models]
    variants.sort(key=lambda variant: -variant.header.weights_bytes)
    rows = _planned(planner, variants, show)
    recommended, reason = recommend("quants", rows)
    repository = f"hf:{parse_name(sources[0].name[3:]).repository}"
    return Comparison("models", repository, models[0][1].name, rows, recommended, reason, tuple(left_out))


def advise(planner: Planner, model: Model, request: Request, plan: Plan | None) -> tuple[Advice, ...]:
    """What would help a plan, or where nothing fitted, None: each a plan that is made here, and a few at most.

    Raises UsageError or BinaryError.
    """
    header = model.header
    try:
        devices = planner.devices_of(request.rpc)
        asked, most = (resolve_limits(one, devices) for one in (request, replace(request, budgets=())))
    except DoesNotFit:  # the budget is more than the card has, and the error says what to do
        return ()
    rows = list(_planned(planner, changes(header, model.source.name, request, asked, most), lambda _: None))
    types = () if plan and plan.requantization else LADDER  # it was the best of them
    found = requantized_models(planner, header, types)
    by_type = {variant.label: variant for variant in quantizations(model, request, found)[1:]}

    def with_type(name: str) -> Row:
        label = f"{name} instead of {header.file_type or 'what it is'}"
        return _planned(planner, [replace(by_type[name], label=label, type="quant")], lambda _: None)[0]

    rows += down_to_usable(list(by_type), with_type)
    rows += _with_more_ram(planner, model, request, plan) if plan else ()
    rows += _on_larger_card(planner, model, request, larger_card(plan, header, asked, all_cards()))
    return advice_from(rows, plan)


def _on_larger_card(planner: Planner, model: Model, request: Request, card: Card | None) -> tuple[Row, ...]:
    if card is None:
        return ()
    label = f"{card.short_name}, {format_size(card.memory_bytes)}"
    words = ("--gpu", card.short_name, "--virtual-gpu", "", "--vram", "")
    variant = Variant(label, model.header, replace(request, budgets=()), "card", model.source.name, words=words)
    return _elsewhere(planner, replace(planner.machine, gpus=(card,)), variant)


def _with_more_ram(planner: Planner, model: Model, request: Request, plan: Plan) -> tuple[Row, ...]:
    """In a machine with as much as keeps the model in memory; () where this one has, or its cards have no names."""
    size_bytes = more_ram(plan)
    if size_bytes is None:
        return ()
    size = f"{size_bytes // GIB}GiB"
    machine, words = planner.machine, ["--ram", size]
    if machine.gpus is None:
        cards = [card for card in planner.stage.cards if card]
        if len(cards) != len(planner.devices_of(request.rpc)):
            return ()
        machine = replace(machine, gpus=tuple(cards))
        words += ["--gpu", ",".join(card.short_name for card in cards) or "none"]
    elsewhere = replace(machine, ram_bytes=size_bytes)
    variant = Variant(f"{size} of RAM", model.header, request, "ram", model.source.name, words=tuple(words))
    return _elsewhere(planner, elsewhere, replace(variant, request=replace(request, ram=None)))


def _elsewhere(planner: Planner, machine: Machine, variant: Variant) -> tuple[Row, ...]:
    """A plan on another machine, with RAM and CPU as fast as here; () where the request is for this one's devices."""
    try:
        with Planner(machine, overhead_bytes=variant.request.overhead_bytes, host=planner.hardware.host) as other:
            return _planned(other, [variant], lambda _: None)
    except UsageError:
        return ()


def requantized_models(planner: Planner, header: Header, types: Sequence[str] | None = None) -> Requantizations:
    """What llama-quantize could make of a model: it is asked about each of some types, or of all that it knows."""
    quantizer, variables = planner.binaries.path("llama-quantize"), environment(planner.binaries)

    def start(argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running(argv, variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    if types is None:
        types = known_types(output_of([quantizer, "--help"], variables)[1])
    return requantizations(start, quantizer, planner.skeleton(header), header, types)


def _planned(planner: Planner, variants: Sequence[Variant], show: Show) -> tuple[Row, ...]:
    memory = planner.memory(variants[0].request.ram) if variants else None

    def plan(variant: Variant) -> Plan:
        show(f"planning {variant.label}")
        return planner.plan(_model(variant), variant.request, memory)

    return rows_of(variants, plan)


def _model(variant: Variant) -> Model:
    return Model(Source(variant.source, variant.header.path), variant.header)


def loses_more(header: Header, which: str) -> str:
    """What is to be known of a requantization where the model is quantized already; "" where it is not."""
    if header.file_type in (*UNQUANTIZED, ""):
        return ""
    return f"Made from {header.file_type}, {which} loses more than the same type made from the original model."


def quantizations(model: Model, request: Request, found: Requantizations) -> list[Variant]:
    """The model as it is, and as it could be made, under the names that `pyllamarun quantize` gives to the files."""
    header, source = model.header, model.source
    as_it_is = Variant(header.file_type or "as it is", header, request, header.file_type, source.name, is_current=True)
    first = "" if source.is_here else f"{source.pull_command} && "
    variants = [as_it_is]
    for one in found.offered:
        path = target_of(source, header, Wish(), one.type)
        command = first + shell.join(["pyllamarun", "quantize", source.name, one.type])
        made = replace(one.header, parts=(path,))
        variants.append(Variant(one.type, made, request, one.type, str(path), command=command))
    return variants


def _published(source: Source, header: Header, request: Request) -> Variant:
    """A model of a repository, called by its quantization, or by its file where that does not tell it apart."""
    name = parse_name(source.name[3:])
    kind = name.quantization or quantization(name.file) or header.file_type
    label = name.quantization or PurePosixPath(name.file).stem
    return Variant(label, header, request, kind, source.name, command="" if source.is_here else source.pull_command)


def _read_headers(sources: Sequence[Source]) -> list[Header | PyllamarunError]:
    """A few at a time, in their order, each with its error if it has one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return list(pool.map(_header_or_error, sources))


def _header_or_error(source: Source) -> Header | PyllamarunError:
    try:
        return source.read_header()
    except (DownloadError, ModelError, UsageError) as error:
        return error
