"""quantize --fit: the largest type that meets the goal, held against plans of its neighbours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import run_cli

from pyllamarun.machine.machine import Machine
from pyllamarun.models.model import Model
from pyllamarun.models.requantize import Requantized
from pyllamarun.planner import Planner
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import make_request
from pyllamarun.requantizing import Goal, candidates
from pyllamarun.whatif import requantized_models

DESK = 'gpus = ["RTX 3060"]\nram = "64GiB"\nram_bandwidth = "51.2GB/s"\ncores = 8\n'
LARGE = 'gpus = ["48GiB"]\nram = "64GiB"\nram_bandwidth = "51.2GB/s"\ncores = 8\n'


@pytest.mark.parametrize(("desk", "fit", "speed"), [(LARGE, "32GiB", None), (DESK, "11.5GiB", 1.3)])
def test_the_chosen_type_is_the_largest_that_meets_the_goal(
    desk: str, fit: str, speed: float | None, header_70b: Path, tmp_path: Path
) -> None:
    machine = tmp_path / "desk.toml"
    machine.write_text(desk)
    pace = ["--speed", f"{speed}tok/s"] if speed else []
    result = run_cli("quantize", header_70b, "--fit", fit, *pace, "--machine", machine, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    chosen = json.loads(result.stdout)["data"]["what_if"][-1]
    model = Model.open(header_70b)
    goal = Goal(make_request(vram=fit), speed, "")
    with Planner(Machine.read(machine)) as planner:
        offered = requantized_models(planner, model.header).offered

        def planned(one: Requantized) -> Plan:
            return planner.plan(Model(model.source, one.header), goal.request)

        tried, _ = candidates(offered, model.header.parameters)
        (place,) = (place for place, one in enumerate(tried) if one.type == chosen["type"])
        own = planned(tried[place])
        assert goal.is_met(own)
        assert (own.gpu_layers, own.left_on_cpu == ()) == (chosen["plan"]["gpu_layers"], speed is None)
        assert place > 0
        assert not any(goal.is_met(planned(larger)) for larger in tried[:place])
        smaller = tried[place + 1]
        assert smaller.header.weights_bytes < tried[place].header.weights_bytes
        assert goal.is_met(planned(smaller)), "and those below it do, too"


def test_a_type_of_which_a_smaller_one_was_measured_to_be_better_is_not_chosen(header_70b: Path) -> None:
    model = Model.open(header_70b)
    with Planner(Machine.of(gpus="none")) as planner:
        offered = requantized_models(planner, model.header).offered
    tried, left_out = candidates(offered, model.header.parameters)
    assert {one.type for one in offered} == {one.type for one in tried} | {one.type for one in left_out}
    assert {one.type: one.reason for one in left_out}["IQ4_NL"].startswith("Q4_K_S is not larger")


def test_what_fits_as_it_is_is_left_as_it_is(header_70b: Path) -> None:
    result = run_cli("quantize", header_70b, "--fit", "44GiB", "--virtual-gpu", "48GiB", "--dry-run")
    assert (result.returncode, "as it is" in result.stderr) == (2, True)


def test_a_goal_that_no_type_meets_is_refused(header_70b: Path) -> None:
    result = run_cli("quantize", header_70b, "--fit", "11.5GiB", "--virtual-gpu", "12GiB", "--dry-run")
    assert result.returncode == 3
    assert "The smallest that was tried is Q2_K" in result.stderr
