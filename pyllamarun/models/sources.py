"""Finds what a user means by MODEL: a file, a model that another program keeps here, or one on the network.

What speaks with the network is imported only for what is there: a plan of a file starts sooner without.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamarun import shell
from pyllamarun.errors import UsageError
from pyllamarun.models import stores
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.names import part_names
from pyllamarun.paths import expanded

if TYPE_CHECKING:
    from pyllamarun.models.remote import RemoteFile


@dataclass(frozen=True)
class Source:
    """Where a model is.

    `path` is its file, or the first of its parts.  Where it is not on this machine, that is the place where `pull`
    puts it, and `remote` says where on the network each of its files lies.  `name` is what to type for it.
    """

    name: str
    path: Path
    remote: Callable[[Path], RemoteFile] | None = None

    @property
    def is_here(self) -> bool:
        return self.remote is None

    def read_header(self) -> Header:
        """Raises UsageError, ModelError, and DownloadError where it is read over the network."""
        if self.remote is None:
            return read_header(self.path)
        from pyllamarun.models.network import read_header_from

        return read_header_from(self.path, self.remote)

    def check_here(self) -> None:
        """Raises UsageError where the model itself is needed, and is not on this machine."""
        if not self.is_here:
            raise UsageError(
                f"{self.name} is not on this machine.",
                why="Its header is enough for a plan; to run it, the model is needed.",
                remedy=f"Pull it first: {self.pull_command}",
            )

    @property
    def pull_command(self) -> str:
        return shell.join(["pyllamarun", "pull", self.name])


def stored_model(text: str) -> stores.Stored:
    """A model on this machine as its store has it, damaged ones, too; of no store where it is a file elsewhere.

    Raises UsageError and DownloadError for what is not here; no network is asked about a repository.
    """
    stored = stores.all_stored()
    for one in stored:
        if text == one.name:
            return one
    if text.startswith("hf:"):
        from pyllamarun.models.network import here_source

        source = here_source(text[3:])
    else:
        source = resolve(text)
    if not source.is_here:
        raise UsageError(f"{text} is not on this machine.", remedy="`pyllamarun list` shows what is.")
    path = stores.whole(source.path)
    for one in stored:
        if any(path == stores.whole(part) for part in one.parts):
            return one
    if not stores.is_file(source.path):
        raise UsageError(f"There is no file {source.path}.", remedy="Check the path, or see `pyllamarun list`.")
    parts = tuple(source.path.with_name(name) for name in part_names(source.path.name))
    return stores.Stored(stores.NONE, source.name, parts)


def resolve(text: str) -> Source:
    """What MODEL means: hf:OWNER/REPO..., https://..., a path, or the name of a model in a store on this machine.

    Raises UsageError for what is none of these, and DownloadError where the network is asked and does not answer.
    """
    if text.startswith("hf:"):
        from pyllamarun.models.network import named_source

        return named_source(text[3:])
    if re.match(r"https?://", text, re.IGNORECASE):
        from pyllamarun.models.network import url_source

        return url_source(text)
    path = expanded(text)
    if stores.is_file(path) or text.startswith(("/", "./", "../", "~")):
        return Source(str(path), path)
    found = stores.find(text)
    if found:
        return Source(found.name, found.path)
    if os.path.lexists(path):
        return Source(str(path), path)
    hint = f", or hf:{text} for one on Hugging Face" if re.fullmatch(r"[\w.-]+/[\w.-]+([:/].*)?", text) else ""
    raise UsageError(
        f"There is no file {text}, and no model of that name on this machine.",
        remedy=f"Check the path; `pyllamarun list` shows the models that are here{hint}.",
    )
