"""A plan in words and columns, for a person."""

from __future__ import annotations

from collections.abc import Sequence

from pyllamarun.output import PLAIN_SCREEN, Screen, table
from pyllamarun.planning.bars import bars
from pyllamarun.planning.plan import Advice, DevicePlan, Plan
from pyllamarun.planning.residency import RESIDENT, Residency, explain_growth
from pyllamarun.planning.speed_report import describe_speed, explain_speed, span
from pyllamarun.units import format_size


def describe(
    plan: Plan, command_line: str, stage: str = "", screen: Screen = PLAIN_SCREEN, *, explain: bool = False
) -> str:
    """Several lines: the model, what it is planned on, where it goes, what that takes, the command that does it.

    `explain` adds what the predicted speed is made of, and what else RAM may be taken for.
    """
    lines = [
        f"{plan.model_name}{_type(plan)}: {plan.architecture}, {format_size(plan.weights_bytes)} of weights",
        f"{_layers(plan)}, {plan.context_tokens:,} tokens of context in {plan.slots} slot{'s' * (plan.slots != 1)}",
        *_by_gpu(plan),
        *_left_behind(plan),
        *([stage] if stage else []),
        "",
    ]
    if plan.devices:
        lines += [_device_table(plan), ""]
    lines += [
        _host_table(plan),
        *_residency(plan.residency),
        *([explain_growth(plan.residency)] if explain else []),
        "",
    ]
    drawn = bars(plan, screen)
    lines += [*drawn, ""] if drawn else []
    lines += [*describe_speed(plan.speed, plan.slots, not stage), *([explain_speed(plan.speed)] if explain else []), ""]
    lines += [*plan.changes, *[""] * bool(plan.changes)]
    lines += [f"warning: {warning}" for warning in plan.warnings] + [""] * bool(plan.warnings)
    lines.append(command_line)
    return "\n".join(lines)


def _type(plan: Plan) -> str:
    return f" in {plan.requantization.type}" if plan.requantization else ""


def _layers(plan: Plan) -> str:
    if not plan.devices:
        return "No GPU: everything on the CPU"
    if plan.gpu_layers == plan.layers:
        return f"All {plan.layers} layers on the GPU"
    return f"{plan.gpu_layers} of {plan.layers} layers on the GPU, the rest on the CPU"


def _by_gpu(plan: Plan) -> list[str]:
    """Which of several GPUs has how many layers."""
    if len(plan.devices) < 2:
        return []
    lines = [", ".join(f"{device.layers} on {device.name}" for device in plan.devices)]
    for name, tensors in plan.moved.items():
        lines.append(f"{tensors[0] if len(tensors) == 1 else f'{len(tensors)} matrices'} of another's on {name}")
    return lines


def _left_behind(plan: Plan) -> list[str]:
    """What of the layers on the GPU is not."""
    if not plan.left_on_cpu:
        return []
    if len(plan.left_on_cpu) <= 3:
        return [f"But for {', '.join(plan.left_on_cpu)}, which would not fit"]
    layers = {name.split(".")[1] for name in plan.left_on_cpu}
    if plan.division == "layers":
        return [f"But for {len(plan.left_on_cpu)} matrices of layer {', '.join(layers)}, which would not fit"]
    what = "feed-forward matrices" if plan.division == "feed_forward" else "experts"
    return [f"But for {what} of {len(layers)} layers, {len(plan.left_on_cpu)} tensors, which stay on the CPU"]


def _device_table(plan: Plan) -> str:
    header = ["GPU", "weights", "KV cache", "compute", "overhead", "total", "budget", "left"]
    rows = []
    for device in plan.devices:
        sizes = [device.weights_bytes, device.context_bytes, device.compute_bytes + device.projector_bytes]
        sizes += [device.overhead_bytes, device.total_bytes, device.budget_bytes]
        sizes.append(device.budget_bytes - device.total_bytes)
        rows.append([device.name, *map(format_size, sizes)])
    lines = [table(rows, header=header, right=range(1, len(header)))]
    lines += dict.fromkeys(_overhead(device) for device in plan.devices if device.total_bytes)
    lines += [_headroom(device) for device in plan.devices if device.free_bytes > device.budget_bytes]
    return "\n".join(lines)


def _headroom(device: DevicePlan) -> str:
    """What the budget leaves to others, which is not what the plan leaves of the budget."""
    free, memory = format_size(device.free_bytes), format_size(device.memory_bytes)
    left = format_size(device.free_bytes - device.budget_bytes)
    return f"{device.name}: of {memory}, {free} are free now, of which the budget leaves {left} to others."


def _overhead(device: DevicePlan) -> str:
    """Where the overhead comes from: devices that agree say it once."""
    if device.overhead_source == "given":
        return "The overhead was given."
    context = format_size(device.overhead_bytes - device.scratch_bytes)
    scratch = format_size(device.scratch_bytes)
    return (
        f"Overhead: a CUDA context of {context}, {device.overhead_source} until it is measured, and {scratch} "
        f"of scratch memory, {device.scratch_source}."
    )


def _host_table(plan: Plan) -> str:
    host = plan.host
    header = ["RAM", "mapped", "pinned", "repacked", "weights", "KV cache", "compute", "total"]
    sizes = [host.mapped_bytes, host.pinned_bytes, host.repacked_bytes, host.weights_bytes]
    sizes += [host.context_bytes, host.compute_bytes, host.total_bytes]
    return table([["host", *map(format_size, sizes)]], header=header, right=range(1, len(header)))


def _residency(residency: Residency) -> list[str]:
    """What of it stays; what does not is among the warnings."""
    if residency.verdict != RESIDENT:
        return []
    return [f"All of it stays in memory: {format_size(residency.limit_bytes)} are there."]


def describe_advice(advice: Sequence[Advice], commands: Sequence[str]) -> list[str]:
    """Each with its plan in short, and what to type for it."""
    lines = []
    for one, command in zip(advice, commands):
        facts = [f"{one.gpu_layers} of {one.layers} layers on the GPU", f"{format_size(one.vram_bytes)} of VRAM"]
        facts.append(f"{format_size(one.ram_bytes)} of RAM" + ("" if one.stays_in_memory else ", more than memory has"))
        if one.generation:
            facts.insert(0, f"{span(one.generation)} tok/s")
        lines += [f"  {one.change}: {', '.join(facts)}", f"    {command}"]
    return ["What would help, by a plan for each:", *lines] if lines else []
