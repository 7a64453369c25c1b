"""Known NVIDIA cards, from cards.toml: for plans and rehearsals of a card that is not here."""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamarun.errors import UsageError
from pyllamarun.units import GIB, KIB, MIB

# What a driver keeps of a card for which the table does not say; of an RTX 3060 it keeps 3.1 percent.
ASSUMED_RESERVED_SHARE = 0.035

# Words of a card's name that need not be typed.
_BRANDS = {"nvidia", "geforce", "quadro", "tesla", "gpu", "generation"}


@dataclass(frozen=True)
class Card:
    """One model of card.

    `memory_bytes` is the total that NVML shows; `reserved_bytes` of it the driver keeps for itself.
    `shared_memory_bytes` is what a block may ask for.  `variant` tells cards of one name apart, "8GB".
    """

    name: str
    variant: str
    memory_bytes: int
    reserved_bytes: int
    compute_capability: str
    multiprocessors: int
    shared_memory_bytes: int
    bus_bits: int
    memory_mhz: int
    bandwidth_bytes_per_second: int
    pcie_generation: int
    pcie_lanes: int

    @property
    def title(self) -> str:
        """The name, with the variant where there are several."""
        return f"{self.name} {self.variant}".strip()

    @property
    def short_name(self) -> str:
        return re.sub(r"^NVIDIA |GeForce ", "", self.title)


@functools.cache
def all_cards() -> tuple[Card, ...]:
    """The whole table, in its order."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with Path(__file__).with_name("cards.toml").open("rb") as file:
        return tuple(_card(entry) for entry in toml.load(file)["card"])


def _card(entry: dict[str, Any]) -> Card:
    memory_mib = entry["memory_mib"]
    usable_mib = entry.get("usable_mib", int(memory_mib * (1 - ASSUMED_RESERVED_SHARE)))
    return Card(
        name=entry["name"],
        variant=entry.get("variant", ""),
        memory_bytes=memory_mib * MIB,
        reserved_bytes=(memory_mib - usable_mib) * MIB,
        compute_capability=entry["compute_capability"],
        multiprocessors=entry["multiprocessors"],
        shared_memory_bytes=entry["shared_memory_kib"] * KIB,
        bus_bits=entry["bus_bits"],
        memory_mhz=entry["memory_mhz"],
        bandwidth_bytes_per_second=round(entry["bandwidth_gbs"] * 10**9),
        pcie_generation=entry["pcie_generation"],
        pcie_lanes=entry["pcie_lanes"],
    )


def _words(text: str) -> frozenset[str]:
    """ "RTX3060 12 GB" -> {rtx, 3060, 12gb}: letters and digits apart but for units and names such as A100."""
    text = re.sub(r"(\d+)\s*gi?b\b", r"\1gb", text.lower())
    text = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super|laptop)\b", r" \1", text)
    return frozenset(re.split(r"[\s_,/-]+", text.strip())) - {""}


def find_card(text: str) -> Card:
    """The card that a person means: "RTX 3060", "rtx3060 8gb", "A100 80GB"; the plainest and first that has all words.

    Raises UsageError, with the nearest names, when there is none.
    """
    wanted = _words(text) - _BRANDS
    if any(not word.endswith("gb") for word in wanted):  # a size alone names no card
        matches = [card for card in all_cards() if wanted <= _words(card.title) | {_gigabytes(card)}]
    else:
        matches = []
    if matches:
        return min(matches, key=lambda card: len(_words(card.name) - _BRANDS))
    names = {card.short_name.lower(): card.short_name for card in all_cards()}
    nearest = [names[name] for name in difflib.get_close_matches(text.lower(), names, n=4, cutoff=0.3)]
    raise UsageError(
        f'No card is known as "{text}".',
        why=f"Near it: {', '.join(nearest)}." if nearest else "",
        remedy="Name another, or give its memory: --virtual-gpu 12GiB.",
    )


def _gigabytes(card: Card) -> str:
    return f"{round(card.memory_bytes / GIB)}gb"


def identify(name: str, total_bytes: int) -> Card | None:
    """The card that a driver calls so, of several variants the one nearest in size; None if the table lacks it."""
    same = [card for card in all_cards() if card.name == name]
    return min(same, key=lambda card: abs(card.memory_bytes - total_bytes), default=None)
