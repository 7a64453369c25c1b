"""From the models of `compare` to what they differ by.  Imported only when that runs."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pyllamarun import output
from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.machine.host import read_cpu
from pyllamarun.machine.machine import Machine
from pyllamarun.models.comparisons import Kept, Shelf
from pyllamarun.models.divergence import Difference, OtherPart, ReferencePart, difference, perplexity, running
from pyllamarun.models.model import Model
from pyllamarun.models.text import Text
from pyllamarun.models.vocabulary import check_same_vocabulary
from pyllamarun.planner import Planner
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import PERPLEXITY, Request, chunks_request
from pyllamarun.planning.speed import Range
from pyllamarun.run.comparison import Compared, Outcome, limits_of, verdict
from pyllamarun.run.measuring import Measured, Measurement, Reader
from pyllamarun.run.process import running as running_process
from pyllamarun.run.stage import ON_STANDIN, Stage

# What a chunk is computed in, where it does not fit at once: the logits of a ubatch are in the compute buffer.
SMALLER_UBATCHES = (128, 32)


@dataclass(frozen=True)
class Wanted:
    """What `compare` was asked for."""

    reference: str
    others: tuple[str, ...]
    text: Text
    chunk_tokens: int
    most_chunks: int | None
    again: bool
    machine: Machine
    request: Request


@dataclass(frozen=True)
class Subject:
    """A model, the plan by which it reads the text, and what a plan for llama-server predicts, where one fits."""

    name: str
    model: Model
    plan: Plan
    generation: Range | None


def compared(wanted: Wanted) -> Outcome:
    """Measures, or takes what was kept.  Raises UsageError, ModelError, DoesNotFit, BinaryError or ServerError."""
    names = (wanted.reference, *wanted.others)
    models = [Model.open(name) for name in names]
    for model in models:
        model.source.check_here()
        check_same_vocabulary(models[0].header, model.header)
    with Planner(wanted.machine, overhead_bytes=wanted.request.overhead_bytes) as planner:
        stage, build = planner.stage, planner.binaries.build
        if stage.kind == ON_STANDIN:
            raise UsageError(
                "Nothing is computed on a card that is not here.",
                remedy="Leave --gpu out, or give the card's size: --virtual-gpu 12GiB, which computes on the CPU.",
            )
        subjects = [_subject(planner, name, model, wanted) for name, model in zip(names, models)]
        planner.free_gpus()
        facts = [build.commit, build.backend, stage.kind, wanted.chunk_tokens, wanted.most_chunks]
        facts.append(list(wanted.request.passthrough))
        shelf = Shelf(models[0].header, wanted.text.digest, facts)
        program = str(planner.binaries.path(PERPLEXITY))
        readers = [_reader(program, subject, wanted.request) for subject in subjects]
        with shelf.held():
            if wanted.again:
                shelf.forget([model.header for model in models[1:]])
            outcome = _outcome(wanted, subjects, _measured(stage, shelf, wanted, readers))
            _keep(shelf, subjects, outcome)
    return outcome


def _subject(planner: Planner, name: str, model: Model, wanted: Wanted) -> Subject:
    try:
        generation = planner.plan(model, wanted.request).speed.generation
    except DoesNotFit:
        generation = None
    return Subject(name, model, _reading_plan(planner, model, wanted), generation)


def _reading_plan(planner: Planner, model: Model, wanted: Wanted) -> Plan:
    """For llama-perplexity; in smaller ubatches where it does not fit otherwise."""
    request = chunks_request(wanted.request, PERPLEXITY, wanted.chunk_tokens)
    try:
        return planner.plan(model, request)
    except DoesNotFit as error:
        refusal = error
    for ubatch in SMALLER_UBATCHES:
        try:
            return planner.plan(model, chunks_request(wanted.request, PERPLEXITY, wanted.chunk_tokens, ubatch))
        except DoesNotFit:
            continue
    raise refusal


def _reader(program: str, subject: Subject, request: Request) -> Reader:
    threads = () if {"-t", "--threads"} & set(request.passthrough) else ("-t", str(read_cpu().physical_cores))
    return Reader(subject.model.header, (program, *subject.plan.argv[1:], *threads))


def _measured(stage: Stage, shelf: Shelf, wanted: Wanted, readers: Sequence[Reader]) -> Measured:
    def start(argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running_process(argv, stage.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    parts = wanted.text.parts(wanted.chunk_tokens)
    with output.progress("chunks", 0) as advance:
        measurement = Measurement(start, shelf, parts, wanted.chunk_tokens, wanted.most_chunks, advance)
        return measurement.run(readers[0], readers[1:])


def _outcome(wanted: Wanted, subjects: Sequence[Subject], measured: Measured) -> Outcome:
    reference = _compared(subjects[0], measured.reference)
    others = [
        _compared(subject, parts, difference(parts))
        for subject, parts in zip(subjects[1:], measured.others, strict=True)
    ]
    chunks, tokens = (sum(getattr(part, name) for part in measured.reference) for name in ("chunks", "tokens"))
    shipped = wanted.text.is_shipped
    return Outcome(
        text=wanted.text.name,
        text_is_shipped=shipped,
        text_sha256=wanted.text.digest,
        chunks=chunks,
        chunk_tokens=wanted.chunk_tokens,
        tokens=tokens,
        measured_now=measured.fresh_chunks > 0,
        reference=reference,
        others=tuple(others),
        limits=limits_of(shipped, tokens, wanted.chunk_tokens, reference.perplexity),
    )


def _compared(
    subject: Subject, parts: Sequence[ReferencePart] | Sequence[OtherPart], lost: Difference | None = None
) -> Compared:
    header = subject.model.header
    each = parts[0].tokens // parts[0].chunks
    surprises = running([(part.running, each) for part in parts])
    divergences = [(part.running_divergence, each) for part in parts if isinstance(part, OtherPart)]
    return Compared(
        name=subject.name,
        path=str(header.path),
        type=header.file_type,
        file_bytes=header.file_bytes,
        bits_per_weight=8 * header.weights_bytes / header.parameters,
        generation=subject.generation,
        gpu_layers=subject.plan.gpu_layers,
        vram_bytes=sum(device.total_bytes for device in subject.plan.devices),
        perplexity=perplexity(parts),
        running_perplexity=tuple(map(math.exp, surprises)),
        running_kl_divergence=tuple(running(divergences)),
        difference=lost,
        verdict=verdict(header.file_type or subject.name, lost) if lost else "",
    )


def _keep(shelf: Shelf, subjects: Sequence[Subject], outcome: Outcome) -> None:
    reference = subjects[0].model.header
    for subject, one in zip(subjects[1:], outcome.others, strict=True):
        assert one.difference
        kept = Kept(
            reference=outcome.reference.path,
            reference_type=outcome.reference.type,
            other=one.path,
            type=one.type,
            text=outcome.text,
            tokens=outcome.tokens,
            perplexity=one.perplexity,
            difference=one.difference,
        )
        shelf.finish(reference, subject.model.header, kept)
