"""Models that are on this machine already: pyllamarun's own, and those that other programs keep.

They are used where they lie, and never copied, moved or written to.  What cannot be read is passed over.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamarun import paths
from pyllamarun.errors import UsageError
from pyllamarun.models.names import is_companion, is_gguf, is_later_part, part_names, quantization

OWN, HUGGING_FACE, LM_STUDIO, OLLAMA, NONE = "pyllamarun", "huggingface", "lmstudio", "ollama", ""
MAX_DEPTH = 8
MAX_MANIFEST_BYTES = 1 << 20
NAMES = {OWN: "pyllamarun", HUGGING_FACE: "Hugging Face's cache", LM_STUDIO: "LM Studio", OLLAMA: "Ollama"}
OLLAMA_REGISTRY, OLLAMA_NAMESPACE, OLLAMA_TAG = "registry.ollama.ai", "library", "latest"
OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class Stored:
    """A model in a store, by its name there; `problem` says why it cannot be used, where that shows already."""

    store: str
    name: str
    parts: tuple[Path, ...]
    problem: str = ""

    @property
    def path(self) -> Path:
        return self.parts[0]


def all_stored() -> list[Stored]:
    """Every model of every store, without looking into their files."""
    stored = [*_files(OWN, paths.models_folder()), *_hugging_face()]
    for folder in lm_studio_folders():
        stored += _files(LM_STUDIO, folder)
    for folder in ollama_folders():
        stored += _ollama(folder)
    return stored


def find(text: str) -> Stored | None:
    """The model of that name: its whole name, of the first store that has it, or a shorter one that only one has.

    Raises UsageError where a shorter name is that of several.
    """
    stored = [one for one in all_stored() if not one.problem]
    for one in stored:
        if text == one.name:
            return one
    found = {os.path.realpath(one.path): one for one in reversed(stored) if text.casefold() in _short_names(one)}
    if len(found) > 1:
        choices = "\n".join(f"{one.name}  ({one.path})" for one in reversed(found.values()))
        raise UsageError(f'Several models are called "{text}".', why=choices, remedy="Name one of these, or its path.")
    return next(iter(found.values()), None)


def _short_names(one: Stored) -> set[str]:
    """What else may be typed for it, in lower case."""
    name = one.name.casefold()
    if one.store == OLLAMA:
        return {name, name.removesuffix(f":{OLLAMA_TAG}")}
    file = name.rpartition("/")[2]
    short = {name, file, file.removesuffix(".gguf"), re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", file)}
    folders = name.split("/")[:-1]
    if len(folders) >= 2 and not is_companion(file):
        repository = "/".join(folders[:2])
        short |= {repository, f"{repository}:{quantization(one.name).casefold()}"}
    return short


def is_file(path: Path) -> bool:
    """Whether there is a regular file that may be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def file_bytes(path: Path) -> int:
    """A file's size; 0 where there is none, or none any more."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def whole(path: Path) -> Path:
    """The whole path, without following links."""
    return Path(os.path.normpath(path.absolute()))


def is_folder(path: Path) -> bool:
    """Whether there is a folder that may be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_kept_by_others(path: Path) -> bool:
    """Whether a file lies in another program's store, which is never written to."""
    if any(part.startswith("models--") for part in path.absolute().parts):  # in Hugging Face's cache, wherever that is
        return True
    return any(path.absolute().is_relative_to(one.absolute()) for one in (*lm_studio_folders(), *ollama_folders()))


def gguf_files(folder: Path) -> Iterator[Path]:
    """The GGUF files below a folder, in order; links to folders are followed, and none is entered twice."""
    seen: set[tuple[int, int]] = set()

    def walk(path: Path, depth: int) -> Iterator[Path]:
        try:
            status = path.stat()
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            return
        if (status.st_dev, status.st_ino) in seen or depth > MAX_DEPTH:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(".partial"):
                continue  # of files that are being made
            if is_folder(path / entry.name):
                yield from walk(path / entry.name, depth + 1)
            elif is_gguf(entry.name):
                yield path / entry.name

    return walk(folder, 0)


def _files(store: str, folder: Path) -> list[Stored]:
    return _models(store, {path.relative_to(folder).as_posix(): path for path in gguf_files(folder)})


def _models(store: str, files: Mapping[str, Path], suffix: str = "") -> list[Stored]:
    """Files as models, the parts of a split as one."""
    wanted = {part for name in files if not is_later_part(name) for part in part_names(name)}
    models = []
    for name, path in files.items():
        if is_later_part(name):
            if name not in wanted:
                models.append(Stored(store, name + suffix, (path,), "The first part of this split model is missing."))
            continue
        parts = part_names(name)
        missing = sum(part not in files for part in parts)
        problem = f"{missing} of its {len(parts)} parts are missing." if missing else ""
        models.append(Stored(store, name + suffix, tuple(files[part] for part in parts if part in files), problem))
    return models


def _hugging_face() -> list[Stored]:
    """By repository and revision: the one that is called main first, others with their commit, each file once."""
    from huggingface_hub import constants

    stored = []
    for folder in _folders(Path(constants.HF_HUB_CACHE)):
        match = re.fullmatch(r"models--([^/]+?)--([^/]+)", folder.name)
        if not match:
            continue
        repository = f"{match[1]}/{match[2]}"
        seen: set[str] = set()
        main = _text(folder / "refs" / "main").strip()
        for snapshot in sorted(_folders(folder / "snapshots"), key=lambda path: path.name != main):
            files = {f"{repository}/{path.relative_to(snapshot).as_posix()}": path for path in gguf_files(snapshot)}
            new = {name: path for name, path in files.items() if os.path.realpath(path) not in seen}
            seen |= {os.path.realpath(path) for path in new.values()}
            stored += _models(HUGGING_FACE, new, "" if snapshot.name == main else f"@{snapshot.name[:12]}")
    return stored


def lm_studio_folders() -> list[Path]:
    """LM Studio's default folders, of this version and earlier ones; PYLLAMARUN_LMSTUDIO_MODELS names another."""
    chosen = os.environ.get("PYLLAMARUN_LMSTUDIO_MODELS")
    if chosen:
        return [Path(chosen).expanduser()]
    return _distinct([Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"])


def ollama_folders() -> list[Path]:
    """OLLAMA_MODELS, or where Ollama keeps models for a user and, as a service, for all."""
    chosen = os.environ.get("OLLAMA_MODELS")
    if chosen:
        return [Path(chosen).expanduser()]
    return _distinct([Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models")])


def _ollama(folder: Path) -> list[Stored]:
    """manifests/REGISTRY/NAMESPACE/MODEL/TAG, each a JSON object that names its blobs by their digests."""
    stored = []
    for registry in _folders(folder / "manifests"):
        for namespace in _folders(registry):
            for model in _folders(namespace):
                for manifest in filter(is_file, _entries(model)):
                    names = registry.name, namespace.name, model.name, manifest.name
                    stored.append(_ollama_model(folder, _ollama_name(*names), manifest))
    return stored


def _ollama_name(registry: str, namespace: str, model: str, tag: str) -> str:
    """As `ollama list` shows it."""
    folders = [registry, namespace] if registry != OLLAMA_REGISTRY else [namespace]
    return "/".join([*([] if folders == [OLLAMA_NAMESPACE] else folders), f"{model}:{tag}"])


def _ollama_model(folder: Path, name: str, manifest: Path) -> Stored:
    try:
        layers: list[dict[str, Any]] = json.loads(_text(manifest))["layers"]
        digests = [str(layer["digest"]) for layer in layers if layer["mediaType"] == OLLAMA_MODEL]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Stored(OLLAMA, name, (manifest,), "Its manifest cannot be read.")
    if not digests:
        return Stored(OLLAMA, name, (manifest,), "It has no model in GGUF format.")
    if not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digests[0]):
        return Stored(OLLAMA, name, (manifest,), "Its manifest names no sound digest.")
    blob = folder / "blobs" / digests[0].replace(":", "-")
    return Stored(OLLAMA, name, (blob,), "" if is_file(blob) else "Its blob is missing.")


def _text(path: Path) -> str:
    """A small file's text; "" where there is none that can be read."""
    try:
        if not is_file(path):
            return ""
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES).decode("utf-8")
    except (OSError, ValueError):
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _folders(folder: Path) -> list[Path]:
    return list(filter(is_folder, _entries(folder)))


def _distinct(folders: Iterable[Path]) -> list[Path]:
    return list({os.path.realpath(folder): folder for folder in folders}.values())
