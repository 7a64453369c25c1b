"""What a user asks of a plan: budgets, context, slots, what is fixed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyllamarun.errors import UsageError
from pyllamarun.machine.cards import Card
from pyllamarun.units import MIB, format_size, parse_size

DEFAULT_CONTEXT_TOKENS = 4096  # upstream's own smallest for --fit
# Longer than any model was trained for: 10,485,760 tokens is the most yet.  For each token of a context llama.cpp holds
# some fifty bytes besides the KV cache, and the probe fills it to see what that takes.
MAX_CONTEXT_TOKENS = 1 << 24
DEFAULT_BATCH_TOKENS, DEFAULT_UBATCH_TOKENS = 2048, 512  # llama.cpp's own -b and -ub
# What a process holds on a CUDA card besides llama.cpp's buffers, as long as nobody has measured it on this machine:
# the context with its module code (200 to 300 MiB on GeForce cards), and a scratch pool (4 to 64 MiB).
ASSUMED_CONTEXT_BYTES = 300 * MIB
ASSUMED_POOL_BYTES = 64 * MIB

RPC = ("--rpc",)
# What may be changed where that is allowed: types of the KV cache, the size of ubatches, the context; and last the
# type of the model.
QUANT = "quant"
ALLOWED = ("kv", "ub", "ctx", QUANT)
GOALS = LATENCY, THROUGHPUT = "latency", "throughput"
# The programs that are planned for: a server, and those that read a text in chunks as long as the context.
SERVER, PERPLEXITY, IMATRIX = "llama-server", "llama-perplexity", "llama-imatrix"


@dataclass(frozen=True)
class VirtualGpu:
    """A card that is not here: its size, what its driver and context would hold, and which card it stands for."""

    total_bytes: int
    reserved_bytes: int = 0
    card: Card | None = None

    @property
    def name(self) -> str:
        return f"virtual {self.card.short_name if self.card else format_size(self.total_bytes) + ' GPU'}"


@dataclass(frozen=True)
class Budget:
    """An upper bound on what the process may hold on one GPU, or in RAM, as it was typed.

    kind: "bytes" (amount), "percent" of the card's memory or of all RAM, or "max": all that is free now, less amount.
    """

    kind: str
    amount: float

    def resolve(self, total_bytes: int, free_bytes: int) -> int:
        """Bytes, for a card, or RAM, of that size with that much free now."""
        if self.kind == "percent":
            return int(total_bytes * self.amount / 100)
        if self.kind == "max":
            return max(0, free_bytes - int(self.amount))
        return int(self.amount)


@dataclass(frozen=True)
class Request:
    """One model, to be placed.

    `passthrough` is what the user wrote after `--`: it goes to llama.cpp as it stands, after our own arguments, and so
    wins over them.  `ram` is what the process may take of host memory, None for all that is available.  `allow` is what
    may be changed, of ALLOWED and "slots" (QUANT by plans.py, the others by choose.py), and `chosen` are arguments with
    which the planner has done so.  `rpc` are addresses of RPC servers: they come first of all arguments, since others
    name their devices.  `program` is which of llama.cpp's is to run: what it takes depends on that.
    """

    context_tokens: int
    slots: int = 1
    budgets: tuple[Budget, ...] = ()
    overhead_bytes: int | None = None
    passthrough: tuple[str, ...] = ()
    force: bool = False
    ram: Budget | None = None
    allow: frozenset[str] = frozenset()
    goal: str = LATENCY
    chosen: tuple[str, ...] = ()
    rpc: str = ""
    program: str = SERVER

    @property
    def arguments(self) -> tuple[str, ...]:
        """The planner's own and the user's, which come later and so win."""
        return (*self.chosen, *self.passthrough)


def make_request(
    *,
    vram: str | None = None,
    ram: str | None = None,
    context: int = DEFAULT_CONTEXT_TOKENS,
    slots: int | None = None,
    overhead: str | None = None,
    arguments: Sequence[str] = (),
    force: bool = False,
    allow: str = "",
    goal: str = LATENCY,
    rpc: str = "",
) -> Request:
    """From what a person would write: vram="11.5GiB" or "11GiB,7GiB", ram="max-4GiB", arguments=["-ctk", "q8_0"],
    allow="kv,ub,quant".  With the goal "throughput" and no number of slots, the planner chooses that too."""
    if not 0 < context <= MAX_CONTEXT_TOKENS:
        raise UsageError(
            f"A context of {context:,} tokens is not planned: it is not between 1 and {MAX_CONTEXT_TOKENS:,}.",
            remedy="Give a smaller -c; `pyllamarun inspect` says how long a context a model was trained with.",
        )
    return Request(
        context_tokens=context,
        slots=slots or 1,
        budgets=parse_budgets(vram) if vram is not None else (),
        overhead_bytes=parse_size(overhead) if overhead is not None else None,
        passthrough=tuple(without_option(arguments, *RPC)),
        force=force,
        ram=parse_budget(ram) if ram is not None else None,
        allow=parse_allow(allow) | (frozenset({"slots"}) if goal == THROUGHPUT and slots is None else frozenset()),
        goal=parse_goal(goal),
        rpc=rpc or fixed_value(arguments, *RPC) or "",
    )


def chunks_request(
    request: Request, program: str, chunk_tokens: int, ubatch_tokens: int = DEFAULT_UBATCH_TOKENS
) -> Request:
    """The same for a program that reads a text in chunks, one a batch: more at once would only take more memory."""
    sizes = ("-b", str(chunk_tokens), "-ub", str(min(chunk_tokens, ubatch_tokens)))
    return replace(request, program=program, context_tokens=chunk_tokens, slots=1, chosen=sizes)


def parse_allow(text: str) -> frozenset[str]:
    """What may be changed: "kv,ub"."""
    words = frozenset(word.strip() for word in text.split(",")) - {""}
    if words - set(ALLOWED):
        raise UsageError(
            f'"{", ".join(sorted(words - set(ALLOWED)))}" cannot be allowed.',
            remedy=f"Name what may be changed: {', '.join(ALLOWED)}.",
        )
    return words


def parse_goal(text: str) -> str:
    if text not in GOALS:
        raise UsageError(f'"{text}" is no goal.', remedy=f"Name one of these: {', '.join(GOALS)}.")
    return text


def context_bytes(overhead_bytes: int | None) -> int:
    """The part of the overhead that a process holds from the start: the context, of at most all that was given."""
    return ASSUMED_CONTEXT_BYTES if overhead_bytes is None else min(ASSUMED_CONTEXT_BYTES, overhead_bytes)


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Budgets by GPU: "11.5GiB", "95%", "max", "max-300MiB", or several with commas."""
    return tuple(parse_budget(part.strip()) for part in text.split(","))


def parse_budget(text: str) -> Budget:
    """One of them: for RAM, of which there is one."""
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if percent:
        if not 0 < float(percent[1]) <= 100:
            raise UsageError(f'"{text}" is not between 0% and 100%.')
        return Budget("percent", float(percent[1]))
    if text.lower() == "max":
        return Budget("max", 0)
    if text.lower().startswith("max-"):
        return Budget("max", parse_size(text[4:]))
    return Budget("bytes", parse_size(text))


def has_option(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of these options stands in `arguments`."""
    return any(argument.partition("=")[0] in names for argument in arguments)


def fixed_value(arguments: Sequence[str], *names: str) -> str | None:
    """The value that the last of these options has in `arguments`: `-ngl 20`, `--gpu-layers=20`; None if absent."""
    value = None
    for position, argument in enumerate(arguments):
        name, equals, attached = argument.partition("=")
        if name in names:
            if equals:
                value = attached
            elif position + 1 < len(arguments):
                value = arguments[position + 1]
    return value


def without_option(arguments: Sequence[str], *names: str) -> list[str]:
    """`arguments` without these options, each of which has a value."""
    kept = []
    skipped = 0
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skipped:
            skipped -= 1
        elif name in names:
            skipped = 0 if equals else 1
        else:
            kept.append(argument)
    return kept
