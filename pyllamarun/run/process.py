"""Starts and stops processes.  The only module that does.

Every child leads a process group of its own and dies with us (PR_SET_PDEATHSIG), so nothing is orphaned.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pyllamarun.errors import BinaryError

STOP_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with(parent: int) -> None:
    """Runs in the child before it becomes the program."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def start(
    argv: Sequence[str | Path],
    environment: Mapping[str, str],
    *,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> subprocess.Popen[str]:
    """Starts a program in a group of its own; BinaryError when it cannot be started."""
    parent = os.getpid()
    try:
        return subprocess.Popen(
            [str(argument) for argument in argv],
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
    except OSError as error:
        raise BinaryError(
            f"{argv[0]} cannot be started.",
            why=error.strerror or str(error),
            remedy="Check that its file system is not mounted noexec, or install the package again.",
        ) from None


def stop(process: subprocess.Popen[str], seconds: float = STOP_SECONDS) -> int:
    """Ends the whole group, politely and then not, and returns the program's exit status.

    What a hanging driver keeps in the kernel heeds not even SIGKILL; it is left behind, and nobody waits for it.
    """
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        try:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    status = process.poll()
    return -signal.SIGKILL if status is None else status


@contextmanager
def running(
    argv: Sequence[str | Path],
    environment: Mapping[str, str],
    *,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A started program that is stopped when the block is left, however it is left."""
    process = start(argv, environment, stdin=stdin, stdout=stdout, stderr=stderr)
    try:
        yield process
    finally:
        stop(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


def output_of(
    argv: Sequence[str | Path], environment: Mapping[str, str], *, timeout_seconds: float = 60.0
) -> tuple[int, str]:
    """Runs a program to its end and returns its exit status and what it printed to stdout and stderr."""
    with running(argv, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            text, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise BinaryError(f"{argv[0]} did not end within {timeout_seconds:.0f} seconds.") from None
        return process.returncode, text
