"""A model to plan for: where it is, and what its header says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyllamarun.models.gguf import Header
from pyllamarun.models.sources import Source, resolve


@dataclass(frozen=True)
class Model:
    source: Source
    header: Header

    @classmethod
    def open(cls, name: str | Path) -> Model:
        """What a person means by a name: a path, a model that is on this machine, hf:OWNER/REPO:Q4_K_M, https://....

        Of one on the network only the header is read.  Raises UsageError, ModelError or DownloadError.
        """
        source = resolve(str(name))
        return cls(source, source.read_header())

    @property
    def path(self) -> Path:
        """Its file, or the first of its parts."""
        return self.header.path
