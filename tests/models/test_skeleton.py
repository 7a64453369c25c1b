"""A skeleton answers like its model: the probe's bytes and llama-quantize's forecast are the same."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic
from harness import Machine

from pyllamarun.models.gguf import read_header
from pyllamarun.models.skeleton import write_skeleton
from pyllamarun.run.binaries import Binaries


@pytest.mark.parametrize("architecture", synthetic.ARCHITECTURES)
def test_the_probe_answers_the_same(
    architecture: str, tiny: Callable[[str], Path], machine: Callable[..., Machine], tmp_path: Path
) -> None:
    path = tiny(architecture)
    skeleton = write_skeleton(read_header(path), tmp_path / "skeleton.gguf")
    for options in (["-ngl", "2", "-c", "1024"], ["-ngl", "99", "-c", "2048", "-np", "2"]):
        assert machine(4096).ask(["-m", str(skeleton), *options]) == machine(4096).ask(["-m", str(path), *options])


def test_it_takes_little_space(smollm2: Path, tmp_path: Path) -> None:
    skeleton = write_skeleton(read_header(smollm2), tmp_path / "skeleton.gguf")
    assert skeleton.stat().st_blocks * 512 < 64 * 1024
    assert read_header(skeleton).weights_bytes == read_header(smollm2).weights_bytes


def test_a_split_model_becomes_one_skeleton(
    tiny: Callable[[str], Path], binaries: Binaries, machine: Callable[..., Machine], tmp_path: Path
) -> None:
    whole = tiny("llama")
    splitter = [binaries.path("llama-gguf-split"), "--split", "--split-max-tensors", "9"]
    subprocess.run([*splitter, whole, tmp_path / "m"], check=True, capture_output=True)
    first = min(tmp_path.glob("m-*.gguf"))
    skeleton = write_skeleton(read_header(first), tmp_path / "skeleton.gguf")
    options = ["-ngl", "2", "-c", "1024"]
    assert machine(4096).ask(["-m", str(skeleton), *options]) == machine(4096).ask(["-m", str(whole), *options])


def test_the_70b_header_has_the_types_that_llama_quantize_chooses(binaries: Binaries, tmp_path: Path) -> None:
    import llama_70b_header

    f16 = llama_70b_header.write_f16(tmp_path / "f16.gguf")
    argv = [binaries.path("llama-quantize"), "--dry-run", f16, tmp_path / "none", "Q4_K_M"]
    result = subprocess.run(argv, check=True, capture_output=True, text=True)
    chosen = {}
    for line in (result.stdout + result.stderr).splitlines():
        if line.startswith("[") and "] " in line and "->" in line:
            name = line.split("]")[1].split()[0]
            chosen[name] = line.rsplit("(", 1)[1].rstrip(")").upper()
    ours = {
        name: llama_70b_header.q4_k_m(name, shape).name for name, shape in llama_70b_header.shapes() if len(shape) > 1
    }
    assert chosen == ours
