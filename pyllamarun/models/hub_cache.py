"""Keeps files in Hugging Face's cache, laid out as huggingface_hub does and under its locks, and takes them out again.

blobs/ETAG is the content, snapshots/COMMIT/NAME a link to it, refs/REVISION the commit that a branch is at.  What is
on its way has a name of our own beside the blob, which huggingface_hub never takes for one of its own.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyllamarun.errors import DownloadError
from pyllamarun.models.disk import make_writable
from pyllamarun.models.stores import is_file, whole

LOCK_MODE = 0o664  # WeakFileLock in huggingface_hub/utils/_fixes.py: for people who share a cache
SNAPSHOTS, BLOBS, REFS = "snapshots", "blobs", "refs"


@dataclass(frozen=True)
class Spot:
    """A file's place in the cache: `folder` is that of its repository, `etag` the name of its content."""

    folder: Path
    revision: str
    commit: str
    file: str
    etag: str

    @property
    def blob(self) -> Path:
        return self.folder / BLOBS / self.etag

    @property
    def link(self) -> Path:
        return self.folder / SNAPSHOTS / self.commit / self.file

    @property
    def lock(self) -> Path:
        return lock_of(self.blob)


def lock_of(blob: Path) -> Path:
    """The file that huggingface_hub locks while it gets a blob."""
    folder = blob.parent.parent
    return folder.parent / ".locks" / folder.name / f"{blob.name}.lock"


class Busy(Exception):
    """Another process has the lock."""


@contextmanager
def locked(lock: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds huggingface_hub's lock of a blob; raises Busy where it is taken and is not waited for.

    On a file system without locks there is none, as huggingface_hub's own files do not depend on it.
    """
    from filelock import FileLock, Timeout

    lock.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(str(lock), mode=LOCK_MODE)
    held = False
    try:
        file_lock.acquire(timeout=-1 if wait else 0)
        held = True
    except Timeout:
        raise Busy from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        if held:
            file_lock.release()


def make_room(spot: Spot) -> None:
    """The folders of a file.  Raises DownloadError where the cache cannot be written to."""
    try:
        for folder in (spot.blob.parent, spot.link.parent, spot.lock.parent):
            make_writable(folder)
    except OSError as error:
        raise DownloadError(
            f"Hugging Face's cache cannot be written to: {spot.folder.parent}.",
            why=error.strerror or str(error),
            remedy="Make it writable, or set HF_HUB_CACHE to a folder that is.",
        ) from None


def publish(spot: Spot) -> None:
    """Shows a blob that is there under its name in the snapshot, and lets the revision be at this commit."""
    link = spot.link
    target = os.path.relpath(spot.blob, link.parent)
    if not (link.is_symlink() and str(link.readlink()) == target):
        beside = link.with_name(f".{uuid.uuid4().hex[:8]}.link")
        try:
            beside.symlink_to(target)
            beside.replace(link)
        except OSError:  # a file system without links: there huggingface_hub, too, keeps the file in the snapshot
            beside.unlink(missing_ok=True)
            spot.blob.replace(link)
    reference = spot.folder / REFS / spot.revision
    if spot.revision != spot.commit and _text(reference) != spot.commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        beside = reference.with_name(f"{reference.name}.{uuid.uuid4().hex[:8]}.tmp")
        beside.write_text(spot.commit, encoding="utf-8")
        beside.replace(reference)


def repository_of(path: Path) -> Path | None:
    """The repository's folder in the cache that a file of a snapshot belongs to; None for any other file."""
    from huggingface_hub import constants

    cache = whole(Path(constants.HF_HUB_CACHE))
    try:
        parts = whole(path).relative_to(cache).parts
    except ValueError:
        return None
    return cache / parts[0] if len(parts) > 3 and parts[1] == SNAPSHOTS else None


def blob_of(link: Path) -> Path:
    """What a file of a snapshot leads to, one step: a blob may itself be a link into a store that caches share."""
    try:
        return whole(link.parent / link.readlink())
    except OSError:
        return link


def unshared_blobs(folder: Path, links: Sequence[Path]) -> dict[Path, int]:
    """The blobs that would go with these files of snapshots, since no other revision refers to them; their sizes."""
    going = {whole(link) for link in links}
    others = {blob_of(path) for path in _files(folder / SNAPSHOTS) if path not in going}
    return {blob: _own_bytes(blob) for blob in map(blob_of, links) if blob not in others}


def unlinked(folder: Path, blobs: Sequence[Path]) -> tuple[Path, ...]:
    """Of these blobs those that are here, and are in no snapshot."""
    linked = {blob_of(path) for path in _files(folder / SNAPSHOTS)}
    return tuple(blob for blob in blobs if is_file(blob) and whole(blob) not in linked)


def remove(folder: Path, links: Sequence[Path]) -> int:
    """Takes files of snapshots out, and the blobs that nothing else refers to; returns the bytes that this frees.

    Links go before blobs, so that none ever leads nowhere.  What is left empty is for `tidy`.
    """
    blobs = unshared_blobs(folder, links)
    for link in links:
        link.unlink(missing_ok=True)
    for blob in blobs:
        blob.unlink(missing_ok=True)
    return sum(blobs.values())


def tidy(folder: Path) -> None:
    """Removes what a repository's removed files have left empty: snapshots, references to those, and itself.

    Not while something is on its way into it, which counts on its folders.
    """
    snapshots = folder / SNAPSHOTS
    for below, _, _ in os.walk(snapshots, topdown=False):
        if Path(below) != snapshots:
            with suppress(OSError):
                Path(below).rmdir()
    for reference in list(_files(folder / REFS)):
        if not (snapshots / _text(reference)).is_dir():
            reference.unlink(missing_ok=True)
    if not any(_files(snapshots)) and not any(_files(folder / BLOBS)):
        shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    for below, _, names in os.walk(folder):
        yield from (Path(below) / name for name in names)


def _own_bytes(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
