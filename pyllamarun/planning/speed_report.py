"""A plan's speed in words, and what it is made of in columns."""

from __future__ import annotations

from pyllamarun.output import table
from pyllamarun.planning.speed import Range, Speed
from pyllamarun.units import format_size

RESTS_ON = {
    "measured": "this machine's CPU as measured",
    "NVML": "bandwidth of the GPU as its driver tells it",
    "specification": "bandwidth of the GPU as specified",
    "nominal": "RAM as described",
    "assumed": "RAM and CPU as assumed",
}


def describe_speed(speed: Speed, slots: int, is_here: bool) -> list[str]:
    """Two or three lines; `is_here` is whether the plan is for this machine, which can be measured."""
    if speed.generation is None:
        return ["How fast it is depends on the disk, which is read for every token: seconds to minutes a token."]
    full = f", {span(speed.generation_full)} with a full context" if speed.generation_full else ""
    lines = [f"Generates {span(speed.generation)} tok/s{full}: {speed.verdict}."]
    if speed.prompt:
        lines[0] += f"  Reads prompts at {span(speed.prompt)} tok/s."
    if slots > 1 and speed.throughput:
        lines.append(f"All {slots} slots together generate {span(speed.throughput)} tok/s.")
    basis = [RESTS_ON.get(source, source) for source in speed.basis]
    measure = "; --read-bandwidth measures it" if is_here and "assumed" in speed.basis else ""
    lines.append(f"That rests on {', '.join(basis)}{measure}.")
    return lines


def explain_speed(speed: Speed) -> str:
    """What one generated token is made of, the largest first."""
    total = sum(term.seconds for term in speed.terms)
    rows = [
        [
            term.device,
            term.what,
            format_size(term.bytes) if term.bytes else "",
            f"{term.bytes_per_second / 1e9:.1f} GB/s" if term.bytes_per_second else "",
            term.source,
            f"{1000 * term.seconds:.3f} ms",
            f"{100 * term.seconds / total:.1f} %" if total else "",
        ]
        for term in sorted(speed.terms, key=lambda term: -term.seconds)
    ]
    rows.append(["", "one token", "", "", "", f"{1000 * total:.3f} ms", ""])
    header = ["WHERE", "WHAT", "READS", "AT", "WHICH IS", "TAKES", "SHARE"]
    return table(rows, header=header, right=(2, 3, 5, 6))


def span(values: Range) -> str:
    """Two figures that differ: "0.55 to 1.6", "39 to 61"."""
    low, high = (_figure(value) for value in (values.low, values.high))
    return low if low == high else f"{low} to {high}"


def _figure(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
