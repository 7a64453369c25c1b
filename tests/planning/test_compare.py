"""What-ifs: every row is the plan that would be made for it alone, and the recommended one is one of the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import run_cli
from misbehaving import RemoteContent, Server
from remote_models import REPOSITORY, TYPES, content, publish

from pyllamarun import Machine, Model, Planner
from pyllamarun.models.gguf import UINT32, Value, read_header
from pyllamarun.models.quality import quality
from pyllamarun.models.types import FILE_TYPES
from pyllamarun.planning.compare import Row, recommend, rows_of
from pyllamarun.planning.plan import Plan
from pyllamarun.planning.request import MAX_CONTEXT_TOKENS, make_request
from pyllamarun.planning.speed import Range
from pyllamarun.planning.variants import Variant, contexts
from pyllamarun.units import MIB
from pyllamarun.whatif import compare

CARD = "1GiB"
VRAM = "306MiB"  # 300 MiB of it a context that is assumed


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    with Planner(Machine.of(gpus=CARD, ram="8GiB")) as planner:
        yield planner


@pytest.mark.parametrize("axis", ["ctx", "vram", "slots"])
def test_a_row_is_the_plan_that_is_made_for_it_alone(axis: str, planner: Planner, tiny: Callable[[str], Path]) -> None:
    model, request = Model.open(tiny("gemma3")), make_request(vram="320MiB", overhead="300MiB")
    comparison = compare(planner, model, request, axis)
    assert [row.is_current for row in comparison.rows].count(True) == 1
    for row in comparison.rows:
        said = dict(zip(row.words[::2], row.words[1::2]))
        alone = make_request(
            vram=said.get("--vram", "320MiB"),
            context=int(said.get("-c", 4096)),
            slots=int(said.get("--slots", 1)),
            overhead="300MiB",
        )
        if row.fits:
            assert row.plan == planner.plan(model, alone), row.label
    assert any(row.fits for row in comparison.rows)


def test_a_requantization_is_planned_like_the_file_that_it_becomes(
    planner: Planner, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model, request = Model.open(tiny("llama")), make_request(vram=VRAM, overhead="300MiB", context=1024)
    comparison = compare(planner, model, request, "quants")
    row = next(row for row in comparison.rows if row.type == "Q3_K_M")
    target = tmp_path / "real.gguf"
    assert run_cli("quantize", model.path, "Q3_K_M", "-o", target).returncode == 0
    real = planner.plan(Model.open(target), request)
    assert row.plan is not None
    forecast = row.plan.of_model_at(target)
    assert replace(forecast, residency=real.residency) == real
    provenance_bytes = real.residency.load_low_bytes - forecast.residency.load_low_bytes
    assert 0 <= provenance_bytes < 4096
    assert row.file_bytes + provenance_bytes == target.stat().st_size
    assert real.residency.mapped_bytes == forecast.residency.mapped_bytes
    sizes = [one.weights_bytes for one in comparison.rows]
    assert sizes == sorted(sizes, reverse=True)
    assert comparison.rows[0].is_current


def test_what_does_not_fit_is_a_row_that_says_so(tiny: Callable[[str], Path]) -> None:
    result = run_cli("plan", tiny("llama"), "--virtual-gpu", CARD, "--vram", "299MiB", "--compare", "vram")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("*") and "299.0 MiB  does not fit" in line for line in lines), result.stdout
    assert any(line.startswith("299.0 MiB does not fit: Even with every layer on the CPU") for line in lines)


def test_when_nothing_fits_that_is_the_result(tiny: Callable[[str], Path]) -> None:
    result = run_cli("plan", tiny("llama"), "--virtual-gpu", CARD, "--vram", "1MiB", "--compare", "ctx", "--json")
    assert result.returncode == 3
    assert json.loads(result.stdout.splitlines()[0])["data"]["recommended"] == ""


def test_a_comparison_is_printed_as_json(tiny: Callable[[str], Path]) -> None:
    result = run_cli("plan", tiny("llama"), "--virtual-gpu", CARD, "--compare", "slots", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["kind"], document["data"]["axis"]) == ("compare", "slots")
    rows = document["data"]["rows"]
    assert [row["slots"] for row in rows] == [1, 2, 4, 8, 16]
    assert all(row["context_tokens"] == 4096 * row["slots"] and row["fits"] for row in rows)
    assert rows[0]["plan"]["argv"][0] == "llama-server"


@pytest.mark.parametrize("more", [["--save", "p.json"], ["--dry-run"]])
def test_one_plan_cannot_be_kept_of_several(more: list[str], tiny: Callable[[str], Path]) -> None:
    result = run_cli("plan", tiny("llama"), "--compare", "ctx", *more)
    assert (result.returncode, "Leave one out" in result.stderr) == (2, True)


def test_contexts_reach_from_short_to_what_was_trained(tiny: Callable[[str], Path]) -> None:
    header = read_header(tiny("llama"))

    def steps(context: int) -> list[int]:
        return [one.request.context_tokens for one in contexts(header, "m", make_request(context=context))]

    assert steps(4096) == [2048, 4096, 8192]
    assert steps(5000) == [2048, 4096, 5000, 8192]
    assert steps(512) == [512, 1024, 2048, 4096, 8192]
    assert steps(16384) == [2048, 4096, 8192, 16384]


def test_a_context_that_a_file_only_claims_is_not_tried(tiny: Callable[[str], Path]) -> None:
    sound = read_header(tiny("llama"))
    header = replace(sound, metadata={**sound.metadata, "llama.context_length": Value(UINT32, 2**32 - 1)})
    assert max(one.request.context_tokens for one in contexts(header, "m", make_request())) == MAX_CONTEXT_TOKENS


# -------------------------------------------------------------------------------------------- a repository's models


def published(tiny: Path, kind: str, folder: Path) -> RemoteContent:
    """The tiny model as it would be in another type, without data."""
    header = read_header(tiny)
    number = next(number for number, name in FILE_TYPES.items() if name == kind)
    metadata = dict(header.metadata) | {"general.file_type": Value(UINT32, number)}
    tensors = [(one.name, TYPES[kind] if len(one.shape) > 1 else one.type, one.shape) for one in header.tensors]
    return content(folder / "made.gguf", metadata, tensors)


def test_a_repositorys_models_are_planned_from_their_headers(
    hugging_face: Server, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    files = {f"m-{kind}.gguf": published(tiny("llama"), kind, tmp_path) for kind in ("Q8_0", "Q4_0", "Q2_K")}
    broken = RemoteContent(b"<html>not a model", 1000)
    publish(hugging_face, files | {"m-Q6_K.gguf": broken, "mmproj-F16.gguf": broken})
    result = run_cli("plan", f"hf:{REPOSITORY}", "--virtual-gpu", CARD, "--json")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)["data"]
    assert [row["label"] for row in data["rows"]] == ["Q8_0", "Q4_0", "Q2_K"]
    assert [one["name"] for one in data["left_out"]] == [f"hf:{REPOSITORY}:Q6_K"]
    assert "is not a GGUF file" in data["left_out"][0]["reason"]
    for row in data["rows"]:
        assert row["source"] == f"hf:{REPOSITORY}:{row['label']}"
        assert row["command"] == f"pyllamarun pull {row['source']}"
        assert row["file_bytes"] == files[f"m-{row['label']}.gguf"].size
        alone = run_cli("plan", row["source"], "--virtual-gpu", CARD, "--json")
        assert json.loads(alone.stdout)["data"]["argv"] == row["plan"]["argv"]
    assert hugging_face.sent_bytes < sum(2 * len(one.head) + MIB for one in files.values())


def test_a_repository_of_which_nothing_can_be_read_says_why(hugging_face: Server) -> None:
    broken = RemoteContent(b"<html>not a model", 1000)
    publish(hugging_face, {"m-Q6_K.gguf": broken, "m-Q4_0.gguf": broken})
    result = run_cli("plan", f"hf:{REPOSITORY}", "--virtual-gpu", CARD)
    assert (result.returncode, "is not a GGUF file" in result.stderr) == (4, True)


# ------------------------------------------------------------------------------------------------- what is recommended


@pytest.fixture
def some_plan(planner: Planner, tiny: Callable[[str], Path]) -> Plan:
    return planner.plan(Model.open(tiny("llama")), make_request(vram=VRAM, overhead="300MiB", context=1024))


@pytest.fixture
def row(some_plan: Plan, tiny: Callable[[str], Path]) -> Callable[..., Row]:
    variant = Variant("", read_header(tiny("llama")), make_request(), "Q4_0", "m.gguf")
    (plain,) = rows_of([variant], lambda _: some_plan)

    def of(label: str, low: float | None, **changes: object) -> Row:
        changes |= {"label": label, "generation": None if low is None else Range(low, low)}
        return replace(plain, **changes)  # type: ignore[arg-type]

    return of


def of_type(row: Callable[..., Row], type_name: str, bits: float, low: float) -> Row:
    return row(type_name, low, type=type_name, bits_per_weight=bits, quality=quality(type_name, 8 * 10**9))


def test_the_best_quantization_that_is_usable_is_recommended(row: Callable[..., Row]) -> None:
    rows = [of_type(row, "Q6_K", 6.6, 1.0), of_type(row, "Q4_K_M", 4.9, 2.0), of_type(row, "Q2_K", 3.0, 3.0)]
    assert recommend("quants", rows)[0] == "Q4_K_M"


def test_a_larger_quantization_that_was_measured_to_be_worse_is_not(row: Callable[..., Row]) -> None:
    rows = [of_type(row, "Q4_1", 5.0, 4.0), of_type(row, "Q4_K_M", 4.9, 4.0)]
    assert recommend("quants", rows)[0] == "Q4_K_M"


def test_where_none_is_usable_the_best_of_the_fastest_is(row: Callable[..., Row]) -> None:
    rows = [row("4,096", 1.59, context_tokens=4096), row("2,048", 1.6, context_tokens=2048)]
    assert recommend("ctx", rows)[0] == "4,096"
    rows = [of_type(row, "Q4_K_M", 4.9, 0.7), of_type(row, "Q2_K", 3.0, 1.2)]
    label, reason = recommend("quants", rows)
    assert (label, reason.startswith("none reaches 2 tok/s")) == ("Q2_K", True)


def test_the_longest_context_that_is_usable_is(row: Callable[..., Row]) -> None:
    rows = [row("a", 5.0, context_tokens=2048), row("b", 2.5, context_tokens=4096), row("c", 1.0, context_tokens=8192)]
    assert recommend("ctx", rows)[0] == "b"


def test_as_many_slots_as_are_usable_together_are(row: Callable[..., Row]) -> None:
    def of(slots: int, total: float) -> Row:
        return row(str(slots), 4.0, slots=slots, throughput=Range(total, total))

    assert recommend("slots", [of(1, 4.0), of(2, 6.0), of(4, 8.0), of(8, 9.0)])[0] == "4"
    assert recommend("slots", [of(1, 1.0), of(2, 1.5), of(4, 1.4)])[0] == "2"


def test_a_model_that_no_memory_holds_is_not_recommended_in_any_way(row: Callable[..., Row]) -> None:
    label, reason = recommend("quants", [row("a", None, from_disk=True), row("b", None, from_disk=True)])
    assert (label, "disk" in reason) == ("", True)


def test_the_smallest_budget_that_is_about_as_fast_as_any_is(row: Callable[..., Row]) -> None:
    rows = [row("8", 3.0, budget_bytes=8), row("10", 3.9, budget_bytes=10), row("12", 4.0, budget_bytes=12)]
    assert recommend("vram", rows)[0] == "10"


def test_nothing_is_recommended_that_does_not_fit(row: Callable[..., Row]) -> None:
    assert recommend("ctx", [row("a", None, plan=None)]) == ("", "None of these fits.")
    assert recommend("ctx", [row("a", None, plan=None), row("b", 3.0)])[0] == "b"
