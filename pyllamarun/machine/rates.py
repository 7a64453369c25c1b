"""How fast a CPU is: the rates that the speed model computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MEASURED, NOMINAL, ASSUMED = "measured", "nominal", "assumed"
PLAIN, REPACKED = "plain", "repacked"

# {(name, layout)} of a quantization type in ggml's names, such as ("Q4_K", "plain").
Rates = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class ThreadRates:
    """What a number of threads does together.

    weights: bytes of weights per second in products with one vector, by type and layout; rows: seconds that each of a
    matrix's rows costs besides; product_seconds: what each product costs besides.  products: floating operations per
    second in products with many vectors.  attention: elements of keys and values per second, for each query head
    anew, by the cache's type.  node_seconds: what any other step of a graph costs; graph_seconds: to begin with one.
    """

    threads: int
    weights: Rates
    rows: Rates
    products: Rates
    attention: Mapping[str, float]
    product_seconds: Rates
    node_seconds: float
    graph_seconds: float


@dataclass(frozen=True)
class HostRates:
    """How fast a CPU is.

    `bandwidth_bytes_per_second` is what reading gets with `best_threads`, the fewest that come near the most; `source`
    is "measured", "nominal" (from a bandwidth that the user names) or "assumed".  `one` thread and `all`, as many as
    llama.cpp uses by default.
    """

    source: str
    bandwidth_bytes_per_second: float
    best_threads: int
    one: ThreadRates
    all: ThreadRates
    by_threads: Mapping[int, float] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return self.all.threads

    def read_rate(self, name: str, layout: str, threads: int | None = None) -> float:
        """Bytes of weights per second in products with one vector; a type that is unknown reads as the slowest."""
        most = _rate(self.all.weights, name, layout)
        if threads is None or threads >= self.threads:
            return most
        return min(most, threads * _rate(self.one.weights, name, layout))

    def read_seconds(
        self, name: str, layout: str, size_bytes: float, rows: float, matrices: int, threads: int | None = None
    ) -> float:
        """Products with one vector, of matrices that have so many bytes and rows together."""
        each = self.all.rows.get((name, layout), 0.0) * (self.threads / min(threads or self.threads, self.threads))
        products = matrices * self.all.product_seconds.get((name, layout), 0.0)
        return size_bytes / self.read_rate(name, layout, threads) + rows * each + products

    def product_rate(self, name: str, layout: str, threads: int | None = None) -> float:
        """Floating operations per second in products with many vectors."""
        share = 1.0 if threads is None else min(1.0, threads / self.threads)
        return share * _rate(self.all.products, name, layout)

    def attention_rate(self, cache_type: str, threads: int | None = None) -> float:
        """Elements of keys and values per second, counted for each query head."""
        share = 1.0 if threads is None else min(1.0, threads / self.threads)
        rates = self.all.attention
        return share * rates.get(cache_type, min(rates.values()))

    def is_repacked(self, name: str) -> bool:
        """Whether the CPU backend has a layout of its own for a type."""
        return (name, REPACKED) in self.all.weights


def _rate(rates: Rates, name: str, layout: str) -> float:
    return rates.get((name, layout)) or rates.get((name, PLAIN)) or min(rates.values())
