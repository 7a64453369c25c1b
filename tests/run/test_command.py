"""The command lines that are shown, and the environment of the programs."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pyllamarun.planning.request import VirtualGpu
from pyllamarun.run.binaries import Binaries
from pyllamarun.run.command import environment, shell_line
from pyllamarun.units import GIB


def test_only_paths_below_the_working_directory_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    argv = [f"{here}/bin/llama-server", f"{here}/llama-cli", "-m", f"/mnt{here}/m.gguf", "-c", "4096", "a b", here]
    words = shlex.split(shell_line(argv))
    assert words[:2] == ["bin/llama-server", "./llama-cli"]
    assert words[2:7] == ["-m", f"/mnt{here}/m.gguf", "-c", "4096", "a b"]


def test_a_working_directory_that_is_gone_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert shell_line(["/bin/llama-server", "-c", "1"]) == "/bin/llama-server -c 1"
    os.chdir("/")


def test_virtual_gpus_are_the_only_cards(binaries: Binaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_N_GPU_LAYERS", "3")
    gpu = VirtualGpu(12 * GIB + 1, 300)
    variables = environment(binaries, [gpu])
    assert int(float(variables["PYLLAMARUN_VIRTUAL_GPUS"]) * 2**20) == gpu.total_bytes
    assert variables["CUDA_VISIBLE_DEVICES"] == ""
    assert "LLAMA_ARG_N_GPU_LAYERS" not in variables


def test_variables_stand_before_a_shown_command() -> None:
    assert shell_line(["llama-server"], {"A": "x y", "B": ""}) == "A='x y' B='' llama-server"


def test_what_is_not_printable_is_shown_as_a_shell_takes_it() -> None:
    words = ["plain", "a b", "it's", "\x1b[2J'\\", "caf\udce9", "\x9b\u202eä", "", "a\nb"]
    shown = shell_line(words)
    assert shown.isprintable()
    said = subprocess.run(["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, check=True).stdout
    assert said.split(b"\0")[:-1] == [os.fsencode(word) for word in words]
