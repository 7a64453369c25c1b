"""A file that is not whole yet: NAME.partial, the journal of which of its bytes are there, and its one writer.

The journal names the version of the file and how many bytes of each chunk are there, twice: as written, which holds
whatever becomes of this process, and as it was when the file was last flushed to the disk, which holds after a power
cut too.  Which of the two counts is told by the boot it was written in.  It holds no address and no secret.
"""

from __future__ import annotations

import fcntl
import io
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
SUFFIXES = (".partial", ".partial.journal", ".partial.journal.new")
# What is read at once of a file that is hashed; chunks are multiples of it.
HASHED_AT_ONCE_BYTES = 1 << 20


def is_begun(target: Path) -> bool:
    """Whether anything of a download to this name is there."""
    return any(os.path.lexists(target.with_name(target.name + suffix)) for suffix in SUFFIXES)


class Partial:
    """The file beside `target`, locked: whoever has opened it is its only writer.  Raises OSError as files do.

    `done` is how many bytes of each chunk are there, from the chunk's start on.
    """

    def __init__(self, target: Path, on_wait: Callable[[], None]) -> None:
        """Calls `on_wait` where another process has it, and waits until that one has done."""
        self.target = target
        self.path, self._journal_path, self._new_path = (target.with_name(target.name + suffix) for suffix in SUFFIXES)
        self.rejected_path = target.with_name(f"{target.name}.rejected")
        self.version, self.size_bytes, self.done = "", 0, array("I")
        self._header = b""
        self._journal: io.FileIO | None = None
        self._file, self.waited = _lock(self.path, on_wait)
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Lets go of it; of a file of which nothing came, nothing stays."""
        file = self._stat()
        if not file.st_size and file.st_nlink:
            self.discard()
        self._file.close()
        if self._journal:
            self._journal.close()

    @property
    def done_bytes(self) -> int:
        return sum(self.done)

    @property
    def is_empty(self) -> bool:
        return self._stat().st_size == 0

    @property
    def disk_bytes(self) -> int:
        """What it takes of the disk: less than its size where there are gaps."""
        return self._stat().st_blocks * 512

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
        self._file.truncate(0)
        self.version, self.size_bytes = version, size_bytes
        self.done = array("I", bytes(-(-size_bytes // CHUNK_BYTES) * ENTRY_BYTES))
        self._write_journal()

    def write(self, position: int, data: memoryview) -> None:
        """Adds what is not there yet; it is in the journal when this returns."""
        while data:
            chunk, offset = divmod(position, CHUNK_BYTES)
            count = min(len(data), self.done[chunk] - offset)
            if count <= 0:
                count = os.pwrite(self._file.fileno(), data[: CHUNK_BYTES - offset], position)
                self.done[chunk] = offset + count
                self._note(self.done[chunk : chunk + 1], (len(self.done) + chunk) * ENTRY_BYTES)
            position, data = position + count, data[count:]

    def read(self, buffer: memoryview, position: int) -> int:
        count = os.preadv(self._file.fileno(), [buffer], position)
        if not count:
            raise OSError(0, "it became shorter while it was read", str(self.path))
        return count

    def flush(self) -> None:
        """Notes what is there as safe from a power cut, once it is."""
        done = self.done[:]
        os.fdatasync(self._file.fileno())
        self._note(done, 0)

    def publish(self) -> None:
        """Gives the whole file its final name.  Raises FileExistsError where something has that name meanwhile."""
        os.fsync(self._file.fileno())
        if os.path.lexists(self.target):
            raise FileExistsError(f"{self.target} exists")
        self.path.rename(self.target)
        self.rejected_path.unlink(missing_ok=True)
        self._drop_journal()
        _sync_folder(self.target.parent)

    def reject(self) -> None:
        """Puts a file aside that is whole and not right."""
        self.path.rename(self.rejected_path)
        self._drop_journal()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._drop_journal()

    def _drop_journal(self) -> None:
        for path in (self._journal_path, self._new_path):
            path.unlink(missing_ok=True)

    def _stat(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def _note(self, entries: array[int], position: int) -> None:
        assert self._journal
        os.pwrite(self._journal.fileno(), entries, len(self._header) + position)

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
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return
        same_boot = boot and boot == _boot()
        done = array("I", tables[tables_bytes:] if same_boot else tables[:tables_bytes])
        ends = [chunk * CHUNK_BYTES + there for chunk, there in enumerate(done) if there]
        self.size_bytes = size
        fits = all(there <= self.length(chunk) for chunk, there in enumerate(done))
        if fits and self._stat().st_size >= max(ends, default=0):
            self.version, self.done = version, done
            self._write_journal()

    def _write_journal(self) -> None:
        fields = {"version": self.version, "size_bytes": self.size_bytes, "chunk_bytes": CHUNK_BYTES, "boot": _boot()}
        self._header = json.dumps(fields).encode() + b"\n"
        if self._journal:
            self._journal.close()
        self._journal = _open(self._new_path)
        os.fdatasync(self._file.fileno())
        self._journal.truncate(0)
        self._journal.write(self._header + self.done.tobytes() * 2)
        os.fsync(self._journal.fileno())
        self._new_path.rename(self._journal_path)


def _open(path: Path) -> io.FileIO:
    """A regular file of that name, made where there is none; not one that a link leads to."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = io.FileIO(os.open(path, flags, 0o666), "r+")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "It is no regular file", str(path))
    return file


def _lock(path: Path, on_wait: Callable[[], None]) -> tuple[io.FileIO, bool]:
    """The file that has this name now, locked; and whether that took a wait."""
    waited = False
    while True:
        file = _open(path)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    on_wait()
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    return file, waited
        except BaseException:
            file.close()
            raise
        file.close()  # who had it has finished: the name is another file's now, or nobody's


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
