"""Statistics of votes: a share with its error, how many votes it takes, and a test that may stop at any time.

Pure functions. A vote is for one of two: for the first or for the second model, or for the image that the
model makes likelier or for the other one.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL, POWER = 0.05, 0.8  # of the two-sided test that `votes_needed` is for
TOLD_APART = 0.6  # share of votes for one of two models that texts give as an example of a difference
DRIFT = 2.0  # errors of FID's difference by which a model may be worse and still win by votes
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


def wrongly_ordered(margins: Sequence[float]) -> list[float]:
    """Return for each vote whether a model's implicit rewards order it wrongly: 0, 1, or 1/2 for equal ones.

    Of a model that has not left its reference every margin is 0.

    Args:
        margins: reward of the preferred image minus that of the other one, by vote.
    """
    return [0.5 if margin == 0 else float(margin < 0) for margin in margins]


def mean_of_groups(values: Sequence[float], groups: Sequence[str]) -> tuple[float, float | None]:
    """Return the mean of values, and its standard error where values of one group depend on each other.

    The variance of the mean is K / (K - 1) times the sum over K groups of their summed deviations' squares,
    over n^2 (Liang & Zeger, Biometrika 73, 1986, of a mean). None for fewer than two groups.

    Args:
        groups: name of each value's group, as the prompt of a vote.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    sums: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    if (number := len(sums)) < 2:
        return mean, None
    variance = number / (number - 1) * math.fsum(each**2 for each in sums.values()) / count**2
    return mean, math.sqrt(variance)


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
