"""Machines that are described: by words, by a file, and what is wrong with either."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllamarun.errors import UsageError
from pyllamarun.machine.cards import all_cards, find_card
from pyllamarun.machine.machine import HERE, Machine
from pyllamarun.units import GIB, parse_bandwidth


def test_a_machine_in_words() -> None:
    machine = Machine.of(gpus="3060, 8GiB", ram="64GiB", ram_bandwidth="51.2GB/s", cores=8)
    assert machine.gpus == (find_card("RTX 3060"), 8 * GIB)
    assert (machine.ram_bytes, machine.ram_bandwidth_bytes_per_second, machine.cores) == (64 * GIB, 51_200_000_000, 8)
    assert not machine.is_here


def test_a_machine_is_what_its_words_say() -> None:
    described = [
        HERE,
        Machine.of(gpus="none"),
        Machine.of(gpus="RTX 3060,7.5GiB", ram="64GiB", ram_bandwidth="51.2GB/s"),
    ]
    described += [Machine(gpus=(card,), cores=3, name="x") for card in all_cards()]
    assert [Machine.of(**machine.to_words()) for machine in described] == described


def test_this_machine_has_its_own_gpus_and_a_described_one_may_have_none() -> None:
    assert HERE.is_here
    assert HERE.gpus is None
    assert Machine.of(gpus="none").gpus == ()


def test_a_machine_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_text('gpus = ["RTX 3060"]\nram = "64GiB"\nram_bandwidth = "51.2 GB/s"\ncores = 8\n')
    assert Machine.read(file) == Machine.of(
        gpus="RTX 3060", ram="64GiB", ram_bandwidth="51.2GB/s", cores=8, name="desk"
    )


@pytest.mark.parametrize(
    "text",
    ['gpu = "RTX 3060"', "gpus = 3060", "cores = true", "cores = 0", 'ram = "much"', 'gpus = ["no such card"]', "ram =",
     'ram_bandwidth = "fast"', 'gpus = ["1KiB"]', "\udcff"],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(text: str, tmp_path: Path) -> None:
    file = tmp_path / "desk.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError):
        Machine.read(file)


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            Machine.read(path)


def test_a_file_without_end_is_left() -> None:
    with pytest.raises(UsageError, match="is no TOML file"):
        Machine.read("/dev/zero")


def test_bandwidths() -> None:
    assert [parse_bandwidth(text) for text in ("51.2GB/s", "48 GiB/s", "100GBps")] == [51_200_000_000, 48 * GIB, 10**11]
    for text in ("51.2", "51.2GB", "GB/s", "0GB/s", "-1GB/s", ""):
        with pytest.raises(UsageError, match="no bandwidth"):
            parse_bandwidth(text)
