"""Models on Hugging Face: their names, their files, and those that its cache holds.

Through huggingface_hub: its cache, token, endpoint and offline mode hold here too (HF_HUB_CACHE, HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pyllamarun.errors import DownloadError, UsageError
from pyllamarun.models.http import Interrupted, Web, origin
from pyllamarun.models.names import (
    check_safe,
    is_gguf,
    is_safe,
    models_among,
    part_names,
    quantization,
    with_quantization,
)
from pyllamarun.models.refusals import AGAIN, Place
from pyllamarun.models.stores import gguf_files, is_file
from pyllamarun.units import format_size

DEFAULT_REVISION = "main"
MAX_LISTING_BYTES = 16 << 20
FORMS = "Write hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M or hf:OWNER/REPO/FILE.gguf, each with @REVISION if need be."
LOGIN = "set HF_TOKEN, or run `hf auth login`"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"


@dataclass(frozen=True)
class HubName:
    """A model on Hugging Face, as it was typed: a repository, and of it a file, a quantization or neither."""

    repository: str
    file: str = ""
    quantization: str = ""
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else f":{self.quantization}" if self.quantization else ""
        revision = f"@{self.revision}" if self.revision != DEFAULT_REVISION else ""
        return f"hf:{self.repository}{file}{revision}"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository; its size, where the server says it; `sha256` of large ones, and empty else.

    `blob` is what Hugging Face's cache calls its content: the sha256, or git's hash of a small file; "" if not said.
    """

    path: str
    size_bytes: int | None
    sha256: str
    blob: str = ""


@dataclass(frozen=True)
class Listing:
    """The GGUF files of a repository at one commit."""

    commit: str
    files: tuple[HubFile, ...]

    def file(self, path: str) -> HubFile | None:
        return next((file for file in self.files if file.path == path), None)


def parse_name(text: str) -> HubName:
    """What stands after "hf:".  Raises UsageError for what is no such name."""
    text, at, revision = text.partition("@")
    match = re.fullmatch(rf"({_WORD}/{_WORD})(?:/(.+)|:([A-Za-z0-9_.-]+))?", text)
    if not match or (at and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./-]*", revision)) or ".." in revision:
        raise UsageError(f'"hf:{text}{at}{revision}" is no name of a model on Hugging Face.', remedy=FORMS)
    repository, file, label = match[1], match[2] or "", match[3] or ""
    if file and not is_gguf(check_safe(file)):
        raise UsageError(f'"{file}" is no GGUF file.', remedy=FORMS)
    return HubName(repository, file, label, revision or DEFAULT_REVISION)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT).rstrip("/")


def name_of_url(url: str) -> HubName | None:
    """The name of what an address on Hugging Face's own host leads to: a file, to be read or looked at."""
    endpoint = _endpoint()
    if origin(url) != origin(endpoint):
        return None
    below = urlsplit(url).path.removeprefix(urlsplit(endpoint).path)
    match = re.fullmatch(rf"/({_WORD}/{_WORD})/(?:resolve|blob|raw)/([^/]+)/(.+)", below)
    return parse_name(f"{match[1]}/{unquote(match[3])}@{unquote(match[2])}") if match else None


def folder_name(name: HubName) -> str:
    """Where below the folder of models a repository's files are kept."""
    revision = f"@{quote(name.revision, safe='')}" if name.revision != DEFAULT_REVISION else ""
    return name.repository + revision


def cache_folder(name: HubName) -> Path:
    """Where Hugging Face's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.repository.replace('/', '--')}"


def cached_files(name: HubName) -> dict[str, Path]:
    """The GGUF files of that repository and revision that Hugging Face's cache holds, by their names there."""
    folder = cache_folder(name)
    try:
        commit = (folder / "refs" / name.revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = name.revision
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return {}
    return {str(path.relative_to(snapshot)): path for path in gguf_files(snapshot) if is_file(path)}


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def place(name: HubName, path: str = "", commit: str = "") -> Place:
    """Where a file of the repository lies, or, without a path, the list of its files."""
    from huggingface_hub import hf_hub_url

    revision = commit or name.revision
    if path:
        url = hf_hub_url(name.repository, path, revision=revision, endpoint=_endpoint())
        shown = str(HubName(name.repository, path, revision=name.revision))
    else:
        url = f"{_endpoint()}/api/models/{name.repository}/revision/{quote(revision, safe='')}?blobs=true"
        shown = str(name)
    return Place(url, shown, _token(), f"{_endpoint()}/{name.repository}", LOGIN)


def _token() -> str | None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        return get_token()
    except Exception as error:  # whatever it takes to log in where it runs
        why = f"huggingface_hub: {type(error).__name__}"
        raise DownloadError("The token for Hugging Face cannot be had.", why=why, remedy=f"Try: {LOGIN}.") from None


def list_files(web: Web, name: HubName) -> Listing:
    """Asks for a repository's GGUF files.  Raises DownloadError."""
    where = place(name)
    for attempt in range(web.patience.attempts):
        response = web.get(where, {})
        body = bytearray()
        try:
            for piece in web.body(response):
                body += piece
                if len(body) > MAX_LISTING_BYTES:
                    raise DownloadError(f"The list of the files of {name} is too long.")
            return _parse_listing(where, bytes(body))
        except Interrupted as error:
            why = f"{error}."
            web.patience.sleep(2**attempt / 2)
        finally:
            response.close()
    raise DownloadError(f"The list of the files of {name} cannot be read.", why=why, remedy=AGAIN)


def _parse_listing(where: Place, body: bytes) -> Listing:
    try:
        data = json.loads(body)
        files = tuple(_file(entry) for entry in data["siblings"] if is_gguf(entry["rfilename"]))
        commit = str(data.get("sha") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DownloadError(
            f"{where.shown}: the server answers something else than a list of files.",
            remedy="Check HF_ENDPOINT, and whether the network wants a login in a browser first.",
        ) from None
    safe = tuple(file for file in files if is_safe(file.path))
    return Listing(commit if re.fullmatch(r"[0-9a-f]{40}", commit) else "", safe)


def _file(entry: dict[str, Any]) -> HubFile:
    lfs = entry.get("lfs") or {}
    sha256 = _hash(lfs.get("sha256"), 64)
    size = entry.get("size")
    blob = sha256 or _hash(entry.get("blobId"), 40)
    return HubFile(str(entry["rfilename"]), size if isinstance(size, int) else None, sha256, blob)


def _hash(value: object, digits: int) -> str:
    """What a server says is a hash, if it is one: it becomes the name of a file."""
    return value if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) else ""


def choose(name: HubName, files: Sequence[HubFile]) -> str:
    """The file, or the first part, that the name means, of those that there are.

    Raises DownloadError where there is none such, and UsageError where there are several.
    """
    sizes = {file.path: file.size_bytes for file in files}
    models = models_among(sizes)
    if name.file:
        found = [name.file] if name.file in sizes else []
    else:
        found = with_quantization(models, name.quantization) if name.quantization else models
    if len(found) == 1:
        return found[0]
    choices = "\n".join(_choice(name, path, sizes) for path in sorted(found or models))
    if not found:
        what = f"There is no {name}."
        why = f"The repository has:\n{choices}" if models else "The repository has no model in GGUF format."
        raise DownloadError(what, why=why, remedy="Name one of these." if models else "Look for one that has.")
    raise UsageError(f"{name} has several models.", why=choices, remedy="Name one of these.")


def shortest(name: HubName, path: str, files: Iterable[str]) -> HubName:
    """The repository's name with what tells this file from the other models: its quantization, if that does."""
    label = quantization(path)
    alone = label and [quantization(other) for other in models_among(files)].count(label) == 1
    return HubName(name.repository, "" if alone else path, label if alone else "", name.revision)


def _choice(name: HubName, path: str, sizes: Mapping[str, int | None]) -> str:
    """What to type for a file, and its size."""
    one = shortest(name, path, sizes)
    size_bytes = sum(sizes.get(part) or 0 for part in part_names(path))
    return f"{one}  {format_size(size_bytes)}" if size_bytes else str(one)
