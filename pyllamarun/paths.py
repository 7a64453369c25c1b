"""Where pyllamarun keeps things; PYLLAMARUN_HOME puts all of it into one folder."""

from __future__ import annotations

import os
from pathlib import Path


def _folder(kind: str) -> Path:
    home = os.environ.get("PYLLAMARUN_HOME")
    if home:
        return Path(home).expanduser() / kind
    import platformdirs

    folder = getattr(platformdirs, f"user_{kind}_path")("pyllamarun")
    return Path(folder)


def models_folder() -> Path:
    """Where downloaded models go."""
    return _folder("data") / "models"


def state_folder() -> Path:
    """Where what was learned about this machine goes."""
    return _folder("state")


def log_folder() -> Path:
    """Where the servers' logs go."""
    return _folder("log")
