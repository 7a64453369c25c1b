"""Writes command lines that a person can paste into a shell, and that cannot drive the terminal which shows them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable


def join(words: Iterable[str]) -> str:
    return " ".join(map(quote, words))


def quote(word: str) -> str:
    """As shlex does; bytes that are not printable, as names of files may have them, in the $'...' of bash and zsh."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(map(_escaped, word))}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
