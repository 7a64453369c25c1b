"""Whether what a plan puts into host memory stays there: judged before anything is loaded.

Host memory is of three kinds.  What is *held* (pinned, repacked and plain buffers, locked pages) can at best be
swapped: where it does not fit, the kernel ends a process.  *Mapped* weights are pages of the model's file: the kernel
drops them where it needs the room and reads them again when they are used, so that a model larger than RAM runs at the
speed of the disk.  And llama-server's *prompt cache* and *context checkpoints* grow as prompts come, up to a limit.

What is said of loading follows src/llama-mmap.cpp and src/llama-model-loader.cpp: with mmap the whole file is read into
the page cache first (MAP_POPULATE); what goes to a GPU, or is repacked, is copied from there; and only the range of the
file from the first to the last tensor that is used in place stays mapped.  The rest stays in the cache until somebody
needs the room.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyllamarun.errors import DoesNotFit
from pyllamarun.machine.host import Memory
from pyllamarun.models.gguf import Header
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.request import SERVER, Budget, Request, fixed_value, has_option
from pyllamarun.planning.token_cost import CPU
from pyllamarun.units import MIB, format_size

RESIDENT, REREAD, SWAPPED, TOO_LARGE = "resident", "reread", "swapped", "too_large"
BUDGET, CGROUP, AVAILABLE = "budget", "cgroup", "available"
LOAD_MODE = ("-lm", "--load-mode")
CACHE_RAM = ("-cram", "--cache-ram")
CHECKPOINTS = ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints")
PROMPT_CACHE_BYTES = 8192 * MIB  # llama-server's own --cache-ram (common_params::cache_ram_mib)


@dataclass(frozen=True)
class RamLimit:
    """What the process may take of host memory, in bytes.

    `limit_bytes` is what it can have without swapping, and `source` what sets it: the "budget" that was given, a
    "cgroup", or what is "available" now.  `swap_bytes` may be had beyond it.  `usable_bytes` is all that the process
    could ever have, `budget_bytes` what was given, None without.  `assumed`: as Memory says.
    """

    limit_bytes: int
    source: str
    swap_bytes: int
    usable_bytes: int
    budget_bytes: int | None = None
    assumed: bool = False

    @property
    def words(self) -> str:
        size = format_size(self.limit_bytes)
        if self.assumed:
            return f"this machine has {size} available"
        return {BUDGET: f"--ram allows {size}", CGROUP: f"a cgroup leaves {size}"}.get(
            self.source, f"{size} are available"
        )


@dataclass(frozen=True)
class HostNeeds:
    """What a plan takes of host memory, in bytes.

    held: pinned, repacked and plain buffers; mapped: weights used in place in the file's page
    cache; locked: those of them that are locked there, with what else of the file stands between.  A token reads
    `read_bytes` of the mapped weights, of experts only the share that is used, out of `reach_bytes` that are ever read:
    all but the embedding.  `prompt_cache_bytes` is the limit of llama-server's prompt cache, None without one, and
    `checkpoints` how many copies of its sliding window or recurrent state it keeps at most for each slot; one of every
    slot takes up to `checkpoint_bytes`.
    """

    held_bytes: int
    pinned_bytes: int
    repacked_bytes: int
    mapped_bytes: int
    locked_bytes: int
    reach_bytes: int
    read_bytes: int
    file_bytes: int
    prompt_cache_bytes: int | None
    checkpoints: int = 0
    checkpoint_bytes: int = 0

    @property
    def checkpoints_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes


@dataclass(frozen=True)
class Residency:
    """The verdict, and what it rests on, in bytes.

    verdict: "resident", all stays in memory; "reread", mapped weights do not, and each token reads of them from disk
    again between `reread_low_bytes` (by a cache that always keeps the same pages) and `reread_high_bytes` (by one that
    has always just dropped the next ones); "swapped", what is held needs swap as well; "too_large", it is more than
    memory and swap, or than the budget.

    `held_bytes` includes what is locked, and `mapped_bytes` does not; `cached_bytes` is what that has of the rest.
    Loading reads `load_low_bytes` from disk, or up to `load_high_bytes` where the file does not fit into memory.

    What grows as prompts come is not part of the verdict: the last three, as in HostNeeds.
    """

    verdict: str
    limit_bytes: int
    limit_source: str
    swap_bytes: int
    held_bytes: int
    mapped_bytes: int
    cached_bytes: int
    reread_low_bytes: int
    reread_high_bytes: int
    load_low_bytes: int
    load_high_bytes: int
    prompt_cache_bytes: int | None
    checkpoints: int = 0
    checkpoint_bytes: int = 0

    @property
    def checkpoints_bytes(self) -> int:
        return self.checkpoints * self.checkpoint_bytes


def ram_limit(budget: Budget | None, memory: Memory) -> RamLimit:
    """Raises DoesNotFit when the budget is above what the machine, or the process's cgroup, has."""
    free = memory.free_bytes
    source = AVAILABLE if free == memory.available_bytes else CGROUP
    if budget is None:
        return RamLimit(free, source, memory.free_swap_bytes, memory.usable_bytes, None, memory.assumed)
    amount = budget.resolve(memory.usable_bytes, free)
    if amount > memory.usable_bytes:
        owner = "this machine has" if memory.usable_bytes == memory.total_bytes else "this process's cgroup allows"
        raise DoesNotFit(
            f"The budget for RAM is {format_size(amount)}, and {owner} {format_size(memory.usable_bytes)}.",
            remedy="Give a smaller --ram, or `max`; for a machine that is not here, name it with --machine or --gpu.",
        )
    if amount <= free:
        return RamLimit(amount, BUDGET, 0, memory.usable_bytes, amount)
    return RamLimit(free, source, min(memory.free_swap_bytes, amount - free), memory.usable_bytes, amount)


def judge(needs: HostNeeds, ram: RamLimit) -> Residency:
    held = needs.held_bytes + needs.locked_bytes
    droppable = max(0, needs.mapped_bytes - needs.locked_bytes)
    cached = min(droppable, max(0, ram.limit_bytes - held))
    stuck = needs.pinned_bytes + needs.locked_bytes  # where it needs swap, others' memory or ours goes there
    if held > ram.limit_bytes + ram.swap_bytes or stuck > ram.usable_bytes:
        verdict = TOO_LARGE
    elif held > ram.limit_bytes:
        verdict = SWAPPED
    elif cached < droppable:
        verdict = REREAD
    else:
        verdict = RESIDENT
    stays = verdict == RESIDENT
    kept_share = min(1.0, cached / needs.reach_bytes) if needs.reach_bytes else 1.0
    copied = max(0, needs.file_bytes - needs.mapped_bytes) if needs.mapped_bytes else 0
    return Residency(
        verdict=verdict,
        limit_bytes=ram.limit_bytes,
        limit_source=ram.source,
        swap_bytes=ram.swap_bytes,
        held_bytes=held,
        mapped_bytes=droppable,
        cached_bytes=cached,
        reread_low_bytes=0 if stays else round(needs.read_bytes * (1 - kept_share)),
        reread_high_bytes=0 if stays else needs.read_bytes,
        load_low_bytes=needs.file_bytes,
        load_high_bytes=needs.file_bytes + (copied if held + needs.file_bytes > ram.limit_bytes else 0),
        prompt_cache_bytes=needs.prompt_cache_bytes,
        checkpoints=needs.checkpoints,
        checkpoint_bytes=needs.checkpoint_bytes,
    )


def host_needs(
    placement: Placement, header: Header, request: Request, memory: Memory, ram: RamLimit
) -> tuple[HostNeeds, tuple[str, ...]]:
    """What a placement takes of host memory, and the arguments that keep what grows within a budget."""
    answer = placement.answer
    mapped = answer.bytes(device="CPU", kind="mapped")
    on_cpu = [tensor for tensor in header.tensors if not placement.holds(tensor.name)]
    weights = sum(tensor.size_bytes for tensor in on_cpu)
    embedding = sum(tensor.size_bytes for tensor in on_cpu if tensor.name.startswith("token_embd"))
    mapped_share = min(1.0, mapped / weights) if weights else 0.0  # the rest was pinned or repacked
    locked = _locked_bytes(placement, header) if mapped and _locks(request) else 0
    needs = HostNeeds(
        held_bytes=answer.bytes(device="CPU") - mapped,
        pinned_bytes=answer.bytes(device="CPU", kind="pinned"),
        repacked_bytes=answer.bytes(device="CPU", kind="repacked"),
        mapped_bytes=mapped,
        locked_bytes=locked if memory.lockable_bytes is None or locked <= memory.lockable_bytes else 0,
        reach_bytes=round(mapped_share * (weights - embedding)),
        read_bytes=round(mapped_share * placement.cost(header).weights_read_bytes(CPU)),
        file_bytes=header.file_bytes,
        prompt_cache_bytes=_prompt_cache_bytes(request),
        checkpoints=answer.checkpoints,
        checkpoint_bytes=answer.checkpoint_bytes * answer.slots,
    )
    if request.program != SERVER:  # which alone keeps earlier prompts
        return replace(needs, prompt_cache_bytes=0), ()
    arguments: list[str] = []
    count = None if has_option(request.passthrough, *CHECKPOINTS) else checkpoints_within(needs, ram)
    if count is not None:
        needs = replace(needs, checkpoints=count)
        arguments += ["--ctx-checkpoints", str(count)]
    mib = None if has_option(request.passthrough, *CACHE_RAM) else prompt_cache_mib(needs, ram)
    if mib is not None:
        needs = replace(needs, prompt_cache_bytes=mib * MIB)
        arguments += ["--cache-ram", str(mib)]
    return needs, tuple(arguments)


def _locks(request: Request) -> bool:
    return fixed_value(request.passthrough, *LOAD_MODE) == "mmap+mlock"


def _locked_bytes(placement: Placement, header: Header) -> int:
    """What mmap+mlock locks: of the file all from the first to the last tensor used in place (llama_mlock::grow_to).

    Of a split model all is taken to be locked.  Where the user may not lock so much, llama.cpp only warns.
    """
    if len(header.parts) > 1:
        return header.file_bytes
    used = [tensor for tensor in header.tensors if not placement.holds(tensor.name)]
    return max(tensor.offset + tensor.size_bytes for tensor in used) - min(tensor.offset for tensor in used)


def _prompt_cache_bytes(request: Request) -> int | None:
    """The limit of llama-server's prompt cache; None where the user took it off."""
    value = fixed_value(request.passthrough, *CACHE_RAM)
    if value is None or not value.lstrip("-").isdigit():
        return PROMPT_CACHE_BYTES
    return int(value) * MIB if int(value) >= 0 else None


def checkpoints_within(needs: HostNeeds, ram: RamLimit) -> int | None:
    """The --ctx-checkpoints that keeps the process within its budget; None where its own limit does.

    They come before the prompt cache, which is for prompts that no slot holds any more.
    """
    if ram.budget_bytes is None or needs.checkpoints_bytes <= _room(needs, ram.budget_bytes):
        return None
    return _room(needs, ram.budget_bytes) // needs.checkpoint_bytes


def prompt_cache_mib(needs: HostNeeds, ram: RamLimit) -> int | None:
    """The --cache-ram that keeps the process within its budget; None where its own limit does.

    By the budget alone, not by what happens to be available, so that a plan is the same tomorrow.
    """
    if ram.budget_bytes is None:
        return None
    room = max(0, _room(needs, ram.budget_bytes) - needs.checkpoints_bytes)
    return None if room >= PROMPT_CACHE_BYTES else room // MIB


def _room(needs: HostNeeds, budget_bytes: int) -> int:
    """What is left of a budget for what grows."""
    return max(0, budget_bytes - needs.held_bytes - max(needs.locked_bytes, needs.mapped_bytes))


def check(residency: Residency, needs: HostNeeds, ram: RamLimit) -> None:
    """Raises DoesNotFit where the process could not have what it holds, if it is known what it could have."""
    if residency.verdict != TOO_LARGE or ram.assumed:
        return
    parts = {"pinned": needs.pinned_bytes, "locked": needs.locked_bytes}
    of_it = "".join(f", {format_size(size)} of it {name}" for name, size in parts.items() if size)
    swap = "" if ram.source == BUDGET else f" and {format_size(ram.swap_bytes)} of swap"
    raise DoesNotFit(
        f"The plan holds {format_size(residency.held_bytes)} of host memory{of_it}; {ram.words}{swap}.",
        why="It cannot be dropped, as pages of the model's file can: the kernel would end a process.",
        remedy=f"{_largest_saving(needs)}; or go on with --force.",
    )


def _largest_saving(needs: HostNeeds) -> str:
    """How to hold less: by what is held most of."""
    copied = needs.pinned_bytes + needs.repacked_bytes
    if needs.locked_bytes > needs.held_bytes:
        return "Leave --load-mode mmap+mlock out: what is not locked can be dropped and read again"
    if copied * 2 > needs.held_bytes:
        return (
            "Leave other load modes than mmap out, and give --no-repack after `--`: weights that are used where they "
            "stand in the file can be dropped and read again"
        )
    return "Take less with a smaller -c, or with `-- -ctk q8_0 -ctv q8_0`"


def warnings(residency: Residency, ram: RamLimit, model: str) -> list[str]:
    """What a person should know before it is loaded; `model` is the file's name."""
    found = []
    if ram.budget_bytes is not None and ram.source != BUDGET:
        found.append(f"RAM: {ram.words}, less than the budget of {format_size(ram.budget_bytes)}.")
    total = residency.held_bytes + residency.mapped_bytes
    needed = f"{format_size(total)} of RAM are needed and {ram.words}"
    reread = _between(residency.reread_low_bytes, residency.reread_high_bytes)
    if residency.verdict == REREAD:
        found.append(f"{needed}: {reread} of {model} are read from disk again for every token.")
    elif residency.verdict == SWAPPED:
        swapped = format_size(residency.held_bytes - ram.limit_bytes)
        also = (
            f", and {reread} of {model} are read from disk again for every token" if residency.reread_high_bytes else ""
        )
        found.append(f"{needed}: {swapped} have to be swapped{also}.")
    elif residency.verdict == TOO_LARGE:
        why = "with --ram, say what the other has" if ram.assumed else "this does not fit, and was forced"
        found.append(f"{needed}: {why}.")
    else:
        room, cache = max(0, ram.limit_bytes - total), residency.prompt_cache_bytes
        if cache is None or cache + residency.checkpoints_bytes > room:
            found.append(_growth(residency, room))
    return found


def _between(low: int, high: int) -> str:
    return format_size(high) if low >= high else f"{format_size(low)} to {format_size(high)}"


def _growth(residency: Residency, room: int) -> str:
    """What grows, and how to bound it: the checkpoints first, in whole ones."""
    cache, checkpoints = residency.prompt_cache_bytes, residency.checkpoints_bytes
    grown, bounds = [f"cache of earlier prompts may grow {_limit(cache)}"], []
    if checkpoints:
        grown.append(f"context checkpoints {_limit(checkpoints)}")
    if checkpoints > room:
        count = room // residency.checkpoint_bytes
        bounds.append(f"--ctx-checkpoints {count}")
        checkpoints = count * residency.checkpoint_bytes
    bounds.append(f"--cache-ram {(room - checkpoints) // MIB}")
    return (
        f"llama-server's {', its '.join(grown)}, and {format_size(room)} of RAM are left: "
        f"bound {'them' if len(grown) > 1 else 'it'} with --ram, or `-- {' '.join(bounds)}`."
    )


def _limit(size_bytes: int | None) -> str:
    return "without limit" if size_bytes is None else f"to {format_size(size_bytes)}"


def explain_growth(residency: Residency) -> str:
    """What llama-server takes of RAM besides, as prompts come: no part of the verdict."""
    cache = (
        f"Besides, as prompts come, llama-server's cache of earlier ones grows {_limit(residency.prompt_cache_bytes)}"
    )
    if not residency.checkpoints:
        return f"{cache}."
    size = format_size(residency.checkpoint_bytes)
    return (
        f"{cache}, and its context checkpoints {_limit(residency.checkpoints_bytes)}: {residency.checkpoints} a slot, "
        f"of which one for every slot takes {size}."
    )
