"""The header reader under a limit of its address space: the header's size and 64 MiB, whatever a file claims."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import ARR, STR, U8, array, gguf_file, integers, key, string

from pyllamarun.models.gguf import MAX_HEADER_BYTES, MAX_METADATA_KEYS, MAX_TENSORS, MAX_TEXT_BYTES
from pyllamarun.units import MIB

SPARSE_BYTES = 2 << 30
READ = """
import resource, sys
from pathlib import Path
from pyllamarun.errors import ModelError
from pyllamarun.models.gguf import read_header
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    read_header(Path(sys.argv[1]))
except ModelError as error:
    print(error.why)
else:
    print("sound")
"""


def tensors(count: int, *, name: bytes) -> tuple[bytes, ...]:
    """A table of so many tensors, each with numbers of its own and as long a name as there may be."""
    lines = []
    for number in range(count):
        own = name + b"%06d" % number
        lines.append(integers("Q", len(own)) + own + struct.pack("<I4qIQ", 4, 1000, 2, 1, 1, 0, number * 8000))
    return tuple(lines)


def wide_text(size_bytes: int) -> bytes:
    """A text whose last character makes Python keep four bytes for each."""
    return b"a" * (size_bytes - 4) + "😀".encode()


CLAIMS = {
    "a string of 900 MiB": (gguf_file(key("k", STR, integers("Q", 900 * MIB))), "more than"),
    "an array of 900 MiB": (gguf_file(key("k", ARR, array(U8, 900 * MIB))), "header is larger"),
    "an array of 2^40 bytes": (gguf_file(key("k", ARR, array(U8, 2**40))), "header is larger"),
    "an array of 2^27 strings": (gguf_file(key("k", ARR, array(STR, 2**27))), "header is larger"),
    "an array of endless strings": (
        gguf_file(key("k", ARR, array(STR, 9, integers("Q", MAX_HEADER_BYTES)))),
        "header is larger",
    ),
    "2^16 keys": (gguf_file()[:16] + integers("Q", 2**16), "more than"),
    "all the tensors there may be": (gguf_file()[:8] + integers("Q", MAX_TENSORS, 0), "is empty"),
}


def array_keys(count: int, size_bytes: int) -> list[bytes]:
    return [key(f"{number}", ARR, array(U8, size_bytes, bytes(size_bytes))) for number in range(count)]


# These are in the file, to the last byte; and made only when they are tried.
FULL: dict[str, tuple[Callable[[], bytes], str]] = {
    "a long text": (lambda: gguf_file(key("k", STR, string(wide_text(MAX_TEXT_BYTES - 64)))), "sound"),
    "a long text that is not UTF-8": (
        lambda: gguf_file(key("k", STR, string("😀".encode() + b"\xff" * (MAX_TEXT_BYTES - 64)))),
        "sound",
    ),
    "long keys": (
        lambda: gguf_file(*[key(b"%09d" % i + wide_text(65_000), U8, b"\0") for i in range(MAX_TEXT_BYTES // 65_536)]),
        "sound",
    ),
    "many arrays": (lambda: gguf_file(*array_keys(MAX_METADATA_KEYS - 1, 8)), "sound"),
    "a large array": (lambda: gguf_file(*array_keys(1, 60 * MIB)), "sound"),
    "two large arrays": (lambda: gguf_file(*array_keys(2, 31 * MIB)), "sound"),
    "a large array of strings": (lambda: gguf_file(key("k", ARR, array(STR, 4 * MIB, bytes(32 * MIB)))), "sound"),
    "arrays beyond the limit": (lambda: gguf_file(*array_keys(9, 8 * MIB)), "header is larger"),
    "many tensors": (lambda: gguf_file(tensors=tensors(MAX_TENSORS, name=b"t" * 57)), "are there"),
    "all of it": (
        lambda: gguf_file(
            key("text", STR, string(wide_text(MAX_TEXT_BYTES * 3 // 4))),
            *array_keys(MAX_METADATA_KEYS - 2, 8),
            tensors=tensors(MAX_TENSORS, name=b""),
        ),
        "are there",
    ),
}


def read_within(path: Path, limit_bytes: int) -> str:
    """What a process says of a file that may take so many bytes more than it has when it begins."""
    argv = [sys.executable, "-c", READ, str(path), str(limit_bytes)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("content", "expected"), CLAIMS.values(), ids=CLAIMS)
def test_what_a_file_claims_takes_no_memory(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(SPARSE_BYTES)
    assert expected in read_within(path, 64 * MIB)


@pytest.mark.parametrize(("make", "expected"), FULL.values(), ids=FULL)
def test_a_full_header_takes_its_size_and_64_mib(make: Callable[[], bytes], expected: str, tmp_path: Path) -> None:
    path, content = tmp_path / "full.gguf", make()
    path.write_bytes(content)
    assert expected in read_within(path, min(len(content), MAX_HEADER_BYTES) + 64 * MIB)
