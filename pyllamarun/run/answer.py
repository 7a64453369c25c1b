"""Takes the answer out of what llama-cli prints: it also prints a banner, the prompt, and a farewell, to stdout."""

from __future__ import annotations

import codecs
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pyllamarun.errors import UsageError
from pyllamarun.run.server import Running, failure

FAREWELL = "\n\nExiting..."
# cli_context::generate_completion prints what the server answered where it should have answered.
TOO_LONG = "Error: request ("
ECHO_BYTES = 500  # ui::user_turn::echo cuts a longer prompt
LONGEST_ARGUMENT_BYTES = 64 * 1024


class AnswerFilter:
    """Feed it llama-cli's stdout as it comes; it gives back the answer as it comes.

    cli_context::run prints "\\n> PROMPT\\n", then the answer, then the farewell.
    """

    HELD_BACK = max(len(FAREWELL) + 2, len(TOO_LONG))

    def __init__(self, prompt: str) -> None:
        self._marker = f"\n> {echoed(prompt)}\n"
        self._pending = ""
        self._begun = False
        self.answering = False
        self.refusal = ""

    def feed(self, text: str) -> str:
        self._pending = (self._pending + text).replace("\r\n", "\n")
        if not self.answering:
            _, marker, after = self._pending.partition(self._marker)
            if not marker:
                return ""
            self.answering = True
            self._pending = after
        if not self._begun:
            begun = self._pending.lstrip("\n")
            if len(begun) <= self.HELD_BACK or begun.startswith(TOO_LONG):
                return ""
            self._pending, self._begun = begun, True
        # What might be the beginning of the farewell is held back, with the line breaks before it.
        ready = self._pending[: -self.HELD_BACK].rstrip("\n")
        self._pending = self._pending[len(ready) :]
        return ready

    def finish(self) -> str:
        """The rest of the answer, when there is nothing more to feed; or nothing, and `refusal` says why."""
        if not self.answering:
            return ""
        answer, _, _ = self._pending.partition(FAREWELL)
        if self._begun:
            return answer.rstrip("\n")
        answer = answer.strip("\n")
        if answer.startswith(TOO_LONG):
            self.refusal = answer
            return ""
        return answer


def echoed(prompt: str) -> str:
    """The prompt as llama-cli repeats it."""
    raw = prompt.encode("utf-8", "surrogateescape")
    shown = raw[:ECHO_BYTES].decode("utf-8", "replace") + " ... (truncated)" if len(raw) > ECHO_BYTES else prompt
    return shown.replace("\r\n", "\n")


def as_typed(prompt: str) -> str:
    """The prompt as llama-cli must get it: a line that begins with / would be a command to it."""
    return " " + prompt if prompt.startswith("/") else prompt


def cli_arguments(prompt: str, predict_tokens: int | None) -> list[str]:
    """llama-cli's arguments for one answer and no conversation."""
    arguments = ["-p", as_typed(prompt), "--no-escape", "-st", "--simple-io", "--no-show-timings", "--color", "off"]
    return arguments + (["-n", str(predict_tokens)] if predict_tokens is not None else [])


def stream_answer(
    running: Running, argv: Sequence[str], environment: Mapping[str, str], write: Callable[[str], None]
) -> None:
    """Runs llama-cli and writes the answer as it comes.

    Raises UsageError when the prompt is longer than the context, and ServerError or DoesNotFit when llama-cli fails.
    """
    prompt = argv[list(argv).index("-p") + 1]
    answer = AnswerFilter(prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with tempfile.TemporaryDirectory(prefix="pyllamarun-") as folder, (Path(folder) / "log").open("w+") as log:
        words = _with_short_arguments(argv, Path(folder))
        with running(words, environment, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdout
            while data := os.read(process.stdout.fileno(), 1 << 16):
                write(answer.feed(decoder.decode(data)))
            status = process.wait()
        write(answer.finish())
        if answer.refusal:
            raise UsageError(
                "The prompt is longer than the context.",
                why=answer.refusal.removeprefix("Error: "),
                remedy="Give a larger -c, or a shorter prompt.",
            )
        if status != 0 or not answer.answering:
            log.seek(0)
            raise failure(status, deque(log.read().splitlines(), maxlen=200))
        write("\n")


def _with_short_arguments(argv: Sequence[str], folder: Path) -> list[str]:
    """The same command, with a prompt that is too long for an argument in a file."""
    words = list(argv)
    position = words.index("-p")
    if len(words[position + 1].encode("utf-8", "surrogateescape")) > LONGEST_ARGUMENT_BYTES:
        file = folder / "prompt"
        file.write_text(words[position + 1] + "\n", encoding="utf-8", errors="surrogateescape")
        words[position : position + 2] = ["-f", str(file)]
    return words
