"""Prints.  The only module that writes results to stdout and messages to stderr."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyllamarun import __version__
from pyllamarun.errors import PyllamarunError
from pyllamarun.units import format_seconds, format_size

SCHEMA = 1
LOG_INTERVAL_SECONDS = 10.0  # between lines about progress, where there is no terminal
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


LINE_SECONDS = 10.0


@contextmanager
def transfer(subject: str, total_bytes: int, initial_bytes: int = 0) -> Iterator[Callable[[int, int], None]]:
    """How far bytes are, with their rate and what is left, on stderr; call it with (done, total).

    A bar on a terminal; elsewhere a line every ten seconds.
    """
    if not sys.stderr.isatty():
        yield _lines(subject, initial_bytes)
        return
    from tqdm import tqdm

    size: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=total_bytes, initial=initial_bytes, desc=subject, leave=False, **size) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def _lines(subject: str, initial_bytes: int) -> Callable[[int, int], None]:
    """Says a line every LINE_SECONDS; the rate is that since the line before."""
    last_seconds, last_bytes = time.monotonic(), initial_bytes

    def advance(done: int, total: int) -> None:
        nonlocal last_seconds, last_bytes
        now = time.monotonic()
        if now - last_seconds < LINE_SECONDS:
            return
        per_second = max(done - last_bytes, 0) / (now - last_seconds)
        left = f", {format_seconds((total - done) / per_second)} left" if per_second else ""
        share = f"{format_size(done)} of {format_size(total)}"
        note(f"{subject}: {share}, {format_size(int(per_second))}/s{left}")
        last_seconds, last_bytes = now, done

    return advance


def ask(question: str) -> bool | None:
    """Whether a person says yes; None where there is none to ask."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")


@contextmanager
def weighted_progress(subject: str, unit: str, weights: Sequence[int]) -> Iterator[Callable[[int, int], None]]:
    """Progress through things that take as long as their weights say; call it with (how many are done, of how many).

    On a terminal a bar with the time that is left; elsewhere a line on stderr every so often.
    """
    sums = [0, *itertools.accumulate(weights)]
    if not sys.stderr.isatty():
        yield _progress_lines(subject, unit, sums)
        return
    from tqdm import tqdm

    bar_format = "{desc}{postfix} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=sums[-1], desc=subject, bar_format=bar_format, leave=False) as bar:

        def advance(done: int, of: int) -> None:
            bar.postfix = f"{done}/{of} {unit}"
            bar.update(sums[min(done, len(sums) - 1)] - bar.n)

        yield advance


def _progress_lines(subject: str, unit: str, sums: Sequence[int]) -> Callable[[int, int], None]:
    started = shown = time.monotonic()

    def advance(done: int, of: int) -> None:
        nonlocal shown
        now, share = time.monotonic(), sums[min(done, len(sums) - 1)] / max(sums[-1], 1)
        if now - shown >= LOG_INTERVAL_SECONDS and 0 < share < 1:
            shown, left = now, (now - started) * (1 / share - 1)
            note(f"{subject}: {done} of {of} {unit}, {share:.0%}, {left:.0f} s left")

    return advance


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
