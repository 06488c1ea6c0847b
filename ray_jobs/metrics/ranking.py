"""Who wins, when measured numbers have errors. Pure Python."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that was measured.

    Attributes:
        fid: lower is better.
        error: standard error of `fid`.
        steps: training steps that it cost.
    """

    fid: float
    error: float
    steps: int


def is_tie(one: Candidate, other: Candidate) -> bool:
    """Whether two are closer than the error of their difference.

    That is the root of their errors' squares, as of independent samples. On common noise the difference's
    own error is smaller (`paired_difference`), so this rule rather calls a tie too many than too few.
    """
    return abs(one.fid - other.fid) <= math.hypot(one.error, other.error)


def winner(candidates: Sequence[Candidate]) -> int:
    """Index of the one with the fewest steps among those that tie with the best; then of the lowest FID.

    As the one-standard-error rule chooses the simplest model (Breiman et al., Classification and Regression
    Trees, 1984, section 3.4.3).

    Raises:
        ValueError: if there is none, or a number is not finite.
    """
    if not candidates:
        raise ValueError("candidates: there are none to choose from")
    for candidate in candidates:
        if not math.isfinite(candidate.fid) or not math.isfinite(candidate.error) or candidate.error < 0:
            raise ValueError(f"candidates: {candidate} has a FID or an error that is no number")
    best = min(candidates, key=lambda candidate: candidate.fid)
    tied = [i for i, candidate in enumerate(candidates) if is_tie(candidate, best)]
    return min(tied, key=lambda i: (candidates[i].steps, candidates[i].fid))


def may_be_noise(num_samples: int, num_features: int) -> bool:
    """Whether a ranking by Fréchet distances of so few pictures should be shown with a warning.

    Up to as many pictures as features the covariance has not full rank, and the distance is mostly the
    sample's size: the authors of FID ask for more than 2,048 with Inception, better 10,000 (Heusel et al.,
    arXiv 1706.08500, and their program's instructions). The kernel distance has no such bias.
    """
    return num_samples <= num_features
