"""Looks into the models that stores hold: what each is, or what is wrong with it, from its header alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.gguf import read_header
from pyllamarun.models.names import quantization
from pyllamarun.models.store import Index
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
    """Entries that were made before, from the index: a header is read again only when its file has changed.

    A vocabulary takes a tenth of a second to step over, and some people keep hundreds of models.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._known = index.headers()
        self._asked: set[str] = set()
        self._made: list[tuple[str, str, str]] = []

    def entries(self, stored: Iterable[Stored]) -> Iterator[Entry]:
        for one in stored:
            yield self._entry(one)

    def _entry(self, one: Stored) -> Entry:
        path, stamp = str(one.path), json.dumps([_stamp(part) for part in one.parts])
        self._asked.add(path)
        try:
            known_stamp, known = self._known[path]
            entry = Entry(**json.loads(known))
            if known_stamp != stamp or (entry.store, entry.name, entry.parts) != (one.store, one.name, len(one.parts)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            entry = read_entry(one)
            if not one.problem:
                self._made.append((path, stamp, json.dumps(asdict(entry))))
        return entry

    def save(self) -> None:
        """Keeps the entries that were made, and drops those that were not asked for."""
        self._index.keep_headers(self._made, self._known.keys() - self._asked)


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
