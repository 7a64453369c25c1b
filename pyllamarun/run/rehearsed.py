"""Keeps what rehearsals have shown, for the plans that follow."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamarun.models.gguf import Header
from pyllamarun.models.skeleton import fingerprint
from pyllamarun.planning.probe import Answer, Scratch
from pyllamarun.planning.request import without_option
from pyllamarun.planning.residency import CACHE_RAM, CHECKPOINTS
from pyllamarun.run.binaries import Build
from pyllamarun.run.stage import CARDS, VIRTUAL, Stage

if TYPE_CHECKING:
    from pyllamarun.run.rehearsal import Rehearsal


class Rehearsals:
    """What rehearsals have shown of one model on one stage: a small file for each set of arguments."""

    def __init__(self, folder: Path, header: Header, stage: Stage, build: Build) -> None:
        self._folder, self._header, self._stage, self._build = folder, header, stage, build

    @functools.cached_property
    def _facts(self) -> list[object]:
        cards, counts_scratch = self._stage.environment.get(CARDS, ""), self._stage.kind != VIRTUAL
        return [fingerprint(self._header), cards, counts_scratch, self._build.commit, self._build.backend]

    def _path(self, arguments: Sequence[str]) -> Path:
        import hashlib

        # Neither where the model lies (-m MODEL) nor what may grow in RAM says anything of GPU memory.
        key = json.dumps([self._facts, without_option(arguments[2:], *CACHE_RAM, *CHECKPOINTS)])
        return self._folder / (hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:32] + ".json")

    def applied(self, arguments: Sequence[str], answer: Answer) -> Answer:
        """The probe's answer, and where these arguments were rehearsed, no less scratch memory than they then took.

        No less and not just that: a rehearsal does not try prompts of every length, and the probe's rules do.
        """
        if not self._folder.is_dir():
            return answer
        try:
            entries = json.loads(self._path(arguments).read_text(encoding="utf-8"))
            taken = {str(entry["device"]): int(entry["bytes"]) for entry in entries}
        except (OSError, ValueError, TypeError, KeyError):
            return answer
        computed = {device: answer.scratch_bytes(device) or 0 for device in taken}
        more = [
            Scratch(device, "rehearsal", size - computed[device], 0)
            for device, size in taken.items()
            if size > computed[device]
        ]
        return replace(answer, scratch=(*answer.scratch, *more), scratch_source="rehearsed")

    def put(self, arguments: Sequence[str], rehearsal: Rehearsal) -> None:
        """Keeps the scratch memory of a rehearsal, if the file can be written."""
        entries = [{"device": d.name, "bytes": d.pool_bytes + d.workspace_bytes} for d in rehearsal.devices]
        path = self._path(arguments)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(entries), encoding="utf-8")
            partial.replace(path)
        except OSError:
            pass
