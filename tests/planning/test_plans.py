"""--allow quant: the largest type that is usable is planned where the model as it is serves badly, and never made."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_cli

from pyllamarun import Machine, Model, Plan, Planner, paths, plan
from pyllamarun.errors import DoesNotFit
from pyllamarun.planning.advice import LADDER
from pyllamarun.planning.plan import Requantization
from pyllamarun.planning.request import make_request
from pyllamarun.whatif import compare

# Slow enough for a model of 1.5 MB to be too large.
CARD, RAM = {"gpus": "1GiB", "cores": 1}, "8GiB"
BUDGET = {"vram": "306MiB", "overhead": "300MiB", "context": 1024}
SLOW = ("--virtual-gpu", "450MiB", "--ram-bandwidth", "60MB/s", "--cores", "2", "--allow", "quant")


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copy(tiny("llama"), tmp_path / "llama.gguf")


def planned(model: Path, bandwidth: str = "4.6MB/s", allow: str = "quant", **wishes: object) -> Plan:
    return plan(model, Machine.of(ram=RAM, ram_bandwidth=bandwidth, **CARD), allow=allow, **(BUDGET | wishes))  # type: ignore[arg-type]


def chosen(one: Plan) -> Requantization:
    assert one.requantization is not None
    return one.requantization


@pytest.mark.parametrize(
    ("bandwidth", "type_name"), [("9MB/s", ""), ("5MB/s", "Q3_K_M"), ("4.6MB/s", "Q2_K"), ("1MB/s", "Q2_K")]
)
def test_the_largest_type_that_is_usable_is_planned_or_else_the_fastest(
    bandwidth: str, type_name: str, model: Path
) -> None:
    result = planned(model, bandwidth)
    with Planner(Machine.of(ram=RAM, ram_bandwidth=bandwidth, **CARD)) as planner:
        rows = compare(planner, Model.open(model), make_request(**BUDGET), "quants").rows  # type: ignore[arg-type]
    smaller = [row for row in rows if row.type in LADDER]
    wanted = next((row for row in (rows[0], *smaller) if row.pace >= 2), max(smaller, key=lambda row: row.pace))
    assert wanted.type == type_name
    made, notes = result.requantization, result.changes
    assert replace(result, requantization=None, changes=(), residency=wanted.plan.residency) == wanted.plan  # type: ignore[union-attr]
    if not type_name:
        assert (made, notes) == (None, ())
        return
    assert notes[0].startswith(f"{type_name} in place of what it is, as allowed: ")
    assert result.argv[:3] == ("llama-server", "-m", str(model.with_name(f"llama-{type_name}.gguf")))
    assert chosen(result).command == f"pyllamarun quantize {model} {type_name}"
    assert chosen(result).generation_before == rows[0].generation
    assert list(model.parent.glob("*.gguf")) == [model]


def test_what_else_may_be_changed_comes_first(model: Path) -> None:
    """A smaller KV cache brings more of it onto the card than a smaller type would."""
    assert planned(model, vram="307MiB").requantization is not None
    result, without = (planned(model, vram="307MiB", allow=allow) for allow in ("kv,quant", "kv"))
    assert result.requantization is None
    assert replace(result, residency=without.residency) == without


def test_where_it_would_not_fit_otherwise(model: Path) -> None:
    fixed = {"arguments": ["-ngl", "3"], "vram": "307MiB"}
    with pytest.raises(DoesNotFit):
        planned(model, allow="", **fixed)
    result = planned(model, **fixed)
    assert (chosen(result).gpu_layers_before, result.gpu_layers) == (None, 3)
    assert result.changes[0].endswith("as allowed: otherwise it would not fit.")
    with pytest.raises(DoesNotFit, match="With -ngl 3"):
        planned(model, arguments=["-ngl", "3"])


def test_a_name_that_something_else_has_is_passed_over(model: Path, tiny: Callable[[str], Path]) -> None:
    taken = model.with_name("llama-Q3_K_M.gguf")
    shutil.copy(tiny("qwen2"), taken)
    result = planned(model, "5MB/s")
    assert chosen(result).type == "Q2_K"
    assert f"Q3_K_M was passed over: {taken} is there, and is not that." in result.warnings
    model.with_name("llama-Q2_K.gguf").touch()
    assert planned(model, "5MB/s").requantization is None
    assert "no smaller type of this model is clearly better" in planned(model, "5MB/s").warnings[-1]


def test_it_is_never_to_be_written_into_another_program_s_store(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "hub/models--owner--repo/snapshots/0/llama.gguf"
    kept.parent.mkdir(parents=True)
    model.rename(kept)
    assert planned(kept).argv[2] == str(paths.models_folder() / "llama-Q2_K.gguf")


def test_it_is_made_by_what_the_refusal_says_and_then_used(smollm2: Path, tmp_path: Path) -> None:
    model, file = tmp_path / "smollm2.Q4_1.gguf", tmp_path / "plan.json"
    shutil.copy(smollm2, model)
    saved = run_cli("plan", model, *SLOW, "--no-advice", "--save", file)
    assert saved.returncode == 0, saved.stderr
    made_by = f"pyllamarun quantize {model} Q2_K"
    assert saved.stdout.endswith(f"The model is not on this machine yet.  First: {made_by}\n")
    argv = json.loads(file.read_text())["data"]["argv"]
    assert argv[2] == str(tmp_path / "smollm2.Q2_K.gguf")
    again = json.loads(run_cli("plan", "--plan", file, "--json").stdout)["data"]
    assert (again["argv"], again["here"], again["requantization"]["is_made"]) == (argv, False, False)
    for command in (("serve", model, *SLOW), ("run", "--plan", file, "-p", "Hello")):
        refused = run_cli(*command)
        assert (refused.returncode, f"First: {made_by}" in refused.stderr) == (3, True), refused.stderr
    assert not Path(argv[2]).exists()
    assert run_cli(*shlex.split(made_by)[1:]).returncode == 0
    data = json.loads(run_cli("plan", model, *SLOW, "--json").stdout)["data"]
    assert (data["argv"], data["here"], data["requantization"]["is_made"]) == (argv, True, True)
    answer = run_cli("run", "--plan", file, "-n", "4", "-p", "The capital of France is")
    assert (answer.returncode, bool(answer.stdout.strip())) == (0, True), answer.stderr


def test_what_would_help_a_requantization_makes_it_first(model: Path) -> None:
    said = ("--virtual-gpu", "1GiB", "--ram-bandwidth", "1MB/s", "--cores", "1", "-c", "1024", "--overhead", "300MiB")
    result = run_cli("plan", model, *said, "--vram", "306MiB", "--allow", "kv,quant")
    assert result.returncode == 0, result.stderr
    _, _, advice = result.stdout.partition("What would help")
    commands = [line.strip() for line in advice.splitlines() if line.strip().startswith("pyllamarun")]
    assert commands
    for command in commands:
        made_by, _, then = command.partition(" && ")
        assert made_by == f"pyllamarun quantize {model} Q2_K"
        assert then.startswith(f"pyllamarun plan {model.with_name('llama-Q2_K.gguf')} ")
        assert " --allow kv " in then
