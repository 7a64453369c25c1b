"""compare: what a requantization loses, measured by the real llama-perplexity."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from harness import read_state, run_cli, start_cli

from pyllamarun.models.comparisons import Shelf, kept_for
from pyllamarun.models.divergence import difference, perplexity
from pyllamarun.models.divergence import running as running_means
from pyllamarun.models.gguf import read_header
from pyllamarun.models.text import read_text
from pyllamarun.paths import state_folder
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment
from pyllamarun.run.measuring import Measured, Measurement, Reader
from pyllamarun.run.process import output_of, running

LIMIT_SECONDS = 60.0
SMALL = ("-c", "256", "--", "-t", "1")  # tiny models are slower with two threads, where the cores are busy


def quantized(binaries: Binaries, source: Path, target: Path, type_name: str) -> Path:
    quantizer = binaries.path("llama-quantize")
    argv = [quantizer, "--allow-requantize", source, target, type_name, "2"]
    status, text = output_of(list(map(str, argv)), environment(binaries, ()))
    assert status == 0, text[-2000:]
    return target


@pytest.fixture(scope="session")
def smollm2_q2k(smollm2: Path, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(binaries, smollm2, tmp_path_factory.mktemp("q2k") / "smollm2-Q2_K.gguf", "Q2_K")


@pytest.fixture(scope="session")
def pair(
    tiny: Callable[[str], Path], binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A tiny model and its Q4_0."""
    source = tiny("qwen3")
    return source, quantized(binaries, source, tmp_path_factory.mktemp("pair") / "tiny-Q4_0.gguf", "Q4_0")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred chunks long."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(read_text(None).data)
    return path


def compare(*arguments: str | Path, **variables: str) -> dict[str, Any]:
    result = run_cli("compare", *arguments, "--json", *SMALL, **variables)
    envelope = json.loads(result.stdout)
    assert envelope["ok"], envelope["error"]
    assert envelope["kind"] == "quality"
    data: dict[str, Any] = envelope["data"]
    return data


def wait_for(folder: Path, pattern: str, is_alive: Callable[[], bool]) -> None:
    """Until there is such a file in the folder."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not list(folder.glob(pattern)):
        assert is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_requantization_loses_and_the_model_itself_does_not(smollm2: Path, smollm2_q2k: Path) -> None:
    data = compare(smollm2, smollm2_q2k, smollm2, "--chunks", "2")
    q2k, itself = data["others"]
    assert q2k["perplexity"]["value"] > data["reference"]["perplexity"]["value"]
    assert q2k["difference"]["kl_divergence"] > 10 * q2k["difference"]["kl_divergence_error"]
    assert "Q2_K" in q2k["verdict"]
    assert itself["perplexity"]["value"] == pytest.approx(data["reference"]["perplexity"]["value"], rel=1e-4)
    assert itself["difference"]["kl_divergence"] == pytest.approx(0, abs=1e-5)  # the logits are kept in 16 bits
    assert itself["difference"]["same_top"] == 1
    assert "the same" in itself["verdict"]
    kept = kept_for(read_header(smollm2), "Q2_K")
    assert kept
    assert kept.difference.kl_divergence == q2k["difference"]["kl_divergence"]


def measured(
    pair: tuple[Path, Path], program: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> Measured:
    """The pair over two parts of some chunks each."""
    variables = {name: value for name, value in os.environ.items() if name != "GGML_BACKEND_PATH"}

    def start(argv: Sequence[str]) -> AbstractContextManager[subprocess.Popen[str]]:
        return running(argv, variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    parts = [b"".join(b"It was %d. " % (number * number) for number in range(n, n + 100)) for n in (0, 500)]
    readers = [
        Reader(read_header(path), (str(program), "-m", str(path), "-c", "256", "-b", "256", "-t", "1")) for path in pair
    ]
    shelf = Shelf(readers[0].header, "two parts", [])
    with shelf.held():
        return Measurement(start, shelf, parts, 256, None, progress).run(readers[0], readers[1:])


def test_parts_add_up(pair: tuple[Path, Path], binaries: Binaries) -> None:
    told: list[tuple[int, int]] = []
    found = measured(pair, binaries.path("llama-perplexity"), lambda *progress: told.append(progress))
    (other,) = found.others
    chunks = sum(part.chunks for part in other)
    assert found.fresh_chunks == 2 * chunks
    assert told[-1] == (2 * chunks, 2 * chunks)
    for parts in (found.reference, other):
        running_surprise = running_means([(part.running, 127) for part in parts])
        assert len(running_surprise) == chunks
        assert math.exp(running_surprise[-1]) == pytest.approx(perplexity(parts).value, rel=1e-4)
    lost = difference(other)
    assert lost.kl_divergence > 1e-4
    divergences = running_means([(part.running_divergence, 127) for part in other])
    assert divergences[-1] == pytest.approx(lost.kl_divergence, abs=2e-5)
    rise = perplexity(other).value / perplexity(found.reference).value - 1
    assert lost.perplexity_rise == pytest.approx(rise, abs=1e-4)


def test_what_was_measured_is_not_measured_again(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    first = compare(*pair, "--text", text, "--chunks", "3")
    moved = tmp_path / "of another name.gguf"
    os.link(pair[1], moved)
    again = compare(pair[0], moved, "--text", text, "--chunks", "3")
    anew = compare(*pair, "--text", text, "--chunks", "3", "--again")
    assert [run["measured_now"] for run in (first, again, anew)] == [True, False, True]
    for run in (again, anew):
        assert run["others"][0]["difference"] == first["others"][0]["difference"]
    assert not list(tmp_path.rglob("*.logits"))


def test_a_killed_comparison_goes_on_where_it_was(
    pair: tuple[Path, Path], binaries: Binaries, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = binaries.path("llama-perplexity")
    whole = measured(pair, program)
    monkeypatch.setenv("PYLLAMARUN_HOME", str(tmp_path / "killed"))
    process = multiprocessing.get_context("fork").Process(target=measured, args=(pair, program))
    process.start()
    wait_for(state_folder(), "comparisons/*/01.logits", process.is_alive)  # the second part has begun
    process.kill()
    process.join()
    (folder,) = state_folder().glob("comparisons/*")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*-00.json")}
    assert len(times) == 2
    resumed = measured(pair, program)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-00.json")} == times
    assert resumed.fresh_chunks == 2 * whole.reference[1].chunks
    assert (resumed.reference, resumed.others) == (whole.reference, whole.others)
    assert not list(folder.glob("*.logits"))


@pytest.mark.parametrize("budget_mib", [308, 340])  # the smaller holds the logits of smaller ubatches alone
def test_the_budget_is_kept(budget_mib: int, pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    arguments = ("--text", text, "--chunks", "2", "--virtual-gpu", "1GiB", "--vram", f"{budget_mib}MiB")
    data = compare(*pair, *arguments, PYLLAMARUN_VIRTUAL_STATE=str(state))
    other = data["others"][0]
    (device,) = read_state(state)  # of the last process; a virtual GPU has no scratch memory, which comes in pieces
    assert other["vram_bytes"] <= budget_mib << 20
    assert other["vram_bytes"] - device.peak_bytes in (2 << 20, 4 << 20)
    assert other["gpu_layers"] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"Too short.\n", "The text is too short"),
        ("Caf\u00e9 au lait.\n".encode("latin-1") * 500, "is not UTF-8"),
        (None, "There is no text file"),
    ],
)
def test_a_text_that_cannot_be_used(
    content: bytes | None, message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    result = run_cli("compare", *pair, "--text", path, *SMALL)
    assert result.returncode == 2
    assert message in result.stderr


def test_another_vocabulary_is_refused_before_anything_runs(smollm2: Path, pair: tuple[Path, Path]) -> None:
    result = run_cli("compare", smollm2, pair[1])
    assert result.returncode == 2
    assert "have other vocabularies" in result.stderr
    assert not state_folder().exists() or not list(state_folder().glob("comparisons/*"))


def test_a_model_that_predicts_no_numbers(tiny: Callable[[str], Path], text: Path) -> None:
    result = run_cli("compare", tiny("jamba"), tiny("jamba"), "--text", text, "--chunks", "2", *SMALL)
    assert result.returncode == 4
    assert "predicts no numbers" in result.stderr


def test_a_state_folder_that_cannot_be_written(pair: tuple[Path, Path]) -> None:
    result = run_cli("compare", *pair, PYLLAMARUN_HOME="/proc/nowhere")
    assert result.returncode == 2
    assert "cannot be written" in result.stderr


def test_one_comparison_at_a_time(pair: tuple[Path, Path], text: Path) -> None:
    arguments = ("compare", *pair, "--text", text, *SMALL)
    first = start_cli(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(state_folder(), "comparisons/*/00.logits", lambda: first.poll() is None)
        second = run_cli(*arguments)
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert "another process" in second.stderr
    assert not list(state_folder().rglob("*.logits"))


def test_a_plot_is_drawn(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        result = run_cli("compare", *pair, "--text", text, "--chunks", "2", "--plot", file, *SMALL)
        assert result.returncode == 0, result.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    for words in ("perplexity so far", "KL divergence so far", "Q4_0"):
        assert words in files[0].read_text(), words
