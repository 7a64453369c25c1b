"""Room on the disk, and what it means when the system does not write."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from pyllamarun.errors import DownloadError
from pyllamarun.units import format_size


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises DownloadError where the disk has less free than that."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DownloadError(
            f"{folder} has {format_size(free)} free, and {format_size(needed_bytes)} are needed.",
            remedy="Make room there, or choose another folder: PYLLAMARUN_HOME says which.",
        )


def disk_error(target: Path, error: OSError) -> DownloadError:
    """What the system says when it does not write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"The disk of {target.parent} is full.", remedy="Make room there, and try again.")
    if error.errno == errno.EFBIG:
        why = "Its file system, or a limit (ulimit -f), allows no file that large."
        return DownloadError(f"{target} cannot be written.", why=why, remedy="Choose another folder.")
    why = f"{error.strerror or error}: {error.filename or target}."
    return DownloadError(f"{target} cannot be written.", why=why, remedy="Check the folder's permissions.")


def make_writable(folder: Path) -> None:
    """Makes a folder.  Raises OSError where it cannot be made, or written to."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
