"""Measures how fast this CPU reads weights and computes with them, by the probe, and keeps it until the next boot.

Nothing is measured unless `measure` is called, so that a plan never waits for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyllamarun.errors import BinaryError
from pyllamarun.machine.rates import MEASURED, HostRates, ThreadRates

Run = Callable[[], str]


def known_rates(folder: Path, build: str) -> HostRates | None:
    """What was measured since this machine booted, with this build and the CPUs that we may use; None if nothing was.

    `folder` is the state folder.
    """
    try:
        return _parsed(json.loads(_cache(folder, build).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def measure(folder: Path, build: str, run: Run) -> HostRates:
    """Measures, and keeps the result for `known_rates`.  Takes some seconds.

    `run` gives what `pyllamarun-probe --read-bandwidth` prints.  Raises BinaryError when that is nothing sound.
    """
    text = run()
    try:
        rates = _parsed(json.loads(text.strip().splitlines()[-1]))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        raise BinaryError(
            "pyllamarun-probe did not measure the bandwidth.",
            why=text.strip()[-300:],
            remedy="Run `pyllamarun doctor`.",
        ) from None
    _keep(_cache(folder, build), text)
    return rates


def _keep(path: Path, text: str) -> None:
    """Whole or not at all; what cannot be kept is measured again another time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError:
        return


def _cache(folder: Path, build: str) -> Path:
    """A file for each boot, build and set of CPUs: clocks, memory and neighbours may be others after a boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    key = repr((boot, build, sorted(os.sched_getaffinity(0))))
    return folder / "bandwidth" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _parsed(data: Mapping[str, Any]) -> HostRates:
    by_threads = {int(one["threads"]): float(one["bytes_per_second"]) for one in data["read"]}
    best = int(data["best_threads"])
    one, everything = _thread_rates(data["one"]), _thread_rates(data["all"])
    if not by_threads[best] > 0 or not everything.weights or not everything.attention:
        raise ValueError
    return HostRates(MEASURED, by_threads[best], best, one, everything, by_threads)


def _thread_rates(data: Mapping[str, Any]) -> ThreadRates:
    weights = {(one["type"].upper(), one["layout"]): one for one in data["weights"]}
    return ThreadRates(
        threads=int(data["threads"]),
        weights={key: _positive(one["bytes_per_second"]) for key, one in weights.items()},
        rows={key: max(0.0, float(one["row_seconds"])) for key, one in weights.items() if "row_seconds" in one},
        products={key: _positive(one["flops_per_second"]) for key, one in weights.items() if "flops_per_second" in one},
        attention={one["type"].upper(): _positive(one["elements_per_second"]) for one in data["attention"]},
        node_seconds=max(0.0, float(data["node_seconds"])),
        product_seconds={
            key: max(0.0, float(one["product_seconds"])) for key, one in weights.items() if "product_seconds" in one
        },
        graph_seconds=max(0.0, float(data["graph_seconds"])),
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError
    return number
