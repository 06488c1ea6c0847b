"""Which trials a simulated search stops."""

import math
from collections.abc import Sequence

import numpy as np


class Halving:
    """Which trials ASHA stops (arXiv 1810.05934), as Tune's ASHAScheduler decides it."""

    def __init__(self, ladder: Sequence[int], factor: int) -> None:
        self.factor = factor
        count = int(math.log(ladder[-1] / ladder[0]) / math.log(factor) + 1)
        self.rungs: dict[int, dict[int, float]] = {ladder[0] * factor**k: {} for k in reversed(range(count))}

    def stops(self, trial: int, step: int, fid: float) -> bool:
        """Take in a score; whether it is not among the best 1 / factor of those that came before it."""
        for rung, recorded in self.rungs.items():
            if step < rung or trial in recorded:
                continue
            before = list(recorded.values())
            recorded[trial] = fid
            return bool(before) and fid > float(np.percentile(before, 100 / self.factor))
        return False
