"""`from pyllamarun import Machine, Model, Planner, plan`: the same plans as the command line's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness import run_cli

from pyllamarun import Machine, Model, Planner
from pyllamarun.planning.request import make_request


def test_a_planner_plans_as_the_command_does(header_70b: Path) -> None:
    with Planner(Machine.of(gpus="12GiB")) as planner:
        model = Model.open(header_70b)
        plans = [planner.plan(model, make_request(vram=vram)) for vram in ("8GiB", "11.5GiB")]
    result = run_cli("plan", header_70b, "--virtual-gpu", "12GiB", "--vram", "11.5GiB", "--json")
    assert json.loads(result.stdout)["data"]["argv"] == list(plans[1].argv)
    assert plans[0].gpu_layers < plans[1].gpu_layers


def test_a_machine_without_a_gpu_plans_for_the_cpu(smollm2: Path) -> None:
    with Planner(Machine.of(gpus="none")) as planner:
        assert planner.plan(Model.open(smollm2), make_request()).devices == ()


def test_the_examples_of_the_documentation_run(
    header_70b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-3-70b-Q4_K_M.gguf").symlink_to(header_70b)
    text = (Path(__file__).parent.parent / "docs/library.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/library.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "21 of 81 layers on the GPU" in printed
    assert "llama-server -m llama-3-70b-Q4_K_M.gguf" in printed
    assert "32,768 tokens" in printed
