"""The table of cards, and what a person may call them."""

from __future__ import annotations

import pytest

from pyllamarun.errors import UsageError
from pyllamarun.machine.cards import Card, all_cards, find_card, identify
from pyllamarun.run.binaries import Build
from pyllamarun.units import GIB, KIB, MIB

# CUDA C++ Programming Guide, the most shared memory of a block by compute capability, in KiB.
SHARED_KIB = {"6.0": 48, "6.1": 48, "7.0": 96, "7.5": 64, "8.0": 163, "8.6": 99, "8.9": 99, "9.0": 227, "12.0": 99}


@pytest.mark.parametrize("card", all_cards(), ids=lambda card: card.title)
def test_every_card_is_plausible(card: Card) -> None:
    assert card.memory_bytes >= 5.9 * GIB
    assert 0 < card.reserved_bytes < 0.1 * card.memory_bytes
    assert card.shared_memory_bytes == SHARED_KIB[card.compute_capability] * KIB
    # Double data rate: what NVML's clock and width make is what NVIDIA specifies.
    made = 2 * card.memory_mhz * 10**6 * card.bus_bits // 8
    assert made == pytest.approx(card.bandwidth_bytes_per_second, rel=0.02)
    assert card.pcie_generation in (3, 4, 5)
    assert card.pcie_lanes in (4, 8, 16)
    assert find_card(card.title) == card


def test_no_two_cards_share_a_title() -> None:
    titles = [card.title for card in all_cards()]
    assert len(titles) == len(set(titles))
    assert len(titles) > 100


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "RTX 3060": "NVIDIA GeForce RTX 3060 12GB",
        "rtx3060": "NVIDIA GeForce RTX 3060 12GB",
        "3060 8 GB": "NVIDIA GeForce RTX 3060 8GB",
        "RTX 3060 Ti": "NVIDIA GeForce RTX 3060 Ti",
        "rtx 3060 laptop": "NVIDIA GeForce RTX 3060 Laptop GPU",
        "NVIDIA GeForce RTX 4090": "NVIDIA GeForce RTX 4090",
        "A100 80GB": "NVIDIA A100 80GB PCIe",
        "T4": "Tesla T4",
        "RTX 4070 Ti Super": "NVIDIA GeForce RTX 4070 Ti SUPER",
    }.items(),
)
def test_a_card_is_found_by_what_people_call_it(typed: str, meant: str) -> None:
    assert find_card(typed).title == meant


@pytest.mark.parametrize("typed", ["RTX 3061", "", "nvidia", "geforce gpu", "12GiB", "\x1b[31m"])
def test_what_is_no_card_is_refused_with_the_nearest(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(typed)
    assert "--virtual-gpu" in caught.value.remedy
    if typed == "RTX 3061":
        assert "RTX 3060" in caught.value.why


def test_a_driver_s_name_tells_variants_apart_by_size() -> None:
    for size, variant in ((12037, "12GB"), (7900, "8GB")):
        card = identify("NVIDIA GeForce RTX 3060", size * MIB)
        assert card
        assert card.variant == variant
    assert identify("NVIDIA Experimental", GIB) is None


@pytest.mark.parametrize(
    ("architectures", "capability", "compiled"),
    [
        ("86", "8.6", "8.6"), ("86", "8.9", "8.6"), ("86-real", "7.5", "0"), ("", "7.5", "7.5"),
        ("75-virtual;80-virtual;86-real;89-real;120a-real", "12.0", "12.0"), ("75-virtual;86-real", "8.0", "7.5"),
    ],
)  # fmt: skip
def test_what_a_build_is_compiled_for(architectures: str, capability: str, compiled: str) -> None:
    assert Build("b1", "0", "cuda", {"cuda_architectures": architectures}).compiled_for(capability) == compiled
