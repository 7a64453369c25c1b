"""The outcome of a comparison, as `compare --json` prints it, and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyllamarun.models.divergence import Difference, Perplexity
from pyllamarun.output import printable, table
from pyllamarun.planning.speed import Range
from pyllamarun.units import format_size


@dataclass(frozen=True)
class Compared:
    """One of the models.  `generation` is predicted, by a plan of it for llama-server, None where none fits;
    `gpu_layers` and `vram_bytes` are of the plan by which it was measured.

    `running_perplexity` and `running_kl_divergence` are what was measured up to each chunk.  The reference differs
    from nothing.
    """

    name: str
    path: str
    type: str
    file_bytes: int
    bits_per_weight: float
    generation: Range | None
    gpu_layers: int
    vram_bytes: int
    perplexity: Perplexity
    running_perplexity: tuple[float, ...]
    running_kl_divergence: tuple[float, ...] = ()
    difference: Difference | None = None
    verdict: str = ""

    @property
    def short_name(self) -> str:
        """Of a path, the file's name alone."""
        return Path(self.name).name if self.name.endswith(".gguf") else self.name


@dataclass(frozen=True)
class Outcome:
    """`tokens` were predicted, of `chunks` of `chunk_tokens`; `measured_now` is false where all of it was kept."""

    text: str
    text_is_shipped: bool
    text_sha256: str
    chunks: int
    chunk_tokens: int
    tokens: int
    measured_now: bool
    reference: Compared
    others: tuple[Compared, ...]
    limits: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdict(name: str, difference: Difference) -> str:
    """One sentence on what was lost."""
    rise = f"{difference.perplexity_rise:+.1%} ± {difference.perplexity_rise_error:.1%}"
    if difference.is_certain:
        how = "rises" if difference.perplexity_rise > 0 else "falls"
        perplexity = f"the perplexity {how}: {rise}"
    else:
        perplexity = f"the perplexity differs by no more than chance: {rise}"
    # It is never negative, so a few tokens that one model finds very unlikely are no noise, however few they are.
    is_noise = difference.kl_divergence < 2 * difference.kl_divergence_error and difference.like == "F16"
    if difference.kl_divergence <= 0 or is_noise:
        return f"{name} predicts the same: a KL divergence of {_nats(difference.kl_divergence)}; {perplexity}."
    like = "" if difference.like == "F16" else f", about what {difference.like} costs Llama 3 8B"
    return f"{name}: {difference.loss}{like} (KL divergence {_nats(difference.kl_divergence)}); {perplexity}."


def _nats(value: float) -> str:
    return f"{round(value, 5) + 0.0:.5f}"  # without a minus before nothing


def limits_of(text_is_shipped: bool, tokens: int, chunk_tokens: int, reference: Perplexity) -> tuple[str, ...]:
    """What such a text can and cannot show."""
    error = reference.error / reference.value if reference.value else 0.0
    lines = [
        f"Of {tokens:,} predicted tokens, a perplexity is known to ± {error:.1%}, but how two models differ on them "
        "much better: compare the differences, and no perplexity with one of another text.",
        f"Each token was predicted from at most {chunk_tokens:,} before it: longer contexts are not tried.",
    ]
    if text_is_shipped:
        lines.append(
            "The text that ships is English prose of 1817, which models have seen: it shows how much was lost, not how "
            "good a model is, and nothing of code, other languages or chat.  For those give your own --text."
        )
    return tuple(lines)


def describe_comparison(outcome: Outcome) -> str:
    models = (outcome.reference, *outcome.others)
    rows = [
        [
            printable(one.short_name),
            format_size(one.file_bytes),
            f"{one.bits_per_weight:.2f}",
            f"{one.generation.low:.3g} to {one.generation.high:.3g}" if one.generation else "-",
            f"{one.perplexity.value:.3f} ± {one.perplexity.error:.3f}",
            *_difference_cells(one.difference),
        ]
        for one in models
    ]
    header = ["model", "size", "bits/weight", "tok/s", "perplexity", "rise", "KL divergence", "same top"]
    kept = "" if outcome.measured_now else "  All of it was measured before; --again measures anew."
    return "\n".join(
        [
            f"Over {outcome.text}: {outcome.chunks} chunks of {outcome.chunk_tokens} tokens.{kept}",
            "",
            table(rows, header=header, right=range(1, len(header))),
            "tok/s are predicted, by a plan for each.",
            "",
            *(one.verdict for one in outcome.others),
            "",
            *outcome.limits,
        ]
    )


def _difference_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    return [
        f"{difference.perplexity_rise:+.1%} ± {difference.perplexity_rise_error:.1%}",
        f"{_nats(difference.kl_divergence)} ± {_nats(difference.kl_divergence_error)}",
        f"{difference.same_top:.1%}",
    ]
