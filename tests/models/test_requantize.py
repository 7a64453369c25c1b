"""The forecast of a requantization is what llama-quantize then writes: every tensor, and the file's size."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import synthetic
from harness import Machine

from pyllamarun.models.gguf import Header, read_header
from pyllamarun.models.quantize import Start, known_types
from pyllamarun.models.requantize import Requantizations, requantizations, requantized
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment
from pyllamarun.run.process import output_of, running

TYPES = (
    "Q4_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "Q4_K_M",
    "Q4_K",
    "Q6_K",
    "IQ4_XS",
    "IQ4_NL",
    "IQ3_M",
    "F16",
)


@pytest.fixture(scope="module")
def start(binaries: Binaries) -> Start:
    variables = environment(binaries)

    def of(argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running(argv, variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return of


def all_of(header: Header, start: Start, binaries: Binaries, folder: Path) -> Requantizations:
    """Everything that llama-quantize knows, forecast for a model."""
    quantizer = binaries.path("llama-quantize")
    types = known_types(output_of([quantizer, "--help"], environment(binaries))[1])
    return requantizations(start, quantizer, write_skeleton(header, folder / "skeleton.gguf"), header, types)


@pytest.mark.parametrize("name", ["llama", "qwen3moe", "smollm2"])
def test_it_is_what_llama_quantize_writes(
    name: str, smollm2: Path, tiny: Callable[[str], Path], start: Start, binaries: Binaries, tmp_path: Path
) -> None:
    model = smollm2 if name == "smollm2" else tiny(name)
    header, quantizer = read_header(model), binaries.path("llama-quantize")
    skeleton = write_skeleton(header, tmp_path / "skeleton.gguf")
    for type_name in ("Q3_K_M", "IQ4_XS") if name == "smollm2" else TYPES:
        target = tmp_path / "written.gguf"
        argv = [quantizer, "--allow-requantize", model, target, type_name, "2"]
        subprocess.run(argv, check=True, capture_output=True)
        written, forecast = read_header(target), requantized(start, quantizer, skeleton, header, type_name).header
        assert forecast.tensors == written.tensors, type_name
        assert (forecast.file_bytes, forecast.file_type) == (target.stat().st_size, written.file_type), type_name


def test_its_skeleton_is_planned_like_the_file(
    tiny: Callable[[str], Path], start: Start, binaries: Binaries, machine: Callable[..., Machine], tmp_path: Path
) -> None:
    header, quantizer = read_header(tiny("gemma3")), binaries.path("llama-quantize")
    skeleton, target = write_skeleton(header, tmp_path / "skeleton.gguf"), tmp_path / "written.gguf"
    argv = [quantizer, "--allow-requantize", tiny("gemma3"), target, "Q3_K_M", "2"]
    subprocess.run(argv, check=True, capture_output=True)
    forecast = requantized(start, quantizer, skeleton, header, "Q3_K_M")
    instead = write_skeleton(forecast.header, tmp_path / "forecast.gguf")
    for options in (["-ngl", "2", "-c", "1024"], ["-ngl", "99", "-c", "2048"]):
        assert machine(4096).ask(["-m", str(instead), *options]) == machine(4096).ask(["-m", str(target), *options])


def test_only_what_is_smaller_and_needs_no_more_is_offered(
    header_70b: Path, start: Start, binaries: Binaries, tmp_path: Path
) -> None:
    header = read_header(header_70b)
    found = all_of(header, start, binaries, tmp_path)
    assert [one.type for one in found.offered][-3:] == ["IQ3_S", "Q3_K_S", "Q2_K"]
    assert all(one.header.weights_bytes < header.weights_bytes for one in found.offered)
    reasons = {one.type: one.reason for one in found.left_out}
    assert reasons["IQ2_XXS"] == reasons["Q2_K_S"] == "made only with an importance matrix"
    assert reasons["Q8_0"] == reasons["Q5_K_M"] == "not smaller than the model"
    assert "trained in" in reasons["TQ1_0"]
    offered = {one.type for one in found.offered}
    assert not offered & ({"Q4_K_M", "Q4_K", "F16"} | reasons.keys())


def test_names_from_strangers_are_read_as_they_stand(start: Start, binaries: Binaries, tmp_path: Path) -> None:
    spec = synthetic.ARCHITECTURES["llama"]()
    spec.add("blk.0.odd - [ 256, 256], type = f16, size.weight", 256, 256)
    header = read_header(synthetic.write(spec, tmp_path / "odd.gguf"))
    skeleton = write_skeleton(header, tmp_path / "skeleton.gguf")
    forecast = requantized(start, binaries.path("llama-quantize"), skeleton, header, "Q2_K")
    assert {tensor.name for tensor in forecast.header.tensors} == {tensor.name for tensor in header.tensors}
