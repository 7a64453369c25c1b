"""Files under way, in a hidden folder beside their final place: all get their names when all are whole, or none does.

The folder is locked by its owner as long as that lives, and the kernel lets go of the lock however it ends; so who
comes next can tell a folder that is in use from one that was left behind, and removes the latter.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyllamarun.errors import UsageError

PREFIX, SUFFIX = ".pyllamarun-", ".partial"


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder for files that will belong into `parent`; gone, with what is in it, when the block is left.

    Raises UsageError where `parent` cannot be written to.
    """
    folder, lock = _make(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make(parent: Path) -> tuple[Path, int]:
    """One that nobody takes for dead: who cleans up may find it before it is locked, so it is looked at again."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent))
        except OSError as error:
            raise UsageError(
                f"Nothing can be written to {parent}.", why=error.strerror or "", remedy="Name another place with -o."
            ) from None
        lock = _open_locked(folder, fcntl.LOCK_EX)
        if lock is not None and folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _open_locked(folder: Path, how: int) -> int | None:
    """A descriptor that holds the lock; None where another process has it, or there is no such folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) or how & fcntl.LOCK_NB:
            os.close(descriptor)
            return None  # also where locks are not known: then nobody can tell whether it is in use
    return descriptor


def remove_dead(parent: Path) -> int:
    """Removes what runs that were killed left in `parent`, and returns how many."""
    removed = 0
    for folder in parent.glob(f"{PREFIX}*{SUFFIX}"):
        lock = _open_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            continue
        try:
            _take_back(folder, parent)
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
        finally:
            os.close(lock)
    return removed


def _take_back(folder: Path, parent: Path) -> None:
    """Removes names that were given to some of its files, if it ended before all had theirs."""
    files = [path for path in folder.iterdir() if path.is_file()]
    named = [parent / path.name for path in files if _is_same(path, parent / path.name)]
    if len(named) < len(files):
        for path in named:
            path.unlink(missing_ok=True)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other) and not other.is_symlink()
    except OSError:
        return False


def publish(folder: Path, names: Sequence[str], parent: Path) -> None:
    """Gives all files their names in `parent`, the first one's last: without it, the parts of a split are no model.

    Raises UsageError, and leaves nothing, where one of the names was taken meanwhile.
    """
    for name in names:
        flush(folder / name)
    given: list[Path] = []
    try:
        for name in reversed(names):
            _give_name(folder / name, parent / name)
            given.append(parent / name)
    except FileExistsError:
        for path in given:
            path.unlink(missing_ok=True)
        raise UsageError(f"{parent / name} appeared meanwhile; it was left as it is.") from None
    except BaseException:  # also an interruption: half of a model is none
        for path in given:
            path.unlink(missing_ok=True)
        raise
    flush(parent)


def _give_name(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        file.rename(target)


def flush(path: Path) -> None:
    """Onto the disk, the names in it where it is a folder.  Raises UsageError where the disk does not take it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UsageError(f"{path} cannot be written.", why=error.strerror or "", remedy="Look at the disk.") from None
