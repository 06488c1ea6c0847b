"""Learning-rate schedules: the factor on the learning rate at each step. Pure functions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up to the full learning rate, then one of several decays.

    Attributes:
        name: `constant` (no warm-up), `constant_with_warmup`, `linear`, `cosine` (half a period; Loshchilov &
            Hutter, arXiv 1608.03983, eq. 5), `cosine_with_restarts` (the same, `cycles` times over),
            `polynomial` ((1 - progress) ** power), or `warmup_stable_decay` (full until the last
            `decay_share` of the steps, then linear; Hu et al., arXiv 2404.06395, section 4.2).
        steps: total number of steps in the schedule.
        end: share of the learning rate at the end of the schedule.
    """

    name: str
    steps: int
    warmup_steps: int = 0
    cycles: int = 1
    power: float = 1.0
    end: float = 0.0
    decay_share: float = 0.2

    def factor(self, step: int) -> float:
        """Return the factor at optimizer step `step`, counted from 0; in (0, 1] while the schedule lasts.

        Raises:
            ValueError: `name` is unknown.
        """
        if self.name == "constant":
            return 1.0
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        return self.end + (1 - self.end) * self._left(progress)

    def _left(self, progress: float) -> float:
        """Return the remaining part of the decay, from 1 to 0, at a share of the steps after the warm-up."""
        match self.name:
            case "constant_with_warmup":
                return 1.0
            case "linear":
                return 1 - progress
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_with_restarts":
                if progress == 1:
                    return 0.0
                return 0.5 * (1 + math.cos(math.pi * (self.cycles * progress % 1)))
            case "polynomial":
                return (1 - progress) ** self.power
            case "warmup_stable_decay":
                return min(1.0, (1 - progress) / self.decay_share)
        raise ValueError(f"schedule: unknown name {self.name!r}")
