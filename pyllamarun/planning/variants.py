"""What can be changed of a request, one thing at a time: contexts, budgets, slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyllamarun.models.gguf import Header
from pyllamarun.planning.limits import Limit
from pyllamarun.planning.request import MAX_CONTEXT_TOKENS, Budget, Request
from pyllamarun.units import GIB, format_size

SHORTEST_CONTEXT_TOKENS = 2048
UNKNOWN_CONTEXT_TOKENS = 32768  # as far as is tried where a model does not say how long a context it was trained with
SLOTS = (1, 2, 4, 8, 16)
BUDGET_STEPS_GIB = (0.25, 0.5, 1, 2, 4, 8, 16)
MOST_BUDGETS = 12


@dataclass(frozen=True)
class Variant:
    """One thing to try: a model and a request.

    `label` is what the row is called; `source` is what to type for its model, `words` what in place of the options that
    were asked for, and `command`, where it takes one, what makes it or brings it here.
    """

    label: str
    header: Header
    request: Request
    type: str
    source: str
    is_current: bool = False
    words: tuple[str, ...] = ()
    command: str = ""


def contexts(header: Header, source: str, request: Request) -> list[Variant]:
    """Powers of two from the shortest that is of use to the longest that the model was trained with, and the own."""
    longest = min(header.trained_context_tokens or UNKNOWN_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS)
    wanted = {request.context_tokens, longest}
    tokens = min(SHORTEST_CONTEXT_TOKENS, request.context_tokens)
    while tokens < longest:
        wanted.add(tokens)
        tokens *= 2
    fixed = replace(request, allow=request.allow - {"ctx"})
    return [
        Variant(
            f"{tokens:,}", header, replace(fixed, context_tokens=tokens), header.file_type, source,
            is_current=tokens == request.context_tokens, words=("-c", str(tokens)),
        )
        for tokens in sorted(wanted)
    ]  # fmt: skip


def budgets(
    header: Header, source: str, request: Request, asked: Sequence[Limit], most: Sequence[Limit]
) -> list[Variant]:
    """Round budgets from small to all that the cards have, and the own; several cards get equal shares of each.

    `asked` are the limits of the request, `most` those without a budget.
    """
    whole = max(limit.budget_bytes for limit in most)
    step = next((size for size in BUDGET_STEPS_GIB if whole / (size * GIB) <= MOST_BUDGETS), BUDGET_STEPS_GIB[-1])
    wanted = {tuple(limit.budget_bytes for limit in limits) for limits in (asked, most)}
    size_bytes = int(step * GIB)
    while size_bytes < whole:
        wanted.add(tuple(size_bytes * limit.budget_bytes // whole for limit in most))
        size_bytes += int(step * GIB)
    own = tuple(limit.budget_bytes for limit in asked)
    return [
        Variant(
            " + ".join(map(format_size, sizes)),
            header,
            replace(request, budgets=tuple(Budget("bytes", size) for size in sizes)),
            header.file_type,
            source,
            is_current=sizes == own,
            words=("--vram", ",".join(map(_size_word, sizes))),
        )
        for sizes in sorted(wanted, key=lambda sizes: (sum(sizes), sizes))
    ]


def _size_word(size_bytes: int) -> str:
    """A size as it is typed, exactly."""
    if size_bytes % (GIB // 4) == 0:
        return f"{size_bytes / GIB:g}GiB"
    return f"{size_bytes // 2**20}MiB" if size_bytes % 2**20 == 0 else f"{size_bytes}B"


def slot_counts(header: Header, source: str, request: Request) -> list[Variant]:
    """More and more requests at once, each with as long a context as one has in what was asked for."""
    each = -(-request.context_tokens // request.slots)
    fixed = replace(request, allow=request.allow - {"slots"})
    return [
        Variant(
            str(slots), header, replace(fixed, slots=slots, context_tokens=each * slots), header.file_type, source,
            is_current=slots == request.slots, words=("--slots", str(slots), "-c", str(each * slots)),
        )
        for slots in sorted({*SLOTS, request.slots})
        if slots == request.slots or each * slots <= MAX_CONTEXT_TOKENS
    ]  # fmt: skip
