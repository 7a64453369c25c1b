"""SIGINT and SIGTERM end what a command has started, and give its exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal asked to stop.  Not an Exception: nothing may swallow it."""


class Signals:
    def __init__(self) -> None:
        self.number = 0

    @property
    def exit_code(self) -> int:
        return 128 + self.number if self.number else 0


@contextmanager
def stopped_by_signals() -> Iterator[Signals]:
    """Leaves the block when SIGINT or SIGTERM arrives; what was opened in it is closed on the way."""
    signals = Signals()

    def stop(number: int, _: FrameType | None) -> None:
        if signals.number == 0:
            signals.number = number
            raise Stopped

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    except Stopped:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
