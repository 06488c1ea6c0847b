"""How a cost grows: a straight line through what was measured or, where that does not do, a power."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SUFFICES = 0.1  # largest relative error of a straight line that is kept
EXPONENTS = np.arange(0.1, 3.01, 0.01)
FEWEST = 4  # sizes for a power, which has three parameters


@dataclass(frozen=True)
class Fit:
    """a + b * n**c, and by how much of its value it misses what was measured at worst."""

    a: float
    b: float
    c: float
    largest_error: float

    def at(self, size: float) -> float:
        return float(self.a + self.b * size**self.c)

    def told(self) -> str:
        power = "" if self.c == 1 else f"^{self.c:.2f}"
        return f"{self.a:.4g} + {self.b:.4g} n{power} (within {self.largest_error:.0%})"

    def record(self) -> dict[str, Any]:
        return {"kind": "line" if self.c == 1 else "power", **asdict(self)}


def fitted(sizes: Sequence[float], values: Sequence[float]) -> Fit:
    """Least squares of relative errors, since sizes span decades; neither constant nor slope is negative.

    Args:
        sizes: two or more.
        values: positive.
    """
    line = _of_power(sizes, values, 1.0)
    if line.largest_error <= SUFFICES or len(sizes) < FEWEST:
        return line
    powers = [_of_power(sizes, values, float(exponent)) for exponent in EXPONENTS]
    return min([line, *powers], key=lambda fit: fit.largest_error)


def _of_power(sizes: Sequence[float], values: Sequence[float], exponent: float) -> Fit:
    measured = np.array(values, float)
    powers = np.array(sizes, float) ** exponent
    whole = np.stack([np.ones_like(powers), powers], axis=1) / measured[:, None]
    one = np.ones_like(measured)
    a, b = np.linalg.lstsq(whole, one, rcond=None)[0]
    if a < 0:
        a, b = 0.0, np.linalg.lstsq(whole[:, 1:], one, rcond=None)[0][0]
    elif b < 0:
        a, b = np.linalg.lstsq(whole[:, :1], one, rcond=None)[0][0], 0.0
    errors = np.abs((a + b * powers) / measured - 1)
    return Fit(float(a), float(b), exponent, float(errors.max()))
