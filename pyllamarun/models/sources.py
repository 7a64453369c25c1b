"""Finds what a user means by MODEL: a file, a model that another program keeps here, or one on the network."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pyllamarun import paths
from pyllamarun.errors import DownloadError, UsageError
from pyllamarun.models import hub, stores
from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.http import Web, check_url
from pyllamarun.models.names import check_safe, is_gguf, models_among, part_names, with_quantization
from pyllamarun.models.refusals import Place
from pyllamarun.models.remote import RemoteFile, read_remote_header


@dataclass(frozen=True)
class Source:
    """Where a model is.

    `path` is its file, or the first of its parts.  Where it is not on this machine, that is the place where `pull`
    puts it, and `remote` says where on the network each of its files lies.  `name` is what to type for it.
    """

    name: str
    path: Path
    remote: Callable[[Path], RemoteFile] | None = None

    @property
    def is_here(self) -> bool:
        return self.remote is None

    def read_header(self) -> Header:
        """Raises UsageError, ModelError, and DownloadError where it is read over the network."""
        if self.remote is None:
            return read_header(self.path)
        with closing(Web()) as web:
            return read_remote_header(web, self.path, self.remote)

    def check_here(self) -> None:
        """Raises UsageError where the model itself is needed, and is not on this machine."""
        if not self.is_here:
            raise UsageError(
                f"{self.name} is not on this machine.",
                why="Its header is enough for a plan; to run it, the model is needed.",
                remedy=f"Pull it first: {self.pull_command}",
            )

    @property
    def pull_command(self) -> str:
        return shlex.join(["pyllamarun", "pull", self.name])


def resolve(text: str) -> Source:
    """What MODEL means: hf:OWNER/REPO..., https://..., a path, or the name of a model in a store on this machine.

    Raises UsageError for what is none of these, and DownloadError where the network is asked and does not answer.
    """
    if text.startswith("hf:"):
        return _hub_source(hub.parse_name(text[3:]))
    if re.match(r"https?://", text, re.IGNORECASE):
        return _url_source(text)
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"There is no home folder for {text}.", remedy="Write the whole path.") from None
    if stores.is_file(path) or text.startswith(("/", "./", "../", "~")):
        return Source(str(path), path)
    found = stores.find(text)
    if found:
        return Source(found.name, found.path)
    if os.path.lexists(path):
        return Source(str(path), path)
    hint = f", or hf:{text} for one on Hugging Face" if re.fullmatch(r"[\w.-]+/[\w.-]+([:/].*)?", text) else ""
    raise UsageError(
        f"There is no file {text}, and no model of that name on this machine.",
        remedy=f"Check the path; `pyllamarun list` shows the models that are here{hint}.",
    )


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


def _hub_source(name: hub.HubName) -> Source:
    """A file that is here is used; where the name says none, the repository is asked which ones it has."""
    here = _here(name)
    known = [name.file] if name.file else []
    if name.quantization:
        known = with_quantization(models_among(here), name.quantization)
    if len(known) == 1 and known[0] in here:
        return Source(str(name), here[known[0]])
    if hub.is_offline():
        return _offline(name, here)
    with closing(Web()) as web:
        listing = hub.list_files(web, name)
    return _in_repository(name, listing, here, hub.choose(name, listing.files))


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

    def find(part: Path) -> RemoteFile:
        path = str(folder_in_repository / part.name)
        entry = listing.file(path)
        if entry is None:
            what = f"There is no {path} in hf:{name.repository}, and it is a part of {file}."
            raise DownloadError(what, remedy="Name another file; this model is not whole.")
        return RemoteFile(hub.place(name, path, listing.commit), entry.size_bytes)

    return Source(str(hub.HubName(name.repository, file, revision=name.revision)), _folder(name) / file, find)


def _offline(name: hub.HubName, here: Mapping[str, Path]) -> Source:
    """The model that the name means, of those that are here."""
    if not models_among(here):
        raise DownloadError(
            f"{name} is not on this machine.",
            why="HF_HUB_OFFLINE is set, so Hugging Face is not asked.",
            remedy="Unset HF_HUB_OFFLINE, or name a model that is here: `pyllamarun list`.",
        )
    file = hub.choose(name, [hub.HubFile(file, path.stat().st_size, "") for file, path in here.items()])
    return Source(str(name), here[file])


def _url_source(url: str) -> Source:
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
