"""Fetches one file: several connections, a journal that survives any end, a checksum while it streams, one writer.

The final name appears only when the file is whole, right and on the disk.  Until then it is NAME.partial, with the
journal of what of it is there beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.models.http import Web
from pyllamarun.models.refusals import Place


@dataclass(frozen=True)
class Wanted:
    """A file to be fetched.  Size and sha256 (in hex) are what its source, or the user, says: they are held to it."""

    place: Place
    target: Path
    size_bytes: int | None = None
    sha256: str = ""


@dataclass(frozen=True)
class Fetched:
    """A file that is there, whole.  `waited`: another process fetched it meanwhile, and it is that one's."""

    path: Path
    size_bytes: int
    sha256: str
    etag: str
    transferred_bytes: int
    resumed_bytes: int
    waited: bool


def fetch(
    web: Web,
    wanted: Wanted,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Fetched:
    """The file at `wanted.target`, fetched if it is not there yet.

    A target that is there is used when size and sha256 agree, and else an error: it is never replaced.  `progress` and
    `say` (what a person should know meanwhile: a wait for another process, a new start) are called on this thread.
    Raises DownloadError; what came so far is kept, and the next call goes on from there.
    """
    raise NotImplementedError
