"""Plans in files: what `plan --json` prints and `plan --save` writes, read back to be carried out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamarun.errors import DoesNotFit, UsageError
from pyllamarun.machine.machine import Machine
from pyllamarun.output import SCHEMA, printable
from pyllamarun.planning.plan import DevicePlan, Plan
from pyllamarun.planning.probe import Answer, Device
from pyllamarun.units import MIB, format_size

MAX_FILE_BYTES = 16 * MIB
REMEDY = "Make the file with `pyllamarun plan MODEL --save FILE`."


@dataclass(frozen=True)
class SavedPlan:
    """`source` is what to type for the model, wherever it is."""

    plan: Plan
    machine: Machine
    source: str


def read_plan(path: Path) -> SavedPlan:
    """Raises UsageError, which says what is wrong with the file."""
    import dacite

    data = _plan_data(path)
    try:
        plan = dacite.from_dict(
            Plan,
            {key: value for key, value in data.items() if key in Plan.__dataclass_fields__},
            dacite.Config(cast=[tuple]),
        )
        machine = Machine.of(**data["machine"])
        source = data["source"]
    except (dacite.DaciteError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not whole.", why=printable(str(error)), remedy=REMEDY) from None
    if not isinstance(source, str) or plan.argv[:2] != ("llama-server", "-m") or len(plan.argv) < 3:
        raise UsageError(f"{path} holds no plan that llama-server could carry out.", remedy=REMEDY)
    return SavedPlan(plan, machine, source)


def _plan_data(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read.", why=error.strerror or "", remedy=REMEDY) from None
    if len(text) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is too large for a plan.", remedy=REMEDY)
    try:
        envelope = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON.", remedy=REMEDY) from None
    if not isinstance(envelope, dict) or envelope.get("kind") != "plan" or not isinstance(envelope.get("data"), dict):
        raise UsageError(f"{path} is no plan.", remedy=REMEDY)
    if envelope.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} is of schema {printable(str(envelope.get('schema')))}, and this pyllamarun reads {SCHEMA}.",
            remedy="Plan again with this version: `pyllamarun plan MODEL --save FILE`.",
        )
    data: dict[str, Any] = envelope["data"]
    return data


def write_plan(path: Path, envelope: dict[str, Any]) -> None:
    """Whole or not at all; a plan that was there is replaced.  UsageError where it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(envelope, indent=2) + "\n", encoding="ascii")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written.", why=error.strerror or "", remedy="Name another file.") from None


def confirm(plan: Plan, answer: Answer, devices: Sequence[Device]) -> None:
    """Holds a plan that was made before against what llama.cpp answers now.

    Raises UsageError where it would take other memory, as with another model, card or version of llama.cpp; DoesNotFit
    where less than it needs is free.
    """
    present = {device.name: device for device in devices}
    for planned in plan.devices:
        device = present.get(planned.name)
        if device is None or device.description != planned.description:
            found = f"{device.name} is {device.description}" if device else "Devices: " + (", ".join(present) or "none")
            raise outdated(f"It is for {planned.name}, {planned.description}.", found)
        now, then = answer.bytes(device=planned.name), _buffer_bytes(planned)
        if now != then:
            what = f"It was to take {then:,} bytes on {planned.name}, and would take {now:,}."
            raise outdated(what, "The model or llama.cpp is another.")
        context_bytes = planned.overhead_bytes - planned.scratch_bytes
        free_bytes = min(device.total_bytes, device.free_bytes + context_bytes)
        if planned.total_bytes > free_bytes:
            raise DoesNotFit(
                f"The plan takes {format_size(planned.total_bytes)} on {planned.name}, and {format_size(free_bytes)} "
                "are free now.",
                remedy="End what holds the rest, or plan again.",
            )


def _buffer_bytes(device: DevicePlan) -> int:
    return device.weights_bytes + device.context_bytes + device.compute_bytes + device.projector_bytes


def outdated(what: str, why: str) -> UsageError:
    """What a plan is refused with that was right once."""
    return UsageError(f"The plan does not hold any more.  {what}", why=why, remedy="Plan again.")
