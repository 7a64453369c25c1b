"""A file that is not whole yet: NAME.partial, the journal of which of its bytes are there, and its one writer.

The journal names the version of the file and how many bytes of each chunk are there, twice: as written, which holds
whatever becomes of this process, and as it was when the file was last flushed to the disk, which holds after a power
cut too.  Which of the two counts is told by the boot it was written in.  It holds no address and no secret.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 16 << 20
MAX_JOURNAL_BYTES = 64 << 20
ENTRY_BYTES = 4
# What is read at once of a file that is hashed; chunks are multiples of it.
HASHED_AT_ONCE_BYTES = 1 << 20


class Partial:
    """The file beside `target`, locked: whoever has opened it is its only writer.  Raises OSError as files do.

    `done` is how many bytes of each chunk are there, from the chunk's start on.
    """

    def __init__(self, target: Path, on_wait: Callable[[], None]) -> None:
        """Calls `on_wait` where another process has it, and waits until that one has done."""
        self.target = target
        self.path = target.with_name(f"{target.name}.partial")
        self.rejected_path = target.with_name(f"{target.name}.rejected")
        self._journal_path = target.with_name(f"{target.name}.partial.journal")
        self._journal = -1
        self.version, self.size_bytes, self.done = "", 0, array("I")
        self._header = b""
        self._file, self.waited = _lock(self.path, on_wait)
        try:
            self._resume()
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Lets go of it; of a file of which nothing came, nothing stays."""
        file = os.fstat(self._file)
        if not file.st_size and file.st_nlink:
            self.discard()
        os.close(self._file)
        if self._journal >= 0:
            os.close(self._journal)

    @property
    def done_bytes(self) -> int:
        return sum(self.done)

    @property
    def is_empty(self) -> bool:
        return os.fstat(self._file).st_size == 0

    def length(self, chunk: int) -> int:
        return min(CHUNK_BYTES, self.size_bytes - chunk * CHUNK_BYTES)

    def missing(self) -> list[int]:
        """The chunks that are not whole."""
        return [chunk for chunk in range(len(self.done)) if self.left(chunk)]

    def next(self, chunk: int) -> int:
        """Where what is missing of a chunk begins."""
        return chunk * CHUNK_BYTES + self.done[chunk]

    def left(self, chunk: int) -> int:
        """How many bytes of it are missing."""
        return self.length(chunk) - self.done[chunk]

    def ready_bytes(self, position: int) -> int:
        """How many bytes from `position` on, within its chunk, can be read."""
        chunk, offset = divmod(position, CHUNK_BYTES)
        return self.done[chunk] - offset

    def start(self, version: str, size_bytes: int) -> None:
        """Begins anew, with a file of this version and size."""
        self._journal_path.unlink(missing_ok=True)
        os.ftruncate(self._file, 0)
        self.version, self.size_bytes = version, size_bytes
        self.done = array("I", bytes(-(-size_bytes // CHUNK_BYTES) * ENTRY_BYTES))
        self._write_journal()

    def write(self, position: int, data: memoryview) -> None:
        """Adds what is not there yet; it is in the journal when this returns."""
        while data:
            chunk, offset = divmod(position, CHUNK_BYTES)
            count = min(len(data), self.done[chunk] - offset)
            if count <= 0:
                count = os.pwrite(self._file, data[: CHUNK_BYTES - offset], position)
                self.done[chunk] = offset + count
                entry = len(self._header) + (len(self.done) + chunk) * ENTRY_BYTES
                os.pwrite(self._journal, self.done[chunk : chunk + 1], entry)
            position, data = position + count, data[count:]

    def read(self, buffer: memoryview, position: int) -> int:
        count = os.preadv(self._file, [buffer], position)
        if not count:
            raise OSError(0, "it became shorter while it was read", str(self.path))
        return count

    def flush(self) -> None:
        """Notes what is there as safe from a power cut, once it is."""
        done = self.done[:]
        os.fdatasync(self._file)
        os.pwrite(self._journal, done, len(self._header))

    def publish(self) -> None:
        """Gives the whole file its final name.  Raises FileExistsError where something has that name meanwhile."""
        os.fsync(self._file)
        if os.path.lexists(self.target):
            raise FileExistsError(f"{self.target} exists")
        self.path.rename(self.target)
        self._journal_path.unlink(missing_ok=True)
        _sync_folder(self.target.parent)

    def reject(self) -> None:
        """Puts a file aside that is whole and not right."""
        self.path.rename(self.rejected_path)
        self._journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._journal_path.unlink(missing_ok=True)

    def _resume(self) -> None:
        """Takes over what an earlier writer's journal says, if that is sound, and the file holds as much."""
        try:
            with self._journal_path.open("rb") as file:
                text, tables = file.readline(MAX_JOURNAL_BYTES), file.read(MAX_JOURNAL_BYTES)
            header = json.loads(text)
            version, size, boot = str(header["version"]), int(header["size_bytes"]), header["boot"]
            count = -(-size // CHUNK_BYTES)
            tables_bytes = count * ENTRY_BYTES
            if header["chunk_bytes"] != CHUNK_BYTES or size <= 0 or len(tables) != 2 * tables_bytes:
                return
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return
        same_boot = boot and boot == _boot()
        done = array("I", tables[tables_bytes:] if same_boot else tables[:tables_bytes])
        ends = [chunk * CHUNK_BYTES + there for chunk, there in enumerate(done) if there]
        self.size_bytes = size
        fits = all(there <= self.length(chunk) for chunk, there in enumerate(done))
        if fits and os.fstat(self._file).st_size >= max(ends, default=0):
            self.version, self.done = version, done
            self._write_journal()

    def _write_journal(self) -> None:
        fields = {"version": self.version, "size_bytes": self.size_bytes, "chunk_bytes": CHUNK_BYTES, "boot": _boot()}
        self._header = json.dumps(fields).encode() + b"\n"
        new = self._journal_path.with_name(f"{self._journal_path.name}.new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = fd
        os.fdatasync(self._file)
        os.pwrite(fd, self._header + self.done.tobytes() * 2, 0)
        os.fsync(fd)
        new.rename(self._journal_path)


def _lock(path: Path, on_wait: Callable[[], None]) -> tuple[int, bool]:
    """The file that has this name now, locked; and whether that took a wait."""
    waited = False
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(0, "it is no regular file", str(path))
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    on_wait()
                waited = True
                fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False)):
                    return fd, waited
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # who had it has finished: the name is another file's now, or nobody's


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
