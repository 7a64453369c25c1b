"""The header reader against the gguf package on sound files, and against files from strangers."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import synthetic

from pyllamarun.errors import ModelError, PyllamarunError, UsageError
from pyllamarun.models.gguf import Array, read_header
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
    for key, field in oracle.fields.items():
        if key.startswith("GGUF."):
            continue
        data = header.metadata[key].data
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


def encoded_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def file_of(
    *, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"", data: int = 0
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, keys) + body
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return encoded_string(name) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return encoded_string(name) + struct.pack(f"<I{len(shape)}qIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "empty": b"",
    "another format": b"PK\x03\x04" + b"\0" * 60,
    "version 1": file_of(version=1),
    "version 4": file_of(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "2^64-1 keys": file_of(keys=2**64 - 1),
    "2^64-1 tensors": file_of(tensors=2**64 - 1),
    "a key longer than the file": file_of(keys=1, body=struct.pack("<Q", 2**40)),
    "a string longer than the file": file_of(keys=1, body=key(b"k", 8, struct.pack("<Q", 2**63))),
    "an empty key": file_of(keys=1, body=key(b"", 4, b"\0" * 4)),
    "a key twice": file_of(keys=2, body=key(b"k", 4, b"\0" * 4) * 2),
    "an unknown value type": file_of(keys=1, body=key(b"k", 13, b"\0" * 8)),
    "an array length that overflows": file_of(keys=1, body=key(b"k", 9, struct.pack("<IQ", 10, 2**61))),
    "an array of strings that ends early": file_of(keys=1, body=key(b"k", 9, struct.pack("<IQ", 8, 2**60))),
    "an array of arrays": file_of(keys=1, body=key(b"k", 9, struct.pack("<IQ", 9, 1))),
    "alignment 0": file_of(keys=1, body=key(b"general.alignment", 4, struct.pack("<I", 0))),
    "alignment 48": file_of(keys=1, body=key(b"general.alignment", 4, struct.pack("<I", 48))),
    "alignment as a string": file_of(keys=1, body=key(b"general.alignment", 8, encoded_string(b"32"))),
    "no dimensions": file_of(tensors=1, body=tensor(shape=())),
    "five dimensions": file_of(tensors=1, body=tensor(shape=(1,) * 5)),
    "a dimension of 0": file_of(tensors=1, body=tensor(shape=(32, 0))),
    "a negative dimension": file_of(tensors=1, body=tensor(shape=(-32,))),
    "dimensions that overflow": file_of(tensors=1, body=tensor(shape=(2**31, 2**31, 2**31))),
    "a row that is no multiple of its block": file_of(tensors=1, body=tensor(shape=(33,), kind=2)),
    "an unknown tensor type": file_of(tensors=1, body=tensor(kind=99)),
    "a removed tensor type": file_of(tensors=1, body=tensor(kind=4)),
    "a tensor name of 64 bytes": file_of(tensors=1, body=tensor(name=b"x" * 64), data=128),
    "an empty tensor name": file_of(tensors=1, body=tensor(name=b""), data=128),
    "a tensor name twice": file_of(tensors=2, body=tensor() + tensor(offset=128), data=256),
    "an unaligned offset": file_of(tensors=1, body=tensor(offset=8), data=256),
    "an offset past the end": file_of(tensors=1, body=tensor(offset=1 << 20), data=128),
    "overlapping tensors": file_of(tensors=2, body=tensor(b"a") + tensor(b"b", offset=64), data=512),
    "data that is missing": file_of(tensors=1, body=tensor(), data=127),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_clear_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4


def test_the_hostile_files_differ_from_a_sound_one_only_in_their_fault(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(
        file_of(tensors=2, keys=1, body=key(b"k", 4, b"\0" * 4) + tensor() + tensor(b"u", offset=128), data=256)
    )
    assert len(read_header(path).tensors) == 2


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


def test_control_characters_in_names_are_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "escape.gguf"
    path.write_bytes(file_of(tensors=1, body=tensor(name=b"\x1b[2J", kind=99)))
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert "\x1b" not in str(caught.value)


def test_a_file_cut_anywhere_is_an_error(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    content = tiny("mamba").read_bytes()
    path = tmp_path / "cut.gguf"
    step = random.Random(0)
    for size in [*range(64), *sorted(step.sample(range(64, len(content)), 150)), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError):
            read_header(path)


def test_a_file_with_flipped_bytes_is_read_or_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    content = np.frombuffer(tiny("llama").read_bytes(), dtype=np.uint8)
    generator = np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    for _ in range(300):
        mutated = content.copy()
        mutated[generator.integers(0, 12_000, 4)] = generator.integers(0, 256, 4)
        path.write_bytes(mutated.tobytes())
        try:
            read_header(path)
        except PyllamarunError:
            pass


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing"])
def test_what_is_no_regular_file_is_a_usage_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(UsageError):
        read_header(path)
