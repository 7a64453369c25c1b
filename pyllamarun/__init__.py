"""Runs a model that is larger than your GPU, at exactly the VRAM you allow.

As a library: `Machine`, `Model`, `Planner` and `plan`, see pyllamarun/plans.py and docs/library.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllamarun.machine.machine import Machine as Machine
    from pyllamarun.models.model import Model as Model
    from pyllamarun.planner import Planner as Planner
    from pyllamarun.planning.plan import Plan as Plan
    from pyllamarun.plans import plan as plan

__version__ = "0.1.0"
__all__ = ["Machine", "Model", "Plan", "Planner", "__version__", "plan"]

_HOMES = {
    "Machine": "machine.machine", "Model": "models.model", "Plan": "planning.plan", "Planner": "planner",
    "plan": "plans",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the command line starts faster without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
