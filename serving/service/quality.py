"""Decide by quality whether a version may stay: by votes and ratings, drift and near copies. Pure.

Errors: people's feedback is a sequential test, which may be looked at after every vote. It withdraws a
version that people like as much with a probability of at most `Quality.level` over all its life
(`metrics.votes.evidence_of_worse`). Near copies are tested anew for each window of images, with a probability
of `CHANCE` each. Drift is a limit, not a test.
"""

from dataclasses import dataclass
from math import comb

from ray_jobs.metrics.votes import evidence_of_worse
from serving.feedback.store import Compared
from serving.load import DriftScores
from serving.service.canary import CHANCE


@dataclass(frozen=True)
class Quality:
    """Limits of quality; as in ServeConfig.

    Attributes:
        level: probability of withdrawing a version that people like as much; 0: feedback withdraws none.
        promotes: probability of promoting a version that people like no more; 0: none is promoted.
        drift: allowed multiple of the drift FID when published; None: neither drift nor near copies count.
    """

    level: float
    promotes: float = 0.0
    drift: float | None = None

    def objection(self, compared: Compared, scores: DriftScores | None) -> str | None:
        """Return the reason to withdraw a version now; None if it may stay.

        Args:
            compared: people's feedback on the version, against the one that it is to replace or has replaced.
            scores: of its images; None: too few were drawn.
        """
        if self.level and (evidence := evidence_of_worse(*compared)) >= 1 / self.level:
            return (
                f"feedback: people preferred it in {compared.wins} of {sum(compared)} comparisons; by chance "
                f"with a probability of at most {1 / evidence:.1g}"
            )
        if self.drift is None or scores is None:
            return None
        if scores.expected_fid and scores.fid > self.drift * scores.expected_fid:
            return (
                f"drift: FID {scores.fid:.1f} of the last {scores.num_pictures} images, "
                f"{scores.expected_fid:.1f} when published"
            )
        return _copies(scores)

    def is_better(self, compared: Compared) -> bool:
        """Return whether people like a candidate more than the champion."""
        wins, losses = compared
        return bool(self.promotes) and evidence_of_worse(losses, wins) >= 1 / self.promotes


def _copies(scores: DriftScores) -> str | None:
    """Return the reason to withdraw a version that draws more near copies than chance has."""
    share, expected, count = scores.near_copies, scores.expected_near_copies, scores.num_pictures
    if share is None or expected is None:
        return None
    chance = at_least(round(share * count), count, expected)
    if chance >= CHANCE:
        return None
    return (
        f"near copies: {share:.1%} of the last {count} images, {expected:.1%} by chance; so many with a "
        f"probability of {chance:.1g}"
    )


def at_least(hits: int, count: int, share: float) -> float:
    """Return the probability of at least so many hits of `count`, each with probability `share`."""
    return 1.0 - sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits))
