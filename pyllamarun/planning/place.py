"""Finds what goes to the GPUs: as much as their memory, as llama.cpp itself counts it, holds within the budgets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from pyllamarun.errors import DoesNotFit
from pyllamarun.models.gguf import Header
from pyllamarun.planning.gpus import Gpus, in_order
from pyllamarun.planning.hardware import UNKNOWN, Hardware
from pyllamarun.planning.layout import ANY_MATRIX, BUT_ATTENTION, Layers, Layout, Room
from pyllamarun.planning.limits import DEVICES, Limit
from pyllamarun.planning.placement import Placement
from pyllamarun.planning.probe import Answer
from pyllamarun.planning.request import SERVER, THROUGHPUT, Request, fixed_value, has_option
from pyllamarun.planning.spill import OVERRIDES, Division, Piece, divisions, overridden
from pyllamarun.planning.token_cost import TokenCost, use_of
from pyllamarun.units import format_size

GPU_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
# How the user divides layers among GPUs: then that is left to llama.cpp and them.
SPLITS = ("-ts", "--tensor-split", "-sm", "--split-mode", "-mg", "--main-gpu")
CACHE_ON_CPU = ("-nkvo", "--no-kv-offload")
MAX_ATTEMPTS = 5
MAX_SPLITS = 3
UNDIVIDED = Division("layers", 0, 0)

Ask = Callable[[Sequence[str]], Answer]


def place(
    header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask, hardware: Hardware = UNKNOWN
) -> Placement:
    """The placement that costs least a token on that hardware, of those within the limits.

    Raises DoesNotFit when not even -ngl 0 does, unless the request says force.
    """
    search = _Search(header, request, limits, ask, hardware)
    fixed = fixed_value(request.passthrough, *GPU_LAYERS)
    if fixed is not None or not limits:
        placement = search.as_asked(fixed)
        if not placement.fits and not request.force:
            raise _does_not_fit(placement, f"With -ngl {fixed} as you asked, the model")
        return placement
    nothing = with_all = search.nothing(search.gpus)
    while not nothing.fits:
        search.gpus = search.gpus.with_room(nothing)
        if not search.gpus.limits or not search.may_choose_gpus:
            if request.force:
                return with_all
            raise _does_not_fit(with_all, "Even with every layer on the CPU, the model")
        nothing = search.nothing(search.gpus)
    return search.everything(nothing) or search.best(nothing)


class _Search:
    """Asks for placements of one model, each once."""

    def __init__(
        self, header: Header, request: Request, limits: tuple[Limit, ...], ask: Ask, hardware: Hardware
    ) -> None:
        self._header = header
        self._hardware = hardware
        self._use = use_of(request, request.slots if request.goal == THROUGHPUT else 1)
        self._request = request
        self._limits = limits
        self._ask = ask
        self._placed_by_user = has_option(request.passthrough, *OVERRIDES)
        self._split_by_user = has_option(request.passthrough, *SPLITS)
        self.may_choose_gpus = not self._split_by_user and not has_option(request.passthrough, *DEVICES)
        self.gpus = in_order(limits, hardware) if self.may_choose_gpus else Gpus(limits, False)
        self._known: dict[tuple[str, ...], Placement] = {}
        self._layers: Layers | None = None

    def as_asked(self, gpu_layers: str | None) -> Placement:
        """With the user's own -ngl, shared among GPUs so that it fits, if it can; or without any GPU."""
        gpus = Gpus(self._limits, False)
        if gpu_layers is None:
            return self.nothing(gpus)
        placement = self._placement(gpus, UNDIVIDED, 0, [])
        layers = placement.answer.offloadable_layers
        on_gpu = min(int(gpu_layers), layers) if gpu_layers.isdigit() else layers
        placement = replace(placement, division=Division("layers", layers, layers), on_gpu=on_gpu)
        if placement.fits or len(self._limits) == 1 or self._split_by_user:
            return placement
        return self._shared(gpus, placement.division, on_gpu, placement)

    def nothing(self, gpus: Gpus) -> Placement:
        """With every layer on the CPU."""
        placement = self._placement(gpus, UNDIVIDED, 0, ["-ngl", "0"])
        layers = placement.answer.offloadable_layers
        return replace(placement, division=Division("layers", layers, layers))

    def everything(self, nothing: Placement) -> Placement | None:
        """All layers on one GPU, or the first few: whichever is predicted faster; None if all of them do not hold it.

        Those that are not needed then hold nothing.
        """
        limits, division = self.gpus.limits, nothing.division
        if self._split_by_user and len(limits) > 1:
            return None
        if not self.may_choose_gpus:
            return self._everything_on(self.gpus, division, nothing)
        here = [limit for limit in limits if not limit.is_remote]
        wanted = [*here, *(limit for limit in limits if limit.is_remote)]
        alone = self._first_that_holds([{limit} for limit in wanted], division, nothing)
        if alone and alone.devices == (wanted[0].device.name,):
            return alone
        several = self._first_that_holds([set(wanted[:n]) for n in range(2, len(limits) + 1)], division, nothing)
        found = [placement for placement in (alone, several) if placement]
        return min(found, key=lambda placement: self._cost(placement).seconds, default=None)

    def _first_that_holds(
        self, choices: Sequence[set[Limit]], division: Division, nothing: Placement
    ) -> Placement | None:
        for chosen in choices:
            everyone = len(chosen) == len(self.gpus.limits)
            gpus = self.gpus if everyone else self.gpus.only(one for one in self.gpus.limits if one in chosen)
            found = self._everything_on(gpus, division, nothing)
            if found:
                return found
        return None

    def _everything_on(self, gpus: Gpus, division: Division, nothing: Placement) -> Placement | None:
        needed = sum(self._model(nothing).sizes(division, division.steps)) + nothing.answer.bytes(use="context")
        if needed > sum(limit.limit_bytes - limit.overhead_bytes for limit in gpus.limits):
            return None
        shared = self._shared(gpus, division, division.steps, nothing)
        if shared.fits:
            return shared
        if len(gpus.limits) == 1 or self._placed_by_user:
            return None
        return self._divided(gpus, division, shared, BUT_ATTENTION, complete=True)

    def _shared(self, gpus: Gpus, division: Division, step: int, like: Placement) -> Placement:
        """That many steps in whole layers, shared among the GPUs so that they fit, if a way is found."""
        for _ in range(MAX_SPLITS if len(gpus.limits) > 1 else 1):
            split = self._room(gpus, division, like).whole(step).split
            if split == like.split:
                break
            like = self._at(gpus, division, Layout(step, split))
            if like.fits:
                break
        return like

    def best(self, nothing: Placement) -> Placement:
        """The one that costs least a token of those that fit; a tiny model may be faster without any GPU."""
        chosen: Placement | None = None
        for division in divisions(self._request.passthrough, nothing.answer):
            if chosen and not (division.name == "feed_forward" and self._cost(chosen).has_much_attention_on_cpu):
                break  # experts' divisions come in the order of their merit
            found = self._filled(division, nothing)
            if found and (chosen is None or self._cost(found).is_clearly_below(self._cost(chosen))):
                chosen = found
        if chosen is None or self._cost(chosen).seconds > self._cost(nothing).seconds:
            return nothing
        return self._without_idle_gpus(chosen)

    def _cost(self, placement: Placement) -> TokenCost:
        return placement.cost(self._header, self._hardware, self._use)

    def _without_idle_gpus(self, placement: Placement) -> Placement:
        """Without GPUs that got no layer, which would hold a context in vain."""
        busy = {name for name, count in zip(placement.devices, placement.split) if count}
        if not busy or len(busy) == len(placement.devices) or not self.may_choose_gpus:
            return placement
        gpus = self.gpus.only(limit for limit in self.gpus.limits if limit.device.name in busy)
        split = tuple(count for count in placement.split if count)
        numbers = {name: number for number, name in enumerate(gpus.names)}
        moved = tuple((piece, numbers[name]) for piece, name in placement.moved)
        alone = self._at(gpus, placement.division, Layout(placement.on_gpu, split, placement.left_behind, moved))
        return alone if alone.fits else placement

    def _filled(self, division: Division, nothing: Placement) -> Placement | None:
        """The cheapest of a division: of whole layers, and with matrices that are elsewhere than their layer."""
        if self._split_by_user and len(self.gpus.limits) > 1:
            return self._bisected(division)
        at_once = self._filled_at_once(division, nothing)
        if at_once:
            return at_once
        best = self._whole(division, nothing)
        if self._placed_by_user or best is None:
            return best
        for kinds in (BUT_ATTENTION, ANY_MATRIX):
            found = self._divided(self.gpus, division, best, kinds)
            if found and self._cost(found).seconds < self._cost(best).seconds:
                best = found
        return best

    def _filled_at_once(self, division: Division, nothing: Placement) -> Placement | None:
        """The fullest on a single GPU, with any matrices elsewhere, where nothing that is worth asking about can be
        better: it takes no more besides its tensors than a model on the CPU does, one more step would not fit even if
        nothing were computed, and what it leaves behind of the last one is next to nothing."""
        if self._placed_by_user or len(self.gpus.limits) > 1:
            return None
        layout = self._room(self.gpus, division, nothing).divided(ANY_MATRIX)
        if layout is None:
            return None
        found = self._at(self.gpus, division, layout)
        if not found.fits or self._besides(self.gpus, found) > self._besides(self.gpus, nothing):
            return None
        now, more = (sum(self._model(found).sizes(division, layout.on_gpu + one)) for one in (0, 1))
        if layout.on_gpu < division.steps and more - now <= self._compute_bytes(found):
            return None
        whole = replace(found, left_behind=())
        return found if self._cost(found).is_about(self._cost(whole)) else None

    def _whole(self, division: Division, nothing: Placement) -> Placement | None:
        """The most steps in whole layers: either one more was asked about, or there cannot be room for it."""
        best = None
        if division.name in ("layers", "attention"):
            best = replace(nothing, division=division)
        like, too_much = nothing, division.steps + 1
        while too_much > (lowest := best.on_gpu if best else -1) + 1:
            room = self._room(self.gpus, division, like)
            step = min(max(room.most(), lowest + 1), too_much - 1)
            packing = room.whole(step)
            if best and packing.overflow_bytes > self._compute_bytes(best):
                break
            if sum(room.sizes(step)) > sum(limit.limit_bytes for limit in self.gpus.limits):
                break  # with no more than tensors and KV cache, which at long context alone may be too much
            like = self._at(self.gpus, division, Layout(step, packing.split))
            again = self._room(self.gpus, division, like).whole(step)
            if not like.fits and again.overflow_bytes <= 0 and again.split != packing.split:
                like = self._at(self.gpus, division, Layout(step, again.split))
            if like.fits:
                best = like
            else:
                too_much = step
        return best

    def _compute_bytes(self, placement: Placement) -> int:
        """By how much a placement's buffers could shrink in one of more layers: more is kept than computed with."""
        return sum(placement.answer.bytes(device=name, use="compute") for name in placement.devices)

    def _divided(
        self, gpus: Gpus, division: Division, like: Placement, kinds: frozenset[str], complete: bool = False
    ) -> Placement | None:
        """The most that fits with matrices elsewhere than their layer.  It lays them out, asks what that takes besides
        its tensors, and lays them out anew; `like` is a placement which takes about as much besides."""
        best: Placement | None = None
        besides = highest = self._besides(gpus, like)
        tried = set()
        for _ in range(MAX_ATTEMPTS):
            layout = self._room(gpus, division, like, besides).divided(kinds)
            if layout in tried and best is None and besides != highest:
                besides = highest
                layout = self._room(gpus, division, like, besides).divided(kinds)
            if (
                layout is None
                or layout in tried
                or (complete and (layout.left_behind or layout.on_gpu < division.steps))
            ):
                break
            tried.add(layout)
            like = self._at(gpus, division, layout)
            besides = self._besides(gpus, like)
            highest = tuple(map(max, highest, besides))
            if like.fits and (best is None or self._gpu_bytes(like) > self._gpu_bytes(best)):
                best = like
        return best

    def _bisected(self, division: Division) -> Placement | None:
        """The most that fits where the user has said how GPUs share the layers."""
        fits, too_much = None, division.steps + 1
        lowest = 0
        while too_much - lowest > 1:
            middle = (lowest + too_much) // 2
            found = self._at(self.gpus, division, Layout(middle, ()))
            if found.fits:
                fits, lowest = found, middle
            else:
                too_much = middle
        return fits

    def _room(self, gpus: Gpus, division: Division, like: Placement, besides: Sequence[float] | None = None) -> Room:
        others = self._besides(gpus, like) if besides is None else besides
        rooms = tuple(max(0.0, limit.limit_bytes - other) for limit, other in zip(gpus.limits, others))
        return Room(self._model(like), division, self._context(like), rooms, gpus.limits[0].is_remote)

    def _besides(self, gpus: Gpus, placement: Placement) -> tuple[float, ...]:
        """What each GPU holds besides the tensors that the arithmetic knows of."""
        layers, division = self._model(placement), placement.division
        known = dict.fromkeys(gpus.names, 0.0)
        sizes = layers.sizes(division, placement.on_gpu)
        context = self._context(placement)[layers.count - len(sizes) :]
        position = 0
        for name, count in zip(placement.devices, placement.split):
            part = slice(position, position + count)
            known[name] = sum(sizes[part]) + sum(context[part])
            position += count
        for piece in placement.left_behind:
            known[self._home(placement, piece)] -= piece.size_bytes
        for piece, name in placement.moved:
            known[self._home(placement, piece)] -= piece.size_bytes
            known[name] += piece.size_bytes
        used = {limit.device.name: placement.used_bytes(limit) for limit in gpus.limits}
        return tuple(used[name] - known[name] for name in gpus.names)

    def _home(self, placement: Placement, piece: Piece) -> str:
        """The GPU that a piece's layer is on."""
        return replace(placement, left_behind=(), moved=()).device_of(piece.name) or ""

    def _gpu_bytes(self, placement: Placement) -> int:
        return sum(
            placement.answer.bytes(device=name, use=use) for name in placement.devices for use in ("weights", "context")
        )

    def _context(self, placement: Placement) -> list[float]:
        """Each layer's part of the KV cache that goes where the layer is, as if all layers had the same."""
        answer, stays = placement.answer, has_option(self._request.passthrough, *CACHE_ON_CPU)
        share = 0.0 if stays else answer.bytes(use="context") / answer.layers
        return [share] * answer.layers + [0.0] * (answer.nextn_layers + 1)

    def _model(self, placement: Placement) -> Layers:
        if self._layers is None:
            layers = placement.answer.offloadable_layers
            self._layers = Layers(self._header, layers, overridden(self._request.passthrough))
        return self._layers

    def _at(self, gpus: Gpus, division: Division, layout: Layout) -> Placement:
        moved = tuple((piece, gpus.names[gpu]) for piece, gpu in layout.moved)
        return self._placement(
            gpus, division, layout.on_gpu, division.arguments(layout.on_gpu), layout.split, layout.left_behind, moved
        )

    def _placement(
        self,
        gpus: Gpus,
        division: Division,
        on_gpu: int,
        where: Sequence[str],
        split: tuple[int, ...] = (),
        left_behind: tuple[Piece, ...] = (),
        moved: tuple[tuple[Piece, str], ...] = (),
    ) -> Placement:
        request = self._request
        rpc = ["--rpc", request.rpc] if request.rpc else []
        arguments = [
            "-m",
            str(self._header.path),
            *rpc,
            "-c",
            str(request.context_tokens),
            *(["-np", str(request.slots)] if request.program == SERVER else []),
            *where,
        ]
        arguments += self._overrides(left_behind, moved)
        if len(split) > 1:
            arguments += ["-ts", ",".join(map(str, split))]
        if gpus.named:
            arguments += ["-dev", ",".join(gpus.names)]
        arguments += ["-fit", "off", *request.chosen, *request.passthrough]
        key = tuple(arguments)
        if key not in self._known:
            answer = self._ask(arguments)
            self._known[key] = Placement(
                division, on_gpu, gpus.names, split, left_behind, moved, key, answer, self._limits
            )
        return self._known[key]

    def _overrides(self, left_behind: Sequence[Piece], moved: Sequence[tuple[Piece, str]]) -> list[str]:
        """Arguments that put these matrices elsewhere."""
        places = [(piece, "CPU") for piece in left_behind]
        places += [(piece, self._buffer_type(name)) for piece, name in moved]
        return ["-ot", ",".join(f"{_pattern(piece.name)}={place}" for piece, place in places)] if places else []

    def _buffer_type(self, device: str) -> str:
        """What llama.cpp calls a GPU's memory: CUDA0 as the GPU itself, but of an RPC device with its address."""
        for placement in self._known.values():
            for buffer in placement.answer.buffers:
                if (buffer.device, buffer.kind) == (device, "device"):
                    return buffer.buffer
        return device


def _pattern(name: str) -> str:
    """What llama.cpp finds in this tensor's name only: "output.weight" also stands in blk.0.attn_output.weight."""
    return ("" if name.startswith("blk.") else "^") + re.escape(name)


def _does_not_fit(placement: Placement, subject: str) -> DoesNotFit:
    limit = max(placement.limits, key=lambda one: placement.used_bytes(one) - one.limit_bytes)
    answer, name = placement.answer, limit.device.name
    parts = ", ".join(
        f"{use} {format_size(answer.bytes(device=name, use=use))}"
        for use in ("weights", "context", "compute", "total")
        if answer.bytes(device=name, use=use)
    )
    overhead = placement.overhead_bytes(limit)
    limited = "" if limit.limit_bytes == limit.budget_bytes else f" (of a budget of {format_size(limit.budget_bytes)})"
    needed = placement.used_bytes(limit)
    return DoesNotFit(
        f"{subject} needs {format_size(needed)} on {name}, and may use {format_size(limit.limit_bytes)}{limited}.",
        why=f"{parts}, overhead {format_size(overhead)} ({limit.overhead_source}).",
        remedy=f"Allow --vram {-(-needed // 2**20)}MiB, or take less with a smaller -c, or a smaller -ub after `--`.",
    )
