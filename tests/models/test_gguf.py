"""The header reader against the gguf package on sound files, and against files from strangers."""

from __future__ import annotations

import io
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import synthetic
from hostile import (
    ARR,
    BOOL,
    ESCAPES,
    F32,
    FAULTS,
    I32,
    SOUND,
    STR,
    U8,
    array,
    drives_no_terminal,
    gguf_file,
    integers,
    key,
    no_file,
    part,
    string,
    tensor,
)

from pyllamarun.errors import ModelError, UsageError
from pyllamarun.models.gguf import (
    ARRAY,
    MAX_HEADER_BYTES,
    MAX_TEXT_BYTES,
    STRING,
    Array,
    Value,
    parse_header,
    read_header,
)
from pyllamarun.models.skeleton import write_sparse
from pyllamarun.models.types import TENSOR_TYPES
from pyllamarun.run.binaries import Binaries


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_reads_what_the_gguf_package_reads(architecture: str, tiny: Callable[[str], Path]) -> None:
    path = tiny(architecture)
    header, oracle = read_header(path), gguf.GGUFReader(path)
    assert header.architecture == synthetic.ARCHITECTURES[architecture]().arch
    assert [t.name for t in header.tensors] == [t.name for t in oracle.tensors]
    for ours, theirs in zip(header.tensors, oracle.tensors):
        assert ours.type.name == theirs.tensor_type.name
        assert ours.shape == tuple(int(n) for n in theirs.shape)
        assert ours.size_bytes == theirs.n_bytes
        assert ours.offset == theirs.data_offset - oracle.data_offset
    for name, field in oracle.fields.items():
        if name.startswith("GGUF."):
            continue
        data = header.metadata[name].data
        value = data.values() if isinstance(data, Array) else data
        assert value == pytest.approx(field.contents()) if isinstance(value, float) else value == field.contents()


def test_reads_a_real_model(smollm2: Path) -> None:
    header = read_header(smollm2)
    assert (header.architecture, header.layers, header.file_type) == ("llama", 30, "Q4_1")
    assert header.vocabulary_size == 49152
    assert header.parameters == 134_515_008
    assert header.weights_bytes < smollm2.stat().st_size


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    ours = {t.name: (t.block_size, t.block_bytes) for t in TENSOR_TYPES.values()}
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # an intermediate type, of another size in ggml itself
            assert ours[kind.name] == sizes


LENGTHS = {
    "short ones": [n % 13 + 1 for n in range(200_000)],  # of several chunks
    "empty ones among them": [n % 9 for n in range(1000)],
    "a long one at every place of a run": [300 if n % 129 == 0 else 3 for n in range(129 * 129)],
    "around the longest that a run takes": [30 + n % 5 for n in range(500)],
    "fewer than a run": [2] * 127,
    "no more than a run": [2] * 128,
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_vocabulary_is_read_whole(lengths: list[int], tmp_path: Path) -> None:
    texts = [chr(ord("a") + n % 26) * length for n, length in enumerate(lengths)]
    raw = b"".join(len(text).to_bytes(8, "little") + text.encode() for text in texts)
    metadata = {
        "general.architecture": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(ARRAY, Array(STRING, len(texts), raw)),
        "after": Value(STRING, "them"),
    }
    header = read_header(write_sparse(tmp_path / "m.gguf", metadata, []))
    assert header.metadata["tokenizer.ggml.tokens"].data.values() == texts
    assert header.get("after") == "them"


def test_a_split_model_is_found_whole(tiny: Callable[[str], Path], binaries: Binaries, tmp_path: Path) -> None:
    whole = read_header(tiny("llama"))
    splitter = [binaries.path("llama-gguf-split"), "--split", "--split-max-tensors", "9"]
    subprocess.run([*splitter, whole.path, tmp_path / "m"], check=True, capture_output=True)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    header = read_header(parts[0])
    assert header.parts == tuple(parts)
    assert {t.name: t.size_bytes for t in header.tensors} == {t.name: t.size_bytes for t in whole.tensors}

    with pytest.raises(ModelError, match="not the first part"):
        read_header(parts[1])
    parts[-1].unlink()
    with pytest.raises(UsageError, match="There is no file"):
        read_header(parts[0])
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelError, match="is not part"):
        read_header(parts[0])


def write_parts(folder: Path, *contents: bytes) -> Path:
    """Writes the parts of a split model under the names that they should have, and returns the first."""
    paths = [folder / f"m-{number:05d}-of-{len(contents):05d}.gguf" for number in range(1, len(contents) + 1)]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths[0]


TWO_PARTS = [part(0, 2, tensor("a"), announced=2), part(1, 2, tensor("b"), announced=2)]
SPLITS = {
    "the second twice": ([part(0, 3, tensor("a"), announced=3), *[part(1, 3, tensor("b"), announced=3)] * 2], "is not"),
    "reordered": ([TWO_PARTS[1], TWO_PARTS[0]], "not the first part"),
    "reordered behind the first": (
        [part(0, 3, tensor("a"), announced=3), part(2, 3, tensor("c"), announced=3), part(1, 3, announced=3)],
        "is not part 2 of 3",
    ),
    "of another count": ([TWO_PARTS[0], part(1, 3, tensor("b"), announced=2)], "is not part 2 of 2"),
    "not a part": ([TWO_PARTS[0], SOUND], "is not part 2 of 2"),
    "of another model, with the same tensors": ([TWO_PARTS[0], part(1, 2, tensor("a"), announced=2)], "stands twice"),
    "of another model, with more tensors": (
        [TWO_PARTS[0], part(1, 2, tensor("b"), tensor("c", offset=128), announced=2)],
        "hold 3 tensors, and the first announces 2",
    ),
    "with a fault": ([TWO_PARTS[0], part(1, 2, tensor("b", kind=99), announced=2)], "99 is no tensor type"),
    "empty": ([TWO_PARTS[0], b""], "It is empty"),
}


def test_two_parts_make_a_model(tmp_path: Path) -> None:
    assert [t.name for t in read_header(write_parts(tmp_path, *TWO_PARTS)).tensors] == ["a", "b"]


@pytest.mark.parametrize(("contents", "expected"), SPLITS.values(), ids=SPLITS)
def test_parts_that_do_not_belong_together_are_an_error(contents: list[bytes], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=expected):
        read_header(write_parts(tmp_path, *contents))


def test_a_part_under_another_name_is_an_error(tmp_path: Path) -> None:
    renamed = write_parts(tmp_path, *TWO_PARTS).rename(tmp_path / "first.gguf")
    with pytest.raises(ModelError, match=r"does not end in -00001-of-00002\.gguf"):
        read_header(renamed)


def test_a_missing_part_is_named_however_many_are_claimed(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-65535.gguf"
    path.write_bytes(part(0, 65535, announced=0))
    with pytest.raises(UsageError, match="m-00002-of-65535"):
        read_header(path)


@pytest.mark.parametrize(("content", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_one_error_that_says_what_and_where(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert re.search(expected, str(caught.value))
    assert str(path) in caught.value.what
    assert len(str(caught.value)) < 500 + len(str(path))
    assert drives_no_terminal(str(caught.value))


def test_the_faulty_files_differ_from_a_sound_one_only_in_their_fault(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(SOUND)
    assert [(t.name, t.offset, t.size_bytes) for t in read_header(path).tensors] == [("a", 0, 128), ("b", 128, 128)]


def test_a_header_without_tensors_may_end_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf_file(key("k", STR, string("")))[: 69 + 9 + 4 + 8])
    assert read_header(path).tensors == ()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "It is a Git-LFS pointer"),
        (b"  <!DOCTYPE html><html></html>", "It is a web page"),
        (b"<html>", "It is a web page"),
        (b"no", "It begins with b'no'"),
        (b"", "It is empty"),
    ],
)
def test_what_stands_in_place_of_a_model_is_told(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert why in caught.value.why


LONG = {
    "a string": gguf_file(key("k", STR, integers("Q", MAX_TEXT_BYTES))),
    "strings": gguf_file(*[key(f"{i}", STR, string("x" * (MAX_TEXT_BYTES // 8))) for i in range(9)]),
    "keys": gguf_file(*[key(f"{i:060000d}", BOOL, b"\0") for i in range(MAX_TEXT_BYTES // 60_000 + 1)]),
}


@pytest.mark.parametrize("content", LONG.values(), ids=LONG)
def test_text_is_bounded(content: bytes) -> None:
    with pytest.raises(ModelError, match="more than 8388608 bytes of text"):
        parse_header(io.BytesIO(content), Path("x"), 1 << 40)


def test_a_header_is_bounded() -> None:
    content = gguf_file(key("k", ARR, array(U8, MAX_HEADER_BYTES)))
    with pytest.raises(ModelError, match="larger than 67108864 bytes"):
        parse_header(io.BytesIO(content), Path("x"), 1 << 40)


@pytest.mark.parametrize("size", [1, 7])
def test_a_stream_may_trickle(size: int) -> None:
    class Trickle(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            return super().read(size)

    content = gguf_file(key("k", ARR, array(STR, 3, string("äöü") * 3)), tensors=(tensor(),), data=128)
    header = parse_header(Trickle(content), Path("x"), len(content))
    assert header == parse_header(io.BytesIO(content), Path("x"), len(content))
    assert header.metadata["k"].data.values() == ["äöü"] * 3


def test_a_file_that_shrinks_while_it_is_read_is_an_error() -> None:
    for size in range(len(SOUND) - 256 - 32):
        with pytest.raises(ModelError):
            parse_header(io.BytesIO(SOUND[:size]), Path("x"), len(SOUND))


def test_names_from_a_file_are_printable_and_short(tmp_path: Path) -> None:
    path = tmp_path / "escape.gguf"
    path.write_bytes(gguf_file(key("general.name", STR, string(ESCAPES * 1000))))
    assert read_header(path).name.isprintable()
    assert len(read_header(path).name) < 200
    path.write_bytes(gguf_file())
    assert read_header(path.rename(tmp_path / f"{ESCAPES}.gguf")).name.isprintable()


READ_KEYS = [
    "general.name",
    "general.file_type",
    "split.count",
    "split.no",
    "block_count",
    "context_length",
    "vocab_size",
]
ODD_VALUES = {
    "string": (STR, string("7")),
    "negative": (I32, integers("i", -7)),
    "array": (ARR, array(U8, 1, b"7")),
    "float": (F32, integers("f", 7)),
}


@pytest.mark.parametrize(("kind", "value"), ODD_VALUES.values(), ids=ODD_VALUES)
@pytest.mark.parametrize("name", READ_KEYS)
@pytest.mark.parametrize("prefix", ["", "llama."])
def test_odd_values_are_refused_or_passed_over(prefix: str, name: str, kind: int, value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(gguf_file(key(prefix + name, kind, value)))
    try:
        header = read_header(path)
    except ModelError:
        return
    assert (header.architecture, header.file_type, header.layers) == ("llama", "", 0)
    assert header.name in ("odd", "7")
    assert (header.trained_context_tokens, header.vocabulary_size) == (0, 0)


def test_values_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    path = tmp_path / "latin1.gguf"
    tokens = key("tokenizer.ggml.tokens", ARR, array(STR, 2, string(b"\xff") + string("b")))
    path.write_bytes(gguf_file(key("general.name", STR, string(b"caf\xe9")), tokens))
    header = read_header(path)
    assert header.name == "caf\ufffd"
    assert header.metadata["tokenizer.ggml.tokens"].data.values() == ["\ufffd", "b"]


NO_FILES = ["folder", "fifo", "socket", "device", "missing", "loop", "too long"]


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_regular_file_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_header(no_file(kind, tmp_path))


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_a_part_that_is_no_regular_file_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    first = write_parts(tmp_path, *TWO_PARTS)
    second = first.with_name("m-00002-of-00002.gguf")
    second.unlink()
    no_file(kind, tmp_path).rename(second)
    with pytest.raises(UsageError):
        read_header(first)
