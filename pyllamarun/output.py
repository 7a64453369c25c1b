"""Prints.  The only module that writes results to stdout and messages to stderr."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyllamarun import __version__
from pyllamarun.errors import PyllamarunError

SCHEMA = 1
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # but for tabs and line breaks


@dataclass(frozen=True)
class Screen:
    """Where a result is shown: how wide it is, and whether it can show the block characters of Unicode."""

    columns: int = 80
    shows_blocks: bool = False


PLAIN_SCREEN = Screen()


def screen() -> Screen:
    """The terminal, or what stands in for it: 80 columns, or what COLUMNS says."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return Screen(shutil.get_terminal_size().columns, encoding in ("utf8", "utf16", "utf32"))


def printable(text: str) -> str:
    """`text` without control characters: names from a file must not drive the terminal."""
    return "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def envelope(kind: str, data: Any) -> dict[str, Any]:
    """The one shape of everything that --json prints."""
    return {"pyllamarun": __version__, "kind": kind, "schema": SCHEMA, "ok": True, "data": data, "error": None}


def error_envelope(kind: str, error: PyllamarunError) -> dict[str, Any]:
    fields = {"code": error.code, "exit_code": error.exit_code}
    fields |= {"what": error.what, "why": error.why, "remedy": error.remedy}
    return {"pyllamarun": __version__, "kind": kind, "schema": SCHEMA, "ok": False, "data": None, "error": fields}


def print_json(data: Any) -> None:
    """In ASCII: control characters beyond it, which JSON leaves as they are, must not drive the terminal either."""
    print(json.dumps(data, default=str), flush=True)


def print_text(text: str = "") -> None:
    print(printable_lines(text), flush=True)


def write(text: str) -> None:
    """A piece of a result that is printed as it comes: a model's words, which must not drive a terminal either."""
    sys.stdout.write(_CONTROLS.sub("\ufffd", text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A message beside the result, or what a program says of it."""
    print(printable_lines(text), file=sys.stderr, flush=True)


def print_error(error: PyllamarunError) -> None:
    note(f"pyllamarun: {printable(error.what)}")
    for text in (error.why, error.remedy):
        for line in text.splitlines():
            note(f"  {printable(line)}")


def table(rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell; those in `right` are aligned to the right."""
    lines = [list(row) for row in rows]
    if header:
        lines.insert(0, list(header))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    printed = []
    for line in lines:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(line)]
        printed.append("  ".join(cells).rstrip())
    return "\n".join(printed)


@contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; call it with (done, total)."""
    from tqdm import tqdm

    with tqdm(total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


@contextmanager
def status(subject: str) -> Iterator[Callable[[str], None]]:
    """One line on stderr that says how far a long step is, where that is a terminal; gone when it is done."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return

    def show(text: str) -> None:
        print(f"\r\033[K{subject}: {text}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
