"""Where pyllamarun keeps things; PYLLAMARUN_HOME puts all of it into one folder."""

from __future__ import annotations

import os
from pathlib import Path

from pyllamarun.errors import UsageError


def _folder(kind: str) -> Path:
    home = os.environ.get("PYLLAMARUN_HOME")
    if home:
        return Path(home).expanduser() / kind
    import platformdirs

    folder = getattr(platformdirs, f"user_{kind}_path")("pyllamarun")
    return Path(folder)


def expanded(text: str) -> Path:
    """A path that a person typed, its ~ replaced.  Raises UsageError where there is no such user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"There is no home folder for {text}.", remedy="Write the whole path.") from None


def models_folder() -> Path:
    """Where downloaded models go."""
    return _folder("data") / "models"


def state_folder() -> Path:
    """Where what was learned about this machine goes."""
    return _folder("state")


def log_folder() -> Path:
    """Where the servers' logs go."""
    return _folder("log")
