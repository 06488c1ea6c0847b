"""What a search will take: mean and interval over many simulated ones."""

import math
import random
from collections.abc import Callable, Sequence
from statistics import mean, quantiles

from benchmarks.simulation.search import Cluster, Plan, Scores, Simulation, Timing


def predicted(
    plan: Plan,
    cluster: Cluster,
    timing: Timing,
    scores: Callable[[random.Random], Scores],
    *,
    replicates: int = 200,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Mean and 90 % interval, by what `Outcome` calls it, over so many searches.

    Args:
        scores: of a replicate.
    """
    outcomes = []
    for number in range(replicates):
        draw = random.Random(f"{seed}/{number}")
        outcomes.append(Simulation(plan, cluster, timing, scores(draw), draw).run())
    return {
        name: spread([getattr(each, name) for each in outcomes])
        for name in vars(outcomes[0])
        if name != "reached"
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, and the 5 % and 95 % quantiles of at least two values."""
    twentieths = quantiles(values, n=20, method="inclusive")
    return {"mean": mean(values), "low": twentieths[0], "high": twentieths[-1]}


def synthetic_scores(trials: int, ladder: Sequence[int], draw: random.Random) -> Scores:
    """FIDs of trials whose levels differ and that fall with the square root of the steps, with an error of
    3: what was measured of the demo is of this kind (docs/search.md)."""
    found = []
    for _ in range(trials):
        level = draw.gauss(0, 5)
        found.append(
            {step: 130 + level + 10 * math.sqrt(ladder[0] / step) + draw.gauss(0, 3) for step in ladder}
        )
    return found
