"""Balance: which attributes generated pictures show, beside those of the data. Pure functions."""

from collections.abc import Mapping

import numpy as np

SIMULATED = 400  # samples from which the distance by chance is estimated


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each label; empty without pictures."""
    total = sum(counts.values())
    return {label: count / total for label, count in counts.items()} if total else {}


def total_variation(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Return the total variation distance of two distributions of labels, 0 to 1.

    Half the sum of the differences of shares: the share of pictures that would have to show something else.
    """
    first, second = shares(one), shares(other)
    labels = first.keys() | second.keys()
    return sum(abs(first.get(label, 0.0) - second.get(label, 0.0)) for label in labels) / 2


def by_chance(data: Mapping[str, int], pictures: int, seed: int = 0) -> tuple[float, float]:
    """Return the mean, and the 95 % quantile, of the distance of so many pictures that are like the data.

    The distance of a sample is never below 0, and so has no mean of 0. Both sides are drawn from the data's
    shares, as many as there are of each.
    """
    generator, probabilities = np.random.default_rng(seed), np.array(list(shares(data).values()))
    drawn = generator.multinomial(pictures, probabilities, SIMULATED) / pictures
    total = sum(data.values())
    again = generator.multinomial(total, probabilities, SIMULATED) / total
    found = np.abs(drawn - again).sum(axis=1) / 2
    return float(found.mean()), float(np.quantile(found, 0.95))
