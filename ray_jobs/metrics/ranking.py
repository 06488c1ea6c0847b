"""Who wins, when measured numbers have errors. Pure Python."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A checkpoint beside the one of the lowest score.

    Attributes:
        behind: how much worse it scored than that one; of itself 0.
        error: standard error of this difference (`paired_difference`).
        steps: training steps that it cost.
    """

    behind: float
    error: float
    steps: int


def is_tie(candidate: Candidate) -> bool:
    """Whether it is as good as the best, as far as its score can tell."""
    return candidate.behind <= candidate.error


def winner(candidates: Sequence[Candidate]) -> int:
    """Index of the one with the fewest steps among those that tie with the best; then of the best score.

    As the one-standard-error rule chooses the simplest model (Breiman et al., Classification and Regression
    Trees, 1984, section 3.4.3).

    Raises:
        ValueError: if there is none, or a number is not finite.
    """
    if not candidates:
        raise ValueError("candidates: there are none to choose from")
    for candidate in candidates:
        if not math.isfinite(candidate.behind) or not math.isfinite(candidate.error) or candidate.error < 0:
            raise ValueError(f"candidates: {candidate} has a difference or an error that is no number")
    tied = [i for i, candidate in enumerate(candidates) if is_tie(candidate)]
    return min(tied, key=lambda i: (candidates[i].steps, candidates[i].behind))


def require_comparable(rows: Sequence[Mapping[str, Any]], *fields: str) -> None:
    """Raises ValueError if rows of scores differ in one of these fields.

    Rows that lack it, of former versions of this program, are not looked at.
    """
    for field in fields:
        found = {str(row[field]) for row in rows if row.get(field) is not None}
        if len(found) > 1:
            raise ValueError(
                f"{field}: scores of {' and '.join(sorted(found))} do not compare; delete the rows of one of"
                " them, so that they are measured again"
            )


def enough_samples(num_features: int) -> int:
    """Pictures from which on Fréchet distances by a network of so many features can be ranked.

    Up to as many pictures as features the covariance has not full rank, and the distance is mostly the
    sample's size: the authors of FID ask for more than 2,048 with Inception, better 10,000 (Heusel et al.,
    arXiv 1706.08500, and their program's instructions). The kernel distance has no such bias.
    """
    return num_features + 1
