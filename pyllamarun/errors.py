"""What can go wrong, as one small tree: each error says what, why and what to type next, and carries its exit code."""

from __future__ import annotations


class PyllamarunError(Exception):
    """An error that a person reads.

    `what` happened, in one sentence; `why`, where it is known; `remedy`, the next thing to type or do.
    """

    exit_code = 1
    code = "error"

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.remedy) if part)


class UsageError(PyllamarunError):
    """The command as typed cannot be done."""

    exit_code = 2
    code = "usage"


class DoesNotFit(PyllamarunError):
    """The plan would need more memory than it may use."""

    exit_code = 3
    code = "does_not_fit"


class ModelError(PyllamarunError):
    """A model file is not what it should be."""

    exit_code = 4
    code = "model"


class DownloadError(PyllamarunError):
    """What a server was asked for did not come, or not whole."""

    exit_code = 4
    code = "download"


class BinaryError(PyllamarunError):
    """A llama.cpp program is missing, does not start, or is not the one that belongs to this package."""

    exit_code = 5
    code = "binary"


class ServerError(PyllamarunError):
    """llama-server or llama-cli failed."""

    exit_code = 6
    code = "server"
