"""What is measured when a model is held against another: perplexities and KL divergence, as statistics that add up.

Each part of a text is measured by itself, in llama.cpp's own numbers: a mean over its tokens with the mean's standard
error.  From both follow the sums that the mean came from, and so the mean over several parts, as llama-perplexity would
have given it for them together (mean_and_uncertainty in tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class ReferencePart:
    """A part of the text as the reference predicts it.

    `surprise` is the mean negative log-likelihood of a token, whose exponential is the perplexity; `running`, the same
    after each chunk.  `tokens` are those that were predicted: of a chunk, the second half.
    """

    chunks: int
    tokens: int
    surprise: Mean
    running: tuple[float, ...]


@dataclass(frozen=True)
class OtherPart:
    """The same part as another model predicts it, token by token beside the reference.

    `rise` is how much larger its surprise is; `shift` and `squared_shift` are of the probability of the text's own
    token; `same_top`, the share of tokens for which both hold the same to be the likeliest.  `running_divergence` and
    `running` are the KL divergence and the surprise after each chunk.
    """

    chunks: int
    tokens: int
    surprise: Mean
    rise: Mean
    divergence: Mean
    most_divergence: float
    shift: Mean
    squared_shift: Mean
    same_top: float
    running: tuple[float, ...]
    running_divergence: tuple[float, ...]


@dataclass(frozen=True)
class Perplexity:
    """Lower is better; the error is that of a text of so many tokens."""

    value: float
    error: float


@dataclass(frozen=True)
class Difference:
    """What a model loses against the reference.

    `perplexity_rise` and its error are shares of the reference's perplexity: 0.05 for 5 percent.  `kl_divergence` is
    the mean over tokens, in nats.  `shift` and `shift_rms` are changes of the probability of the text's own tokens, and
    `same_top` a share of the tokens.  `like` is the type that costs Llama 3 8B about as much, and `loss` says how much
    that is; `is_certain`, whether the perplexity changed by more than twice its error.
    """

    perplexity_rise: float
    perplexity_rise_error: float
    kl_divergence: float
    kl_divergence_error: float
    most_kl_divergence: float
    shift: float
    shift_rms: float
    same_top: float
    like: str
    loss: str
    is_certain: bool


@dataclass(frozen=True)
class Step:
    """A type's published KL divergence from the unquantized model, and what to call a loss like that."""

    type: str
    kl_divergence: float
    loss: str


def together(means: Sequence[Mean], counts: Sequence[int]) -> Mean:
    """The mean over all tokens, of means over so many each."""
    count = sum(counts)
    value = sum(n * mean.value for n, mean in zip(counts, means)) / count
    squares = sum(n * (mean.error**2 * (n - 1) + mean.value**2) for n, mean in zip(counts, means)) / count
    variance = squares - value**2
    return Mean(value, math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else 0.0)


def perplexity(parts: Sequence[ReferencePart] | Sequence[OtherPart]) -> Perplexity:
    mean = together([part.surprise for part in parts], [part.tokens for part in parts])
    value = math.exp(mean.value)
    return Perplexity(value, value * mean.error)


def difference(parts: Sequence[OtherPart]) -> Difference:
    counts = [part.tokens for part in parts]
    rise = together([part.rise for part in parts], counts)
    divergence = together([part.divergence for part in parts], counts)
    step = nearest_step(divergence.value)
    return Difference(
        perplexity_rise=math.expm1(rise.value),
        perplexity_rise_error=math.exp(rise.value) * rise.error,
        kl_divergence=divergence.value,
        kl_divergence_error=divergence.error,
        most_kl_divergence=max(part.most_divergence for part in parts),
        shift=together([part.shift for part in parts], counts).value,
        shift_rms=math.sqrt(together([part.squared_shift for part in parts], counts).value),
        same_top=sum(n * part.same_top for n, part in zip(counts, parts)) / sum(counts),
        like=step.type,
        loss=step.loss,
        is_certain=abs(rise.value) > 2 * rise.error,
    )


def running(parts: Sequence[tuple[Sequence[float], int]]) -> list[float]:
    """Means after each chunk over several parts, of those within each; with the tokens of a part's chunk."""
    means, total, count = [], 0.0, 0
    for within, tokens in parts:
        for number, mean in enumerate(within, 1):
            means.append((total + mean * number * tokens) / (count + number * tokens))
        total += within[-1] * len(within) * tokens
        count += len(within) * tokens
    return means


@functools.cache
def steps() -> tuple[Step, ...]:
    """The scale, from quality.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    with Path(__file__).with_name("quality.toml").open("rb") as file:
        return tuple(Step(**entry) for entry in toml.load(file)["divergence"]["steps"])


def nearest_step(kl_divergence: float) -> Step:
    """By the ratio: so the thresholds are the geometric means of neighbours."""
    size = math.log(max(kl_divergence, 1e-9))
    return min(steps(), key=lambda step: abs(math.log(step.kl_divergence) - size))
