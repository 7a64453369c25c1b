"""A plan in words and columns, for a person."""

from __future__ import annotations

from pyllamarun.output import table
from pyllamarun.plan.plan import Plan
from pyllamarun.units import format_size


def describe(plan: Plan, command_line: str) -> str:
    """Several lines: the model, where it goes, what that takes, and the command that does it."""
    lines = [
        f"{plan.model_name}: {plan.architecture}, {format_size(plan.weights_bytes)} of weights",
        f"{_layers(plan)}, {plan.context_tokens:,} tokens of context in {plan.slots} slot{'s' * (plan.slots != 1)}",
        "",
    ]
    if plan.devices:
        lines += [_device_table(plan), ""]
    lines += [_host_table(plan), ""]
    lines += [f"warning: {warning}" for warning in plan.warnings] + [""] * bool(plan.warnings)
    lines.append(command_line)
    return "\n".join(lines)


def _layers(plan: Plan) -> str:
    if not plan.devices:
        return "No GPU: everything on the CPU"
    if plan.gpu_layers == plan.layers:
        return f"All {plan.layers} layers on the GPU"
    return f"{plan.gpu_layers} of {plan.layers} layers on the GPU, the rest on the CPU"


def _device_table(plan: Plan) -> str:
    header = ["GPU", "weights", "KV cache", "compute", "overhead", "total", "budget", "left"]
    rows = []
    for device in plan.devices:
        sizes = [device.weights_bytes, device.context_bytes, device.compute_bytes + device.projector_bytes]
        sizes += [device.overhead_bytes, device.total_bytes, device.budget_bytes]
        sizes.append(device.budget_bytes - device.total_bytes)
        rows.append([device.name, *map(format_size, sizes)])
    lines = [table(rows, header=header, right=range(1, len(header)))]
    sources = {device.overhead_source for device in plan.devices}
    if "assumed" in sources:
        lines.append("The overhead (CUDA context and scratch pool) is assumed, not measured.")
    return "\n".join(lines)


def _host_table(plan: Plan) -> str:
    host = plan.host
    header = ["RAM", "mapped", "pinned", "repacked", "weights", "KV cache", "compute", "total"]
    sizes = [host.mapped_bytes, host.pinned_bytes, host.repacked_bytes, host.weights_bytes]
    sizes += [host.context_bytes, host.compute_bytes, host.total_bytes]
    return table([["host", *map(format_size, sizes)]], header=header, right=range(1, len(header)))
