"""Statistics that add up, the scale of losses, and texts in parts."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from pyllamarun.errors import UsageError
from pyllamarun.models.divergence import Difference, Mean, nearest_step, steps, together
from pyllamarun.models.gguf import ARRAY, STRING, Array, Header, Value, read_header
from pyllamarun.models.quality import scoreboards
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.text import MOST_PARTS, Text, read_text
from pyllamarun.models.vocabulary import check_same_vocabulary
from pyllamarun.run.comparison import verdict


def mean_of(values: list[float]) -> Mean:
    """As llama-perplexity gives it."""
    mean = sum(values) / len(values)
    variance = sum(value * value for value in values) / len(values) - mean * mean
    return Mean(mean, math.sqrt(variance / (len(values) - 1)))


def test_the_mean_of_parts_is_the_mean_of_their_tokens() -> None:
    chance = random.Random(6)
    parts = [[chance.gauss(place, 2.0) for _ in range(count)] for place, count in enumerate((255, 510, 2550))]
    added = together([mean_of(part) for part in parts], [len(part) for part in parts])
    whole = mean_of([value for part in parts for value in part])
    assert added.value == pytest.approx(whole.value)
    assert added.error == pytest.approx(whole.error)


def test_a_loss_is_named_after_the_type_that_costs_about_as_much() -> None:
    for step in steps():
        for factor in (0.9, 1.0, 1.1):
            assert nearest_step(step.kl_divergence * factor) == step
    assert nearest_step(-1e-6).type == "F16"
    assert nearest_step(9.0).type == "IQ1_M"
    sizes = [step.kl_divergence for step in steps()]
    assert sizes == sorted(sizes)
    published = scoreboards()[0].without_imatrix
    rises = [published[step.type] for step in steps() if step.type in published]
    assert rises == sorted(rises), "perplexity and KL divergence agree on which type loses more"


def lost(kl_divergence: float, error: float) -> Difference:
    step = nearest_step(kl_divergence)
    return Difference(0.0, 0.0, kl_divergence, error, kl_divergence, 0.0, 0.0, 1.0, step.type, step.loss, False)


def test_only_what_is_next_to_nothing_is_called_chance() -> None:
    assert "predicts the same" in verdict("B", lost(-1e-6, 1e-6))
    assert "predicts the same" in verdict("B", lost(1e-4, 1e-4))
    few_tokens_of_many = lost(0.064, 0.063)
    assert few_tokens_of_many.loss in verdict("B", few_tokens_of_many)


def test_tokens_that_differ_and_cannot_be_read_are_other_tokens(tmp_path: Path) -> None:
    def header(token: bytes) -> Header:
        raw = len(token).to_bytes(8, "little") + token
        metadata = {
            "general.architecture": Value(STRING, "llama"),
            "tokenizer.ggml.tokens": Value(ARRAY, Array(STRING, 1, raw)),
        }
        return read_header(write_sparse(tmp_path / "model.gguf", metadata, []))

    check_same_vocabulary(header(b"\xff"), header(b"\xff"))
    with pytest.raises(UsageError, match="other vocabularies"):
        check_same_vocabulary(header(b"\xff"), header(b"\xfe"))


@pytest.mark.parametrize(("size", "parts"), [(1_000, 1), (70_000, 2), (5_000_000, MOST_PARTS)])
@pytest.mark.parametrize("line", ["A line of prose.\n", "\u65e5\u672c\u8a9e"], ids=["lines", "characters"])
def test_parts_are_the_text_cut_where_nothing_is_torn(size: int, parts: int, line: str) -> None:
    data = (line * (size // len(line.encode()) + 1)).encode()
    cut = Text("some", data).parts(512)
    assert len(cut) == parts
    assert b"".join(cut) == data
    for part in cut:
        part.decode()
    if line.endswith("\n"):
        assert all(part.endswith(b"\n") for part in cut)


def test_longer_chunks_need_longer_parts() -> None:
    text = read_text(None)
    assert [len(text.parts(tokens)) for tokens in (512, 2048, 8192)] == [3, 1, 1]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Some words.", encoding="utf-8-sig")
    assert read_text(path).data == b"Some words."
