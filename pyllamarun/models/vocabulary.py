"""Tells whether two models divide a text into the same tokens: only then their predictions can be compared."""

from __future__ import annotations

from pyllamarun.errors import UsageError
from pyllamarun.models.gguf import Array, Header

TOKENS, TOKENIZER = "tokenizer.ggml.tokens", "tokenizer.ggml.model"


def check_same_vocabulary(reference: Header, other: Header) -> None:
    """Raises UsageError where the two have other tokens, or one says none.

    How a text is divided before it is looked up may differ (tokenizer.ggml.pre): the reference's tokens are what both
    are asked about.
    """
    tokens, others = _tokens(reference), _tokens(other)
    names = f"{reference.path.name} and {other.path.name}"
    if tokens.count != others.count:
        raise _differ(names, f"One has {tokens.count:,} tokens, the other {others.count:,}.")
    kinds = [header.get(TOKENIZER) for header in (reference, other)]
    if kinds[0] != kinds[1]:
        raise _differ(names, f"One has a tokenizer of kind {kinds[0]}, the other {kinds[1]}.")
    if tokens.raw != others.raw:
        pairs = zip(tokens.values(), others.values())
        for number, (one, two) in enumerate(pairs):
            if one != two:
                raise _differ(names, f'Token {number} is "{one}" in one, and "{two}" in the other.')
        raise _differ(names, "Tokens that are not UTF-8 differ.")


def _tokens(header: Header) -> Array:
    tokens = header.get(TOKENS)
    if not isinstance(tokens, Array) or not tokens.count:
        raise UsageError(
            f"{header.path.name} has no vocabulary.",
            why="It says no tokens (tokenizer.ggml.tokens), so no text can be read with it.",
            remedy="Name a whole model.",
        )
    return tokens


def _differ(names: str, why: str) -> UsageError:
    return UsageError(
        f"{names} have other vocabularies, so their predictions cannot be compared.",
        why=why,
        remedy="Compare a model with a requantization of itself, or of the same family.",
    )
