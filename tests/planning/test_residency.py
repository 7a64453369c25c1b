"""Whether a plan's host memory stays in memory: verdicts as a table, and of real models as the probe counts them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import shapes
from harness import Machine

from pyllamarun.errors import DoesNotFit
from pyllamarun.machine.host import Memory, memory_of, read_memory
from pyllamarun.models.gguf import read_header
from pyllamarun.planning.plan import Plan, make_plan
from pyllamarun.planning.probe import Device
from pyllamarun.planning.report import describe
from pyllamarun.planning.request import Budget, Request, parse_budget
from pyllamarun.planning.residency import (
    HostNeeds,
    check,
    checkpoints_within,
    judge,
    prompt_cache_mib,
    ram_limit,
    warnings,
)
from pyllamarun.units import GIB, MIB, format_size

# Of a 40 GiB model 12 are on a GPU, and 28 are mapped; a token reads nearly all of those.
NEEDS = HostNeeds(
    held_bytes=2 * GIB, pinned_bytes=0, repacked_bytes=0, mapped_bytes=28 * GIB, locked_bytes=0, reach_bytes=27 * GIB,
    read_bytes=27 * GIB, file_bytes=40 * GIB, prompt_cache_bytes=8 * GIB,
)  # fmt: skip
COPIED = replace(NEEDS, held_bytes=30 * GIB, pinned_bytes=28 * GIB, mapped_bytes=0, reach_bytes=0, read_bytes=0)
REPACKED = replace(COPIED, pinned_bytes=0, repacked_bytes=28 * GIB)
EXPERTS = replace(NEEDS, read_bytes=3 * GIB)
LOCKED = replace(NEEDS, locked_bytes=29 * GIB)


def memory(available: int, swap: int = 0, **others: int) -> Memory:
    return Memory(64 * GIB, available * GIB, swap * GIB, swap * GIB, **{k: v * GIB for k, v in others.items()})


VERDICTS = {
    "all of it stays": (NEEDS, memory(48), "resident"),
    "just enough": (NEEDS, memory(30), "resident"),
    "a model larger than RAM": (NEEDS, memory(16), "reread"),
    "a model larger than RAM, with swap": (NEEDS, memory(16, swap=64), "reread"),
    "no room for any mapped page": (NEEDS, memory(2), "reread"),
    "plain memory that needs swap": (NEEDS, memory(1, swap=4), "swapped"),
    "plain memory above RAM and swap": (NEEDS, memory(1), "too_large"),
    "copied weights that need swap": (COPIED, memory(20, swap=16), "swapped"),
    "copied weights above RAM and swap": (COPIED, memory(20, swap=8), "too_large"),
    "a container's limit": (NEEDS, memory(60, limit_bytes=16, left_bytes=15), "reread"),
    "copied weights above a container's limit": (COPIED, memory(60, limit_bytes=16, left_bytes=15), "too_large"),
    "a container that may not swap": (
        COPIED, memory(60, swap=64, limit_bytes=16, left_bytes=15, swap_left_bytes=0), "too_large"
    ),
    "a container that may swap": (
        REPACKED, memory(60, swap=64, limit_bytes=16, left_bytes=15, swap_left_bytes=32), "swapped"
    ),
    "locked pages that fit": (LOCKED, memory(48), "resident"),
    "locked pages that do not": (LOCKED, memory(24), "too_large"),
    "pinned memory above all RAM": (replace(COPIED, pinned_bytes=65 * GIB), memory(60, swap=64), "too_large"),
}  # fmt: skip


@pytest.mark.parametrize(("needs", "here", "verdict"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(needs: HostNeeds, here: Memory, verdict: str) -> None:
    ram = ram_limit(None, here)
    found = judge(needs, ram)
    assert found.verdict == verdict
    if verdict == "too_large":
        with pytest.raises(DoesNotFit) as caught:
            check(found, needs, ram)
        assert caught.value.exit_code == 3
        assert caught.value.remedy
    else:
        check(found, needs, ram)


def test_what_is_read_again_is_between_a_cache_that_keeps_and_one_that_loses() -> None:
    dense = judge(NEEDS, ram_limit(None, memory(16)))
    assert dense.cached_bytes == 14 * GIB
    assert (dense.reread_low_bytes, dense.reread_high_bytes) == (13 * GIB, 27 * GIB)
    experts = judge(EXPERTS, ram_limit(None, memory(16)))
    assert (experts.reread_low_bytes, experts.reread_high_bytes) == (round(3 * GIB * 13 / 27), 3 * GIB)
    stays = judge(NEEDS, ram_limit(None, memory(48)))
    assert (stays.reread_low_bytes, stays.reread_high_bytes) == (0, 0)


def test_loading_reads_what_goes_to_the_gpu_twice_where_the_file_does_not_fit() -> None:
    assert judge(NEEDS, ram_limit(None, memory(48))).load_high_bytes == 40 * GIB
    assert judge(NEEDS, ram_limit(None, memory(32))).load_high_bytes == 52 * GIB
    assert judge(COPIED, ram_limit(None, memory(32))).load_high_bytes == 40 * GIB, (
        "without mmap each tensor is read once"
    )


BUDGETS = {
    "64GiB of more": ("20GiB", memory(48), (20, "budget", 0)),
    "a share of all": ("50%", memory(48), (32, "budget", 0)),
    "all": ("max", memory(48), (48, "budget", 0)),
    "all but some": ("max-8GiB", memory(48), (40, "budget", 0)),
    "more than is available": ("20GiB", memory(16, swap=8), (16, "available", 4)),
    "more than a container has left": ("20GiB", memory(48, limit_bytes=32, left_bytes=10), (10, "cgroup", 0)),
    "a share of what a container may have": ("50%", memory(48, limit_bytes=32, left_bytes=30), (16, "budget", 0)),
}


@pytest.mark.parametrize(("text", "here", "expected"), BUDGETS.values(), ids=BUDGETS)
def test_budgets_for_ram(text: str, here: Memory, expected: tuple[int, str, int]) -> None:
    limit = ram_limit(parse_budget(text), here)
    assert (limit.limit_bytes // GIB, limit.source, limit.swap_bytes // GIB) == expected


@pytest.mark.parametrize(
    ("here", "owner"),
    [(memory(48), "this machine has 64"), (memory(48, limit_bytes=16), "this process's cgroup allows 16")],
)
def test_a_budget_above_what_there_is(here: Memory, owner: str) -> None:
    with pytest.raises(DoesNotFit, match=owner):
        ram_limit(parse_budget("100GiB"), here)


def test_a_budget_is_no_budget_for_swap() -> None:
    limit = ram_limit(parse_budget("20GiB"), memory(48, swap=64))
    assert judge(COPIED, limit).verdict == "too_large"


def test_the_prompt_cache_is_kept_within_a_budget() -> None:
    def mib(text: str | None) -> int | None:
        return prompt_cache_mib(NEEDS, ram_limit(parse_budget(text) if text else None, memory(60)))

    assert [mib(None), mib("40GiB"), mib("34GiB"), mib("16GiB")] == [None, None, 4096, 0]


SLIDING = replace(NEEDS, checkpoints=32, checkpoint_bytes=GIB // 4)


def test_context_checkpoints_come_before_the_prompt_cache_in_a_budget() -> None:
    def within(text: str) -> tuple[int | None, int | None]:
        ram = ram_limit(parse_budget(text), memory(60))
        count = checkpoints_within(SLIDING, ram)
        bounded = replace(SLIDING, checkpoints=SLIDING.checkpoints if count is None else count)
        return count, prompt_cache_mib(bounded, ram)

    assert [within("60GiB"), within("40GiB"), within("32GiB"), within("30500MiB"), within("16GiB")] == [
        (None, None), (None, 2048), (8, 0), (0, 0), (0, 0)
    ]  # fmt: skip
    assert checkpoints_within(SLIDING, ram_limit(None, memory(31))) is None, "only a budget bounds them"


def test_a_warning_says_how_to_bound_what_grows() -> None:
    def warned(needs: HostNeeds, available: int) -> list[str]:
        ram = ram_limit(None, memory(available))
        return warnings(judge(needs, ram), ram, "model.gguf")

    assert warned(SLIDING, 46) == []
    (both,) = warned(SLIDING, 40)
    assert "cache of earlier prompts may grow to 8.00 GiB, its context checkpoints to 8.00 GiB, and 10.00 GiB" in both
    assert both.endswith("bound them with --ram, or `-- --cache-ram 2048`.")
    (few,) = warned(SLIDING, 31)
    assert few.endswith("`-- --ctx-checkpoints 4 --cache-ram 0`.")


# ---- of real models


def planned(
    machine: Machine, model: Path, here: Memory, *arguments: str, vram: int = 4 * GIB, ram: int = 0, force: bool = False
) -> Plan:
    devices = [Device(name, name, "VIRTUAL", "gpu", vram, vram) for name in machine.device_names]
    budget = Budget("bytes", ram) if ram else None
    wanted = Request(1024, 1, (), 0, arguments, force, budget)
    return make_plan(read_header(model), wanted, devices, here, machine.ask)


def test_a_plan_says_what_stays(header_70b: Path, machine: Callable[..., Machine]) -> None:
    large = planned(machine(12288), header_70b, memory_of(62 * GIB), vram=12 * GIB)
    assert large.residency.verdict == "resident"
    assert large.residency.held_bytes + large.residency.mapped_bytes == large.host.total_bytes
    assert large.warnings == ()
    small = planned(machine(12288), header_70b, memory_of(16 * GIB), vram=12 * GIB)
    assert small.residency.verdict == "reread"
    assert 0.9 * large.host.mapped_bytes < small.residency.reread_high_bytes < large.host.mapped_bytes
    (warning,) = small.warnings
    assert "are read from disk again for every token" in warning


def test_copied_weights_are_refused_where_mapped_ones_are_not(
    header_70b: Path, machine: Callable[..., Machine]
) -> None:
    here = memory_of(16 * GIB)
    for mode in (["-lm", "none"], ["-lm", "mmap+mlock"]):
        with pytest.raises(DoesNotFit, match=r"of it (pinned|locked).* 16\.00 GiB are available"):
            planned(machine(12288), header_70b, here, *mode, vram=12 * GIB)
        forced = planned(machine(12288), header_70b, here, *mode, vram=12 * GIB, force=True)
        assert forced.residency.verdict == "too_large"
        assert "was forced" in forced.warnings[0]
    assumed = planned(machine(12288), header_70b, replace(here, assumed=True), "-lm", "none", vram=12 * GIB)
    assert "say what the other has" in assumed.warnings[0]


def test_memory_that_is_enough_only_with_swap_is_said(header_70b: Path, machine: Callable[..., Machine]) -> None:
    plan = planned(machine(12288), header_70b, memory(20, swap=32), "-lm", "none", vram=12 * GIB)
    assert plan.residency.verdict == "swapped"
    (warning,) = plan.warnings
    swapped = plan.residency.held_bytes - 20 * GIB
    assert f"20.00 GiB are available: {format_size(swapped)} have to be swapped" in warning


def test_a_container_has_no_more_than_its_limit(header_70b: Path, machine: Callable[..., Machine]) -> None:
    inside = memory(60, swap=64, limit_bytes=16, left_bytes=15, swap_left_bytes=0)
    plan = planned(machine(12288), header_70b, inside, vram=12 * GIB)
    assert (plan.residency.verdict, plan.residency.limit_source) == ("reread", "cgroup")
    assert "a cgroup leaves 15.00 GiB" in plan.warnings[0]
    with pytest.raises(DoesNotFit, match=r"a cgroup leaves 15\.00 GiB and 0 B of swap"):
        planned(machine(12288), header_70b, inside, "-lm", "none", vram=12 * GIB)


def test_pages_that_may_not_be_locked_are_not_counted_as_locked(
    header_70b: Path, machine: Callable[..., Machine]
) -> None:
    here = replace(memory_of(16 * GIB), lockable_bytes=8 << 20)
    plan = planned(machine(12288), header_70b, here, "-lm", "mmap+mlock", vram=12 * GIB)
    assert plan.residency.verdict == "reread"


def test_a_model_of_experts_reads_few_of_them_again(tmp_path: Path, machine: Callable[..., Machine]) -> None:
    model = shapes.write(shapes.mixtral_8x7b(32), tmp_path / "m")
    plan = planned(machine(8192), model, memory_of(8 * GIB), vram=8 * GIB)
    assert plan.residency.verdict == "reread"
    assert plan.residency.reread_high_bytes < 0.3 * plan.residency.mapped_bytes, "two experts of eight"


def test_the_prompt_cache_is_part_of_a_plan(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    gpu, model = machine(4096), tiny("llama")
    warned = planned(gpu, model, memory_of(4 * GIB))
    assert "cache of earlier prompts may grow to 8.00 GiB" in warned.warnings[0]
    assert "--cache-ram" not in warned.argv
    bounded = planned(gpu, model, memory_of(4 * GIB), ram=4 * GIB)
    assert (bounded.argv[-2], bounded.warnings) == ("--cache-ram", ())
    assert 4000 < int(bounded.argv[-1]) < 4096
    fixed = planned(gpu, model, memory_of(4 * GIB), "-cram", "100", ram=4 * GIB)
    assert (fixed.argv[-2:], fixed.warnings) == (("-cram", "100"), ())
    without_limit = planned(gpu, model, memory_of(4 * GIB), "-cram", "-1")
    assert "may grow without limit" in without_limit.warnings[0]


@pytest.mark.parametrize("architecture", ["gemma3", "gpt-oss", "mamba", "jamba"])
def test_context_checkpoints_become_as_large_as_predicted(
    architecture: str, tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    """llama-server's log gives the size of each, in MiB with three places."""
    gpu, each = machine(4096), 1024
    arguments = ["-m", str(tiny(architecture)), "-c", str(2 * each), "-np", "2", "-ngl", "2", "-ctxcp", "3"]
    answer = gpu.ask(arguments)
    with gpu.serve([*arguments, "-lv", "4"]) as server:
        for length in (100, 600, each - 2):
            server.complete([3 + i % 200 for i in range(length)], cache_prompt=True)
        made = re.findall(r"created context checkpoint (\d+) of (\d+) .* size = ([\d.]+) MiB", server.log())
    assert {most for _, most, _ in made} == {str(answer.checkpoints)} == {"3"}
    assert max(int(number) for number, _, _ in made) == 3
    assert max(float(size) for _, _, size in made) == round(answer.checkpoint_bytes / MIB, 3)


@pytest.mark.parametrize(
    ("architecture", "options"), [("llama", []), ("gemma3", ["--swa-full"]), ("jamba", ["-ctxcp", "0"])]
)
def test_where_none_are_made_none_are_predicted(
    architecture: str, options: list[str], tiny: Callable[[str], Path], machine: Callable[..., Machine]
) -> None:
    gpu = machine(4096)
    arguments = ["-m", str(tiny(architecture)), "-c", "1024", "-np", "1", "-ngl", "2", *options]
    answer = gpu.ask(arguments)
    assert (answer.checkpoints, answer.checkpoint_bytes) == (0, 0)
    with gpu.serve([*arguments, "-lv", "4"]) as server:
        server.complete([3 + i % 200 for i in range(800)], cache_prompt=True)
        assert "created context checkpoint" not in server.log()


def test_context_checkpoints_are_part_of_a_plan(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    gpu, model = machine(4096), tiny("gemma3")
    free = planned(gpu, model, memory_of(64 * GIB))
    assert free.residency.checkpoints == 32
    assert "context checkpoints to " in describe(free, "", explain=True)
    assert "context checkpoints" not in describe(free, "")
    room = free.residency.held_bytes + free.residency.mapped_bytes
    bounded = planned(gpu, model, memory_of(64 * GIB), ram=room + 5 * free.residency.checkpoint_bytes)
    assert bounded.argv[-4:] == ("--ctx-checkpoints", "5", "--cache-ram", "0")
    assert (bounded.residency.checkpoints, bounded.warnings) == (5, ())
    fixed = planned(gpu, model, memory_of(64 * GIB), "-ctxcp", "40", ram=room + MIB)
    assert ("--ctx-checkpoints" in fixed.argv, fixed.residency.checkpoints) == (False, 40)


def test_locked_is_what_was_predicted(tiny: Callable[[str], Path], machine: Callable[..., Machine]) -> None:
    """mmap+mlock locks what stands between tensors of the CPU, too: here the output's, which is on the GPU."""
    if read_memory().lockable_bytes is not None:
        pytest.skip("this user may lock little memory")
    gpu = machine(4096)
    plan = planned(gpu, tiny("llama"), memory_of(4 * GIB), "-lm", "mmap+mlock", "-ngl", "2")
    locked = plan.residency.held_bytes - (plan.host.total_bytes - plan.host.mapped_bytes)
    with gpu.serve(plan.argv[1:]) as server:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    (kib,) = re.findall(r"^VmLck:\s*(\d+) kB$", status, re.MULTILINE)
    assert locked <= int(kib) * 1024 < locked + 2 * os.sysconf("SC_PAGE_SIZE")
    assert locked > plan.host.mapped_bytes
