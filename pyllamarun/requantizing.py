"""Requantizes models: says what the files will be and what that gains, and makes them.

`requantize` is all of it in one call; `quantize` on the command line takes the steps one by one, to show them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pyllamarun import __version__, paths, shell
from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.machine.host import read_cpu
from pyllamarun.models.comparisons import identity, kept_for
from pyllamarun.models.download import sha256_of
from pyllamarun.models.gguf import Header
from pyllamarun.models.model import Model
from pyllamarun.models.provenance import Provenance
from pyllamarun.models.quality import quality
from pyllamarun.models.quantize import (
    ALIASES,
    Order,
    Quantized,
    check_disk,
    check_target,
    check_type,
    known_types,
    loss_warning,
    needs_imatrix,
    quantize,
    source_warning,
    target_name,
    type_of,
)
from pyllamarun.models.recipe import PLAIN, Recipe, write_placeholder
from pyllamarun.models.requantize import LeftOut, Requantized, requantizations, requantized
from pyllamarun.models.skeleton import fingerprint, write_skeleton
from pyllamarun.models.sources import Source
from pyllamarun.models.store import known_sha256, open_index
from pyllamarun.models.stores import is_folder, is_kept_by_others
from pyllamarun.models.unfinished import remove_dead
from pyllamarun.planner import Planner
from pyllamarun.planning.compare import Comparison, Row, rows_of
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import IMATRIX, Request, chunks_request, make_request
from pyllamarun.planning.variants import Variant
from pyllamarun.run.binaries import Binaries, find_binaries
from pyllamarun.run.command import environment
from pyllamarun.run.imatrix import (
    CHUNK_TOKENS,
    UBATCHES,
    compute_imatrix,
    imatrix_arguments,
)
from pyllamarun.run.process import output_of, running
from pyllamarun.run.stage import ON_STANDIN

Show = Callable[[str], None]
Progress = Callable[[int, int], None]
NO_PROGRESS: Progress = lambda _done, _total: None  # noqa: E731
LONGEST_STEM = 60  # of names that another one is made of


@dataclass(frozen=True)
class Wish:
    """What is to be made: `types` by llama.cpp's names, into `output`, a file or a folder, or beside the source.

    `imatrix_text` is what an importance matrix is to be computed from, `threads` None for the physical cores.
    """

    types: tuple[str, ...] = ()
    output: Path | None = None
    recipe: Recipe = PLAIN
    imatrix_text: Path | None = None
    threads: int | None = None
    hash_source: bool = False

    @property
    def takes_long_before(self) -> bool:
        """Whether what comes before the first file takes so long that the disk is asked before that too."""
        return self.imatrix_text is not None or self.hash_source


@dataclass(frozen=True)
class Quantizer:
    """llama-quantize, how it is started, and the types that it knows."""

    binaries: Binaries
    program: Path
    types: tuple[str, ...]

    def start(self, argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        pipe, variables = subprocess.PIPE, environment(self.binaries, virtual_gpus=())
        return running(argv, variables, stdout=pipe, stderr=subprocess.STDOUT)


@dataclass(frozen=True)
class Goal:
    """What a file is to fit: with a speed in tokens a second, that; without, to be on GPUs as a whole."""

    request: Request
    tokens_per_second: float | None
    words: str

    def is_met(self, plan: Plan | None) -> bool:
        if plan is None:
            return False
        if self.tokens_per_second is not None:
            generation = plan.speed.generation
            return generation is not None and generation.middle >= self.tokens_per_second
        return bool(plan.devices) and plan.gpu_layers == plan.layers and not plan.left_on_cpu


def requantize(model: Model, wish: Wish, progress: Progress = NO_PROGRESS) -> tuple[Quantized, ...]:
    """Makes a file of each type.  `progress` is told how many tensors of how many are done, of each.

    Raises UsageError, ModelError, DoesNotFit or BinaryError; then of the files that are not complete nothing is there.
    """
    quantizer = find_quantizer()
    made = forecasts(quantizer, model, wish)
    if wish.takes_long_before:
        prepare(orders(quantizer, model, wish, made))
    if wish.imatrix_text is not None:
        with Planner() as planner:
            wish = with_imatrix(planner, model, wish, make_request(), NO_PROGRESS)
    wanted = orders(quantizer, model, wish, made, digests(model.header, compute=wish.hash_source))
    prepare(wanted)
    return tuple(quantize(quantizer.start, quantizer.program, order, progress) for order in wanted)


def find_quantizer() -> Quantizer:
    binaries = find_binaries()
    program = binaries.path("llama-quantize")
    _, help_text = output_of([program, "--help"], environment(binaries, virtual_gpus=()))
    return Quantizer(binaries, program, known_types(help_text))


def forecasts(quantizer: Quantizer, model: Model, wish: Wish) -> tuple[Requantized, ...]:
    """What each type will make of the model.  Raises UsageError where one cannot be made."""
    header, types = model.header, dict.fromkeys(check_type(name, quantizer.types) for name in wish.types)
    with _dry_run_of(header, wish) as (skeleton, recipe):
        found = []
        for type_name in types:
            check_target(header, target_of(model.source, header, wish, type_name), type_name, recipe)
            found.append(requantized(quantizer.start, quantizer.program, skeleton, header, type_name, recipe))
            if found[-1].needs_imatrix:
                raise needs_imatrix(type_name)
    return tuple(found)


@contextmanager
def _dry_run_of(header: Header, wish: Wish) -> Iterator[tuple[Path, Recipe]]:
    """The model's skeleton, and a recipe that has an importance matrix, where one is to be computed."""
    recipe = wish.recipe.checked(header)
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as name:
        folder = Path(name)
        if wish.imatrix_text is not None:
            recipe = replace(recipe, imatrix=write_placeholder(folder / "imatrix.gguf", header.tensors))
        yield write_skeleton(header, folder / "skeleton.gguf"), recipe


def target_of(source: Source, header: Header, wish: Wish, type_name: str) -> Path:
    """Where a type goes: -o, or beside the source, or into our own folder where another program keeps that."""
    name = target_name(_file_name(source, header), type_name)
    if wish.output is None:
        return (paths.models_folder() if is_kept_by_others(header.path) else header.path.parent) / name
    if is_folder(wish.output):
        return wish.output / name
    if len({ALIASES.get(name.upper(), name.upper()) for name in wish.types}) > 1:
        raise UsageError(f"{wish.output} is no folder, and several files are to be made.", remedy="Name a folder.")
    return wish.output


def _file_name(source: Source, header: Header) -> str:
    """A file's own; where a store calls it by its digest, the model's."""
    if not re.search(r"[0-9a-f]{40}$", header.path.name):
        return header.path.name
    return re.sub(r"[^\w.-]+", "-", header.name if "/" in source.name else source.name)


def digests(header: Header, *, compute: bool, progress: Progress = NO_PROGRESS) -> tuple[str, ...]:
    """The sha256 of each file of the source, as it is recorded or, where that is wanted, computed; or ()."""
    with open_index() as index:
        found = [known_sha256(part, index) or (sha256_of(part, progress) if compute else "") for part in header.parts]
    return tuple(found) if all(found) else ()


def orders(
    quantizer: Quantizer, model: Model, wish: Wish, made: Sequence[Requantized], sha256: tuple[str, ...] | None = None
) -> tuple[Order, ...]:
    """What is to be carried out; `made` are the forecasts.  The recipe's importance matrix is the one that there is."""
    header, recipe = model.header, wish.recipe.checked(model.header)
    build = quantizer.binaries.build
    matrix = recipe.imatrix
    options = replace(recipe, imatrix=None).arguments()
    return tuple(
        Order(
            source=header,
            type=one.type,
            target=target_of(model.source, header, wish, one.type),
            recipe=recipe,
            tensors=one.header.tensors,
            fallback_tensors=one.fallback_tensors,
            threads=wish.threads or read_cpu().physical_cores,
            provenance=Provenance(
                source=model.source.name if model.source.name != str(header.path) else header.path.name,
                source_sha256=digests(header, compute=False) if sha256 is None else sha256,
                source_type=type_of(header),
                type=one.type,
                options=tuple(options),
                imatrix=matrix.name if matrix else "",
                imatrix_sha256=sha256_of(matrix) if matrix else "",
                tool=f"pyllamarun {__version__}",
                llama_cpp=f"{build.tag} {build.commit}",
            ),
        )
        for one in made
    )


def prepare(wanted: Sequence[Order]) -> None:
    """Clears away what runs that were killed left, and checks that the disk has room for all files together.

    Raises UsageError.
    """
    by_folder: dict[Path, int] = {}
    for order in wanted:
        folder = order.targets[0].parent
        if folder.is_relative_to(paths.models_folder()):
            folder.mkdir(parents=True, exist_ok=True)
        by_folder[folder] = by_folder.get(folder, 0) + sum(tensor.size_bytes for tensor in order.tensors)
    for folder, size_bytes in by_folder.items():
        remove_dead(folder)
        check_disk(folder, size_bytes)


def warnings(model: Model, types: Sequence[str]) -> tuple[str, ...]:
    """What a person should know before, and what `compare` has measured of this model and these types."""
    measured = [_measured_loss(model.header, name) for name in types] if model.source.is_here else []
    said = [*map(loss_warning, types), source_warning(model.header), *measured]
    return tuple(dict.fromkeys(filter(None, said)))


def _measured_loss(header: Header, type_name: str) -> str:
    kept = kept_for(header, type_name)
    if kept is None:
        return ""
    loss = kept.difference
    return (
        f"{type_name} of this model, as `pyllamarun compare` has measured over {kept.tokens:,} tokens: "
        f"perplexity {loss.perplexity_rise:+.1%}, give or take {loss.perplexity_rise_error:.1%}, "
        f"KL divergence {loss.kl_divergence:.3g}."
    )


def what_if(
    planner: Planner, model: Model, request: Request, made: Sequence[Requantized], show: Show = lambda _: None
) -> Comparison:
    """A plan of the model as it is, and one of each file that is to be made."""
    rows = _planned(planner, [_as_it_is(model, request), *(_variant(model, one, request) for one in made)], show)
    return Comparison("quants", str(model.path), model.header.name, tuple(rows), "", "")


def choose(
    planner: Planner, quantizer: Quantizer, model: Model, goal: Goal, wish: Wish, show: Show = lambda _: None
) -> tuple[Comparison, Requantized]:
    """The largest type whose plan meets a goal, from the largest down; each that was tried is a row.

    A type of which a smaller one was measured to be better is not tried.  Raises UsageError where the model meets the
    goal as it is, and DoesNotFit where no type does.
    """
    show("asking llama-quantize")
    with _dry_run_of(model.header, wish) as (skeleton, recipe):
        program, types = quantizer.program, quantizer.types
        found = requantizations(quantizer.start, program, skeleton, model.header, types, recipe)
    tried, left_out = candidates(found.offered, model.header.parameters)
    rows = []
    for row in _planned(planner, [_as_it_is(model, goal.request)], show):
        rows.append(row)
        if goal.is_met(row.plan):
            raise UsageError(
                f"{model.source.name} is {goal.words} as it is.", remedy="Take it: nothing needs to be made smaller."
            )
    for one in tried:
        rows += _planned(planner, [_variant(model, one, goal.request)], show)
        if goal.is_met(rows[-1].plan):
            reasons = tuple((other.type, other.reason) for other in (*found.left_out, *left_out))
            reason = f"the largest that is {goal.words}"
            comparison = Comparison(
                "quants", str(model.path), model.header.name, tuple(rows), one.type, reason, reasons
            )
            return comparison, one
    raise _none_fits(goal, rows)


def candidates(offered: Sequence[Requantized], parameters: int) -> tuple[list[Requantized], list[LeftOut]]:
    """The types that are worth their size, and those of which one that is not larger was measured to be better."""
    measured = {one.type: quality(one.type, parameters) for one in offered}

    def better(one: Requantized) -> str:
        own = measured[one.type]
        for other in offered:
            its = measured[other.type]
            is_no_larger = other.header.weights_bytes <= one.header.weights_bytes
            if own and its and own.imatrix == its.imatrix and is_no_larger and its.perplexity < own.perplexity:
                return other.type
        return ""

    kept = [one for one in offered if not better(one)]
    dropped = [(one.type, better(one)) for one in offered if better(one)]
    return kept, [LeftOut(name, f"{other} is not larger and was measured to be better") for name, other in dropped]


def _none_fits(goal: Goal, rows: Sequence[Row]) -> DoesNotFit:
    last = rows[-1]
    gains = f"{last.gpu_layers} of {last.layers} layers on the GPU" if last.fits else last.reason
    if last.generation is not None:
        gains += f", {last.generation.low:.3g} to {last.generation.high:.3g} tok/s"
    return DoesNotFit(
        f"No type is {goal.words}.",
        why=f"The smallest that was tried is {last.label}: {gains}.",
        remedy="Ask for less speed, give more VRAM, or take a smaller model; an importance matrix (--imatrix) allows "
        "smaller types.",
    )


def _planned(planner: Planner, variants: Sequence[Variant], show: Show) -> tuple[Row, ...]:
    def plan(variant: Variant) -> Plan:
        show(f"planning {variant.label}")
        return planner.plan(Model(Source(variant.source, variant.header.path), variant.header), variant.request)

    return rows_of(variants, plan)


def _as_it_is(model: Model, request: Request) -> Variant:
    label = type_of(model.header)
    return Variant(label, model.header, request, label, model.source.name, is_current=True)


def _variant(model: Model, made: Requantized, request: Request) -> Variant:
    command = shell.join(["pyllamarun", "quantize", model.source.name, made.type])
    return Variant(made.type, made.header, request, made.type, str(made.header.path), command=command)


def imatrix_plan(planner: Planner, model: Model, request: Request) -> Plan:
    """Where the model goes while its importance matrix is computed, within the same budget."""
    refusals = []
    for ubatch_tokens in UBATCHES:
        wanted = replace(make_request(), budgets=request.budgets)
        try:
            return planner.plan(model, chunks_request(wanted, IMATRIX, CHUNK_TOKENS, ubatch_tokens))
        except DoesNotFit as error:
            refusals.append(error)
    last = refusals[-1]
    raise DoesNotFit(
        f"Computing an importance matrix does not fit.  {last.what}", why=last.why, remedy="Allow more with --vram."
    )


def imatrix_target(model: Model, text: Path, wish: Wish) -> Path:
    """Where the importance matrix of a model and a text is kept: with the files that are made.

    Of another model or text, or a changed one, it has another name.
    """
    if not text.is_file():
        raise UsageError(f"There is no file {text}.", remedy="Give a text: --imatrix auto TEXT.")
    folder = target_of(model.source, model.header, wish, "").parent
    name = _file_name(model.source, model.header).removesuffix(".gguf")
    known = identity(model.header) if model.source.is_here else fingerprint(model.header)
    try:
        content = hashlib.sha256(f"{known} {sha256_of(text)}".encode()).hexdigest()
    except OSError as error:
        raise UsageError(f"{text} cannot be read.", why=error.strerror or "", remedy="Give another text.") from None
    return folder / f"imatrix-{name[:LONGEST_STEM]}-{text.stem[:LONGEST_STEM]}-{content[:12]}.gguf"


def with_imatrix(planner: Planner, model: Model, wish: Wish, request: Request, progress: Progress) -> Wish:
    """The wish with the importance matrix of its text, which is computed if it is not there yet.

    Raises DoesNotFit, UsageError or BinaryError.
    """
    text = wish.imatrix_text
    if text is None:
        return wish
    target = imatrix_target(model, text, wish)
    if not target.exists():
        if planner.stage.kind == ON_STANDIN:
            raise UsageError(
                "An importance matrix is computed on a GPU that is here, or on the CPU.",
                remedy="Leave --gpu out, or give a file.",
            )
        plan = imatrix_plan(planner, model, request)
        planner.free_gpus()
        program = planner.binaries.path("llama-imatrix")
        arguments = imatrix_arguments(plan.argv[1:], text, wish.threads)
        target.parent.mkdir(parents=True, exist_ok=True)
        compute_imatrix(program, planner.stage.environment, arguments, target, progress)
    return replace(wish, imatrix_text=None, recipe=replace(wish.recipe, imatrix=target))
