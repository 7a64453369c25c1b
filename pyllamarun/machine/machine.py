"""A machine to plan for: this one, or one that is described, such as one that somebody thinks of buying."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamarun.errors import UsageError
from pyllamarun.machine.cards import Card, find_card
from pyllamarun.units import MIB, parse_bandwidth, parse_size

EXAMPLE = 'gpus = ["RTX 3060"]\nram = "64GiB"\nram_bandwidth = "51.2GB/s"\ncores = 8'


@dataclass(frozen=True)
class Machine:
    """What is None or empty is this machine's own.

    gpus: cards, or sizes in bytes of cards that nothing else is known of; None for those that are here.  ram_bytes: all
    of the memory.  ram_bandwidth_bytes_per_second: nominal, of all channels together.  cores: physical ones.
    """

    name: str = ""
    gpus: tuple[Card | int, ...] | None = None
    ram_bytes: int | None = None
    ram_bandwidth_bytes_per_second: int | None = None
    cores: int | None = None

    @classmethod
    def of(
        cls,
        *,
        gpus: str | Sequence[str] | None = None,
        ram: str | None = None,
        ram_bandwidth: str | None = None,
        cores: int | None = None,
        name: str = "",
    ) -> Machine:
        """From what a person would write: gpus="RTX 3060" or ["12GiB", "8GiB"], ram="64GiB", ram_bandwidth="51.2GB/s".

        Raises UsageError for what is no card, size or bandwidth.
        """
        names = gpus.split(",") if isinstance(gpus, str) else gpus
        if cores is not None and not 0 < cores <= 4096:
            raise UsageError(f"{cores} is no number of cores.")
        return cls(
            name=name,
            gpus=None if names is None else tuple(_gpu(text.strip()) for text in names if text.strip() != "none"),
            ram_bytes=None if ram is None else parse_size(ram),
            ram_bandwidth_bytes_per_second=None if ram_bandwidth is None else parse_bandwidth(ram_bandwidth),
            cores=cores,
        )

    @classmethod
    def read(cls, path: str | Path) -> Machine:
        """From a TOML file with the same names as `of`; UsageError says what is wrong with it."""
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        path = Path(path)
        try:
            with path.open("rb") as file:
                facts = toml.loads(file.read(MIB).decode("utf-8"))
        except OSError as error:
            raise UsageError(f"{path} cannot be read.", why=error.strerror or "", remedy=_remedy()) from None
        except (UnicodeDecodeError, toml.TOMLDecodeError) as error:
            raise UsageError(f"{path} is no TOML file.", why=str(error), remedy=_remedy()) from None
        for key, value in facts.items():
            if key not in _KINDS:
                raise UsageError(f'{path}: nothing is known as "{key}".', remedy=_remedy())
            if not _KINDS[key](value):
                raise UsageError(f"{path}: {key} = {value!r} is not what it should be.", remedy=_remedy())
        return cls.of(**{"name": path.stem} | facts)

    def to_words(self) -> dict[str, Any]:
        """What `of` makes this machine from."""
        bandwidth = self.ram_bandwidth_bytes_per_second
        words = {
            "name": self.name,
            "gpus": None
            if self.gpus is None
            else [gpu.title if isinstance(gpu, Card) else f"{gpu}B" for gpu in self.gpus],
            "ram": None if self.ram_bytes is None else f"{self.ram_bytes}B",
            "ram_bandwidth": None if bandwidth is None else f"{bandwidth}B/s",
            "cores": self.cores,
        }
        return {key: value for key, value in words.items() if value not in (None, "")}

    @property
    def is_here(self) -> bool:
        """Whether nothing of it is imagined."""
        return self == Machine(name=self.name)


HERE = Machine()


def _gpu(text: str) -> Card | int:
    """A card by its name, or a size with its unit."""
    try:
        size_bytes = parse_size(text)
    except UsageError:
        return find_card(text)
    if text.isdigit():
        return find_card(text)
    if not MIB <= size_bytes < 1 << 50:
        raise UsageError(f'"{text}" is neither a card nor the size of one.', remedy="Write RTX 3060, or 12GiB.")
    return size_bytes


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS = {"name": _is_text, "gpus": _is_list, "ram": _is_text, "ram_bandwidth": _is_text, "cores": _is_count}


def _remedy() -> str:
    return f"Write lines such as these, each of which may be left out:\n{EXAMPLE}"
