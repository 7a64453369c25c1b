"""The header reader against random files, sound and mutated; the oracles: the gguf package and llama.cpp's reader."""

from __future__ import annotations

import ctypes
import io
import struct
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hostile import (
    ARR,
    BOOL,
    ESCAPES,
    F32,
    F64,
    I64,
    SOUND,
    STR,
    U8,
    U32,
    array,
    drives_no_terminal,
    gguf_file,
    integers,
    key,
)
from hostile import string as encoded
from hostile import tensor as table_line
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamarun.errors import ModelError
from pyllamarun.models.gguf import KEY_TYPES, SCALARS, STRING, Array, Header, Value, parse_header, read_header
from pyllamarun.models.skeleton import write_skeleton, write_sparse
from pyllamarun.models.types import TENSOR_TYPES, TensorType
from pyllamarun.run.binaries import Binaries

# The default run is the same every time; the slow one looks further.  A deadline is a bound on the reader's time, too.
same_each_time = settings(derandomize=True, database=None, deadline=timedelta(seconds=10), max_examples=150)
further = settings(database=None, deadline=timedelta(seconds=10), max_examples=5000)

TensorLine = tuple[str, TensorType, tuple[int, ...]]
Accepts = Callable[[Path], bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


class _InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml(binaries: Binaries) -> ctypes.CDLL:
    """The library that pyllamarun runs."""
    library = ctypes.CDLL(str(binaries.path("libggml-base.so")))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    library.gguf_free.argtypes = [ctypes.c_void_p]
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def llama_cpp_accepts(ggml: ctypes.CDLL) -> Accepts:
    """Whether gguf_init_from_file takes a file."""

    def accepts(path: Path) -> bool:
        context = ggml.gguf_init_from_file(bytes(path), _InitParams(True, None))
        if context:
            ggml.gguf_free(context)
        return bool(context)

    return accepts


def test_the_tensor_types_are_those_of_ggml(ggml: ctypes.CDLL) -> None:
    numbers = range(max(TENSOR_TYPES) + 1)
    theirs = {n: (ggml.ggml_blck_size(n), ggml.ggml_type_size(n)) for n in numbers if ggml.ggml_type_size(n)}
    assert {n: (kind.block_size, kind.block_bytes) for n, kind in TENSOR_TYPES.items()} == theirs
    for number, kind in TENSOR_TYPES.items():
        assert kind.name.lower() == ggml.ggml_type_name(number).decode().lower()


def texts(max_bytes: int, *, min_size: int = 0) -> st.SearchStrategy[str]:
    characters = st.characters(codec="utf-8")
    return st.text(characters, min_size=min_size, max_size=max_bytes).filter(lambda t: len(t.encode()) <= max_bytes)


def numbers(kind: int) -> st.SearchStrategy[Any]:
    code = SCALARS[kind]
    if code == "?":
        return st.booleans()
    if code in "fd":
        return st.floats(width=32 if code == "f" else 64, allow_nan=False)
    bits = 8 * struct.calcsize(code)
    return st.integers(0, 2**bits - 1) if code.isupper() else st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def arrays(kind: int) -> st.SearchStrategy[Value]:
    def encode(items: list[Any]) -> Value:
        raw = b"".join(encoded(i) if kind == STRING else struct.pack("<" + SCALARS[kind], i) for i in items)
        return Value(ARR, Array(kind, len(items), raw))

    return st.lists(texts(12) if kind == STRING else numbers(kind), max_size=6).map(encode)


kinds = st.sampled_from([*SCALARS, STRING])
values = st.one_of(
    st.sampled_from(list(SCALARS)).flatmap(lambda kind: numbers(kind).map(lambda number: Value(kind, number))),
    texts(40).map(lambda text: Value(STR, text)),
    kinds.flatmap(arrays),
)
# Keys of the vocabulary and of splits, which a skeleton writes anew, come from the tests that are about them.
OF_OTHERS = ("GGUF.", "llama.", "tokenizer.", "split.")
keys = texts(40, min_size=1).filter(lambda name: name not in KEY_TYPES and not name.startswith(OF_OTHERS))
LLAMA = {"general.architecture": Value(STR, "llama")}
metadata = st.dictionaries(keys, values, max_size=8).map(lambda rest: LLAMA | rest)
# The gguf package has no Q2_0 yet, and another size for Q8_1, which no file has.
PACKAGE_TYPES = [kind for kind in TENSOR_TYPES.values() if kind.name not in ("Q2_0", "Q8_1")]


@st.composite
def tensor_lines(draw: st.DrawFn) -> TensorLine:
    kind = draw(st.sampled_from(PACKAGE_TYPES))
    row = kind.block_size * draw(st.integers(1, 3))
    return draw(texts(63, min_size=1)), kind, (row, *draw(st.lists(st.integers(1, 3), max_size=3)))


tables = st.lists(tensor_lines(), max_size=5, unique_by=lambda line: line[0])


def assert_agrees(header: Header, oracle: gguf.GGUFReader) -> None:
    """With the gguf package, on everything that a header says."""
    ours = [(t.name, t.type.name, t.shape, t.offset, t.size_bytes) for t in header.tensors]
    theirs = [
        (t.name, t.tensor_type.name, tuple(map(int, t.shape)), t.data_offset - oracle.data_offset, t.n_bytes)
        for t in oracle.tensors
    ]
    assert ours == theirs
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for name, field in fields.items():
        data = header.metadata[name].data
        assert (data.values() if isinstance(data, Array) else data) == field.contents()
        assert header.metadata[name].type == field.types[0]


@given(metadata=metadata, table=tables)
@same_each_time
def test_what_we_write_is_what_every_reader_reads(
    metadata: dict[str, Value], table: list[TensorLine], folder: Path, llama_cpp_accepts: Accepts
) -> None:
    path = write_sparse(folder / "ours.gguf", metadata, table)
    header = read_header(path)
    assert header.metadata == metadata
    assert [(t.name, t.type, t.shape) for t in header.tensors] == table
    assert_agrees(header, gguf.GGUFReader(path))
    assert llama_cpp_accepts(path)


@given(metadata=metadata, table=tables, alignment=st.sampled_from([8, 32, 64, 4096]))
@same_each_time
def test_what_the_gguf_package_writes_is_read(
    metadata: dict[str, Value], table: list[TensorLine], alignment: int, folder: Path, llama_cpp_accepts: Accepts
) -> None:
    path = folder / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, value in metadata.items():
        if name == "general.architecture" or (isinstance(value.data, Array) and value.data.count == 0):
            continue
        data, kind = value.data, gguf.GGUFValueType(value.type)
        if isinstance(data, Array):
            writer.add_key_value(name, data.values(), kind, gguf.GGUFValueType(data.element_type))
        else:
            writer.add_key_value(name, data, kind)
    for name, kind, shape in table:
        rows = (*reversed(shape[1:]), shape[0] // kind.block_size * kind.block_bytes)
        writer.add_tensor(name, np.zeros(rows, np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_agrees(read_header(path), gguf.GGUFReader(path))
    assert llama_cpp_accepts(path)


@given(metadata=metadata, table=tables, servable=st.booleans())
@same_each_time
def test_a_skeleton_keeps_all_but_the_vocabulary(
    metadata: dict[str, Value], table: list[TensorLine], servable: bool, folder: Path
) -> None:
    left_out = {
        "tokenizer.ggml.tokens": Value(ARR, Array(STR, 2, encoded("a") + encoded("b"))),
        "tokenizer.chat_template": Value(STR, "{% for i in range(10**12) %}{{ i }}{% endfor %}"),
        "split.tensors.count": Value(5, len(table)),
    }
    header = read_header(write_sparse(folder / "model.gguf", metadata | left_out, table))
    skeleton = read_header(write_skeleton(header, folder / "skeleton.gguf", servable=servable))
    assert [(t.name, t.type, t.shape) for t in skeleton.tensors] == table
    assert skeleton.metadata.items() >= metadata.items()
    assert skeleton.vocabulary_size == (3 if servable else 2)
    assert "chat_template" not in str(skeleton.metadata)
    assert "split.tensors.count" not in skeleton.metadata


# Every kind of value and line, two tensors, and names that no terminal should see.
RICH = gguf_file(
    key("general.alignment", U32, integers("I", 64)),
    key("general.name", STR, encoded(f"näme {ESCAPES}")),
    key("llama.block_count", U32, integers("I", 2)),
    key("llama.context_length", U32, integers("I", 4096)),
    key("flag", BOOL, b"\1"),
    key("f32", F32, struct.pack("<f", 1e-5)),
    key("f64", F64, struct.pack("<d", 0.1)),
    key("i64", I64, integers("q", -1)),
    key("tokenizer.ggml.tokens", ARR, array(STR, 3, encoded("<s>") + encoded("") + encoded("▁wörd"))),
    key("tokenizer.ggml.scores", ARR, array(F32, 3, bytes(12))),
    key("bytes", ARR, array(U8, 5, b"abcde")),
    key("none", ARR, array(STR, 0)),
    tensors=(table_line("token_embd.weight", (256, 3), 12), table_line(ESCAPES, (32, 2, 1, 2), 2, offset=448)),
    data=448 + 72,
    alignment=64,
)
SEEDS = {"rich": RICH, "sound": SOUND}


def integer_fields(content: bytes) -> list[tuple[int, int]]:
    """Where a sound file has its counts, lengths, types, dimensions and offsets, and their sizes in bytes."""
    fields = [(4, 4), (8, 8), (16, 8)]
    position = 24

    def field(size: int) -> int:
        nonlocal position
        fields.append((position, size))
        position += size
        return int.from_bytes(content[position - size : position], "little")

    def text() -> None:
        nonlocal position
        length = field(8)
        position += length

    def value(kind: int) -> None:
        if kind == STR:
            text()
        elif kind == ARR:
            kind, count = field(4), field(8)
            for _ in range(count):
                value(kind)
        else:
            field(struct.calcsize(SCALARS[kind]))

    tensor_count, key_count = struct.unpack_from("<QQ", content, 8)
    for _ in range(key_count):
        text()
        value(field(4))
    for _ in range(tensor_count):
        text()
        for _ in range(field(4)):
            field(8)
        field(4), field(8)
    return fields


LIMITS = [0, 1, 2, 4, 2**7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def mutated_fields(draw: st.DrawFn) -> bytes:
    """A sound file, some of whose numbers are at a limit, or a little off."""
    original = draw(st.sampled_from(list(SEEDS.values())))
    content = bytearray(original)
    for offset, size in draw(st.lists(st.sampled_from(integer_fields(original)), min_size=1, max_size=3)):
        old = int.from_bytes(original[offset : offset + size], "little")
        new = draw(st.sampled_from(LIMITS) | st.integers(-2, 2).map(lambda step, old=old: old + step))  # type: ignore[misc]
        content[offset : offset + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(content)


@st.composite
def mutated_bytes(draw: st.DrawFn) -> bytes:
    """A sound file with bytes changed, taken out or put in."""
    content = bytearray(draw(st.sampled_from(list(SEEDS.values()))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content) - 1))
        content[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
        content = content or bytearray(b"\0")
    return bytes(content)


def assert_sound_or_refused(content: bytes, folder: Path, llama_cpp_accepts: Accepts) -> None:
    """Nothing but a ModelError that is fit to print, or a header that the other readers accept as well."""
    path = folder / "mutated.gguf"
    error, header = None, None
    try:
        header = parse_header(io.BytesIO(content), path, len(content))
    except ModelError as caught:
        error = str(caught)
    if header is None:
        assert error
        assert drives_no_terminal(error)
        assert len(error) < 1000
        return
    path.write_bytes(content)
    assert llama_cpp_accepts(path)
    if all(tensor.type in PACKAGE_TYPES for tensor in header.tensors):
        gguf.GGUFReader(path)


@given(content=mutated_fields())
@same_each_time
def test_fields_at_their_limits_are_sound_or_refused(content: bytes, folder: Path, llama_cpp_accepts: Accepts) -> None:
    assert_sound_or_refused(content, folder, llama_cpp_accepts)


@given(content=mutated_bytes())
@same_each_time
def test_changed_bytes_are_sound_or_refused(content: bytes, folder: Path, llama_cpp_accepts: Accepts) -> None:
    assert_sound_or_refused(content, folder, llama_cpp_accepts)


@pytest.mark.slow
@given(content=mutated_fields() | mutated_bytes() | st.binary(max_size=200).map(lambda rest: RICH[:24] + rest))
@further
def test_many_mutations_are_sound_or_refused(content: bytes, folder: Path, llama_cpp_accepts: Accepts) -> None:
    assert_sound_or_refused(content, folder, llama_cpp_accepts)


@pytest.mark.parametrize("name", SEEDS)
def test_every_field_at_every_limit_is_sound_or_refused(name: str, folder: Path, llama_cpp_accepts: Accepts) -> None:
    for offset, size in integer_fields(SEEDS[name]):
        for limit in LIMITS:
            number = (limit % 2 ** (8 * size)).to_bytes(size, "little")
            content = SEEDS[name][:offset] + number + SEEDS[name][offset + size :]
            assert_sound_or_refused(content, folder, llama_cpp_accepts)


def assert_cuts_are_refused(content: bytes, sizes: range) -> None:
    for size in sizes:
        with pytest.raises(ModelError):
            parse_header(io.BytesIO(content[:size]), Path("cut.gguf"), size)


@pytest.mark.parametrize("name", SEEDS)
def test_a_file_cut_at_any_byte_is_refused(name: str) -> None:
    assert_cuts_are_refused(SEEDS[name], range(len(SEEDS[name])))


def test_a_model_cut_anywhere_is_refused(tiny: Callable[[str], Path]) -> None:
    content = tiny("mamba").read_bytes()
    assert_cuts_are_refused(content, range(0, len(content), 997))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mamba", "llama"])
def test_a_model_cut_at_any_byte_of_its_header_is_refused(architecture: str, tiny: Callable[[str], Path]) -> None:
    content = tiny(architecture).read_bytes()
    assert_cuts_are_refused(content, range(gguf.GGUFReader(tiny(architecture)).data_offset + 1))
