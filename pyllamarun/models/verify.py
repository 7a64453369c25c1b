"""Verifies models on this machine: their headers, sizes and parts, and, deeply, their content by its checksum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.download import Progress, sha256_of
from pyllamarun.models.gguf import read_header
from pyllamarun.models.store import Index, named_sha256
from pyllamarun.models.stores import Stored, file_bytes
from pyllamarun.output import printable

# What it comes to: every checksum agrees; header, sizes and parts do, and no more was looked at; the same, and now its
# checksums are recorded, there having been none; and not sound.
MATCHES, SOUND, RECORDED, DAMAGED = "matches", "sound", "recorded", "damaged"


@dataclass(frozen=True)
class Checked:
    """What a model was found to be.

    `sha256` are its parts' checksums as they were computed; () where that was not asked for.  `problem` says what is
    wrong with a damaged one.
    """

    name: str
    store: str
    path: str
    parts: int
    file_bytes: int
    verdict: str
    sha256: tuple[str, ...]
    problem: str


def verify(one: Stored, index: Index, *, deep: bool, progress: Progress = lambda _, __: None) -> Checked:
    """Reads a model's headers, and, if `deep`, all of it; `progress` is told the bytes that were read, of all."""
    sizes = list(map(file_bytes, one.parts))
    sha256: list[str] = []
    verdict, problem = SOUND, one.problem
    if not problem:
        try:
            read_header(one.path)
            if deep:
                verdict = _compare(one, index, sha256, sum(sizes), progress)
        except (ModelError, UsageError) as error:
            problem = " ".join(part for part in (error.what, error.why) if part)
        except OSError as error:
            problem = f"It cannot be read to its end: {error.strerror or error}."
    verdict = DAMAGED if problem else verdict
    return Checked(
        one.name, one.store, str(one.path), len(one.parts), sum(sizes), verdict, tuple(sha256), printable(problem)
    )  # fmt: skip


def _compare(one: Stored, index: Index, sha256: list[str], total_bytes: int, progress: Progress) -> str:
    """Adds the checksum of each part, and holds it against what is known.  Raises ModelError where they differ."""
    verdict, before = MATCHES, 0
    for path in one.parts:
        found = sha256_of(path, partial(_advance, progress, before, total_bytes))
        before += file_bytes(path)
        sha256.append(found)
        expected, says = _expected(path, index)
        if expected and expected != found:
            raise ModelError(
                f"{path} is not what it was.", why=f"Its sha256 is {found}, and {says} {expected}."
            )  # fmt: skip
        if not expected:
            index.keep_file(path, found)
            verdict = RECORDED
    return verdict


def _advance(progress: Progress, before: int, total_bytes: int, done: int, _: int) -> None:
    progress(before + done, total_bytes)


def _expected(path: Path, index: Index) -> tuple[str, str]:
    """The checksum that a file should have, and who says so; "" where nobody does."""
    named = named_sha256(path)
    if named:
        return named, "its store calls it by"
    record = index.file(path)
    return (record.sha256, f"on {record.recorded[:10]} there was recorded") if record else ("", "")
