"""Finds models on the network: of repositories on Hugging Face, and at addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyllamarun import paths
from pyllamarun.errors import DownloadError, UsageError
from pyllamarun.models import hub, stores
from pyllamarun.models.gguf import Header
from pyllamarun.models.http import Web, check_url
from pyllamarun.models.hub_cache import Spot
from pyllamarun.models.names import (
    PROJECTOR,
    check_safe,
    is_gguf,
    models_among,
    part_names,
    quantization,
    with_quantization,
)
from pyllamarun.models.refusals import Place
from pyllamarun.models.remote import RemoteFile, read_remote_header
from pyllamarun.models.sources import Source


def read_header_from(path: Path, remote: Callable[[Path], RemoteFile]) -> Header:
    """The header of a model that is not here; raises UsageError, ModelError and DownloadError."""
    with closing(Web()) as web:
        return read_remote_header(web, path, remote)


def repository(text: str) -> tuple[Source, ...]:
    """All the models of a repository whose name says none, hf:OWNER/REPO, the smallest first; () for any other name.

    Raises UsageError for what is no name, and DownloadError where the network is asked and does not answer.
    """
    name = hub.parse_name(text[3:]) if text.startswith("hf:") else None
    if name is None or name.file or name.quantization:
        return ()
    here = _here(name)
    if hub.is_offline():
        sizes: dict[str, int | None] = {file: path.stat().st_size for file, path in here.items()}
        listing = hub.Listing("", ())
    else:
        with closing(Web()) as web:
            listing = hub.list_files(web, name)
        sizes = {file.path: file.size_bytes for file in listing.files}
    models = sorted(
        models_among(sizes), key=lambda path: (sum(sizes.get(part) or 0 for part in part_names(path)), path)
    )
    found = (_in_repository(name, listing, here, file) for file in models)
    return tuple(replace(source, name=str(hub.shortest(name, file, sizes))) for source, file in zip(found, models))


def named_source(text: str) -> Source:
    """What hf:TEXT means."""
    return _hub_source(hub.parse_name(text))


def _hub_source(name: hub.HubName) -> Source:
    """A file that is here is used; where the name says none, the repository is asked which ones it has."""
    here = _here(name)
    known = _known(name, here)
    if known:
        return known
    if hub.is_offline():
        return _offline(name, here)
    with closing(Web()) as web:
        listing = hub.list_files(web, name)
    return _in_repository(name, listing, here, hub.choose(name, listing.files))


def here_source(text: str) -> Source:
    """What hf:TEXT means of what is here; no network is asked.  Raises UsageError, or DownloadError where it is not."""
    name = hub.parse_name(text)
    here = _here(name)
    return _known(name, here) or _offline(name, here)


def _known(name: hub.HubName, here: Mapping[str, Path]) -> Source | None:
    """The file that the name leaves no doubt about, if it is here."""
    known = [name.file] if name.file else []
    if name.quantization:
        known = with_quantization(models_among(here), name.quantization)
    return Source(str(name), here[known[0]]) if len(known) == 1 and known[0] in here else None


def projector(source: Source) -> Source:
    """The vision projector that lies beside a model of a repository: its mmproj, F16 where there are several.

    Raises UsageError where the model is from no repository, and DownloadError where there is none.
    """
    name = hub.parse_name(source.name[3:]) if source.name.startswith("hf:") else None
    if name is None:
        raise UsageError(
            f"Which projector belongs to {source.name} is not known: an address has no list of files beside it.",
            remedy="Pull it by its own address.",
        )
    here = _here(name)
    if hub.is_offline():
        listing = hub.Listing("", tuple(hub.HubFile(file, path.stat().st_size, "") for file, path in here.items()))
    else:
        with closing(Web()) as web:
            listing = hub.list_files(web, name)
    found = [file.path for file in listing.files if PurePosixPath(file.path).name.lower().startswith(PROJECTOR)]
    if not found:
        what = f"There is no {PROJECTOR}*.gguf in hf:{name.repository}."
        raise DownloadError(what, remedy="Leave --mmproj out, or look for a repository that has one.")
    beside = PurePosixPath(name.file).parent
    found.sort(key=lambda path: (PurePosixPath(path).parent != beside, quantization(path) not in ("F16", "FP16"), path))
    return _in_repository(name, listing, here, found[0])


def _here(name: hub.HubName) -> dict[str, Path]:
    """The repository's files that are on this machine, of models that are whole."""
    folder = _folder(name)
    here = hub.cached_files(name) | {str(path.relative_to(folder)): path for path in stores.gguf_files(folder)}
    return {file: path for file, path in here.items() if all(part in here for part in part_names(file))}


def _folder(name: hub.HubName) -> Path:
    return paths.models_folder() / hub.folder_name(name)


def _in_repository(name: hub.HubName, listing: hub.Listing, here: Mapping[str, Path], file: str) -> Source:
    """One of its models, by its file or the first of its parts."""
    if file in here:
        return Source(str(name), here[file])
    folder_in_repository = PurePosixPath(file).parent
    found = [listing.file(part) for part in part_names(file)]
    in_cache = bool(listing.commit) and all(entry and entry.blob for entry in found)

    def spot(entry: hub.HubFile) -> Spot:
        return Spot(hub.cache_folder(name), name.revision, listing.commit, entry.path, entry.blob)

    def find(part: Path) -> RemoteFile:
        path = str(folder_in_repository / part.name)
        entry = listing.file(path)
        if entry is None:
            what = f"There is no {path} in hf:{name.repository}, and it is a part of {file}."
            raise DownloadError(what, remedy="Name another file; this model is not whole.")
        where = hub.place(name, path, listing.commit)
        return RemoteFile(where, entry.size_bytes, entry.sha256, spot(entry) if in_cache else None)

    target = hub.cache_folder(name) / "snapshots" / listing.commit / file if in_cache else _folder(name) / file
    return Source(str(hub.HubName(name.repository, file, revision=name.revision)), target, find)


def _offline(name: hub.HubName, here: Mapping[str, Path]) -> Source:
    """The model that the name means, of those that are here."""
    if not models_among(here):
        offline = hub.is_offline()
        why = "HF_HUB_OFFLINE is set, so Hugging Face is not asked." if offline else ""
        remedy = ("Unset HF_HUB_OFFLINE, or name" if offline else "Name") + " a model that is here: `pyllamarun list`."
        raise DownloadError(f"{name} is not on this machine.", why=why, remedy=remedy)
    file = hub.choose(name, [hub.HubFile(file, path.stat().st_size, "") for file, path in here.items()])
    return Source(str(name), here[file])


def url_source(url: str) -> Source:
    """What an address means."""
    name = hub.name_of_url(url)
    if name:
        return _hub_source(name)
    check_url(url)
    parts = urlsplit(url)
    folder, _, file = parts.path.rpartition("/")
    segments = [check_safe(unquote(segment)) for segment in parts.path.split("/") if segment]
    if not segments or not is_gguf(segments[-1]):
        raise UsageError("The address does not end in the name of a GGUF file.", why=_shown(url), remedy=_URL_REMEDY)
    target = paths.models_folder().joinpath(check_safe(parts.netloc.lower()), *segments)
    if all(stores.is_file(target.with_name(part)) for part in part_names(target.name)):
        return Source(str(target), target)

    def find(part: Path) -> RemoteFile:
        last = file if part.name == target.name else quote(part.name)
        address = urlunsplit(parts._replace(path=f"{folder}/{last}", fragment=""))
        return RemoteFile(Place(address, _shown(address)))

    return Source(url, target, find)


def _shown(url: str) -> str:
    """An address as messages show it: a query may hold a secret."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


_URL_REMEDY = "Write an address such as https://HOST/FOLDER/FILE.gguf."
