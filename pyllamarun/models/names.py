"""What the names of model files say: the quantization, the part of a split, and whether they may be used as a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from pyllamarun.errors import UsageError

SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)  # llama_split_path
QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d|TQ\d|MXFP\d|NVFP\d)[A-Za-z0-9_]*|BF16|FP?16|FP?32)(?![A-Za-z0-9])",
    re.IGNORECASE,
)
# Files beside a model that are none: vision projectors and importance matrices.
PROJECTOR = "mmproj"
COMPANIONS = (PROJECTOR, "imatrix")


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def is_companion(name: str) -> bool:
    return PurePosixPath(name).name.lower().startswith(COMPANIONS)


def is_later_part(name: str) -> bool:
    match = SPLIT.search(name)
    return bool(match and int(match[1]) != 1)


def models_among(names: Iterable[str]) -> list[str]:
    """Of the names of GGUF files those that are models, split ones by their first part."""
    return [name for name in names if not is_companion(name) and not is_later_part(name)]


def part_names(name: str) -> list[str]:
    """All the files of the model whose first part this is, as their names say; one, if it is not split."""
    match = SPLIT.search(name)
    if not match or int(match[1]) != 1:
        return [name]
    stem, count = name[: match.start()], int(match[2])
    return [f"{stem}-{number:05d}-of-{match[2]}{name[-5:]}" for number in range(1, count + 1)]


def quantization(name: str) -> str:
    """What a file's name, or else its folder's, calls its quantization, in capitals: "Q4_K_M"; "" if it does not."""
    for part in reversed(PurePosixPath(SPLIT.sub("", name)).parts):
        labels = QUANT.findall(part)
        if labels:
            return str(labels[-1]).upper()
    return ""


def with_quantization(names: Iterable[str], label: str) -> list[str]:
    """The models of that quantization: of exactly that, or else of that with a publisher's "UD-" before it."""
    by_label = [(quantization(name), name) for name in names]
    exactly = [name for own, name in by_label if own == label.upper()]
    return exactly or [name for own, name in by_label if own.removeprefix("UD-") == label.upper()]


def is_safe(name: str) -> bool:
    """Whether a name from elsewhere, with "/" between folders, stays below the folder that it is put into."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255 for part in parts) and (
        name.isprintable() and "\\" not in name
    )


def check_safe(name: str) -> str:
    """The name.  Raises UsageError where it would lead elsewhere."""
    if not is_safe(name):
        raise UsageError("A file of that name is not used: it would lie outside its folder.", why=repr(name))
    return name
