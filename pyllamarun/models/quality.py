"""What a quantization costs in quality, as far as somebody published it: perplexities from quality.toml."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scoreboard:
    """Perplexities of one model on one text, by type; `unquantized` is what its differences are from."""

    model: str
    parameters: int
    source: str
    url: str
    unquantized: float
    without_imatrix: Mapping[str, float]
    with_imatrix: Mapping[str, float]


@dataclass(frozen=True)
class Quality:
    """By how much perplexity rises where the unquantized `model` is quantized to `type`.

    `perplexity_rise` is a share of that of the unquantized model, 0.05 for 5 percent.  `imatrix`: whether it was
    quantized with an importance matrix, without which it would be worse.
    """

    type: str
    model: str
    perplexity: float
    perplexity_delta: float
    perplexity_rise: float
    imatrix: bool
    source: str
    url: str


@functools.cache
def scoreboards() -> tuple[Scoreboard, ...]:
    """The whole table."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with Path(__file__).with_name("quality.toml").open("rb") as file:
        return tuple(Scoreboard(**entry) for entry in toml.load(file)["scoreboard"])


def quality(type_name: str, parameters: int) -> Quality | None:
    """What was published for this type with the model nearest in size; None if nothing was.

    Larger models lose less by the same type.  Without an importance matrix, where both were measured, since that is how
    a model is requantized here.
    """
    if parameters <= 0:
        return None
    nearest = min(scoreboards(), key=lambda board: abs(math.log(board.parameters / parameters)))
    for imatrix, figures in ((False, nearest.without_imatrix), (True, nearest.with_imatrix)):
        if type_name in figures:
            delta = figures[type_name] - nearest.unquantized
            return Quality(
                type=type_name,
                model=nearest.model,
                perplexity=figures[type_name],
                perplexity_delta=round(delta, 6),
                perplexity_rise=round(delta / nearest.unquantized, 6),
                imatrix=imatrix,
                source=nearest.source,
                url=nearest.url,
            )
    return None
