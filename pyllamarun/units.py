"""Sizes as people write and read them.  Everywhere else, bytes are plain integers."""

from __future__ import annotations

import re

from pyllamarun.errors import UsageError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

# A bare K, M, G or T is binary, as nvidia-smi and llama.cpp count; kB, MB, GB and TB are decimal.
_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": TIB, "tib": TIB, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes that `text` means: "11.5GiB", "12GB", "11500MiB", "8G".

    Raises UsageError for anything else.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f'"{text}" is no size.',
            remedy="Write a number and a unit: 11.5GiB, 11500MiB, or 12GB for 12,000,000,000 bytes.",
        )
    if len(match[1]) > 24:
        raise UsageError(f"{text[:24]}... is larger than any memory.")
    return int(float(match[1]) * factor)


def format_size(size_bytes: int) -> str:
    """A size for a person, in binary units: "11.50 GiB"."""
    if abs(size_bytes) >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    if abs(size_bytes) >= KIB:
        return f"{size_bytes / KIB:.0f} KiB"
    return f"{size_bytes} B"


def format_seconds(seconds: float) -> str:
    """A time for a person: "0.4 s", "12 s", "3:05 min", "2:10 h"."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"


def parse_bandwidth(text: str) -> int:
    """Bytes per second that `text` means: "51.2GB/s", "48 GiB/s"; UsageError for anything else."""
    amount = re.fullmatch(r"(.*[0-9A-Za-z])\s*(?:/\s*s|ps)", text.strip(), re.IGNORECASE | re.DOTALL)
    try:
        bytes_per_second = parse_size(amount[1]) if amount else 0
    except UsageError:
        bytes_per_second = 0
    if bytes_per_second <= 0:
        raise UsageError(
            f'"{text}" is no bandwidth.',
            remedy="Write a number and a unit: 51.2GB/s for two channels of DDR4-3200, 25.6GB/s for one.",
        )
    return bytes_per_second
