"""What one core does, for machines that are not here or not measured."""

from __future__ import annotations

from pyllamarun.machine.rates import ASSUMED, NOMINAL, PLAIN, REPACKED, HostRates, ThreadRates

# What reading gets of a nominal bandwidth: two channels of DDR4 or DDR5 give 0.65 to 0.75 of it.
RAM_EFFICIENCY = 0.70
# Where nothing is known: two channels of DDR4-3200, and as many cores as keep them busy.
ASSUMED_BANDWIDTH = 51_200_000_000
ASSUMED_CORES = 8

# By `pyllamarun-probe --read-bandwidth --threads 1` on an AMD EPYC of the fourth generation (Zen 4 at about 3.5 GHz,
# AVX-512): 10^9 bytes of weights a second in a product with one vector, 10^9 operations a second in one with many.
_CORE = {
    ("F32", PLAIN): (15.3, 73),
    ("F16", PLAIN): (21.8, 95),
    ("Q4_0", PLAIN): (9.8, 92),
    ("Q4_0", REPACKED): (19.3, 135),
    ("Q4_1", PLAIN): (8.0, 41),
    ("Q5_0", PLAIN): (10.2, 88),
    ("Q5_1", PLAIN): (8.7, 39),
    ("Q8_0", PLAIN): (14.8, 109),
    ("Q2_K", PLAIN): (12.7, 159),
    ("Q2_K", REPACKED): (14.4, 84),
    ("Q3_K", PLAIN): (12.0, 139),
    ("Q4_K", PLAIN): (17.8, 186),
    ("Q4_K", REPACKED): (20.5, 142),
    ("Q5_K", PLAIN): (16.2, 173),
    ("Q6_K", PLAIN): (21.1, 132),
    ("IQ2_XXS", PLAIN): (3.8, 156),
    ("IQ2_XS", PLAIN): (4.6, 132),
    ("IQ3_XXS", PLAIN): (4.2, 140),
    ("IQ1_S", PLAIN): (2.9, 158),
    ("IQ4_NL", PLAIN): (9.3, 90),
    ("IQ4_NL", REPACKED): (19.4, 135),
    ("IQ3_S", PLAIN): (4.1, 139),
    ("IQ2_S", PLAIN): (4.9, 125),
    ("IQ4_XS", PLAIN): (13.2, 177),
    ("IQ1_M", PLAIN): (3.6, 133),
    ("BF16", PLAIN): (18.7, 195),
    ("TQ1_0", PLAIN): (6.3, 57),
    ("TQ2_0", PLAIN): (13.7, 103),
    ("MXFP4", PLAIN): (12.0, 44),
    ("MXFP4", REPACKED): (15.7, 124),
    ("NVFP4", PLAIN): (10.2, 35),
    ("Q1_0", PLAIN): (4.5, 64),
    ("Q2_0", PLAIN): (0.5, 4),
}
_ATTENTION = {
    "F32": 7.3,
    "F16": 8.3,
    "BF16": 6.6,
    "Q8_0": 5.0,
    "Q5_1": 1.8,
    "Q5_0": 1.8,
    "Q4_1": 2.4,
    "Q4_0": 2.8,
    "IQ4_NL": 1.6,
}
_GIGA = 1e9

CORE = ThreadRates(
    threads=1,
    weights={key: _GIGA * read for key, (read, _) in _CORE.items()},
    products={key: _GIGA * operations for key, (_, operations) in _CORE.items()},
    attention={key: _GIGA * elements for key, elements in _ATTENTION.items()},
    # Two threads there, which have to wait for one another; one alone takes half.
    node_seconds=0.95e-6,
    product_seconds=1.8e-6,
    graph_seconds=2.4e-6,
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
        products={key: cores * rate for key, rate in CORE.products.items()},
        attention={key: cores * rate for key, rate in CORE.attention.items()},
        node_seconds=CORE.node_seconds,
        product_seconds=CORE.product_seconds,
        graph_seconds=CORE.graph_seconds,
    )
    return HostRates(source, bandwidth, cores, CORE, together)
