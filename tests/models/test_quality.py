"""What is said of a type's quality is what was published."""

from __future__ import annotations

import re
import subprocess

import pytest

from pyllamarun.models.quality import quality, scoreboards
from pyllamarun.models.types import FILE_TYPES
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment

EIGHT, SEVENTY = 8_030_261_248, 70_553_706_496


def test_an_8b_loses_what_llama_quantize_itself_says(binaries: Binaries) -> None:
    argv = [binaries.path("llama-quantize"), "--help"]
    text = subprocess.run(argv, env=environment(binaries), capture_output=True, text=True, check=False).stdout
    published = dict(re.findall(r"or +(\w+) +: +[\d.]+G, \+([\d.]+) ppl @ Llama-3-8B", text))
    assert len(published) == 15
    for type_name, delta in published.items():
        if type_name == "Q2_K_S":
            continue  # its figure is one with an importance matrix, of 1,000 tokens
        found = quality(type_name, EIGHT)
        assert found is not None
        assert found.perplexity_delta == pytest.approx(float(delta), abs=1e-4), type_name
        assert not found.imatrix


def test_the_model_nearest_in_size_is_meant() -> None:
    small, large = quality("Q3_K_M", 3 * 10**9), quality("Q3_K_M", 123 * 10**9)
    assert small is not None
    assert large is not None
    assert (small.model, large.model) == ("Llama 3 8B", "Llama 3 70B")
    assert (small.imatrix, large.imatrix) == (False, True)
    assert large.perplexity_rise == pytest.approx(0.1875, abs=5e-4)  # "18.75%", as published


def test_what_was_not_published_is_not_said() -> None:
    assert quality("TQ2_0", EIGHT) is None
    assert quality("UD-Q4_K_XL", EIGHT) is None
    assert quality("Q4_0", SEVENTY) is None
    assert quality("Q4_K_M", 0) is None


def test_every_figure_is_of_a_type_and_above_the_unquantized_one() -> None:
    for board in scoreboards():
        for type_name, perplexity in [*board.without_imatrix.items(), *board.with_imatrix.items()]:
            assert type_name in FILE_TYPES.values()
            assert perplexity > board.unquantized
