"""Plots: what they draw is the plan, and the same plan gives the same file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
from harness import run_cli
from matplotlib.figure import Figure
from synthetic import Spec

from pyllamarun import Machine, Model, Planner
from pyllamarun.errors import UsageError
from pyllamarun.planning.compare import Comparison
from pyllamarun.planning.plot import check_plot, draw_comparison, used_from, weights_by_layer, write_plot
from pyllamarun.planning.request import make_request
from pyllamarun.planning.speed import Range
from pyllamarun.whatif import compare

WISHES = {"vram": "312MiB", "overhead": "300MiB", "context": 1024}


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    with Planner(Machine.of(gpus="1GiB", ram="8GiB")) as planner:
        yield planner


@pytest.mark.parametrize(
    "spec", [shapes.llama_8b(8), shapes.qwen3_30b_a3b(6), shapes.gemma3_12b(8)], ids=lambda s: s.arch
)
def test_the_layers_that_are_drawn_add_up_to_the_plan(spec: Spec, planner: Planner, tmp_path: Path) -> None:
    model = Model.open(shapes.write(spec, tmp_path / "m.gguf"))
    plan = planner.plan(model, make_request(vram="1GiB", overhead="300MiB", context=1024))
    on_gpu, on_cpu = weights_by_layer(plan, model.header)
    assert len(on_gpu) == plan.layers
    padding_bytes = sum(device.weights_bytes for device in plan.devices) - sum(on_gpu)  # of rows, to 512 elements
    assert 0 <= padding_bytes < 512 * len(model.header.tensors)
    assert sum(on_gpu) > 0
    assert sum(on_cpu) > 0
    assert plan.left_on_cpu
    assert used_from(plan, on_gpu)[0] == sum(device.total_bytes for device in plan.devices)


def test_the_same_plan_gives_the_same_file(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        options = ("--virtual-gpu", "1GiB", "--vram", "312MiB", "--ram", "8GiB", "-c", "1024", "--plot", file)
        result = run_cli("plan", tiny("llama"), *options)
        assert result.returncode == 0, result.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    for words in ("layers on the GPU", "budget, 312.0 MiB", "by VRAM", "by quantization"):
        assert words in text, words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_a_comparison_is_drawn_beside_its_rows(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "slots.png"
    result = run_cli("plan", tiny("llama"), "--virtual-gpu", "1GiB", "--compare", "slots", "--json", "--plot", file)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "compare"
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("axis", ["vram", "ctx"])
def test_speeds_are_drawn_from_low_to_high(axis: str, planner: Planner, tiny: Callable[[str], Path]) -> None:
    comparison = compare(planner, Model.open(tiny("llama")), make_request(**WISHES), axis)
    rows = tuple(
        replace(row, generation=Range(1.0 + place, 2.0 + place))
        for place, row in enumerate(row for row in comparison.rows if row.fits)
    )
    axes = Figure().subplots()
    draw_comparison(axes, replace(comparison, rows=rows, model_name="$a_{b", recommended=rows[-1].label))
    labels = axes.get_legend_handles_labels()[1]
    assert "low to high" in labels
    assert "2 tok/s: usable" in labels
    assert axes.get_ylim()[1] >= len(rows)


def test_what_cannot_be_plotted_is_said_before_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in (("a.pdf", "does not end in .svg or .png"), ("none/a.svg", "There is no folder")):
        with pytest.raises(UsageError, match=message):
            check_plot(tmp_path / name)
    nothing = Comparison("ctx", "", "", (), "", "")
    with pytest.raises(UsageError, match="cannot be written"):
        write_plot(Path("/proc/a.svg"), [nothing])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as caught:
        check_plot(tmp_path / "a.svg")
    assert caught.value.remedy == "pip install 'pyllamarun[plot]'"
