"""Agreement of several raters. Pure functions."""

from collections import Counter
from collections.abc import Hashable, Sequence


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Return Krippendorff's alpha of nominal ratings: 1 for perfect agreement, 0 for that of chance.

    alpha = 1 - (n - 1) sum_{c != k} o_ck / sum_{c != k} n_c n_k, with the coincidences o_ck of two ratings of
    a unit, each unit of m ratings weighing 1 / (m - 1) (Krippendorff, "Computing Krippendorff's
    Alpha-Reliability", 2011, section B). A unit with one rating says nothing of agreement.

    Args:
        units: ratings of each unit, by however many raters there were.

    Returns:
        None if no unit has two ratings, or all ratings are the same, so that agreement says nothing.
    """
    paired = [Counter(unit) for unit in units if len(unit) > 1]
    totals: Counter[Hashable] = sum(paired, Counter())
    count = totals.total()
    expected = count**2 - sum(each**2 for each in totals.values())
    if not expected:
        return None
    disagreeing = sum(
        (unit.total() ** 2 - sum(each**2 for each in unit.values())) / (unit.total() - 1) for unit in paired
    )
    return 1 - (count - 1) * disagreeing / expected
