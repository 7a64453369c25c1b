"""Sizes, budgets and fixed values, as tables."""

from __future__ import annotations

import pytest

from pyllamarun.errors import UsageError
from pyllamarun.planning.request import Budget, fixed_value, parse_budgets, without_option
from pyllamarun.units import GIB, MIB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("11.5GiB", 12_348_030_976),
        ("11.5G", 12_348_030_976),
        ("12GB", 12_000_000_000),
        ("11500MiB", 11500 * MIB),
        ("8g", 8 * GIB),
        (" 1.5 TiB ", 3 << 39),
        ("0", 0),
        ("4096", 4096),
        (".5kb", 500),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "1X", "1 2", "1e9", "0x10", "11,5GiB", "inf", "nan", "١GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "2 KiB"), (5 * MIB, "5.0 MiB"), (3 * GIB, "3.00 GiB")]
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("text", "bytes_of_12_gib_with_10_free"),
    [
        ("11.5GiB", int(11.5 * GIB)),
        ("50%", 6 * GIB),
        ("100%", 12 * GIB),
        ("max", 10 * GIB),
        ("MAX-300MiB", 10 * GIB - 300 * MIB),
        ("max-11GiB", 0),
    ],
)
def test_budgets(text: str, bytes_of_12_gib_with_10_free: int) -> None:
    (budget,) = parse_budgets(text)
    assert budget.resolve(12 * GIB, 10 * GIB) == bytes_of_12_gib_with_10_free


def test_a_budget_for_each_gpu() -> None:
    assert parse_budgets("8GiB, max") == (Budget("bytes", 8 * GIB), Budget("max", 0))


@pytest.mark.parametrize("text", ["0%", "101%", "half", "max+1G", "8GiB,", ""])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError):
        parse_budgets(text)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], None),
        (["-ngl", "20"], "20"),
        (["--gpu-layers=7"], "7"),
        (["-ngl", "1", "-ngl", "2"], "2"),
        (["-c", "4096", "-ngl"], None),
    ],
)
def test_fixed_values(arguments: list[str], value: str | None) -> None:
    assert fixed_value(arguments, "-ngl", "--gpu-layers") == value


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], []),
        (["-fit", "off", "-cram", "0"], ["-fit", "off"]),
        (["-cram=-1", "-fit", "off"], ["-fit", "off"]),
        (["--cache-ram", "1", "-a", "-cram"], ["-a"]),
    ],
)
def test_options_that_are_left_out(arguments: list[str], kept: list[str]) -> None:
    assert without_option(arguments, "-cram", "--cache-ram") == kept
