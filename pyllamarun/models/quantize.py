"""Requantizes a model with llama-quantize: the file, whole or not at all.  What it will be: requantize.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pyllamarun import paths
from pyllamarun.errors import BinaryError, ModelError, UsageError
from pyllamarun.models.gguf import DEFAULT_ALIGNMENT, Header, Tensor, read_header
from pyllamarun.models.names import SPLIT, part_names
from pyllamarun.models.provenance import Provenance, sidecar_text
from pyllamarun.models.recipe import PLAIN, Recipe
from pyllamarun.models.skeleton import file_bytes
from pyllamarun.models.types import FILE_TYPES
from pyllamarun.models.unfinished import flush, partial_folder, publish
from pyllamarun.units import MIB, format_size

Start = Callable[[Sequence[str]], AbstractContextManager[subprocess.Popen[str]]]
Progress = Callable[[int, int], None]

DISK_RESERVE_BYTES = 64 * MIB
FLUSH_SECONDS = 1.0
MAX_NAME_BYTES = 255
MAX_LINES = 4096  # of what llama-quantize says, for the reason of a failure
LOW_QUALITY = ("Q2_K", "Q2_K_S", "IQ2", "IQ1", "TQ1", "TQ2", "Q1_0", "Q2_0")
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # QUANT_OPTIONS in tools/quantize/quantize.cpp
UNQUANTIZED = ("F32", "F16", "BF16")

# llama-quantize's own words: src/llama-quant.cpp and tools/quantize/quantize.cpp.
_TYPE_LINE = re.compile(r"^\s*\d*\s+(?:or\s+)?([A-Z0-9_]+)\s+:", re.MULTILINE)
_TENSOR_LINE = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]")
_WITHOUT_WEIGHTS = re.compile(r"did not find weights for (\S+)")
_CANNOT_WRITE = "basic_ios::clear"  # what() of std::ofstream's failure
_FAILURE = re.compile(
    r"failed to quantize: (.+)|(this quantization requires an importance matrix)|error: (.+)", re.IGNORECASE
)


@dataclass(frozen=True)
class Order:
    """One file to be made, or with a recipe that keeps the split, one for each of the source's.

    `tensors` are what llama-quantize has said that it will write, in their order.
    """

    source: Header
    type: str
    target: Path
    recipe: Recipe
    tensors: tuple[Tensor, ...]
    fallback_tensors: int
    threads: int
    provenance: Provenance

    @property
    def targets(self) -> tuple[Path, ...]:
        """All files that will be there, the first one first."""
        return target_files(self.target, self.source, self.recipe)

    def argv(self, quantizer: Path, folder: Path) -> list[str]:
        """Writes into `folder`.  With whole paths: llama-quantize takes a file called 7b.gguf for type 7."""
        options = ["--allow-requantize", *self.recipe.arguments(), *self.provenance.overrides(self.source)]
        name = f"{_stem(self.target.name)}.gguf" if self.recipe.keep_split else self.target.name  # it adds the numbers
        paths = [str(self.source.path.absolute()), str(folder.absolute() / name)]
        return [str(quantizer), *options, *paths, self.type, str(self.threads)]


@dataclass(frozen=True)
class Quantized:
    """A finished requantization; sizes are of tensor data.

    `targets` are all files, of which `target` is the first; `without_weights`, the tensors of which the importance
    matrix said nothing.
    """

    source: str
    target: str
    targets: tuple[str, ...]
    type: str
    before_bytes: int
    after_bytes: int
    tensors: int
    fallback_tensors: int
    without_weights: int
    file_bytes: int
    provenance: Provenance


def known_types(help_text: str) -> tuple[str, ...]:
    """The type names that `llama-quantize --help` lists, COPY excepted."""
    _, _, table = help_text.partition("allowed quantization types")
    return tuple(name for name in _TYPE_LINE.findall(table) if name != "COPY")


def check_type(name: str, types: Sequence[str]) -> str:
    """The type as llama-quantize spells it, not by an alias; UsageError if there is none of that name."""
    if name.upper() in types:
        return ALIASES.get(name.upper(), name.upper())
    raise UsageError(
        f'There is no quantization type "{name}".',
        why="Types: " + ", ".join(types),
        remedy="For a smaller Q4_K_M, take Q3_K_M, or Q2_K where it must be.",
    )


def default_target(source: Header, type_name: str) -> Path:
    """The source's name with its type replaced, or the type appended."""
    return source.path.with_name(target_name(source.path.name, type_name))


def target_name(source: str, type_name: str) -> str:
    """The same for a name alone."""
    stem = _stem(source)
    names = "|".join(re.escape(name) for name in sorted(set(FILE_TYPES.values()), key=len, reverse=True))
    renamed, count = re.subn(rf"(?i)(?<=[-._])(?:{names})$", type_name, stem)
    return (renamed if count else f"{stem}-{type_name}") + ".gguf"


def _stem(name: str) -> str:
    """Without what says that it is a model, or a part of one."""
    return re.sub(r"(?i)\.gguf$", "", SPLIT.sub("", name))


def target_files(target: Path, source: Header, recipe: Recipe) -> tuple[Path, ...]:
    """The files that `target` stands for: itself, or as many parts as the source has, named as by llama_split_path."""
    if not recipe.keep_split or len(source.parts) == 1:
        return (target,)
    first = f"{_stem(target.name)}-00001-of-{len(source.parts):05d}.gguf"
    return tuple(target.with_name(name) for name in part_names(first))


def sidecar(target: Path) -> Path:
    """Where that of a file's provenance is kept which does not go into the file."""
    return target.with_name(f"{target.name}.provenance.json")


def check_target(source: Header, target: Path, type_name: str, recipe: Recipe = PLAIN) -> None:
    """Raises UsageError where writing would lose or repeat something."""
    if source.file_type == type_name and not recipe.changes_types:
        raise UsageError(f"{source.path} is {type_name} already.", remedy="Take it as it is.")
    for file in target_files(target, source, recipe):
        _check_free(source, file)
    if not target.parent.is_dir() and not target.is_relative_to(paths.models_folder()):
        raise UsageError(f"There is no folder {target.parent}.", remedy=f"mkdir -p {target.parent}")


def _check_free(source: Header, file: Path) -> None:
    if len(os.fsencode(sidecar(file).name)) > MAX_NAME_BYTES:
        raise UsageError(f"The name of {file} is too long.", remedy="Name another file with -o.")
    if any(os.path.realpath(file) == os.path.realpath(part) for part in source.parts):
        raise UsageError("The target is the source.", remedy="Name another file with -o.")
    for taken in filter(os.path.lexists, (file, sidecar(file))):
        raise UsageError(
            f"{taken} exists already; nothing was changed.",
            remedy="Name another file with -o, or remove this one first.",
        )


def loss_warning(type_name: str) -> str:
    """What a person should know of a type that loses much; "" of others."""
    if not type_name.startswith(LOW_QUALITY):
        return ""
    return f"{type_name} loses much: answers get visibly worse, above all with small models.  Take Q3_K_M if it fits."


def source_warning(source: Header) -> str:
    """What a person should know of quantizing this source; "" if it is the original."""
    kind = type_of(source)
    if kind in UNQUANTIZED:
        return ""
    return (
        f"The source is {kind} already: quantizing it again loses more than quantizing the original F16 model would; "
        "`pyllamarun compare` measures by how much."
    )


def type_of(header: Header) -> str:
    """What a file calls its quantization, or if it does not, the type of most of its data."""
    if header.file_type:
        return header.file_type
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type.name] += tensor.size_bytes
    return sizes.most_common(1)[0][0] if sizes else UNQUANTIZED[0]


def check_disk(folder: Path, forecast_bytes: int) -> None:
    """Raises UsageError where there is no room for all that is to be written there."""
    free = shutil.disk_usage(folder).free
    if free < forecast_bytes + DISK_RESERVE_BYTES:
        raise UsageError(
            f"{folder} has {format_size(free)} free, and {format_size(forecast_bytes)} are needed.",
            remedy="Make room, or write to another disk with -o.",
        )


def quantize(start: Start, quantizer: Path, order: Order, progress: Progress) -> Quantized:
    """Carries out an order: its files appear under their names when all are complete and have been read back.

    `progress` is told how many tensors of how many are done.  Raises UsageError, ModelError or BinaryError.
    """
    source, targets = order.source, order.targets
    folder = targets[0].parent
    with partial_folder(folder) as partial:
        lines, status = _run(start, order.argv(quantizer, partial), _flushing(partial, progress))
        if status != 0:
            raise failure(order.type, lines, status, folder)
        written = _read_back(order, partial)
        names = [target.name for target in targets]
        facts = order.provenance.beside()
        if facts:
            note = partial / sidecar(targets[0]).name
            note.write_text(sidecar_text(facts), encoding="utf-8")
            names.append(note.name)
        publish(partial, names, folder)
    return Quantized(
        source=str(source.path),
        target=str(targets[0]),
        targets=tuple(map(str, targets)),
        type=order.type,
        before_bytes=source.weights_bytes,
        after_bytes=written.weights_bytes,
        tensors=len(written.tensors),
        fallback_tensors=order.fallback_tensors,
        without_weights=len({name for line in lines for name in _WITHOUT_WEIGHTS.findall(line)}),
        file_bytes=written.file_bytes,
        provenance=order.provenance,
    )


def _flushing(folder: Path, progress: Progress) -> Progress:
    """Also has what is there so far written to the disk, now and then, so that little is left at the end."""
    flushed = time.monotonic()

    def advance(done: int, of: int) -> None:
        nonlocal flushed
        progress(done, of)
        if time.monotonic() - flushed >= FLUSH_SECONDS:
            for path in folder.iterdir():
                flush(path)
            flushed = time.monotonic()

    return advance


def _read_back(order: Order, partial: Path) -> Header:
    """What was written, if it is what was forecast: each tensor's name, type, shape and size, and the file's length."""
    missing = [target.name for target in order.targets if not (partial / target.name).is_file()]
    if missing:
        raise BinaryError(f"llama-quantize wrote no {missing[0]}.", remedy="Run `pyllamarun doctor`.")
    try:
        written = read_header(partial / order.targets[0].name)
    except ModelError as error:
        why = f"{error.what} {error.why}".replace(f"{partial}{os.sep}", "")
        raise _unsound("What llama-quantize wrote cannot be read back.", why) from None
    for expected, found in zip(order.tensors, written.tensors):
        if _facts(expected) != _facts(found):
            raise _unsound(f"llama-quantize wrote {_words(found)} where it had announced {_words(expected)}.")
    if len(written.tensors) != len(order.tensors):
        raise _unsound(f"llama-quantize wrote {len(written.tensors)} of {len(order.tensors)} tensors.")
    whole = file_bytes(written.metadata, written.tensors)
    aligned = written.get("general.alignment", DEFAULT_ALIGNMENT) == DEFAULT_ALIGNMENT
    # Of text that is not UTF-8, such as a name that was cut within a letter, the reader does not say how long it was.
    legible = not any(isinstance(value.data, str) and "\ufffd" in value.data for value in written.metadata.values())
    if len(written.parts) == 1 and aligned and legible and written.file_bytes != whole:
        raise _unsound(f"llama-quantize wrote {written.file_bytes:,} bytes; its tensors make {whole:,}.")
    return written


def _facts(tensor: Tensor) -> tuple[str, str, tuple[int, ...], int]:
    return tensor.name, tensor.type.name, tensor.shape, tensor.size_bytes


def _words(tensor: Tensor) -> str:
    return f"{tensor.name} in {tensor.type.name} ({' x '.join(map(str, tensor.shape))})"


def _unsound(what: str, why: str = "") -> ModelError:
    return ModelError(what, why=why, remedy="Nothing was left behind; the source is untouched.  Run it again.")


def _run(start: Start, argv: Sequence[str], progress: Progress) -> tuple[Iterable[str], int]:
    """What it said, the last of it if that is much, and its exit status."""
    lines: deque[str] = deque(maxlen=MAX_LINES)
    with start(argv) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            position = _TENSOR_LINE.match(line)
            if position:
                progress(int(position[1]), int(position[2]))
        status = process.wait()
    return lines, status


def needs_imatrix(type_name: str) -> UsageError:
    return UsageError(
        f"{type_name} needs an importance matrix.",
        remedy="Give one with --imatrix FILE, have it computed with --imatrix auto TEXT, or take a type that does not "
        "need one: Q2_K is the smallest.",
    )


def failure(type_name: str, lines: Iterable[str], status: int, folder: Path | None = None) -> BinaryError | UsageError:
    """The error for a llama-quantize that ended so, after these lines; where it wrote, if it did, was `folder`."""
    said = list(lines)
    text = "\n".join(said)
    if "requires an importance matrix" in text or "requires an imatrix" in text:
        return needs_imatrix(type_name)
    if folder is not None and _CANNOT_WRITE in text:
        return UsageError(
            f"{folder} took no more of the new file.",
            why=f"It has {format_size(shutil.disk_usage(folder).free)} free.",
            remedy="Nothing was left behind; the source is untouched.  Make room, or write to another disk with -o.",
        )
    reasons = [next(filter(None, match.groups())) for match in _FAILURE.finditer(text)]
    killed = f"it was ended by signal {-status}" if status < 0 else f"it ended with status {status}"
    return BinaryError(
        f"llama-quantize failed: {killed}.",
        why=reasons[-1] if reasons else "\n".join(said[-3:]),
        remedy="Nothing was left behind; the source is untouched.",
    )
