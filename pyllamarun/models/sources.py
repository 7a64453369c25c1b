"""Finds what a user means by MODEL: a file, a model that another program keeps here, or one on the network."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
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


def _hub_source(name: hub.HubName) -> Source:
    """A file that is here is used; where the name says none, the repository is asked which ones it has."""
    folder = paths.models_folder() / hub.folder_name(name)
    here = hub.cached_files(name) | {str(path.relative_to(folder)): path for path in stores.gguf_files(folder)}
    here = {file: path for file, path in here.items() if all(part in here for part in part_names(file))}
    known = [name.file] if name.file else []
    if name.quantization:
        known = with_quantization(models_among(here), name.quantization)
    if len(known) == 1 and known[0] in here:
        return Source(str(name), here[known[0]])
    if hub.is_offline():
        return _offline(name, here)
    with closing(Web()) as web:
        listing = hub.list_files(web, name)
    file = hub.choose(name, listing.files)
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

    return Source(str(hub.HubName(name.repository, file, revision=name.revision)), folder / file, find)


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
