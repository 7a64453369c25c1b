"""docs/json.md against what the commands print with --json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness import run_cli
from misbehaving import RemoteContent, Server
from remote_models import REPOSITORY, publish

TEXT = (Path(__file__).parent.parent / "docs/json.md").read_text()
BOX = ("--virtual-gpu", "450MiB", "--ram-bandwidth", "2GB/s", "--cores", "2")


def documented(kind: str) -> set[str]:
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{kind}\n"))
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of what is no object, and of empty ones."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path


def is_documented(leaf: str, names: set[str]) -> bool:
    """An empty list or object, or a null, stands for what it would contain."""
    return any(
        leaf == name
        or fnmatchcase(leaf.replace("[]", "@"), name.replace("[]", "@"))
        or name.startswith((f"{leaf}[]", f"{leaf}."))
        for name in names
    )


def data(*arguments: str | Path) -> tuple[str, Any]:
    result = run_cli(*arguments, "--json")
    envelope = json.loads(result.stdout)
    assert envelope["ok"], envelope["error"]
    assert envelope["schema"] == 1
    return envelope["kind"], envelope["data"]


def test_every_field_is_documented(
    smollm2: Path, tiny: Callable[[str], Path], hugging_face: Server, tmp_path: Path
) -> None:
    model, text = tmp_path / "smollm2.Q4_1.gguf", tmp_path / "text.txt"
    text.write_text("word1 " * 1000)
    shutil.copy(smollm2, model)
    publish(hugging_face, {"m-Q4_0.gguf": RemoteContent(tiny("llama").read_bytes())})
    pulled = f"hf:{REPOSITORY}:Q4_0"
    seen: dict[str, set[str]] = {}
    for arguments in (
        ("doctor",),
        ("pull", pulled, *BOX),
        ("list",),
        ("verify", "--deep"),
        ("rm", pulled, "--yes"),
        ("inspect", model),
        ("plan", model, *BOX, "--advice"),
        ("plan", model, "--virtual-gpu", "450MiB,400MiB", "--goal", "throughput"),
        ("plan", model, *BOX, "--compare", "ctx"),
        ("plan", model, *BOX, "--compare", "quants"),
        ("rehearse", model, *BOX),
        ("quantize", model, "Q3_K_M", *BOX),
        ("quantize", model, "Q2_K", "--dry-run", *BOX),
        ("compare", tiny("llama"), tiny("llama"), "--text", text, "-c", "256", "--chunks", "2"),
    ):
        kind, found = data(*arguments)
        seen.setdefault(kind, set()).update(leaves(found))
    assert set(seen) == set(re.findall(r"^## (\w+)", TEXT, re.MULTILINE))
    for kind, found in seen.items():
        unknown = sorted(leaf for leaf in found if not is_documented(leaf, documented(kind)))
        assert not unknown, f"docs/json.md does not tell of {kind}'s {unknown}"


def test_every_documented_field_of_a_plan_occurs(header_70b: Path, tmp_path: Path) -> None:
    desk = tmp_path / "desk.toml"
    desk.write_text('gpus = ["RTX 3060"]\nram = "64GiB"\nram_bandwidth = "2GB/s"\ncores = 2\n')
    _, found = data("plan", header_70b, "--machine", desk, "--advice", "--allow", "quant")
    occurring = set(leaves(found))
    absent = [
        name
        for name in documented("plan")
        if "*" not in name and not any(leaf == name or leaf.startswith((f"{name}.", f"{name}[]")) for leaf in occurring)
    ]
    assert not absent
