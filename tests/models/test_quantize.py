"""quantize: the whole file or none, nothing overwritten, and what it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import run_cli, start_cli

from pyllamarun.models.gguf import read_header
from pyllamarun.models.quantize import default_target


@pytest.fixture
def source(smollm2: Path, tmp_path: Path) -> Path:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.symlink_to(smollm2)
    return path


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".partial"))


def test_a_smaller_model_comes_out(source: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", source, "q3_k_m", "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)["data"]
    target = tmp_path / "SmolLM2-135M-Instruct.Q3_K_M.gguf"
    assert data["target"] == str(target)
    written = read_header(target)
    assert written.file_type == "Q3_K_M"
    assert written.weights_bytes == data["after_bytes"] < data["before_bytes"] == read_header(source).weights_bytes
    assert data["fallback_tensors"] == 180  # rows of 576 are no multiple of 256
    assert "is Q4_1 already" in result.stderr
    assert not leftovers(tmp_path)


def test_q2_k_is_warned_about(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    result = run_cli("quantize", tiny("llama"), "Q2_K", "-o", target)
    assert result.returncode == 0, result.stderr
    assert "Q2_K loses much" in result.stderr
    assert target.exists()


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "taken.gguf"
    target.write_text("mine")
    result = run_cli("quantize", source, "Q3_K_M", "-o", target)
    assert result.returncode == 2
    assert "exists already" in result.stderr
    assert target.read_text() == "mine"


@pytest.mark.parametrize("name", ["dangling.gguf", "x" * 300 + ".gguf"])
def test_a_target_that_cannot_be_made_is_refused_before_the_work(name: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / name
    if len(name) < 255:
        target.symlink_to("/nonexistent/elsewhere.gguf")
    result = run_cli("quantize", source, "Q3_K_M", "-o", target)
    assert result.returncode == 2
    assert "will become" not in result.stderr


def test_the_source_is_no_target(source: Path) -> None:
    result = run_cli("quantize", source, "Q3_K_M", "-o", source)
    assert (result.returncode, "The target is the source" in result.stderr) == (2, True)


def test_the_same_type_is_refused(source: Path) -> None:
    result = run_cli("quantize", source, "Q4_1")
    assert (result.returncode, "is Q4_1 already" in result.stderr) == (2, True)


def test_an_unknown_type_is_refused_with_those_that_exist(source: Path) -> None:
    result = run_cli("quantize", source, "Q9_X")
    assert result.returncode == 2
    assert 'no quantization type "Q9_X"' in result.stderr
    assert "Q3_K_M" in result.stderr


def test_a_type_that_needs_an_importance_matrix_says_so(source: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", source, "IQ2_XXS")
    assert (result.returncode, "needs an importance matrix" in result.stderr) == (2, True)
    assert "will become" not in result.stderr, "before the work, not after it"
    assert not leftovers(tmp_path)
    assert not list(tmp_path.glob("*IQ2_XXS*"))


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = run_cli("quantize", source, "Q3_K_M", "--dry-run")
    assert result.returncode == 0
    assert "llama-quantize --allow-requantize" in result.stdout
    assert [p.name for p in tmp_path.glob("*.gguf")] == [source.name]


def test_a_full_disk_is_noticed_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pyllamarun.errors import UsageError
    from pyllamarun.models import quantize

    full = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UsageError, match=r"1000 KiB|977 KiB"):
        quantize.check_disk(tmp_path / "out.gguf", 10**8)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    quiet = subprocess.DEVNULL
    process = start_cli("quantize", source, "Q5_K_M", "-t", "1", stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 30
    while not leftovers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leftovers(tmp_path), "it never began"
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert not leftovers(tmp_path)
    assert [p.name for p in tmp_path.glob("*.gguf")] == [source.name]


def test_a_target_is_named_after_its_type(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    names = {
        "Model-8B-Q4_K_M.gguf": "Model-8B-Q3_K_M.gguf",
        "model.q4_k_s.gguf": "model.Q3_K_M.gguf",
        "model.gguf": "model-Q3_K_M.gguf",
        "Model-F16.gguf": "Model-Q3_K_M.gguf",
    }
    for name, expected in names.items():
        path = tmp_path / name
        os.link(tiny("llama"), path)
        assert default_target(read_header(path), "Q3_K_M").name == expected
