"""Fills GPUs with layers by arithmetic: what the header says that tensors take, and room that the probe has left."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyllamarun.models.gguf import Header
from pyllamarun.planning.spill import EXPERTS, FEED_FORWARD, Division, Piece, cover, size_on_gpu

# Matrices whose products are whole steps between two activations, so that each may be computed elsewhere.
KINDS = {
    "experts": rf"blk\.\d+\.{EXPERTS}\.weight",
    "feed_forward": rf"blk\.\d+\.{FEED_FORWARD}\.weight",
    "shared_experts": r"blk\.\d+\.ffn_(up|down|gate)_shexp\.weight",
    "attention": r"blk\.\d+\.attn_(q|k|v|qkv|output)\.weight",
    "output": r"output\.weight",
}
ANY_MATRIX = frozenset(KINDS)
BUT_ATTENTION = ANY_MATRIX - {"attention"}

MORE_STEPS = 2
MAX_CHOICE = 9  # pieces of which every choice is tried
WORTH_SPLITTING = 1 / 16  # of a layer: less of it on a GPU is not worth the crossings
MAX_ROUNDS = 4


@dataclass(frozen=True)
class Layout:
    """What goes where: steps of a division, how many layers a GPU, and matrices that are not where their layer is.

    `moved` are on a GPU before that of their layer: (piece, number of the GPU).
    """

    on_gpu: int
    split: tuple[int, ...]
    left_behind: tuple[Piece, ...] = ()
    moved: tuple[tuple[Piece, int], ...] = ()


class Layers:
    """A model's layers as bytes on a GPU, the output the last of them; tensors that the user places are left out."""

    def __init__(self, header: Header, count: int, placed_by_user: Callable[[str], bool]) -> None:
        self.count = count
        self._bytes = [0] * count
        self._kind_bytes = {kind: [0] * count for kind in KINDS}
        self._pieces: dict[tuple[int, str], list[Piece]] = {}
        tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
        patterns = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
        for tensor in header.tensors:
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            layer = int(block[1]) if block else count - 1
            if layer >= count or placed_by_user(tensor.name):
                continue
            if tensor.name.startswith("token_embd") and not tied:
                continue  # always on the CPU; where there is no output matrix, a copy of it is one
            size = size_on_gpu(tensor)
            self._bytes[layer] += size
            for kind, pattern in patterns.items():
                if pattern.fullmatch(tensor.name):
                    self._kind_bytes[kind][layer] += size
                    self._pieces.setdefault((layer, kind), []).append(Piece(tensor.name, size))

    def sizes(self, division: Division, on_gpu: int) -> list[int]:
        """Bytes of each layer that is on a GPU, the first one first."""
        first = self.count - division.gpu_layers(on_gpu)
        sizes = self._bytes[first:]
        if division.name == "layers":
            return sizes
        less = self._kind_bytes["feed_forward" if division.name == "feed_forward" else "experts"]
        until = self.count if division.name == "attention" else division.steps - on_gpu
        return [size - less[layer] if layer < until else size for layer, size in enumerate(sizes, first)]

    def pieces(self, layer: int, kinds: frozenset[str]) -> list[Piece]:
        """The matrices of a layer that may be elsewhere."""
        return [piece for kind in KINDS if kind in kinds for piece in self._pieces.get((layer, kind), [])]

    def spillable(self, division: Division, step: int, kinds: frozenset[str]) -> list[Piece]:
        """What can stay on the CPU, with `step` steps on the GPU: of the last one; of experts and feed-forward
        matrices, which are few and large, also of those before it."""
        layer = division.layer_of_step(step)
        if division.name in ("experts", "feed_forward"):
            of_kind = frozenset({division.name})
            return [p for k in range(min(step, MORE_STEPS + 1)) for p in self.pieces(layer + k, of_kind)]
        return self.pieces(layer, kinds - {"output"} - ({"experts"} if division.name == "attention" else set()))


@dataclass(frozen=True)
class Packing:
    """Layers a GPU; `overflow_bytes` is how much too much the first GPU then has."""

    split: tuple[int, ...]
    moved: tuple[tuple[Piece, int], ...]
    overflow_bytes: float


def pack(
    sizes: Sequence[float], rooms: Sequence[float], pieces: Callable[[int], Sequence[Piece]] | None = None
) -> Packing:
    """Fills the last GPU with the last layers, then the one before it; the first takes all that are left.

    `pieces(i)` are the matrices of a layer that may be elsewhere: then a layer at a boundary is divided, between a GPU
    and the nearest before it that has the room.
    """
    room = list(rooms)
    split = [0] * len(room)
    moved: list[tuple[Piece, int]] = []
    left = len(sizes)
    for gpu in range(len(room) - 1, 0, -1):
        while left and sizes[left - 1] <= room[gpu]:
            left -= 1
            room[gpu] -= sizes[left]
            split[gpu] += 1
        if not left or pieces is None:
            continue
        layers, parts = _over_the_boundary(sizes[:left], room[gpu], max(room[:gpu]), pieces)
        elsewhere = sum(piece.size_bytes for piece in parts)
        to = max(other for other in range(gpu) if room[other] >= min(elsewhere, max(room[:gpu])))
        left -= layers
        split[gpu] += layers
        room[to] -= elsewhere
        moved += [(piece, to) for piece in parts]
    split[0] = left
    return Packing(tuple(split), tuple(moved), sum(sizes[:left]) - room[0])


def _over_the_boundary(
    sizes: Sequence[float], room: float, room_before: float, pieces: Callable[[int], Sequence[Piece]]
) -> tuple[int, tuple[Piece, ...]]:
    """How many of the last layers a GPU takes more than it has room for, without some of their matrices, and these:
    one layer, or two where they have so few matrices that one's fill the room badly."""
    best: tuple[int, tuple[Piece, ...]] = (0, ())
    most = WORTH_SPLITTING * sizes[-1]
    movable: list[Piece] = []
    for count in range(1, min(2, len(sizes)) + 1):
        movable += pieces(len(sizes) - count)
        size = sum(sizes[-count:])
        if count > 1 and len(movable) > MAX_CHOICE:
            break
        parts = cover(movable, size - room) or ()
        elsewhere = sum(piece.size_bytes for piece in parts)
        if parts and size - elsewhere > most and elsewhere <= room_before:
            best, most = (count, parts), size - elsewhere + WORTH_SPLITTING * sizes[-1]
    return best


def spread(sizes: Sequence[float], rooms: Sequence[float]) -> Packing:
    """Fills the first GPU with the first layers, then the next; the last takes all that are left."""
    backwards = pack(sizes[::-1], rooms[::-1])
    return Packing(backwards.split[::-1], (), backwards.overflow_bytes)


@dataclass(frozen=True)
class Room:
    """What the tensors of a division may take on each GPU, and each layer's share of the KV cache, in bytes.

    With all of a model on GPUs the first is filled first, unless it is another machine's.
    """

    layers: Layers
    division: Division
    context: Sequence[float]
    rooms: tuple[float, ...]
    first_is_remote: bool = False

    def sizes(self, step: int) -> list[float]:
        sizes = self.layers.sizes(self.division, step)
        return [size + kv for size, kv in zip(sizes, self.context[self.layers.count - len(sizes) :])]

    def whole(self, step: int) -> Packing:
        """That many steps in whole layers; if there is no room for them, something overflows."""
        if step == self.division.steps and not self.first_is_remote:
            everything = spread(self.sizes(step), self.rooms)
            if everything.overflow_bytes <= 0:
                return everything
        return pack(self.sizes(step), self.rooms)

    def most(self) -> int:
        """The most steps in whole layers; -1 if there is no room for the first."""
        fits, too_much = -1, self.division.steps + 1
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            if self.whole(middle).overflow_bytes <= 0:
                fits = middle
            else:
                too_much = middle
        return fits

    def divided(self, kinds: frozenset[str]) -> Layout | None:
        """The fullest, with matrices of these kinds elsewhere than their layer; None if nothing is fuller than whole
        layers are."""
        fits = self.most()
        best, most_bytes = None, sum(self.sizes(fits)) if fits >= 0 else 0.0
        highest = fits + len(self.rooms) + (self.division.name in ("experts", "feed_forward"))
        for step in range(max(fits, 0) + 1, min(self.division.steps, highest) + 1):
            found = _divided(self, step, kinds)
            if found:
                placed_bytes = sum(self.sizes(step)) - sum(piece.size_bytes for piece in found.left_behind)
                if placed_bytes > most_bytes:
                    best, most_bytes = found, placed_bytes
        return best


def _divided(room: Room, step: int, kinds: frozenset[str]) -> Layout | None:
    """With so many steps on the GPUs, but for matrices that stay behind because of the room they would take."""
    layers, division, sizes = room.layers, room.division, room.sizes(step)
    first = layers.count - len(sizes)
    spillable = layers.spillable(division, step, kinds)
    excess = sum(sizes) - sum(room.rooms)
    for _ in range(MAX_ROUNDS):
        left_behind = cover(spillable, excess) if excess > 0 else ()
        if left_behind is None or (left_behind and len(left_behind) == len(spillable)):
            return None
        gone = set(left_behind)

        def movable(i: int, gone: set[Piece] = gone) -> list[Piece]:
            of_layer = layers.pieces(first + i, kinds)
            return [piece for piece in of_layer if piece not in gone and division.holds(piece.name, step)]

        less = [sum(piece.size_bytes for piece in gone if piece.layer == f"blk.{first + i}") for i in range(len(sizes))]
        there = [size - out for size, out in zip(sizes, less)]
        packing = pack(there, room.rooms, movable if len(room.rooms) > 1 else None)
        if packing.overflow_bytes <= 0:
            return Layout(step, packing.split, left_behind, packing.moved)
        excess = sum(piece.size_bytes for piece in left_behind) + packing.overflow_bytes
    return None
