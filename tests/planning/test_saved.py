"""Plans in files: the same when read back, carried out as they are, refused when they do not hold any more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import run_cli

from pyllamarun import Machine, Model, Planner
from pyllamarun.errors import UsageError
from pyllamarun.planning.request import make_request
from pyllamarun.planning.saved import read_plan

CARD = ("--virtual-gpu", "450MiB")


@pytest.fixture
def saved(smollm2: Path, tmp_path: Path) -> Path:
    result = run_cli("plan", smollm2, *CARD, "--save", tmp_path / "plan.json")
    assert result.returncode == 0, result.stderr
    return tmp_path / "plan.json"


def test_a_plan_that_is_read_back_is_the_same(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for architecture in ("llama", "mixtral", "gemma3", "mamba"):
        result = run_cli("plan", tiny(architecture), "--virtual-gpu", "340MiB,330MiB", "--json", "--save", file)
        assert json.loads(file.read_text()) == json.loads(result.stdout)
        with Planner(Machine.of(gpus="340MiB,330MiB")) as planner:
            made = planner.plan(Model.open(tiny(architecture)), make_request())
        saved = read_plan(file).plan
        assert replace(saved, residency=made.residency, warnings=()) == replace(made, warnings=())
        assert read_plan(file).machine == planner.machine


def test_it_is_carried_out_as_it_is(saved: Path) -> None:
    argv = json.loads(saved.read_text())["data"]["argv"]
    result = run_cli("serve", "--plan", saved, "--port", "18080", "--dry-run")
    assert result.returncode == 0, result.stderr
    for word in argv[3:]:
        assert word in result.stdout
    assert "PYLLAMARUN_VIRTUAL_GPUS=450" in result.stdout
    answer = run_cli("run", "--plan", saved, "-n", "4", "-p", "The capital of France is")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()


def test_it_is_good_from_any_folder(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(smollm2.parent)
    assert run_cli("plan", f"./{smollm2.name}", *CARD, "--save", tmp_path / "plan.json").returncode == 0
    monkeypatch.chdir(tmp_path)
    result = run_cli("plan", "--plan", "plan.json", "--json")
    assert json.loads(result.stdout)["data"]["model"] == str(smollm2)


@pytest.mark.parametrize(
    "option", [["-c", "512"], ["--vram", "1GiB"], ["--gpu", "RTX 3060"], ["other.gguf"], ["--force"]]
)
def test_nothing_else_is_asked_with_it(option: list[str], saved: Path) -> None:
    result = run_cli("plan", "--plan", saved, *option)
    assert (result.returncode, "exclude each other" in result.stderr) == (2, True), result.stderr


def edited(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    envelope = json.loads(file.read_text())
    change(envelope)
    file.write_text(json.dumps(envelope))
    return file


def test_another_model_in_its_place_is_noticed(saved: Path, tiny: Callable[[str], Path]) -> None:
    edited(saved, lambda envelope: envelope["data"].update(source=str(tiny("llama"))))
    result = run_cli("plan", "--plan", saved)
    assert (result.returncode, "does not hold any more" in result.stderr) == (2, True), result.stderr


def test_another_card_in_its_place_is_noticed(saved: Path) -> None:
    edited(saved, lambda envelope: envelope["data"].update(machine={"gpus": ["600MiB"]}))
    result = run_cli("run", "--plan", saved, "-p", "Hello")
    assert (result.returncode, "does not hold any more" in result.stderr) == (2, True), result.stderr


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "another kind": lambda envelope: envelope.update(kind="list"),
    "another schema": lambda envelope: envelope.update(schema=99),
    "no data": lambda envelope: envelope.update(data=None),
    "a field missing": lambda envelope: envelope["data"].pop("argv"),
    "a field of another type": lambda envelope: envelope["data"].update(gpu_layers="many"),
    "arguments that are no list of words": lambda envelope: envelope["data"].update(argv=[1, 2, 3]),
    "another program": lambda envelope: envelope["data"]["argv"].__setitem__(0, "/bin/sh"),
    "a card that nobody knows": lambda envelope: envelope["data"].update(machine={"gpus": ["no such card"]}),
    "an unknown word of the machine": lambda envelope: envelope["data"].update(machine={"wheels": 4}),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_no_plan_is_refused(change: Callable[[dict[str, Any]], object], saved: Path) -> None:
    with pytest.raises(UsageError):
        read_plan(edited(saved, change))


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}" * 9_000_000])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UsageError):
        read_plan(tmp_path / "plan.json")


def test_where_nothing_can_be_written_nothing_is_left(smollm2: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "none" / "plan.json", tmp_path):
        result = run_cli("plan", smollm2, *CARD, "--save", target)
        assert (result.returncode, "cannot be written" in result.stderr) == (2, True), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == []
