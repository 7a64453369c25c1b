"""The index: what pyllamarun keeps in mind of the models on this machine, in one SQLite file of the state folder.

The models are plain files, and all that is needed to use them is in these.  Here is what would cost time to find out
again (what a header says), and what files do not tell: where each was pulled from, when, and its checksum.  Without the
file, the first is read again, and the second is gone, but for what Hugging Face's cache and Ollama's store tell by
the names of their files.  Several processes may use it at once; one that is damaged is put aside, and made anew.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pyllamarun import __version__, paths
from pyllamarun.errors import UsageError
from pyllamarun.models.disk import make_writable
from pyllamarun.models.stores import whole

SCHEMA = 1
BUSY_SECONDS = 10.0
_TABLES = (
    "CREATE TABLE header (path TEXT PRIMARY KEY, version TEXT, stamp TEXT, entry TEXT)",
    "CREATE TABLE file (path TEXT PRIMARY KEY, source TEXT, origin TEXT, revision TEXT, etag TEXT, sha256 TEXT,"
    " size_bytes INTEGER, mtime_ns INTEGER, recorded TEXT)",
    "CREATE TABLE begun (path TEXT PRIMARY KEY, source TEXT, targets TEXT, size_bytes INTEGER, since TEXT)",
)
_SHA256 = re.compile(r"(?:sha256[:-])?([0-9a-f]{64})")


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file besides its content; `path` is where it really lies, behind all links.

    `source` is what was typed for it, `origin` its address without a query, `revision` a commit; each "" where there is
    none.  `sha256` is of the content that had this size and time.
    """

    path: str
    source: str
    origin: str
    revision: str
    etag: str
    sha256: str
    size_bytes: int
    mtime_ns: int
    recorded: str


@dataclass(frozen=True)
class Begun:
    """A pull that was begun and has not ended; `path` is where the model will be, and `targets` are all its files."""

    path: str
    source: str
    targets: tuple[Path, ...]
    size_bytes: int
    since: str


class Index:
    """The open index.  Where it can be neither read nor written, nothing is known or kept, which is no error.

    `note` is told when a damaged one is put aside.
    """

    def __init__(self, file: Path, note: Callable[[str], None] = lambda _: None) -> None:
        self._file, self._note = file, note
        self._lock = file.with_name(file.name + ".lock")
        self._inode = 0
        self._connection = self._connect()

    def __enter__(self) -> Index:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()

    # ------------------------------------------------------------------------------------------------ headers

    def headers(self) -> dict[str, tuple[str, str]]:
        """By path the stamp of a file and what its header said, as this version of pyllamarun reads it."""
        rows = self._run("SELECT path, stamp, entry FROM header WHERE version = ?", [(__version__,)])
        return {path: (stamp, entry) for path, stamp, entry in rows}

    def keep_headers(self, changed: Iterable[tuple[str, str, str]], gone: Iterable[str]) -> None:
        """(path, stamp, entry) of those that are new, and the paths of those that are no more."""
        rows = [(path, __version__, stamp, entry) for path, stamp, entry in changed]
        self._run("INSERT OR REPLACE INTO header VALUES (?, ?, ?, ?)", rows)
        self._run("DELETE FROM header WHERE path = ?", [(path,) for path in gone])

    # -------------------------------------------------------------------------------------------------- files

    def keep_file(
        self, path: Path, sha256: str, *, source: str = "", origin: str = "", revision: str = "", etag: str = ""
    ) -> None:
        real = os.path.realpath(path)
        status = Path(real).stat()
        size_bytes, mtime_ns = status.st_size, status.st_mtime_ns
        record = FileRecord(real, source, origin, revision, etag, sha256, size_bytes, mtime_ns, _now())
        self._run("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [astuple(record)])

    def file(self, path: Path) -> FileRecord | None:
        """What is recorded of a file; None where nothing is."""
        rows = self._run("SELECT * FROM file WHERE path = ?", [(os.path.realpath(path),)])
        return FileRecord(*rows[0]) if rows else None

    def forget(self, real_paths: Iterable[str]) -> None:
        for table in ("file", "header"):
            self._run(f"DELETE FROM {table} WHERE path = ?", [(path,) for path in real_paths])

    # -------------------------------------------------------------------------------------------------- pulls

    def begin(self, path: Path, source: str, targets: Sequence[Path], size_bytes: int) -> None:
        row = (str(path), source, "\n".join(map(str, targets)), size_bytes, _now())
        self._run("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?, ?)", [row])

    def end(self, path: str) -> None:
        self._run("DELETE FROM begun WHERE path = ?", [(path,)])

    def begun(self) -> list[Begun]:
        rows = self._run("SELECT path, source, targets, size_bytes, since FROM begun ORDER BY since", [()])
        return [
            Begun(path, source, tuple(map(Path, targets.split("\n"))), size_bytes, since)
            for path, source, targets, size_bytes, since in rows
        ]

    # ------------------------------------------------------------------------------------------------- SQLite

    def _run(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """One statement for each row, in one transaction; the rows of a query.

        What cannot be read or written (a full disk, a folder without permission, another process that takes too long)
        stays unknown; what is damaged is made anew.
        """
        rows = [[_storable(value) for value in row] for row in rows]
        for attempt in range(2):
            try:
                with self._connection:
                    if statement.startswith("SELECT"):
                        return self._connection.execute(statement, rows[0]).fetchall()
                    self._connection.executemany(statement, rows)
                    return []
            except sqlite3.OperationalError:
                return []
            except sqlite3.DatabaseError as error:
                if attempt == 0:
                    self._connection.close()
                    self._put_aside(str(error))
                    self._connection = self._connect()
        return []

    def _connect(self) -> sqlite3.Connection:
        for _ in range(2):
            try:
                return self._open()
            except _Unusable as error:
                self._put_aside(str(error))
            except (sqlite3.Error, OSError):
                break
        return _made(sqlite3.connect(":memory:"))

    def _open(self) -> sqlite3.Connection:
        """One process at a time: two must not make it at once."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with _locked_file(self._lock):
            return self._opened()

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, timeout=BUSY_SECONDS)
        self._inode = _inode(self._file)
        try:
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            return _made(connection)
        except sqlite3.OperationalError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            raise _Unusable(str(error)) from None
        except _Unusable:
            connection.close()
            raise

    def _put_aside(self, why: str) -> None:
        """Renames a damaged index, unless another process has done so meanwhile."""
        aside = self._file.with_name(self._file.name + ".damaged")
        with suppress(OSError), _locked_file(self._lock):
            if _inode(self._file) != self._inode:
                return
            self._file.replace(aside)
            for suffix in ("-wal", "-shm"):
                self._file.with_name(self._file.name + suffix).unlink(missing_ok=True)
            self._note(f"The index of models could not be read ({why}): it was put aside as {aside}, and made anew.")


class _Unusable(Exception):
    """A file that is no index of this version."""


def _made(connection: sqlite3.Connection) -> sqlite3.Connection:
    """With its tables."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")
        version = SCHEMA
    if version != SCHEMA:
        raise _Unusable(f"it is of version {version}, and this is {SCHEMA}")
    return connection


def open_index(note: Callable[[str], None] = lambda _: None) -> Index:
    return Index(paths.state_folder() / "index.sqlite", note)


def _storable(value: Any) -> Any:
    """SQLite's texts are UTF-8, and a path need not be."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


def _inode(file: Path) -> int:
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---------------------------------------------------------------------------------------------------- checksums


def named_sha256(path: Path) -> str:
    """The checksum that a store calls a file by: a blob of Hugging Face's cache or of Ollama's; "" of any other."""
    real = Path(os.path.realpath(path))
    match = _SHA256.fullmatch(real.name)
    return match[1] if match and real.parent.name == "blobs" else ""


def known_sha256(path: Path, index: Index) -> str:
    """A file's checksum without reading it: as it is named, or as it was recorded if it has not changed since."""
    named = named_sha256(path)
    record = None if named else index.file(path)
    if record is None:
        return named
    try:
        status = path.stat()
    except OSError:
        return ""
    return record.sha256 if (record.size_bytes, record.mtime_ns) == (status.st_size, status.st_mtime_ns) else ""


# -------------------------------------------------------------------------------------------------------- locks


class UnderWay(Exception):
    """Another process pulls this model now."""


@contextmanager
def pulling(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock of the pull of a model, which is to lie at `path`, and counts as a pull for `no_pulls`.

    `waiting` is called before another process is waited for; without it, that raises UnderWay.  The kernel takes a lock
    away with its process, however that ends.
    """
    name = hashlib.sha256(os.fsencode(whole(path))).hexdigest()[:32]
    folder = _locks_folder()
    with ExitStack() as stack:
        stack.enter_context(_locked_file(folder / "any.lock", fcntl.LOCK_SH))
        try:
            stack.enter_context(_locked_file(folder / f"{name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            if waiting is None:
                raise UnderWay from None
            waiting()
            stack.enter_context(_locked_file(folder / f"{name}.lock"))
        yield


@contextmanager
def no_pulls() -> Iterator[bool]:
    """Whether no process pulls anything; as long as this is held, none begins."""
    folder = _locks_folder()
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked_file(folder / "any.lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        for lock in folder.glob("*.lock"):
            if lock.name != "any.lock":
                lock.unlink(missing_ok=True)
        yield True


def _locks_folder() -> Path:
    folder = paths.state_folder() / "pulls"
    try:
        make_writable(folder)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to, where one process tells another what it pulls.",
            why=error.strerror or str(error),
            remedy="Make it writable, or set PYLLAMARUN_HOME to a folder that is.",
        ) from None
    return folder


@contextmanager
def _locked_file(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
