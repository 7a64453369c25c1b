"""Fetches one file: several connections, resumed after any end, its checksum while it streams, one writer at a time.

The final name appears only when the file is whole, right and on the disk; until then it is a Partial.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.errors import DownloadError
from pyllamarun.models.disk import disk_error
from pyllamarun.models.http import Web
from pyllamarun.models.partial import HASHED_AT_ONCE_BYTES, Partial, is_begun
from pyllamarun.models.refusals import Place
from pyllamarun.units import format_size

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


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


def _silent(*_: object) -> None:
    pass


def fetch(web: Web, wanted: Wanted, progress: Progress = _silent, say: Say = _silent) -> Fetched:
    """The file at `wanted.target`, fetched if it is not there yet.

    A target that is there is used where size and sha256 agree, and is else an error: it is never replaced.
    `progress(done_bytes, total_bytes)` and `say`, what a person should know meanwhile (a wait for another process, a
    new start), are called on this thread.  Raises DownloadError; what came so far is kept, and the next call goes on
    from there.
    """
    from pyllamarun.models.transfer import Transfer

    target = wanted.target
    if os.path.lexists(target) and not is_begun(target):
        return _present(wanted, progress, waited=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial(target, lambda: say(f"Another process is fetching {target.name}: waiting for it."))
    except OSError as error:
        raise disk_error(target, error) from None
    with closing(partial):
        if os.path.lexists(target):
            partial.discard()
            return _present(wanted, progress, partial.waited)
        try:
            with closing(Web(web.patience, receive_buffer_bytes=0)) as fast:
                transfer = Transfer(fast, wanted.place, partial, say)
                sha256 = transfer.run(wanted.size_bytes, wanted.sha256, progress)
            if wanted.sha256 and sha256 != wanted.sha256.lower():
                partial.reject()
                raise _wrong(wanted, sha256, partial.rejected_path)
            partial.publish()
        except FileExistsError:
            raise _in_the_way(target, "It appeared meanwhile.") from None
        except OSError as error:
            raise _with_kept(disk_error(target, error), partial) from None
        except DownloadError as error:
            raise _with_kept(error, partial) from None
        return Fetched(
            path=target,
            size_bytes=partial.size_bytes,
            sha256=sha256,
            etag=partial.version,
            transferred_bytes=transfer.transferred_bytes,
            resumed_bytes=transfer.resumed_bytes,
            waited=False,
        )


def sha256_of(path: Path, progress: Progress = _silent) -> str:
    """The checksum of a file that is here.  Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASHED_AT_ONCE_BYTES))
    with path.open("rb", buffering=0) as file:
        total, done = os.fstat(file.fileno()).st_size, 0
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            done += count
            progress(done, total)
    return digest.hexdigest()


def _present(wanted: Wanted, progress: Progress, waited: bool) -> Fetched:
    """The target that is there already, where it is what is wanted."""
    path = wanted.target
    try:
        size = path.stat().st_size
        if not path.is_file() or wanted.size_bytes not in (None, size):
            raise _in_the_way(path, f"It has {size:,} bytes, and {wanted.size_bytes or 0:,} are wanted.")
        sha256 = sha256_of(path, progress)
    except OSError as error:
        raise _in_the_way(path, f"It cannot be read: {error.strerror}.") from None
    if wanted.sha256 and sha256 != wanted.sha256.lower():
        raise _in_the_way(path, f"Its sha256 is {sha256}.")
    return Fetched(path, size, sha256, etag="", transferred_bytes=0, resumed_bytes=0, waited=waited)


def _in_the_way(path: Path, why: str) -> DownloadError:
    what = f"{path} is there already, and is not what is wanted; it was left as it is."
    return DownloadError(what, why=why, remedy="Move it away, and try again.")


def _wrong(wanted: Wanted, sha256: str, rejected: Path) -> DownloadError:
    return DownloadError(
        f"{wanted.place.shown} came whole, and is not the file that was promised.",
        why=f"sha256 expected: {wanted.sha256.lower()}\nsha256 received: {sha256}",
        remedy=f"It is kept as {rejected}.  Try again: it is fetched anew.  If it goes on, do not use the file.",
    )


def _with_kept(error: DownloadError, partial: Partial) -> DownloadError:
    """The error, and what of the file is kept."""
    kept = 0
    with suppress(OSError):
        kept = partial.done_bytes if partial.path.exists() else 0
    if not kept:
        return error
    sizes = f"{format_size(kept)} of {format_size(partial.size_bytes)}"
    return DownloadError(error.what, why=error.why, remedy=f"{error.remedy}  {sizes} are kept: it goes on from there.")
