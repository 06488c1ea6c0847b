"""Choice of a winner among scores with errors. Pure Python."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A checkpoint compared with the one of the lowest score.

    Attributes:
        behind: its score minus the lowest; 0 for the lowest itself.
        error: standard error of this difference (`paired_difference`).
        steps: number of training steps.
    """

    behind: float
    error: float
    steps: int


def is_tie(candidate: Candidate) -> bool:
    """Return whether the candidate's score is within its error of the best."""
    return candidate.behind <= candidate.error


def winner(candidates: Sequence[Candidate]) -> int:
    """Index of the candidate with the fewest steps among those that tie with the best; then the best score.

    This follows the one-standard-error rule for choosing the simplest model (Breiman et al., Classification
    and Regression Trees, 1984, section 3.4.3).

    Raises:
        ValueError: there are no candidates, a number is not finite, or an error is negative.
    """
    if not candidates:
        raise ValueError("candidates: there are none to choose from")
    for candidate in candidates:
        if not math.isfinite(candidate.behind) or not math.isfinite(candidate.error) or candidate.error < 0:
            raise ValueError(f"candidates: {candidate} has a difference or an error that is no number")
    tied = [i for i, candidate in enumerate(candidates) if is_tie(candidate)]
    return min(tied, key=lambda i: (candidates[i].steps, candidates[i].behind))


def require_comparable(rows: Sequence[Mapping[str, object]], *fields: str) -> None:
    """Raise ValueError if rows of scores differ in one of these fields.

    Rows without the field, from older versions of this program, are ignored.
    """
    for field in fields:
        found = {str(row[field]) for row in rows if row.get(field) is not None}
        if len(found) > 1:
            raise ValueError(
                f"{field}: scores of {' and '.join(sorted(found))} do not compare; delete the rows of one of"
                " them, so that they are measured again"
            )


def enough_samples(num_features: int) -> int:
    """Minimum number of pictures for ranking Fréchet distances in `num_features` features.

    With no more pictures than features the covariance is rank-deficient, and the distance depends mostly on
    the sample size. The authors of FID require more than 2,048 with Inception, better 10,000 (Heusel et al.,
    arXiv 1706.08500, and their program's instructions). The kernel distance has no such bias.
    """
    return num_features + 1
