"""GGUF files made by hand, byte by byte, and those among them that have exactly one fault.

`FAULTS` maps what is wrong with a file to the file and to what the error must say of it.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
ESCAPES = "\x1b[2J\x9b31m\u202ex"  # clears the screen, turns red, and reverses what follows


def drives_no_terminal(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


def integers(code: str, *numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}{code}", *numbers)


def string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return integers("Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + integers("I", kind) + value


def array(kind: int, count: int, raw: bytes = b"") -> bytes:
    return integers("I", kind) + integers("Q", count) + raw


def tensor(name: str | bytes = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + integers("I", len(shape)) + integers("q", *shape) + struct.pack("<IQ", kind, offset)


def gguf_file(
    *keys: bytes,
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    version: int = 3,
    architecture: bytes | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these keys, after the architecture's, and tensors, with so many bytes of data."""
    keys = (key("general.architecture", STR, string("llama")) if architecture is None else architecture, *keys)
    keys = tuple(filter(None, keys))
    head = b"GGUF" + integers("I", version) + integers("Q", len(tensors), len(keys)) + b"".join(keys + tensors)
    return head + b"\0" * (-len(head) % alignment) + b"\0" * data


def counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + integers("I", 3) + integers("Q", tensors, keys) + b"\0" * 64


def one_tensor(**faults: object) -> bytes:
    return gguf_file(tensors=(tensor(**faults),), data=4096)  # type: ignore[arg-type]


def two_tensors(first: bytes, second: bytes) -> bytes:
    return gguf_file(tensors=(first, second), data=4096)


def part(number: int, count: int, *tensors: bytes, announced: int) -> bytes:
    """Part of a split model, with 128 bytes of data for each tensor."""
    keys = [key("split.no", U16, integers("H", number)), key("split.count", U16, integers("H", count))]
    keys.append(key("split.tensors.count", I32, integers("i", announced)))
    return gguf_file(*keys, tensors=tensors, data=128 * len(tensors), architecture=b"" if number else None)


def no_file(kind: str, folder: Path) -> Path:
    """Something else in place of a model file, by its kind; nothing at all where it is "missing"."""
    path = folder / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "too long":
        return folder / ("x" * 300)
    return path


SOUND = gguf_file(
    key("llama.block_count", U32, integers("I", 2)), tensors=(tensor("a"), tensor("b", offset=128)), data=256
)

HEADS = {
    "empty": (b"", "It is empty"),
    "two bytes": (b"GG", "It begins with b'GG'"),
    "another format": (b"PK\x03\x04" + b"\0" * 60, r"It begins with b'PK\\x03\\x04'"),
    "version 0": (gguf_file(version=0), "version at byte 4: 0 is none of"),
    "version 1": (gguf_file(version=1), "version at byte 4: 1 is none of"),
    "version 4": (gguf_file(version=4), "version at byte 4: 4 is none of"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version at byte 4: it is big-endian"),
    "2^64-1 tensors": (counts(2**64 - 1, 0), "number of tensors at byte 8: 18446744073709551615 is more"),
    "2^64-1 keys": (counts(0, 2**64 - 1), "number of metadata keys at byte 16: 18446744073709551615 is more"),
    "more keys than it holds": (counts(0, 9), "metadata key at byte 32: it is empty"),
}

KEYS = {
    "no architecture": (gguf_file(architecture=b""), "not say of which architecture"),
    "an empty architecture": (
        gguf_file(architecture=key("general.architecture", STR, string(""))),
        "not say of which architecture",
    ),
    "a key longer than the file": (gguf_file(integers("Q", 2**15)), "metadata key at byte 77: the file ends"),
    "a key of 2^16 bytes": (gguf_file(string("k" * 2**16)), "length of metadata key at byte 69: 65536 is more"),
    "a string longer than the file": (gguf_file(key("k", STR, integers("Q", 2**20))), "k at byte 90: the file ends"),
    "a string of 2^64-1 bytes": (gguf_file(key("k", STR, integers("Q", 2**64 - 1))), "length of k at byte 82: 18446"),
    "an empty key": (gguf_file(key("", U32, b"\0" * 4)), "metadata key at byte 77: it is empty"),
    "a key twice": (gguf_file(*[key("k", U32, b"\0" * 4)] * 2), 'metadata key at byte 94: "k" stands twice'),
    "a key that is not UTF-8": (gguf_file(key(b"k\xff", U32, b"\0" * 4)), "metadata key at byte 77: .* is not UTF-8"),
    "an unknown value type": (gguf_file(key("k", 13, b"\0" * 8)), "type of k at byte 78: 13 is no value type"),
    "value type 2^32-1": (gguf_file(key("k", 2**32 - 1, b"\0" * 8)), "type of k at byte 78: 4294967295 is no"),
    "an array whose size overflows": (gguf_file(key("k", ARR, array(U64, 2**61))), "k at byte 94: the file ends"),
    "an array of 2^64-1 bytes": (gguf_file(key("k", ARR, array(U8, 2**64 - 1))), "k at byte 94: the file ends"),
    "an array of 2^60 strings": (gguf_file(key("k", ARR, array(STR, 2**60))), "k at byte 94: the file ends"),
    "an array with an endless string": (
        gguf_file(key("k", ARR, array(STR, 2, integers("Q", 2**64 - 1, 0)))),
        "k at byte 94: the file ends",
    ),
    "an array of strings cut short": (
        gguf_file(key("k", ARR, array(STR, 4, string("abc")))),
        "k at byte 121: the file ends",
    ),
    "an array of arrays": (
        gguf_file(key("k", ARR, array(ARR, 1, array(U8, 1, b"\0")))),
        "element type of k at byte 82: 9 is no type",
    ),
    "an array of an unknown type": (gguf_file(key("k", ARR, array(13, 1))), "element type of k at byte 82: 13 is no"),
}


def typed(name: str, kind: int, value: bytes, expected: str) -> tuple[bytes, str]:
    return gguf_file(key(name, kind, value)), f"{name} is of type {expected}"


def valued(name: str, number: int) -> tuple[bytes, str]:
    return gguf_file(key(name, U32, integers("I", number))), f"{name} is {number}"


VALUES = {
    "alignment 0": valued("general.alignment", 0),
    "alignment 48": valued("general.alignment", 48),
    "alignment 2^31": valued("general.alignment", 2**31),
    "alignment as a string": typed("general.alignment", STR, string("32"), "str and not u32"),
    "alignment as a bool": typed("general.alignment", BOOL, b"\1", "bool and not u32"),
    "alignment in 64 bits": typed("general.alignment", U64, integers("Q", 32), "u64 and not u32"),
    "no layers": valued("llama.block_count", 0),
    "2^31 layers": valued("llama.block_count", 2**31),
    "more layers than llama.cpp takes": valued("llama.block_count", 513),
    "layers as a string": typed("llama.block_count", STR, string("2"), "str and not u32"),
    "layers as an array": typed("llama.block_count", ARR, array(U32, 1, b"\2\0\0\0"), "arr and not u32"),
    "negative layers": typed("llama.block_count", I32, integers("i", -1), "i32 and not u32"),
    "the architecture as an integer": (
        gguf_file(architecture=key("general.architecture", U32, b"\1\0\0\0")),
        "general.architecture is of type u32 and not str",
    ),
    "the name as an array": typed("general.name", ARR, array(STR, 1, string("x")), "arr and not str"),
    "the file type as an array": typed("general.file_type", ARR, array(U8, 1, b"\1"), "arr and not u32"),
    "the context as a string": typed("llama.context_length", STR, string("4096"), "str and not u32"),
    "the vocabulary as a string": typed("tokenizer.ggml.tokens", STR, string("a b"), "str and not arr"),
    "a negative number of parts": typed("split.count", I32, integers("i", -1), "i32 and not u16"),
    "a part's number as a string": typed("split.no", STR, string("0"), "str and not u16"),
    "the number of tensors as an array": typed("split.tensors.count", ARR, array(U8, 0), "arr and not i32"),
}

TENSORS = {
    "no dimensions": (one_tensor(shape=()), "dimensions of t at byte 78: 0 is not between 1 and 4"),
    "five dimensions": (one_tensor(shape=(1,) * 5), "dimensions of t at byte 78: 5 is not between 1 and 4"),
    "a dimension of 0": (one_tensor(shape=(32, 0)), "shape of t at byte 90: 0 is not positive"),
    "a negative dimension": (one_tensor(shape=(-32,)), "shape of t at byte 82: -32 is not positive"),
    "dimensions that overflow": (one_tensor(shape=(2**31,) * 3), "shape of t at byte 98: it is larger"),
    "dimensions that overflow to 0": (one_tensor(shape=(2**32,) * 2), "shape of t at byte 90: it is larger"),
    "a size past 2^64": (one_tensor(shape=(2**62,), kind=28), r"need 36,893,488,147,419,103,232 bytes"),
    "sizes that sum past 2^63": (
        two_tensors(tensor("a", (2**62,), 24), tensor("b", (2**62,), 24, offset=2**62)),
        "need 9,223,372,036,854,775,808 bytes",
    ),
    "a row that is no multiple of its block": (
        one_tensor(shape=(33,), kind=2),
        "type of t at byte 90: rows of 33 are no multiple of Q4_0's blocks",
    ),
    "an unknown tensor type": (one_tensor(kind=99), "type of t at byte 90: 99 is no tensor type"),
    "a removed tensor type": (one_tensor(kind=4), "type of t at byte 90: 4 is no tensor type"),
    "tensor type 2^32-1": (one_tensor(kind=2**32 - 1), "type of t at byte 90: 4294967295 is no tensor type"),
    "a name of 64 bytes": (one_tensor(name="x" * 64), "length of tensor name at byte 69: 64 is more than 63"),
    "a name of 2^64-1 bytes": (
        gguf_file(tensors=(integers("Q", 2**64 - 1),)),
        "length of tensor name at byte 69: 18446744073709551615 is more",
    ),
    "an empty name": (one_tensor(name=""), "tensor name at byte 77: it is empty"),
    "a name that is not UTF-8": (one_tensor(name=b"\xff\xfe"), "tensor name at byte 77: .* is not UTF-8"),
    "a name twice": (two_tensors(tensor(), tensor(offset=128)), 'The tensor "t" stands twice'),
    "an unaligned offset": (one_tensor(offset=8), "offset of t at byte 94: it is 8 and should be 0"),
    "an offset of 2^64-1": (one_tensor(offset=2**64 - 1), "offset of t at byte 94: it is 18446744073709551615"),
    "an offset past the end": (one_tensor(offset=1 << 20), "offset of t at byte 94: it is 1048576 and should be 0"),
    "overlapping tensors": (
        two_tensors(tensor("a"), tensor("b", offset=64)),
        "offset of b at byte 127: it is 64 and should be 128",
    ),
    "tensors with a gap": (
        two_tensors(tensor("a"), tensor("b", offset=160)),
        "offset of b at byte 127: it is 160 and should be 128",
    ),
    "tensors out of order": (
        two_tensors(tensor("a", offset=128), tensor("b")),
        "offset of a at byte 94: it is 128 and should be 0",
    ),
    "data that is missing": (gguf_file(tensors=(tensor(),), data=127), "need 128 bytes of data, and 127 are there"),
    "no data at all": (gguf_file(tensors=(tensor(),)), "need 128 bytes of data, and 0 are there"),
}

ESCAPING = {
    "escapes in a key": (gguf_file(key(ESCAPES, 13, b"\0" * 8)), "type of �"),
    "escapes in a key twice": (gguf_file(*[key(ESCAPES, U32, b"\0" * 4)] * 2), "stands twice"),
    "escapes in a tensor's name": (one_tensor(name=ESCAPES, kind=99), "type of �"),
    "escapes in a tensor's name twice": (
        two_tensors(tensor(ESCAPES), tensor(ESCAPES, offset=128)),
        'The tensor "�',
    ),
    "escapes in a name that is not UTF-8": (one_tensor(name=b"\xff\x1b[2J\xc2\x9b31m"), "is not UTF-8"),
    "a name that fills the screen": (gguf_file(key("k" * 60_000, 13, b"\0" * 8)), "type of k{100}… at byte"),
}

FAULTS = HEADS | KEYS | VALUES | TENSORS | ESCAPING
