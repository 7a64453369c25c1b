"""What the probe measures of this CPU, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyllamarun.errors import BinaryError
from pyllamarun.machine.bandwidth import known_rates, measure
from pyllamarun.machine.core_rates import assumed, nominal
from pyllamarun.machine.rates import ASSUMED, MEASURED, NOMINAL, PLAIN, REPACKED
from pyllamarun.models.types import TENSOR_TYPES
from pyllamarun.run.binaries import PROBE, Binaries
from pyllamarun.run.command import environment
from pyllamarun.run.process import output_of

WEIGHTS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ3_S",
           "IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "MXFP4", "F16", "BF16", "F32"}  # fmt: skip


@pytest.fixture(scope="module")
def printed(binaries: Binaries) -> str:
    status, text = output_of([binaries.path(PROBE), "--read-bandwidth", "--threads", "2"], environment(binaries, ()))
    assert status == 0
    return text


def test_every_type_of_weights_is_measured(printed: str, tmp_path: Path) -> None:
    rates = measure(tmp_path, "build", lambda: printed)
    assert (rates.source, rates.threads) == (MEASURED, 2)
    assert {name for name, layout in rates.all.weights if layout == PLAIN} >= WEIGHTS
    assert {name for name, _ in rates.all.weights} <= {kind.name for kind in TENSOR_TYPES.values()}
    assert set(rates.all.weights) == set(rates.one.weights) == set(rates.all.products)
    assert set(rates.all.weights) == set(rates.all.rows) == set(rates.all.product_seconds)
    assert all(
        rates.product_rate(*key) > 0 and rates.read_seconds(*key, 1 << 20, 100, 1) > 0 for key in rates.all.weights
    )
    assert set(rates.by_threads) == {1, 2}


def test_it_is_kept_until_the_next_boot_for_the_build_that_measured(printed: str, tmp_path: Path) -> None:
    assert known_rates(tmp_path, "build") is None
    rates = measure(tmp_path, "build", lambda: printed)
    assert known_rates(tmp_path, "build") == rates
    assert known_rates(tmp_path, "another") is None


@pytest.mark.parametrize(
    "damage", ["", "{}", "[1]", "null", '{"read": 1}', '{"read": [], "best_threads": 1}', "\x00\xff"]
)
def test_damaged_measurements_are_as_none(damage: str, printed: str, tmp_path: Path) -> None:
    measure(tmp_path, "build", lambda: printed)
    (file,) = (tmp_path / "bandwidth").iterdir()
    file.write_bytes(damage.encode("latin-1"))
    assert known_rates(tmp_path, "build") is None
    data = json.loads(printed)
    data["all"]["weights"][0]["bytes_per_second"] = 0
    file.write_text(json.dumps(data))
    assert known_rates(tmp_path, "build") is None


def test_a_probe_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BinaryError, match="did not measure") as caught:
        measure(tmp_path, "build", lambda: "Segmentation fault\n")
    assert "Segmentation fault" in caught.value.why
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_kept_is_measured_all_the_same(printed: str, tmp_path: Path) -> None:
    (tmp_path / "bandwidth").write_text("a file where the folder should be")
    assert measure(tmp_path, "build", lambda: printed).source == MEASURED
    assert known_rates(tmp_path, "build") is None


def test_a_machine_that_is_not_here_reads_no_faster_than_its_memory_or_its_cores() -> None:
    fast, slow = nominal(100e9, 16), nominal(100e9, 1)
    assert fast.read_rate("Q4_K", PLAIN) == pytest.approx(70e9)
    assert slow.read_rate("Q4_K", PLAIN) == fast.one.weights["Q4_K", PLAIN] < 70e9
    assert fast.read_rate("IQ1_S", PLAIN) < fast.read_rate("Q4_K", PLAIN)  # which cores decode too slowly
    assert fast.read_rate("Q4_0", PLAIN, threads=2) == 2 * fast.one.weights["Q4_0", PLAIN]
    assert fast.is_repacked("Q4_0")
    assert ("Q4_0", REPACKED) in fast.all.weights
    assert (fast.source, assumed().source) == (NOMINAL, ASSUMED)
    assert fast.read_rate("of another time", PLAIN) == min(fast.all.weights.values())
