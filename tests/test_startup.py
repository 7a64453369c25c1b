"""What starting up costs."""

from __future__ import annotations

import subprocess
import sys
import time

from harness import PYLLAMARUN, run_cli

HEAVY = ("requests", "huggingface_hub", "rich", "pynvml", "psutil", "tqdm", "numpy", "platformdirs", "json.decoder")


def test_help_imports_nothing_heavy() -> None:
    argv = [sys.executable, "-X", "importtime", PYLLAMARUN, "--help"]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "click" in imported
    for name in HEAVY:
        assert name not in imported


def test_help_is_quick() -> None:
    run_cli("--help")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert run_cli("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2
