"""Looks into the models that stores hold: what each is, or what is wrong with it, from its header alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyllamarun import __version__
from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.gguf import read_header
from pyllamarun.models.names import quantization
from pyllamarun.models.stores import Stored
from pyllamarun.output import printable


@dataclass(frozen=True)
class Entry:
    """A model on this machine.

    `file_bytes` is the size of all its parts.  `problem` says why it cannot be used; "" where it can.  A damaged one
    has no architecture, and its type is what its name says.
    """

    name: str
    store: str
    path: str
    parts: int
    file_bytes: int
    file_type: str
    architecture: str
    trained_context_tokens: int
    problem: str


class Catalog:
    """Entries that were made before, in one file: a header is read again only when its file has changed.

    A vocabulary takes a tenth of a second to step over, and some people keep hundreds of models.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = self._load()
        self._made: dict[str, Any] = {}

    def _load(self) -> dict[str, Any]:
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
            return dict(data["entries"]) if data["version"] == __version__ else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def entries(self, stored: Iterable[Stored]) -> Iterator[Entry]:
        for one in stored:
            yield self._entry(one)

    def _entry(self, one: Stored) -> Entry:
        stamp = [_stamp(part) for part in one.parts]
        try:
            known = self._known[str(one.path)]
            entry = Entry(**known["entry"])
            if known["stamp"] != stamp or (entry.store, entry.name, entry.parts) != (one.store, one.name, len(stamp)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            entry = read_entry(one)
        if not one.problem:
            self._made[str(one.path)] = {"stamp": stamp, "entry": asdict(entry)}
        return entry

    def save(self) -> None:
        """Keeps the entries that were asked for, if the file can be written."""
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"version": __version__, "entries": self._made}), encoding="utf-8")
            partial.replace(self._file)
        except (OSError, ValueError):
            pass


def _stamp(path: Path) -> list[int]:
    """What changes with a file's content: its inode, size and time."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def read_entry(one: Stored) -> Entry:
    """What a model in a store is; a damaged one says what is wrong with it."""
    file_type, architecture, context, problem = quantization(one.name), "", 0, one.problem
    if not problem:
        try:
            header = read_header(one.path)
            file_type = header.file_type or file_type
            architecture, context = printable(header.architecture), header.trained_context_tokens
        except (ModelError, UsageError) as error:
            problem = " ".join(part for part in (error.what, error.why) if part)
    return Entry(
        name=one.name,
        store=one.store,
        path=str(one.path),
        parts=len(one.parts),
        file_bytes=sum(stamp[1] for part in one.parts if (stamp := _stamp(part))),
        file_type=file_type,
        architecture=architecture,
        trained_context_tokens=context,
        problem=printable(problem),
    )
