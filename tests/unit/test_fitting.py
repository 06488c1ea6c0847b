"""How a cost grows: what a known line and a known power are fitted by."""

import pytest

from benchmarks.scale.fitting import fitted

SIZES = [1, 10, 100, 1000, 10_000]


def test_a_line_is_fitted_by_itself() -> None:
    fit = fitted(SIZES, [3 + 0.5 * size for size in SIZES])
    assert (fit.a, fit.b, fit.c) == pytest.approx((3, 0.5, 1)) and fit.largest_error < 1e-9
    assert fit.at(200) == pytest.approx(103)


def test_a_power_is_fitted_by_itself() -> None:
    fit = fitted(SIZES, [3 + 0.5 * size**1.5 for size in SIZES])
    assert (fit.a, fit.b, fit.c) == pytest.approx((3, 0.5, 1.5)) and fit.record()["kind"] == "power"


def test_neither_constant_nor_slope_is_negative() -> None:
    fit = fitted([1, 2, 3], [1, 3, 5])
    assert fit.a == 0 and fit.b > 0
