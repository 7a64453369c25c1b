"""Takes the answer out of what llama-cli prints: it also prints a banner, the prompt, and a farewell, to stdout."""

from __future__ import annotations

import codecs
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from pyllamarun.run.server import failure

Running = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]

FAREWELL = "\n\nExiting..."


class AnswerFilter:
    """Feed it llama-cli's stdout as it comes; it gives back the answer as it comes.

    cli_context::run prints "\\n> PROMPT\\n", then the answer, then the farewell.
    """

    HELD_BACK = len(FAREWELL) + 2

    def __init__(self, prompt: str) -> None:
        self._marker = f"\n> {prompt}\n"
        self._pending = ""
        self._answering = False
        self._begun = False

    def feed(self, text: str) -> str:
        self._pending += text.replace("\r\n", "\n")
        if not self._answering:
            _, marker, after = self._pending.partition(self._marker)
            if not marker:
                return ""
            self._answering = True
            self._pending = after
        if not self._begun:
            begun = self._pending.lstrip("\n")
            if len(begun) <= self.HELD_BACK:
                return ""
            self._pending, self._begun = begun, True
        # What might be the beginning of the farewell is held back, with the line breaks before it.
        ready = self._pending[: -self.HELD_BACK].rstrip("\n")
        self._pending = self._pending[len(ready) :]
        return ready

    def finish(self) -> str:
        """The rest of the answer, when there is nothing more to feed."""
        if not self._answering:
            return ""
        answer, _, _ = self._pending.partition(FAREWELL)
        return answer.rstrip("\n") if self._begun else answer.strip("\n")


def as_typed(prompt: str) -> str:
    """The prompt as llama-cli must get it: a line that begins with / would be a command to it."""
    return " " + prompt if prompt.startswith("/") else prompt


def cli_arguments(prompt: str, predict_tokens: int | None) -> list[str]:
    """llama-cli's arguments for one answer and no conversation."""
    arguments = ["-p", as_typed(prompt), "-st", "--simple-io", "--no-show-timings", "--color", "off"]
    return arguments + (["-n", str(predict_tokens)] if predict_tokens is not None else [])


def stream_answer(
    running: Running, argv: Sequence[str], environment: Mapping[str, str], write: Callable[[str], None]
) -> None:
    """Runs llama-cli and writes the answer as it comes; raises ServerError or DoesNotFit when it fails."""
    prompt = argv[list(argv).index("-p") + 1]
    answer = AnswerFilter(prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with running(argv, environment, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdout
            while data := os.read(process.stdout.fileno(), 1 << 16):
                write(answer.feed(decoder.decode(data)))
            status = process.wait()
        write(answer.finish() + "\n")
        if status != 0:
            log.seek(0)
            raise failure(status, deque(log.read().splitlines(), maxlen=200))
