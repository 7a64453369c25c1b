"""What may be changed is changed where that gains clearly, what may not be is left alone, and the plan says which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
from harness import Machine

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.models.gguf import read_header
from pyllamarun.planning.bound import least_seconds
from pyllamarun.planning.choose import Choice, choose
from pyllamarun.planning.limits import resolve_limits
from pyllamarun.planning.probe import Device
from pyllamarun.planning.request import Request, make_request
from pyllamarun.planning.token_cost import use_of
from pyllamarun.units import GIB, MIB

Choosing = Callable[..., Choice]


@pytest.fixture
def choosing(tmp_path: Path, machine: Callable[..., Machine]) -> Choosing:
    """Chooses for an 8B, or the first 16 layers of another model, on a card of 12 GiB."""
    gpu = machine(12288)

    def chosen(shape: str = "", **wishes: object) -> Choice:
        spec = shapes.SHAPES[shape](16) if shape else shapes.llama_8b(32)
        model = shapes.write(spec, tmp_path / f"m{shape}")
        request: Request = make_request(overhead="0", **wishes)  # type: ignore[arg-type]
        devices = [Device(name, name, "VIRTUAL", "gpu", 12 * GIB, 12 * GIB) for name in gpu.device_names]
        return choose(read_header(model), request, resolve_limits(request, devices), gpu.ask)

    return chosen


def test_nothing_is_changed_that_is_not_allowed(choosing: Choosing) -> None:
    choice = choosing(vram="3GiB", context=32768)
    assert (choice.request.chosen, choice.request.context_tokens, choice.notes) == ((), 32768, ())


def test_a_smaller_kv_cache_where_that_gains(choosing: Choosing) -> None:
    choice, as_asked = (choosing(vram="6GiB", context=32768, allow=allow) for allow in ("kv", ""))
    assert choice.request.chosen[::2] == ("-ctk", "-ctv")
    assert choice.request.chosen[1] in ("q8_0", "q4_0")
    assert set(choice.request.chosen) <= set(choice.placement.arguments)
    assert choice.seconds < 0.95 * as_asked.seconds
    assert len(choice.notes) == 1
    assert "in place of f16, as allowed" in choice.notes[0]
    again = choosing(vram="6GiB", context=32768, allow="kv")
    assert again.placement.arguments == choice.placement.arguments


@pytest.mark.parametrize("fixed", [["-ctk", "f16"], ["-ctv", "q8_0"], ["-fa", "off"]], ids=" ".join)
def test_what_the_user_has_fixed_stays(fixed: list[str], choosing: Choosing) -> None:
    choice = choosing(vram="6GiB", context=32768, allow="kv", arguments=fixed)
    assert (choice.request.chosen, choice.notes) == ((), ())
    assert choosing(vram="3GiB", allow="ub", arguments=["-ub", "512"]).request.chosen == ()


def test_a_model_that_is_wholly_on_the_gpu_is_left_as_it_is(choosing: Choosing) -> None:
    choice = choosing(vram="8GiB", allow="kv,ub,ctx")
    assert (choice.request.chosen, choice.request.context_tokens, choice.notes) == ((), 4096, ())


def test_a_smaller_ubatch_or_context_where_it_would_not_fit_otherwise(choosing: Choosing) -> None:
    """What is computed of prompts takes room even if every layer is on the CPU."""
    with pytest.raises(DoesNotFit):
        choosing(vram="120MiB", context=16384)
    choice = choosing(vram="120MiB", context=16384, allow="ub")
    assert choice.placement.fits
    assert choice.request.chosen in (("-ub", "256"), ("-ub", "128"))
    assert "otherwise it would not fit" in choice.notes[0]


def test_what_is_left_goes_to_the_largest_ubatch_that_costs_little(choosing: Choosing) -> None:
    choice, as_asked = (choosing("mixtral-8x7b", vram="4GiB", allow=allow) for allow in ("ub", ""))
    tokens = int(choice.request.chosen[1])
    assert 512 < tokens < 4096
    assert choice.placement.fits
    assert choice.seconds <= 1.02 * as_asked.seconds
    assert f"A ubatch of {tokens:,} tokens" in choice.notes[0]
    larger = choosing("mixtral-8x7b", vram="4GiB", arguments=["-ub", str(tokens + 256), "-b", "4096"])
    assert larger.seconds > 1.02 * as_asked.seconds
    assert choosing("mixtral-8x7b", vram="4GiB", allow="ub", arguments=["-b", "512"]).request.chosen == ()


def test_a_ubatch_is_no_longer_than_the_context_and_its_batch_no_shorter(choosing: Choosing) -> None:
    def chosen(context: int) -> tuple[str, ...]:
        return choosing("gpt-oss-120b", vram="6.5GiB", context=context, allow="ub").request.chosen

    assert chosen(512) == ()
    assert chosen(2100) == ("-ub", "2048")
    assert chosen(2600) == ("-ub", "2560", "-b", "2560")


def test_a_context_is_halved_only_as_long_as_that_gains(choosing: Choosing) -> None:
    choice = choosing(vram="4GiB", context=65536, allow="ctx")
    tokens = choice.request.context_tokens
    assert 2048 <= tokens == choice.placement.answer.context_tokens < 65536
    assert choice.seconds < 0.95 * choosing(vram="4GiB", context=2 * tokens).seconds
    if tokens > 2048 and not choice.placement.is_complete:
        assert choosing(vram="4GiB", context=tokens // 2).seconds >= 0.95 * choice.seconds
    assert choosing(vram="4GiB", context=3000, allow="ctx").request.context_tokens == 3000


def test_slots_are_chosen_for_throughput(choosing: Choosing) -> None:
    choice = choosing(vram="4GiB", context=16384, goal="throughput")
    assert choice.request.slots in (2, 4, 8)
    assert choice.placement.answer.slots == choice.request.slots
    assert choice.placement.answer.slot_context_tokens >= 2048
    one = replace(choosing(vram="4GiB", context=16384), request=replace(choice.request, slots=1))
    assert choice.seconds < one.seconds
    given = choosing(vram="4GiB", context=16384, goal="throughput", slots=2)
    assert (given.request.slots, given.notes) == (2, ())
    assert choosing(vram="4GiB", context=4096, goal="throughput").request.slots <= 2


def test_words_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be allowed"):
        make_request(allow="kv,everything")
    with pytest.raises(UsageError, match="no goal"):
        make_request(goal="fame")
    assert make_request(vram="1GiB").budgets[0].amount == 1024 * MIB


SEARCHES: dict[str, tuple[str, dict[str, object]]] = {
    "much allowed, little room": ("", {"vram": "3GiB", "allow": "kv,ctx"}),
    "a long context": ("", {"vram": "5GiB", "context": 32768, "allow": "kv,ctx"}),
    "experts": ("mixtral-8x7b", {"vram": "5GiB", "allow": "kv,ub"}),
    "many slots": ("", {"vram": "4GiB", "context": 8192, "goal": "throughput"}),
}


@pytest.mark.parametrize(("shape", "wishes"), SEARCHES.values(), ids=SEARCHES)
def test_what_is_not_searched_would_not_have_been_chosen(
    shape: str, wishes: dict[str, object], choosing: Choosing, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choosing(shape, **wishes)
    monkeypatch.setattr("pyllamarun.planning.choose.least_seconds", lambda *_: 0.0)
    of_all = choosing(shape, **wishes)
    assert (chosen.placement.arguments, chosen.notes) == (of_all.placement.arguments, of_all.notes)


@pytest.mark.parametrize(("shape", "vram"), [("", "1GiB"), ("", "4GiB"), ("", "12GiB"), ("mixtral-8x7b", "5GiB")])
def test_no_placement_costs_less_than_the_least(shape: str, vram: str, choosing: Choosing) -> None:
    choice = choosing(shape, vram=vram)
    placement = choice.placement
    least = least_seconds(choice.header, placement.answer, placement.limits, choice.hardware, use_of(choice.request))
    assert 0.7 * choice.seconds < least < choice.seconds
