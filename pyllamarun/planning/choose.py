"""What the user allows the planner to change: tries it, one thing after the other, and keeps what gains clearly.

A search takes a few questions, each of up to a second where the context is long.  So the first answer is looked at
first: a change that cannot gain enough, however well the model were placed with it, is not searched further.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pyllamarun.errors import DoesNotFit
from pyllamarun.models.gguf import Header
from pyllamarun.planning.bound import least_seconds
from pyllamarun.planning.hardware import UNKNOWN, Hardware
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.place import Ask, place
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Answer, Refused
from pyllamarun.planning.request import (
    DEFAULT_BATCH_TOKENS,
    DEFAULT_UBATCH_TOKENS,
    THROUGHPUT,
    Request,
    fixed_value,
    has_option,
)
from pyllamarun.planning.token_cost import use_of
from pyllamarun.planning.variants import SHORTEST_CONTEXT_TOKENS

CACHE_TYPES = ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v")
FLASH_ATTENTION = ("-fa", "--flash-attn")
UBATCH, BATCH = ("-ub", "--ubatch-size"), ("-b", "--batch-size")
SMALLER_CACHES = ("q8_0", "q4_0")
SMALLER_UBATCHES = (256, 128)
LARGEST_UBATCH_TOKENS, UBATCH_STEP_TOKENS = 8192, 256
MOST_SLOTS = 64

# A change has to gain so much; larger ubatches, which speed up prompts, may cost so much of generation.
CLEARLY, HARDLY = 0.95, 1.02


@dataclass(frozen=True)
class Choice:
    """A request as it was changed, its placement, and what was changed and why."""

    header: Header
    hardware: Hardware
    request: Request
    placement: Placement
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """What is to be least: of a token in one slot, or of each token where all slots generate together."""
        slots = _together(self.request)
        return self.placement.cost(self.header, self.hardware, use_of(self.request, slots)).seconds / slots


# A request, and the seconds that it has to stay below to be of any use; None where it does not, or does not fit.
Try = Callable[[Request, float], "Choice | None"]
Changes = Iterator[tuple[Request, str]]


def choose(
    header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask, hardware: Hardware = UNKNOWN
) -> Choice:
    """The placement of what was asked for, or of what gains clearly by what may be changed.

    Raises DoesNotFit where neither fits.
    """
    as_asked, refusal = _attempt(header, request, limits, ask, hardware)
    if as_asked is None and not request.allow:
        assert refusal
        raise refusal

    def attempt(changed: Request, below: float) -> Choice | None:
        try:
            found = _attempt(header, changed, limits, _asking(header, changed, limits, ask, hardware, below), hardware)[
                0
            ]
        except _NotWorthwhile:
            return None
        return found if found and found.seconds < below else None

    best = as_asked
    for axis, changes in AXES:
        if axis in request.allow and limits:
            best = _along(axis, changes(best.request if best else request), best, attempt)
    if best is None:
        assert refusal
        raise refusal
    return _with_larger_ubatch(best, attempt) if "ub" in request.allow and limits else best


def _attempt(
    header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask, hardware: Hardware
) -> tuple[Choice | None, DoesNotFit | None]:
    try:
        return Choice(header, hardware, request, place(header, request, limits, ask, hardware)), None
    except DoesNotFit as error:
        return None, error


class _NotWorthwhile(Exception):
    """Whatever the search finds, it does not gain enough."""


def _asking(
    header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask, hardware: Hardware, below: float
) -> Ask:
    """Asks, and raises _NotWorthwhile after an answer by which no placement stays below."""
    if below == math.inf or request.force:  # what is forced need not stay within the limits
        return ask
    slots, answers = _together(request), 0

    def asking(arguments: Sequence[str]) -> Answer:
        nonlocal answers
        answer, answers = ask(arguments), answers + 1
        if answers == 1 and least_seconds(header, answer, limits, hardware, use_of(request, slots)) >= below * slots:
            raise _NotWorthwhile
        return answer

    return asking


def _together(request: Request) -> int:
    """How many slots are thought of as generating at the same time."""
    return request.slots if request.goal == THROUGHPUT else 1


def _along(axis: str, changes: Changes, best: Choice | None, attempt: Try) -> Choice | None:
    """Goes along an axis as long as it gains; where nothing fits yet, until something does."""
    start = best
    for changed, note in changes:
        if best and best.placement.is_complete and axis != "slots":
            break
        try:
            found = attempt(changed, CLEARLY * best.seconds if best else math.inf)
        except Refused:  # llama.cpp does not know how, with this model
            break
        if found is None:
            if best:
                break
            continue
        best = replace(found, notes=(*(start.notes if start else ()), _reason(note, start, found)))
    return best


def _with_larger_ubatch(best: Choice, attempt: Try) -> Choice:
    """What is left of the memory goes to the largest ubatch that hardly costs a token: weights on the CPU are copied to
    the GPU once for each ubatch of a prompt.  Doubled as long as that goes, then in between."""
    request = best.request
    taken = has_option(request.passthrough, *UBATCH, *BATCH) or has_option(request.chosen, *UBATCH)
    if taken or best.placement.is_complete or not best.placement.on_gpu:
        return best
    most = min(LARGEST_UBATCH_TOKENS, request.context_tokens // UBATCH_STEP_TOKENS * UBATCH_STEP_TOKENS)
    found, fits, too_much = best, DEFAULT_UBATCH_TOKENS, most + UBATCH_STEP_TOKENS
    while too_much - fits > UBATCH_STEP_TOKENS:
        middle = (fits + too_much) // 2 // UBATCH_STEP_TOKENS * UBATCH_STEP_TOKENS
        tokens = min(2 * fits, most) if too_much > most else max(middle, fits + UBATCH_STEP_TOKENS)
        larger = attempt(_with_ubatch(request, tokens), HARDLY * best.seconds)
        if larger:
            note = _reason(_ubatch_note(tokens), best, larger)
            found, fits = replace(larger, notes=(*best.notes, note)), tokens
        else:
            too_much = tokens
    return found


def _reason(note: str, before: Choice | None, after: Choice) -> str:
    if before is None:
        return f"{note}, as allowed: otherwise it would not fit."
    layers = ""
    if after.placement.gpu_layers != before.placement.gpu_layers:
        layers = f"{after.placement.gpu_layers} layers on the GPU in place of {before.placement.gpu_layers}, "
    gain = before.seconds / after.seconds
    how = faster(gain) if gain >= 1 else f"{1 - gain:.0%} slower, but prompts are read in larger parts"
    return f"{note}, as allowed: {layers}by prediction {how}."


def faster(times: float) -> str:
    """In words, of what is so many times as fast, at least once."""
    return f"{times:.1f} times as fast" if times >= 2 else f"{times - 1:.0%} faster"


def _smaller_ubatches(request: Request) -> Changes:
    """They take less to compute in."""
    if not has_option(request.passthrough, *UBATCH, *BATCH):
        for tokens in SMALLER_UBATCHES:
            yield _with_ubatch(request, tokens), _ubatch_note(tokens)


def _ubatch_note(tokens: int) -> str:
    return f"A ubatch of {tokens:,} tokens in place of {DEFAULT_UBATCH_TOKENS}"


def _with_ubatch(request: Request, tokens: int) -> Request:
    """llama.cpp cuts a ubatch to the size of a batch."""
    changed = _with(request, UBATCH, str(tokens))
    return _with(changed, BATCH, str(tokens)) if tokens > DEFAULT_BATCH_TOKENS else changed


def _caches(request: Request) -> Changes:
    """A quantized cache of values needs flash attention (llama_init_from_model)."""
    attention = fixed_value(request.passthrough, *FLASH_ATTENTION)
    if has_option(request.passthrough, *CACHE_TYPES) or attention in ("off", "0", "false", "disabled"):
        return
    for kind in SMALLER_CACHES:
        keys = _with(request, CACHE_TYPES[:2], kind)
        yield _with(keys, CACHE_TYPES[2:], kind), f"A KV cache in {kind} in place of f16"


def _contexts(request: Request) -> Changes:
    """Halves, as long as a slot has the shortest context that is of use."""
    tokens = request.context_tokens // 2
    while tokens >= SHORTEST_CONTEXT_TOKENS * request.slots:
        yield replace(request, context_tokens=tokens), f"{tokens:,} tokens of context"
        tokens //= 2


def _slot_counts(request: Request) -> Changes:
    """Doubles, as long as a slot's share of the context is the shortest that is of use."""
    slots = 2 * request.slots
    while slots <= MOST_SLOTS and request.context_tokens >= SHORTEST_CONTEXT_TOKENS * slots:
        each = request.context_tokens // slots
        yield replace(request, slots=slots), f"{slots} slots of {each:,} tokens"
        slots *= 2


def _with(request: Request, option: Sequence[str], value: str) -> Request:
    """With an argument of ours, in place of another value for it."""
    others = list(request.chosen)
    if option[0] in others:
        position = others.index(option[0])
        del others[position : position + 2]
    return replace(request, chosen=(*others, option[0], value))


# In the order in which they are tried.
AXES: tuple[tuple[str, Callable[[Request], Changes]], ...] = (
    ("slots", _slot_counts),
    ("kv", _caches),
    ("ub", _smaller_ubatches),
    ("ctx", _contexts),
)
