"""Statistics of votes: a share with its error, how many votes it takes, and a test that may stop at any time.

Pure functions. A vote is for one of two: for the first or for the second model, or for the image that the
model makes likelier or for the other one.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL, POWER = 0.05, 0.8  # of the two-sided test that `votes_needed` is for
LARGEST_EXPONENT = 700.0  # of e that a float holds


def votes_needed(share: float, level: float = LEVEL, power: float = POWER) -> int:
    """Return the number of votes that tells a share from one half, in a two-sided test.

    n = ((z_(1 - level / 2) / 2 + z_power sqrt(p (1 - p))) / (p - 1/2))^2, the normal approximation of the
    binomial test (Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 2003, section 2.4).

    Args:
        share: strictly between 0 and 1, and not 1/2.
    """
    normal = NormalDist()
    spread = normal.inv_cdf(1 - level / 2) / 2 + normal.inv_cdf(power) * math.sqrt(share * (1 - share))
    return math.ceil((spread / (share - 0.5)) ** 2)


def wilson_interval(won: float, votes: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the score interval of a share (Wilson, JASA 22, 1927): it stays within 0 and 1 for few votes."""
    if not votes:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - level / 2)
    share, weight = won / votes, z * z / votes
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / votes + weight / (4 * votes))
    return max(0.0, middle - half), min(1.0, middle + half)


def wrong_share(margins: Sequence[float]) -> tuple[float, float | None]:
    """Return the share of votes that a model's implicit rewards order wrongly, and its standard error.

    Of a model that has not left its reference every margin is 0, which counts as one half.

    Args:
        margins: reward of the preferred image minus that of the other one, by vote.
    """
    wrong = [0.5 if margin == 0 else float(margin < 0) for margin in margins]
    count = len(wrong)
    share = math.fsum(wrong) / count
    if count < 2:
        return share, None
    variance = math.fsum((each - share) ** 2 for each in wrong) / (count - 1)
    return share, math.sqrt(variance / count)


def evidence_of_worse(wins: int, losses: int) -> float:
    """Return the evidence that a model wins less than half of its votes; it may be read after every vote.

    The likelihood ratio of a share drawn evenly from (0, 1/2) to a share of 1/2: 2^(n + 1) times the integral
    of p^wins (1 - p)^losses over (0, 1/2). While the model wins half or more, the probability that this ever
    reaches 1 / alpha is at most alpha (Ville's inequality; Robbins, Ann. Math. Stat. 41, 1970), however often
    and whenever one looks. Ties do not count.
    """
    votes = wins + losses
    # The integral is a tail of the beta distribution: B(w + 1, l + 1) P(Binomial(n + 1, 1/2) > w).
    tail = sum(math.comb(votes + 1, k) for k in range(wins + 1, votes + 2))  # times 2^-(n + 1)
    log_beta = math.lgamma(wins + 1) + math.lgamma(losses + 1) - math.lgamma(votes + 2)
    return math.exp(min(log_beta + math.log(tail), LARGEST_EXPONENT))
