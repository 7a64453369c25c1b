"""Keeps what comparisons have measured, in the state folder: by model, text and build, each part of a text in a file.

A model is known by its tensors, and by the sizes and times of its files: under another name it is still the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyllamarun import paths
from pyllamarun.errors import UsageError
from pyllamarun.models.divergence import Difference, OtherPart, Perplexity, ReferencePart
from pyllamarun.models.gguf import Header
from pyllamarun.models.skeleton import fingerprint

FINISHED = "finished.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A comparison that was finished: how `type` differed from `reference_type`, over a text of so many tokens."""

    reference: str
    reference_type: str
    other: str
    type: str
    text: str
    tokens: int
    perplexity: Perplexity
    difference: Difference


def identity(header: Header) -> str:
    """Tells a model's content from others' without reading it."""
    stamps = [[status.st_size, status.st_mtime_ns] for status in (part.stat() for part in header.parts)]
    return _digest(fingerprint(header), stamps)


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "replace")).hexdigest()[:32]


class Shelf:
    """What was measured with one reference on one text: a folder, held by one process at a time.

    `facts` are whatever else a measurement depends on: the build, the chunks, llama.cpp's arguments.
    """

    def __init__(self, reference: Header, text_digest: str, facts: Sequence[Any]) -> None:
        self.folder = comparisons_folder() / _digest(identity(reference), text_digest, list(facts))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises UsageError where another process measures the same, or the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / "lock").open("w")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written.", why=error.strerror or str(error)) from None
        with lock:
            if not _lock(lock.fileno()):
                raise UsageError("This is being compared by another process.", remedy="Wait until that is done.")
            _remove_left_logits(self.folder.parent, self.folder)
            try:
                yield
            finally:
                self.remove_logits()

    def logits(self, part: int) -> Path:
        """Where llama-perplexity puts the reference's predictions of a part: some gigabytes, for a moment."""
        return self.folder / f"{part:02d}.logits"

    def text(self, part: int) -> Path:
        return self.folder / f"{part:02d}.txt"

    def remove_logits(self) -> None:
        for path in [*self.folder.glob("*.logits"), *self.folder.glob("*.txt")]:
            path.unlink(missing_ok=True)

    def forget(self, others: Sequence[Header]) -> None:
        """What was measured of the reference and of these."""
        for stem in ("reference", *map(identity, others)):
            for path in self.folder.glob(f"{stem}-*.json"):
                path.unlink(missing_ok=True)

    def reference_part(self, part: int) -> ReferencePart | None:
        data = _read(self.folder / f"reference-{part:02d}.json")
        return _loaded(ReferencePart, data) if data else None

    def forget_reference_part(self, part: int) -> None:
        (self.folder / f"reference-{part:02d}.json").unlink(missing_ok=True)

    def keep_reference_part(self, part: int, measured: ReferencePart) -> None:
        _write(self.folder / f"reference-{part:02d}.json", asdict(measured))

    def other_part(self, other: Header, part: int) -> OtherPart | None:
        data = _read(self.folder / f"{identity(other)}-{part:02d}.json")
        return _loaded(OtherPart, data) if data else None

    def keep_other_part(self, other: Header, part: int, measured: OtherPart) -> None:
        _write(self.folder / f"{identity(other)}-{part:02d}.json", asdict(measured))

    def finish(self, reference: Header, other: Header, kept: Kept) -> None:
        """Keeps the outcome where `kept_for` finds it."""
        facts = {"reference": identity(reference), "other": identity(other), "kept": asdict(kept)}
        _write(self.folder / f"{identity(other)}-{FINISHED}", facts)


def comparisons_folder() -> Path:
    return paths.state_folder() / "comparisons"


def kept_for(reference: Header, type_name: str) -> Kept | None:
    """What the newest finished comparison of a model with a requantization of it to that type has shown, if any."""
    wanted, folder = identity(reference), comparisons_folder()
    try:
        files = sorted(folder.glob(f"*/*-{FINISHED}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except OSError:
        return None
    for path in files:
        facts = _read(path) or {}
        kept = _loaded(Kept, facts.get("kept", {})) if facts.get("reference") == wanted else None
        if kept and kept.type == type_name:
            return kept
    return None


def _loaded(kind: type[T], data: dict[str, Any]) -> T | None:
    """A dataclass from what was kept of it; None where that is not one."""
    import dacite

    config = dacite.Config(cast=[tuple])
    try:
        return dacite.from_dict(kind, data, config)
    except (dacite.DaciteError, TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write(path: Path, data: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(data), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written.", why=error.strerror or str(error)) from None
    finally:
        partial.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_logits(folder: Path, but: Path) -> None:
    """Of comparisons whose process was killed."""
    for path in [*folder.glob("*/*.logits"), *folder.glob("*/*.txt")]:
        if path.parent != but:
            with suppress(OSError), (path.parent / "lock").open("w") as lock:  # another user's, or gone by now
                if _lock(lock.fileno()):
                    path.unlink(missing_ok=True)
