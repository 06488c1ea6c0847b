"""Promotion: decide if a new version may replace the champion. Pure: two measurements in, a sentence out."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A test FID, and the conditions that must be equal to compare it with another.

    Attributes:
        error: standard error; None if it was not estimated, which counts as 0.
        data: digest of the prepared data, including the training pictures.
        test: digest of the pictures and captions of the test split; None for a version registered without
            it, for which `data` is compared instead.
        base_fid: FID of the base model on the same pictures; None if it was not recorded.
    """

    fid: float
    error: float | None
    num_samples: int
    feature_network: str
    data: str
    test: str | None = None
    base_fid: float | None = None

    def __str__(self) -> str:
        return f"{self.fid:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


@dataclass(frozen=True)
class Paired:
    """Paired comparison of a new version with a champion on the same captions and noise.

    Attributes:
        champion: version number of that champion.
        error: standard error of the difference of their test FIDs.
    """

    champion: int
    error: float


def objection(new: Measured, champion: Measured | None, paired: Paired | None = None) -> str | None:
    """Return the reason why `new` must not replace the champion, or None if it may.

    The error of the difference of two independent estimates is the root of the sum of their squared errors.
    Two versions scored on the same captions share the sampling of these, which is at least half of either
    error. So if both versions' pictures are available, the error is that of the paired difference.

    Args:
        champion: measurement of the champion; None if it was not measured by this program.
        paired: paired comparison of the two; None if it is not available.
    """
    if champion is None:
        return "the champion has no record of how it was measured"
    pairs = {
        "feature network": (new.feature_network, champion.feature_network),
        "number of samples": (new.num_samples, champion.num_samples),
    }
    if new.test and champion.test:
        pairs["test split"] = new.test[:12], champion.test[:12]
    else:  # registered before the test split had its own digest
        pairs["data"] = new.data[:12], champion.data[:12]
    differ = [
        f"{what} {mine}, the champion's {other}" for what, (mine, other) in pairs.items() if mine != other
    ]
    if differ:
        return f"it cannot be compared with the champion: {'; '.join(differ)}"
    if math.isnan(new.fid):
        return "its test FID is not a number"
    error = paired.error if paired else math.hypot(new.error or 0.0, champion.error or 0.0)
    if math.isnan(champion.fid) or champion.fid - new.fid > error:
        return None
    in_pairs = " of the difference in pairs" if paired else ""
    margin = f" by more than the error {error:.2f}{in_pairs}" if error else ""
    return f"its test FID {new} does not beat the champion's {champion}{margin}"


def objection_to_first(new: Measured) -> str | None:
    """Return the reason why a name's first version must not be served (no better than the base), or None."""
    if math.isnan(new.fid):
        return "its test FID is not a number"
    if new.base_fid is None or math.isnan(new.base_fid) or new.fid < new.base_fid:
        return None
    return f"its test FID {new} does not beat the base model's {new.base_fid:.2f}"
