"""Quantized for real: every tensor is what the dry run said, and the file runs; importance matrices within a budget."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shapes
import synthetic
from harness import Machine, read_state, run_cli, start_cli

from pyllamarun.machine.machine import Machine as Described
from pyllamarun.models.gguf import parse_header, read_header
from pyllamarun.models.model import Model
from pyllamarun.models.provenance import read_provenance
from pyllamarun.planner import Planner
from pyllamarun.planning.request import make_request
from pyllamarun.requantizing import Wish, find_quantizer, forecasts, imatrix_plan, requantize
from pyllamarun.units import MIB

TYPES = ("Q3_K_M", "Q2_K")


def assert_as_forecast_and_running(model: Path, folder: Path, machine: Machine) -> None:
    wish = Wish(TYPES, folder)
    forecast = forecasts(find_quantizer(), Model.open(model), wish)
    for expected, made in zip(forecast, requantize(Model.open(model), wish)):
        written = read_header(Path(made.target))
        assert written.tensors == expected.header.tensors, made.type
        assert (written.file_type, made.fallback_tensors) == (made.type, expected.fallback_tensors)
        assert read_provenance(written.metadata)["type"] == made.type
        with machine.serve(["-m", made.target, "-ngl", "99", "-c", "512"]) as server:
            assert server.complete("The capital of France is", 4)["tokens_predicted"] == 4


def test_smollm2_whose_rows_fall_back(smollm2: Path, machine: Callable[..., Machine], tmp_path: Path) -> None:
    assert_as_forecast_and_running(smollm2, tmp_path, machine(1024))
    assert [made.name for made in tmp_path.glob("*Q3_K_M*")] == ["SmolLM2-135M-Instruct.Q3_K_M.gguf"]


def rows_of_256(n_embd: int, layers: int) -> synthetic.Spec:
    spec = synthetic.Spec("llama", n_layer=layers, n_embd=n_embd, n_ff=3 * n_embd, n_head=n_embd // 64, n_head_kv=4)
    synthetic.common(spec)
    for i in range(layers):
        synthetic.attention(spec, i)
        synthetic.feed_forward(spec, i)
    return shapes.quantized(spec)


def test_a_model_in_q4_k_m_whose_rows_are_whole_blocks(machine: Callable[..., Machine], tmp_path: Path) -> None:
    model = shapes.fill(shapes.write(rows_of_256(512, 4), tmp_path / "model-Q4_K_M.gguf"))
    (tmp_path / "made").mkdir()
    assert_as_forecast_and_running(model, tmp_path / "made", machine(1024))


@pytest.mark.slow
def test_a_large_model_in_q4_k_m(machine: Callable[..., Machine], tmp_path: Path) -> None:
    model = shapes.fill(shapes.write(shapes.llama_8b(), tmp_path / "model-Q4_K_M.gguf"))
    assert model.stat().st_size >= 300e6
    (tmp_path / "made").mkdir()
    assert_as_forecast_and_running(model, tmp_path / "made", machine(2048))


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "tiny-Q4_0.gguf"
    path.symlink_to(tiny("llama"))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Of some 40 chunks."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"word{7 * i % 250}" for i in range(2_200)))
    return path


def chunks(path: Path) -> int:
    with path.open("rb") as file:
        return int(parse_header(file, path, path.stat().st_size).metadata["imatrix.chunk_count"].data)


def test_an_importance_matrix_is_computed_once_and_within_the_budget(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("PYLLAMARUN_VIRTUAL_STATE", str(state))
    text.write_text(text.read_text()[:1_200])
    options = ["--imatrix", "auto", text, "--virtual-gpu", "800MiB", "--vram", "306MiB", "-t", "1"]
    result = run_cli("quantize", model, "IQ2_XXS", *options)
    assert result.returncode == 0, result.stderr
    (matrix,) = tmp_path.glob("imatrix-tiny-Q4_0-text-*.gguf")
    made = tmp_path / "tiny-IQ2_XXS.gguf"
    assert "IQ2_XXS" in {tensor.type.name for tensor in read_header(made).tensors}
    assert read_provenance(read_header(made).metadata)["imatrix"] == matrix.name
    (device,) = read_state(state)
    with Planner(Described.of(gpus="800MiB")) as planner:
        plan = imatrix_plan(planner, Model.open(model), make_request(vram="306MiB"))
    assert plan.gpu_layers > 0
    assert device.peak_bytes == plan.devices[0].total_bytes - plan.devices[0].scratch_bytes
    assert device.peak_bytes <= 306 * MIB
    when = matrix.stat().st_mtime_ns
    assert run_cli("quantize", model, "IQ3_XXS", *options).returncode == 0
    assert matrix.stat().st_mtime_ns == when


def test_an_importance_matrix_goes_on_where_it_was_killed(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", model, "IQ2_XXS", "--imatrix", "auto", text, "--gpu", "none", "-t", "1"]
    quiet = subprocess.DEVNULL
    process = start_cli(*arguments, stdout=quiet, stderr=quiet)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".imatrix*/*.at_10")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not list(tmp_path.glob("imatrix*")), "killed before its end"
    result = run_cli(*arguments)
    assert result.returncode == 0, result.stderr
    (matrix,) = tmp_path.glob("imatrix*")
    assert chunks(matrix) >= 38
    assert not list(tmp_path.glob(".imatrix*"))


def test_a_short_text_is_refused(model: Path, text: Path) -> None:
    text.write_text("word1 word2")
    result = run_cli("quantize", model, "IQ2_XXS", "--imatrix", "auto", text, "--no-plan")
    assert (result.returncode, "at least 1,024 tokens" in result.stderr) == (2, True), result.stderr


def test_the_command_for_an_importance_matrix_is_shown(model: Path, text: Path) -> None:
    result = run_cli("quantize", model, "IQ2_XXS", "--imatrix", "auto", text, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    first, second = json.loads(result.stdout)["data"]["commands"]
    assert re.search("llama-imatrix$", first[0])
    assert first[first.index("-o") + 1] == second[second.index("--imatrix") + 1]


def test_what_compare_has_measured_is_said(model: Path, text: Path, tmp_path: Path) -> None:
    text.write_text(text.read_text()[:1_200])
    first = run_cli("quantize", model, "Q2_K", "--no-plan")
    assert "KL divergence" not in first.stderr
    compared = run_cli("compare", model, tmp_path / "tiny-Q2_K.gguf", "--text", text, "--gpu", "none")
    assert compared.returncode == 0, compared.stderr
    again = run_cli("quantize", model, "Q2_K", "--no-plan", "--dry-run", "-o", tmp_path / "again.gguf")
    assert "Q2_K of this model, as `pyllamarun compare` has measured" in again.stderr
