"""Removes models: pyllamarun's own, and those in Hugging Face's cache; never what another program keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyllamarun import paths
from pyllamarun.errors import UsageError
from pyllamarun.models import hub_cache, stores
from pyllamarun.models.pulling import allocated_bytes, partial_files
from pyllamarun.models.sources import stored_model
from pyllamarun.models.store import Index, UnderWay, no_pulls, pulling
from pyllamarun.models.stores import HUGGING_FACE, NAMES, OWN


@dataclass(frozen=True)
class Removable:
    """A model that may be removed, or what came of one; `freed_bytes` is what that frees.

    `files` go, with what Hugging Face's cache keeps for them alone; `shared_bytes` stay, since another revision has
    the same.  `partials` are what came of a pull that has not ended.
    """

    name: str
    store: str
    files: tuple[Path, ...]
    partials: tuple[Path, ...]
    freed_bytes: int
    shared_bytes: int

    @property
    def path(self) -> Path:
        return self.files[0]


def removable(text: str, index: Index) -> Removable:
    """The model that is meant.  Raises UsageError and DownloadError where there is none, or it is another program's."""
    begun = next((one for one in index.begun() if text in (one.source, one.path)), None)
    if begun and not stores.is_file(Path(begun.path)):
        path = Path(begun.path)
        folder = hub_cache.repository_of(path)
        came = hub_cache.unlinked(folder, begun.targets) if folder else ()
        store = HUGGING_FACE if folder else OWN
        return _measured(begun.source, store, (path,), (*came, *_partials(begun.targets)))
    found = stored_model(begun.path if begun else text)
    if found.store == stores.NONE:
        raise UsageError(
            f"{found.path} is kept by no store that pyllamarun removes from.",
            why="It removes models from its own folder and from Hugging Face's cache.",
            remedy="Name a model that `pyllamarun list` shows; or remove the file yourself.",
        )
    if found.store not in (OWN, HUGGING_FACE):
        remedy = f"ollama rm {found.name}" if found.store == stores.OLLAMA else "Remove it in LM Studio."
        raise UsageError(f"{found.name} is {NAMES[found.store]}'s: it is not removed here.", remedy=remedy)
    targets = [*found.parts, *map(hub_cache.blob_of, found.parts), *(begun.targets if begun else ())]
    return _measured(found.name, found.store, found.parts, _partials(list(dict.fromkeys(targets))))


def _partials(targets: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(path for target in targets for path in partial_files(target))


def _measured(name: str, store: str, files: tuple[Path, ...], partials: tuple[Path, ...]) -> Removable:
    size_bytes = sum(map(stores.file_bytes, files))
    folder = hub_cache.repository_of(files[0])
    freed_bytes = sum(hub_cache.unshared_blobs(folder, files).values()) if folder else size_bytes
    partial_bytes = sum(map(allocated_bytes, partials))
    return Removable(name, store, files, partials, freed_bytes + partial_bytes, size_bytes - freed_bytes)


def remove(model: Removable, index: Index) -> Removable:
    """Removes it; returns what that was, measured again under the locks.

    Raises UsageError where another process gets it just now, or where it may not be written to.
    """
    real = [path.resolve() for path in model.files]
    try:
        with _alone(model):
            model = _measured(model.name, model.store, model.files, model.partials)
            folder = hub_cache.repository_of(model.path)
            if folder:
                hub_cache.remove(folder, model.files)
            for path in (*model.partials, *(() if folder else model.files)):
                path.unlink(missing_ok=True)
            index.forget([str(path) for path in (*real, *model.files) if not path.exists()])
            index.end(str(model.path))
        with no_pulls() as quiet:
            if quiet:
                _tidy(model)
    except (UnderWay, hub_cache.Busy):
        raise UsageError(
            f"{model.name} is on its way just now: another process pulls it.",
            remedy="Wait for that, or end it first; nothing was removed.",
        ) from None
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UsageError(f"{model.name} cannot be removed.", why=why, remedy="Check who owns it.") from None
    return model


@contextmanager
def _alone(model: Removable) -> Iterator[None]:
    """With nobody, us or huggingface_hub, getting it."""
    with ExitStack() as stack:
        stack.enter_context(pulling(model.path))
        if hub_cache.repository_of(model.path):
            for path in model.files:
                blob = hub_cache.blob_of(path)
                if blob != path:
                    stack.enter_context(hub_cache.locked(hub_cache.lock_of(blob), wait=False))
        yield


def _tidy(model: Removable) -> None:
    folder = hub_cache.repository_of(model.path)
    if folder:
        hub_cache.tidy(folder)
        return
    top = paths.models_folder()
    for parent in model.path.parents:
        if top not in parent.parents:
            return
        with suppress(OSError):
            parent.rmdir()
