"""What one core does, for machines that are not here or not measured."""

from __future__ import annotations

from pyllamarun.machine.rates import ASSUMED, NOMINAL, PLAIN, REPACKED, HostRates, ThreadRates

# What reading gets of a nominal bandwidth: two channels of DDR4 or DDR5 give 0.65 to 0.75 of it.
RAM_EFFICIENCY = 0.70
# Where nothing is known: two channels of DDR4-3200, and as many cores as such a machine has.
ASSUMED_BANDWIDTH = 51_200_000_000
ASSUMED_CORES = 6

# By `pyllamarun-probe --read-bandwidth`, compiled for AVX2 as most desktop processors have it, on an AMD EPYC of the
# fourth generation (Zen 4): 10^9 bytes of weights a second in a product with one vector, 10^-9 seconds that each row
# costs besides, and 10^9 operations a second in a product with many vectors.
_CORE = {
    ("F32", PLAIN): (19.0, 0, 77),
    ("F16", PLAIN): (24.7, 11, 98),
    ("Q4_0", PLAIN): (9.5, 11, 70),
    ("Q4_0", REPACKED): (18.7, 0, 88),
    ("Q4_1", PLAIN): (8.3, 7, 48),
    ("Q5_0", PLAIN): (9.7, 12, 56),
    ("Q5_1", PLAIN): (8.6, 3, 37),
    ("Q8_0", PLAIN): (15.6, 11, 81),
    ("Q2_K", PLAIN): (13.0, 18, 92),
    ("Q3_K", PLAIN): (11.9, 20, 87),
    ("Q4_K", PLAIN): (16.9, 20, 96),
    ("Q4_K", REPACKED): (20.1, 0, 104),
    ("Q5_K", PLAIN): (15.9, 21, 95),
    ("Q6_K", PLAIN): (21.4, 22, 83),
    ("IQ2_XXS", PLAIN): (4.0, 13, 87),
    ("IQ2_XS", PLAIN): (4.4, 19, 81),
    ("IQ3_XXS", PLAIN): (4.2, 13, 78),
    ("IQ1_S", PLAIN): (3.1, 13, 86),
    ("IQ4_NL", PLAIN): (9.0, 13, 62),
    ("IQ4_NL", REPACKED): (18.2, 0, 86),
    ("IQ3_S", PLAIN): (4.0, 17, 81),
    ("IQ2_S", PLAIN): (5.1, 14, 80),
    ("IQ4_XS", PLAIN): (13.0, 20, 79),
    ("IQ1_M", PLAIN): (3.5, 17, 81),
    ("BF16", PLAIN): (22.4, 10, 69),
    ("TQ1_0", PLAIN): (6.4, 14, 57),
    ("TQ2_0", PLAIN): (16.6, 17, 123),
    ("MXFP4", PLAIN): (11.8, 20, 43),
    ("MXFP4", REPACKED): (16.6, 0, 86),
    ("NVFP4", PLAIN): (9.8, 20, 34),
    ("Q1_0", PLAIN): (4.2, 14, 60),
    ("Q2_0", PLAIN): (0.5, 4, 4),
}
# 10^9 elements of keys and values a second, by the cache's type.
_ATTENTION = {"F32": 6.7, "F16": 8.0, "BF16": 6.5, "Q8_0": 5.2, "Q5_1": 1.8, "Q5_0": 1.8, "Q4_1": 2.4,
              "Q4_0": 2.8, "IQ4_NL": 1.6}  # fmt: skip
_PRODUCT_SECONDS = {PLAIN: 1.6e-06, REPACKED: 7.8e-06}
_GIGA = 1e9

CORE = ThreadRates(
    threads=1,
    weights={key: _GIGA * read for key, (read, _, _) in _CORE.items()},
    rows={key: row / _GIGA for key, (_, row, _) in _CORE.items()},
    products={key: _GIGA * operations for key, (_, _, operations) in _CORE.items()},
    attention={key: _GIGA * elements for key, elements in _ATTENTION.items()},
    # Of two threads there, which have to wait for one another; more have to wait a little longer.
    node_seconds=7.81e-07,
    product_seconds={(name, layout): _PRODUCT_SECONDS[layout] for name, layout in _CORE},
    graph_seconds=1.05e-06,
)


def nominal(bandwidth_bytes_per_second: float, cores: int) -> HostRates:
    """Of a machine that is not this one, with this bandwidth of RAM, all channels together, and so many cores."""
    return _built(bandwidth_bytes_per_second, cores, NOMINAL)


def assumed(cores: int = ASSUMED_CORES) -> HostRates:
    """Of a machine of which nothing was measured."""
    return _built(ASSUMED_BANDWIDTH, cores, ASSUMED)


def _built(nominal_bandwidth: float, cores: int, source: str) -> HostRates:
    """Each core as fast as those above, all together no faster than the memory."""
    bandwidth = RAM_EFFICIENCY * nominal_bandwidth
    together = ThreadRates(
        threads=cores,
        weights={key: min(bandwidth, cores * rate) for key, rate in CORE.weights.items()},
        rows={key: row / cores for key, row in CORE.rows.items()},
        products={key: cores * rate for key, rate in CORE.products.items()},
        attention={key: cores * rate for key, rate in CORE.attention.items()},
        node_seconds=CORE.node_seconds,
        product_seconds=CORE.product_seconds,
        graph_seconds=CORE.graph_seconds,
    )
    return HostRates(source, bandwidth, cores, CORE, together)
