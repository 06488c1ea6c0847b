"""Promotion: whether a new version may replace the champion. Pure: two measurements in, a sentence out."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A test FID, and what two of them must share to be compared.

    Attributes:
        error: standard error; None where it was not estimated, which counts as 0.
        data: digest of the prepared data, and so of the test split.
    """

    fid: float
    error: float | None
    num_samples: int
    feature_network: str
    data: str

    def __str__(self) -> str:
        return f"{self.fid:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def objection(new: Measured, champion: Measured | None) -> str | None:
    """Why `new` must not replace the champion (None: not measured by this program); None: it may.

    The error of a difference of two independent estimates is the root of the sum of their squared errors.
    """
    if champion is None:
        return "the champion has no record of how it was measured"
    pairs = {
        "feature network": (new.feature_network, champion.feature_network),
        "number of samples": (new.num_samples, champion.num_samples),
        "data": (new.data[:12], champion.data[:12]),
    }
    differ = [
        f"{what} {mine}, the champion's {other}" for what, (mine, other) in pairs.items() if mine != other
    ]
    if differ:
        return f"it cannot be compared with the champion: {'; '.join(differ)}"
    if math.isnan(new.fid):
        return "its test FID is not a number"
    error = math.hypot(new.error or 0.0, champion.error or 0.0)
    if math.isnan(champion.fid) or champion.fid - new.fid > error:
        return None
    margin = f" by more than the error {error:.2f}" if error else ""
    return f"its test FID {new} does not beat the champion's {champion}{margin}"
