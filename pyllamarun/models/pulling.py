"""Pulls models: which files that takes, whether they are here already, and bringing them to where they are kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pyllamarun.errors import DownloadError, ModelError, UsageError
from pyllamarun.models import hub_cache
from pyllamarun.models.disk import disk_error
from pyllamarun.models.download import Wanted, fetch
from pyllamarun.models.gguf import read_header
from pyllamarun.models.http import Web
from pyllamarun.models.hub import parse_name
from pyllamarun.models.names import part_names
from pyllamarun.models.remote import RemoteFile
from pyllamarun.models.sources import Source
from pyllamarun.models.store import Begun, Index, known_sha256, pulling
from pyllamarun.models.stores import Stored, all_stored, file_bytes, is_file
from pyllamarun.units import MIB, format_size

DISK_RESERVE_BYTES = 64 * MIB
# What models/partial.py keeps beside a target.
PARTIAL = ".partial"
BESIDE = (PARTIAL, ".partial.journal", ".partial.journal.new", ".rejected")


@dataclass(frozen=True)
class Part:
    """One file: where it will be used, and where it is now."""

    path: Path
    remote: RemoteFile

    @property
    def target(self) -> Path:
        """What is written: in Hugging Face's cache the blob that `path` leads to."""
        return self.remote.spot.blob if self.remote.spot else self.path


@dataclass(frozen=True)
class Job:
    """A pull: the model's files, and then the projector's, if that is wanted.

    `name` is how messages speak of it, an address without its query.
    """

    source: Source
    parts: tuple[Part, ...]
    projector: Path | None = None

    @property
    def name(self) -> str:
        return shown_name(self.source)

    @property
    def model_parts(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.path != self.projector)

    @property
    def missing(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not is_file(part.target))


@dataclass(frozen=True)
class PulledFile:
    """`transferred_bytes` came over the network now, `resumed_bytes` before; `waited`: another process fetched it."""

    path: Path
    sha256: str
    size_bytes: int
    transferred_bytes: int
    resumed_bytes: int
    waited: bool


def shown_name(source: Source) -> str:
    """A source's name as messages show it and the index keeps it: a query may hold a secret."""
    is_address = re.match(r"https?://", source.name, re.IGNORECASE)
    return urlunsplit(urlsplit(source.name)._replace(query="", fragment="")) if is_address else source.name


def job_of(source: Source, projector: Source | None = None, sha256: str = "") -> Job:
    """All the files of a source that is not here; `sha256` is what the user says of it.  Raises UsageError."""
    assert source.remote is not None
    find = source.remote
    parts = [Part(path, find(path)) for path in map(source.path.with_name, part_names(source.path.name))]
    if sha256:
        parts = [_promised(source, part, sha256, len(parts)) for part in parts]
    if projector is not None and projector.remote is not None:
        parts.append(Part(projector.path, projector.remote(projector.path)))
    return Job(source, tuple(parts), projector.path if projector else None)


def _promised(source: Source, part: Part, sha256: str, count: int) -> Part:
    if count > 1:
        raise UsageError(
            f"{shown_name(source)} has {count} files, and --sha256 is of one.",
            remedy="Leave it out; where the source publishes checksums, all files are held against them.",
        )
    if part.remote.sha256 not in ("", sha256):
        raise DownloadError(
            f"{shown_name(source)} is not the file that you want.",
            why=f"Its source publishes the sha256 {part.remote.sha256}, and you gave {sha256}.",
            remedy="Check both; nothing was downloaded.",
        )
    return replace(part, remote=replace(part.remote, sha256=sha256))


def same_here(job: Job, index: Index) -> Stored | None:
    """The same model in another place on this machine, whoever keeps it there.

    The same is what has the published checksums; or, where one of these is not known, the repository's and file's name,
    and the size.
    """
    parts = job.model_parts
    sizes, published = [part.remote.size_bytes for part in parts], [part.remote.sha256 for part in parts]
    name = parse_name(job.source.name[3:]) if job.source.name.startswith("hf:") else None
    for one in all_stored():
        if one.problem or len(one.parts) != len(parts) or _is_of_repository(one, parts[0]):
            continue
        known = [known_sha256(path, index) for path in one.parts]
        if all(published) and known == published:
            return one
        conflicts = any(a and b and a != b for a, b in zip(known, published))
        same_name = name is not None and one.name == f"{name.repository}/{name.file}"
        if same_name and not conflicts and [file_bytes(path) for path in one.parts] == sizes:
            return one
    return None


def _is_of_repository(one: Stored, part: Part) -> bool:
    """Of which another revision holds the same: then a link is all that is made."""
    return part.remote.spot is not None and hub_cache.repository_of(one.path) == part.remote.spot.folder


def check_disk(job: Job, size_bytes: int, more: Sequence[tuple[Path, int]] = ()) -> list[tuple[Path, int, int]]:
    """For each disk that is written to: the folder, what it takes, what is free.

    `more` will be written besides, by folder.  Raises DownloadError where a disk lacks room.
    """
    needs = [(job.parts[0].target.parent, size_bytes), *more]
    disks: dict[int, tuple[Path, int]] = {}
    for folder, needed in needs:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        first, before = disks.get(existing.stat().st_dev, (existing, 0))
        disks[existing.stat().st_dev] = first, before + needed
    found = [(folder, needed, shutil.disk_usage(folder).free) for folder, needed in disks.values()]
    for folder, needed, free in found:
        if needed and free < needed + DISK_RESERVE_BYTES:
            raise DownloadError(
                f"There is not enough room for {job.name}.",
                why=f"{format_size(needed)} more are needed in {folder}, and {format_size(free)} are free there.",
                remedy="Make room (`pyllamarun list` shows what takes it, `pyllamarun rm` removes a model), or set "
                + ("HF_HUB_CACHE" if job.parts[0].remote.spot else "PYLLAMARUN_HOME")
                + " to a folder on another disk.",
            )
    return found


def present_bytes(targets: Sequence[Path]) -> int:
    """What is on the disk already of files that are whole or on their way."""
    partials = (target.with_name(target.name + PARTIAL) for target in targets)
    return sum(allocated_bytes(target) or allocated_bytes(partial) for target, partial in zip(targets, partials))


def is_here(begun: Begun) -> bool:
    """Whether a pull that was begun has been carried out since, by another program."""
    return all(is_file(path) for path in (Path(begun.path), *begun.targets))


def partial_files(target: Path) -> list[Path]:
    """What a download that has not ended, or that came wrong, keeps beside its target."""
    return [path for suffix in BESIDE if is_file(path := target.with_name(target.name + suffix))]


def allocated_bytes(path: Path) -> int:
    """What a file that may have holes takes of the disk."""
    try:
        status = path.stat()
    except OSError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


def carry_out(
    job: Job,
    index: Index,
    size_bytes: int,
    progress: Callable[[int, int], None] = lambda _, __: None,
    say: Callable[[str], None] = lambda _: None,
) -> list[PulledFile]:
    """Brings all files, one after the other, and checks what they are.

    `progress` is told the bytes that are here, of all; `say`, what a person should know meanwhile.  Where another
    process is at it, that is waited for, and its files are used.  Raises DownloadError, and ModelError where what came
    is no sound model.
    """
    waited = False

    def wait() -> None:
        nonlocal waited
        waited = True
        say("Another process pulls it already: this one waits for that.")

    with closing(Web()) as web, pulling(job.source.path, wait):
        index.begin(job.source.path, job.name, [part.target for part in job.parts], size_bytes)
        pulled: list[PulledFile] = []
        for part in job.parts:
            before = sum(one.size_bytes for one in pulled)
            advance = _advance(progress, before, size_bytes)
            got = _bring(web, job, part, index, advance, say)
            pulled.append(replace(got, waited=got.waited or waited))
        for path in filter(None, (job.source.path, job.projector)):
            check_whole(path)
        index.end(str(job.source.path))
    return pulled


def _advance(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)


def _bring(
    web: Web, job: Job, part: Part, index: Index, progress: Callable[[int, int], None], say: Callable[[str], None]
) -> PulledFile:
    spot = part.remote.spot
    if spot is None:
        return _fetched(web, job, part, index, progress, say)
    hub_cache.make_room(spot)
    try:
        with hub_cache.locked(spot.lock):
            pulled = _fetched(web, job, part, index, progress, say)
            hub_cache.publish(spot)
    except OSError as error:
        raise disk_error(part.path, error) from None
    return pulled


def _fetched(
    web: Web, job: Job, part: Part, index: Index, progress: Callable[[int, int], None], say: Callable[[str], None]
) -> PulledFile:
    """The file under its target's name; what is there already stays as it is."""
    remote = part.remote
    if is_file(part.target):
        size_bytes = file_bytes(part.target)
        progress(size_bytes, size_bytes)
        return PulledFile(part.path, known_sha256(part.target, index), size_bytes, 0, 0, waited=False)
    got = fetch(web, Wanted(remote.place, part.target, remote.size_bytes, remote.sha256), progress, say)
    origin = urlsplit(remote.place.url)
    index.keep_file(
        part.target,
        got.sha256,
        source=job.name,
        origin=f"{origin.scheme}://{origin.netloc}{origin.path}",
        revision=remote.spot.commit if remote.spot else "",
        etag=got.etag,
    )
    transferred, resumed = got.transferred_bytes, got.resumed_bytes
    return PulledFile(part.path, got.sha256, got.size_bytes, transferred, resumed, got.waited)


def check_whole(path: Path) -> None:
    """Raises ModelError where a model's files, as they are here, are not sound: what to do then is to get it again."""
    try:
        read_header(path)
    except ModelError as error:
        remedy = f"Remove it, and pull it again: pyllamarun rm {path}"
        raise ModelError(error.what, why=error.why, remedy=remedy) from None
